"""Running a `WorldModelLoss` on several engines, and holding what they give against each other."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule as Mod
from torch import Tensor, nn

from fastwm.backends import backend
from fastwm.loss import WorldModelLoss
from fastwm.tolerances import tolerance
from tests.loss_models import ALL, LATENT, NEXT_LATENT, OBS, RECON, make_batch, make_model

__all__ = [
    "LOGITS",
    "Dropped",
    "Gained",
    "assert_parity",
    "assert_same",
    "differs",
    "full_batch",
    "full_loss",
    "gained",
    "run",
    "why_not_captured",
]

LOGITS = "binary_cross_entropy_with_logits"


def full_batch(*size: int, seed: int = 1) -> TensorDict:
    batch = make_batch(*size, seed=seed)
    batch["target_latent"] = torch.randn(*batch.batch_size, LATENT)
    return batch


def full_loss(model: nn.Module | None = None, **kwargs: Any) -> WorldModelLoss:
    model = make_model("done", decoder=RECON) if model is None else model
    loss = WorldModelLoss(model, **{"losses": ALL, **kwargs})
    loss.set_keys(predicted_latent=NEXT_LATENT)
    return loss


def run(
    loss: WorldModelLoss, batch: TensorDictBase, engine: str, wrt: Any = None, seed: int = 0
) -> tuple[dict[Any, Tensor], list[Tensor | None]]:
    """Losses, and the gradients of a weighting of them."""
    torch.manual_seed(seed)
    with backend(engine):
        out = loss(batch)
    values = dict(out.items(True, True))
    wrt = [*loss.parameters()] if wrt is None else wrt
    wrt = [p for p in wrt if p.requires_grad]
    total = sum((i + 1.0) * v.sum() for i, v in enumerate(values.values()) if v.requires_grad)
    grads: list[Tensor | None] = []
    if isinstance(total, Tensor) and wrt:
        grads = list(torch.autograd.grad(total, wrt, allow_unused=True))
    return {k: v.detach() for k, v in values.items()}, grads


def assert_same(got: Any, want: Any) -> None:
    for what, a, b in zip(("loss", "loss.gradient"), got, want, strict=True):
        bound = tolerance(what, torch.float32).kwargs()
        if isinstance(b, dict):
            assert list(a) == list(b)
            torch.testing.assert_close(a, b, equal_nan=True, **bound)
            continue
        assert [x is None for x in a] == [x is None for x in b]
        found = [[x for x in xs if x is not None] for xs in (a, b)]
        torch.testing.assert_close(*found, equal_nan=True, **bound)


def assert_parity(loss: WorldModelLoss, batch: TensorDictBase, wrt: Any = None) -> None:
    assert_same(run(loss, batch, "captured", wrt), run(loss, batch, "eager", wrt))


class Gained(nn.Module):
    """A linear encoder times a gain; the subclasses say where that comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(OBS, LATENT)

    def forward(self, observation: Tensor) -> Tensor:
        return self.linear(observation) * self.gain()

    def gain(self) -> Any:
        return 1.0


def gained(net: nn.Module | None = None, cls: type = WorldModelLoss) -> tuple[Any, Any]:
    net = Gained() if net is None else net
    extra = {"encoder": Mod(net, ["observation"], ["latent"])}
    loss = cls(make_model("done", decoder=RECON, extra=extra), losses=ALL)
    loss.set_keys(predicted_latent=NEXT_LATENT)
    return loss, net


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(OBS, LATENT), nn.Dropout(0.5))

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)


def differs(a: Any, b: Any) -> bool:
    if list(a[0]) != list(b[0]):
        return True
    grads = [x is None for x in a[1]] != [x is None for x in b[1]]
    return grads or any(not torch.equal(x, b[0][k]) for k, x in a[0].items())


def why_not_captured(loss: WorldModelLoss, batch: TensorDictBase) -> str:
    """Why the captured engine passes the call on; "" when it takes it."""
    with backend("auto"):
        return loss.explain(batch).passed_over.get("captured", "")
