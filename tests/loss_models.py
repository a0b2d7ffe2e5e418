"""World models, batches and settings that the tests of `WorldModelLoss` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from fastwm.world_model import WorldModel

OBS, LATENT, ACTION = 6, 4, 2
NEXT_LATENT, NEXT_REWARD = ("next", "latent"), ("next", "reward")


class Concat(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out)

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat(parts, -1)))


class Flag(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.fn = nn.Linear(LATENT, 1), fn

    def forward(self, latent: Tensor) -> Tensor:
        return self.fn(self.head(latent))


def make_model(
    done: str | None = None,
    *,
    decoder: str | None = None,
    flag: Callable[[Tensor], Tensor] = torch.sigmoid,
    cls: type = WorldModel,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
) -> nn.Module:
    """A model whose done head, if any, emits ``("next", done)`` through ``flag``."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "encoder": Mod(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        "dynamics": Mod(Concat(LATENT + ACTION, LATENT), ["latent", "action"], [NEXT_LATENT]),
        "reward_head": Mod(nn.Linear(LATENT, 1), [NEXT_LATENT], [NEXT_REWARD]),
        "done_head": None if done is None else Mod(Flag(flag), [NEXT_LATENT], [("next", done)]),
        "decoder": None if decoder is None else Mod(nn.Linear(LATENT, OBS), ["latent"], [decoder]),
    }
    return cls(**{**parts, **(extra or {})})


def make_batch(*batch_size: int, seed: int = 1) -> TensorDict:
    torch.manual_seed(seed)
    size = batch_size or (5,)
    terminated = torch.rand(*size, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            "action": torch.randn(*size, ACTION),
            "next": {
                "reward": torch.randn(*size, 1),
                "done": terminated | (torch.rand(*size, 1) < 0.3),
                "terminated": terminated,
                "observation": torch.randn(*size, OBS),
            },
        },
        size,
    )


class Latents(TensorDictModuleBase):
    """Predicts a latent of two parts, as a nested tensordict, and encodes its target."""

    in_keys = ("observation", "action")
    out_keys = (NEXT_REWARD, ("predicted_latent", "a"), ("predicted_latent", "b"), "target_latent")

    def __init__(self, b: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.target_b = nn.Linear(OBS, 2), nn.Linear(OBS, 3), nn.Linear(OBS, b)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        obs = td["observation"]
        td["predicted_latent"] = TensorDict({"a": self.a(obs), "b": self.b(obs)}, td.batch_size)
        td["target_latent"] = TensorDict(
            {"a": self.a(obs.flip(-1)), "b": self.target_b(obs)}, td.batch_size
        )
        td[NEXT_REWARD] = self.a(obs)[..., :1]
        return td


# ---------------------------------------------------------------- cases

ALL = ["reward", "done", "reconstruction", "latent"]
RECON = "reconstructed_observation"


def case_plain() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    return make_model(), make_batch(), {}


def case_all() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    batch = make_batch(7)
    batch["target_latent"] = torch.randn(7, LATENT)
    keys = {"predicted_latent": NEXT_LATENT}
    return make_model("done", decoder=RECON), batch, {"losses": ALL, "keys": keys}


def case_time() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    model, _, kwargs = case_all()
    batch = make_batch(3, 4)
    batch["target_latent"] = torch.randn(3, 4, LATENT)
    return model, batch, kwargs


def case_weights() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    model, batch, kwargs = case_all()
    weights = {f"{name}_weight": 0.5 + i for i, name in enumerate(ALL)}
    return model, batch, {**kwargs, **weights}


def case_order() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    model, batch, kwargs = case_all()
    return model, batch, {**kwargs, "losses": ALL[::-1]}


def case_bool_head() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    return make_model("done", flag=lambda x: x > 0), make_batch(), {"losses": ["done"]}


def case_both_flags() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    heads = Mod(nn.Linear(LATENT, 2), [NEXT_LATENT], ["flags"])
    split = Mod(
        lambda x: (x[..., :1], x[..., 1:]), ["flags"], [("next", "done"), ("next", "terminated")]
    )
    model = make_model(extra={"decoder": split, "done_head": heads})
    return model, make_batch(), {"losses": ["done"]}


def case_nested_keys() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    head = Mod(nn.Linear(LATENT, 1), [NEXT_LATENT], [("next", "agents", "gain")])
    batch = make_batch()
    batch["next", "agents", "gain"] = torch.randn(5, 1)
    keys = {"reward": ("agents", "gain"), "true_reward": ("agents", "true_gain")}
    return make_model(extra={"reward_head": head}), batch, {"keys": keys}


def case_latent_of_parts() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    torch.manual_seed(3)
    return Latents(), make_batch(), {"losses": ["latent", "reward"], "latent_weight": 3.0}


def case_empty_batch() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    return make_model(), make_batch()[:0], {}


def case_no_losses() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    return make_model(), make_batch(), {"losses": []}


def case_lazy_stack() -> tuple[nn.Module, TensorDictBase, dict[str, Any]]:
    batch = LazyStackedTensorDict.lazy_stack([make_batch(seed=1), make_batch(seed=2)], 1)
    return make_model("done"), batch, {"losses": ["reward", "done"]}


def case_float64() -> tuple[nn.Module, TensorDict, dict[str, Any]]:
    model, batch, kwargs = case_all()
    to64 = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    return model.double(), batch.apply(to64), kwargs


CASES = {name[5:]: make for name, make in globals().items() if name.startswith("case_")}


def build(cls: type, model: nn.Module, kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    keys = kwargs.pop("keys", {})
    loss = cls(model, **kwargs)
    loss.set_keys(**keys)
    return loss
