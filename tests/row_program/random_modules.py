"""Random torch modules as world models: fused against eager, values and gradients."""

from __future__ import annotations

import random

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded

import fastwm
from tests.compare import assert_close, assert_same, gradients, run
from tests.models import ACTION, OBS, linear_policy, module, spec_env

__all__ = ["check_module"]

_ACTIVATIONS = (
    nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, lambda: nn.GELU("tanh"), nn.Mish, nn.Softplus,
    nn.LeakyReLU, lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(-1), nn.Identity, nn.LogSigmoid, nn.Hardtanh,
    nn.SELU, nn.CELU, nn.ReLU6, nn.Softsign,
)  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.inner(x)


class _Gated(nn.Module):
    """Halves of a wider product: one gates the other."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.linear(x).chunk(2, -1)
        return gate.sigmoid() * value


class _Both(nn.Module):
    """Two ways, side by side."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], -1)


class _Groups(nn.Module):
    """Softmax within groups of features (SimNorm)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).softmax(-1).flatten(-2)


class _Standard(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.square().sum(-1, keepdim=True) + 1.0).sqrt()


def _stack(rng: random.Random, width: int, out: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        kind = rng.randrange(8)
        new = rng.choice([1, 3, 8, 16, 33])
        if kind <= 2:
            layers += [nn.Linear(width, new, bias=rng.random() < 0.8), rng.choice(_ACTIVATIONS)()]
            width = new
        elif kind == 3:
            layers.append(nn.LayerNorm(width, eps=1e-3) if width > 1 else nn.Tanh())
        elif kind == 4:
            layers.append(_Residual(_stack(rng, width, width, 1)))
        elif kind == 5:
            layers.append(_Gated(width, new))
            width = new
        elif kind == 6:
            layers.append(_Both(nn.Linear(width, new), _stack(rng, width, 2, 1)))
            width = new + 2
        else:
            layers.append(_Groups(4) if width % 4 == 0 else _Standard())
    return nn.Sequential(*layers, nn.Linear(width, out))


class _Step(nn.Module):
    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        self.net = _stack(rng, width + ACTION, width, rng.randint(1, 5))
        self.stay = rng.random() < 0.5

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        new = self.net(torch.cat([latent, action], -1))
        return torch.tanh(0.5 * latent + new) if self.stay else new.tanh()


def check_module(seed: int) -> None:
    """Raises where fused differs from eager, or does not run."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, steps, width = (
        rng.choice([1, 3, 17, 40]),
        rng.choice([1, 2, 5]),
        rng.choice([1, 4, 10, 32]),
    )
    step = _Step(rng, width)
    head = _stack(rng, width, 1, rng.randint(0, 2))
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, width), ["observation"], ["latent"]),
        TensorDictModule(step, ["latent", "action"], [("next", "latent")]),
        module(head, [("next", "latent")], [("next", "reward")]),
    )
    spec = Composite({"latent": Unbounded((rows, width))}, shape=[rows])
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[rows], observation_spec=spec)
    start = TensorDict({"latent": torch.randn(rows, width)}, [rows])
    policy = _policy(width)
    wrt = [*step.parameters(), *head.parameters(), *policy.parameters()]
    try:
        with torch.no_grad():
            want, _ = run("eager", env, steps, policy, start)
            got, _ = run("fused", env, steps, policy, start)
        assert_same(got, want)
        expected = gradients(run("eager", env, steps, policy, start)[0], wrt)
        found = gradients(run("fused", env, steps, policy, start)[0], wrt)
        for i, (g, w) in enumerate(zip(found, expected, strict=True)):
            if g is None or w is None:
                assert not any(t is not None and t.any() for t in (g, w)), f"gradient {i}"
            else:
                assert_close(g, w, "rollout.gradient", f"gradient {i} of shape {tuple(w.shape)}")
    except Exception as error:
        raise AssertionError(f"{error}\nrows {rows}, steps {steps}\n{step}\n{head}") from error


def _policy(width: int) -> nn.Module:
    return module(nn.Linear(width, ACTION), ["latent"], ["action"]) if width else linear_policy()
