"""``tdmpc2``: a latent of 512 in simplices of 8, LayerNorm and Mish, a two-hot reward, as TD-MPC2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from fastwm.bench.suites.base import Model, Parts, Suite, activations_of, linear_macs
from fastwm.bench.suites.layers import BINS, jax_mlp, jax_two_hot
from fastwm.models.layers import Concat, SimNorm, TwoHot, mlp

__all__ = ["TDMPC2WorldModel", "suite"]

LATENT, HIDDEN, ACTION, GROUP = 512, 512, 6, 8
LOG_STD_LOW, LOG_STD_HIGH = -10.0, 2.0


class _Prior(nn.Module):
    """The policy prior: draws an action."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent: Tensor) -> Tensor:
        mean, raw = self.net(latent).chunk(2, -1)
        log_std = LOG_STD_LOW + 0.5 * (LOG_STD_HIGH - LOG_STD_LOW) * (torch.tanh(raw) + 1)
        return torch.tanh(mean + torch.randn_like(mean) * log_std.exp())


class TDMPC2WorldModel(Model):
    """Dynamics, reward (of the state left behind and the action) and policy prior."""

    def __init__(self) -> None:
        super().__init__()

        def net(inputs: int, outputs: int, last: float = 1.0) -> nn.Sequential:
            return mlp((inputs, HIDDEN, HIDDEN, outputs), nn.Mish, norm=nn.LayerNorm, last=last)

        self.policy = _Prior(net(LATENT, 2 * ACTION, 0.1))
        self.dynamics = Concat(net(LATENT + ACTION, LATENT), SimNorm(GROUP))
        self.reward = Concat(net(LATENT + ACTION, BINS, 0.1), TwoHot())

    def step(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action = self.policy(latent)
        return action, self.dynamics(latent, action), self.reward(latent, action)

    def parts(self) -> Parts:
        return Parts(
            TensorDictModule(self.dynamics, ["latent", "action"], [("next", "latent")]),
            TensorDictModule(self.reward, ["latent", "action"], [("next", "reward")]),
            TensorDictModule(self.policy, ["latent"], ["action"]),
        )


def _draws(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, ACTION),)


def _jax_draws(key: Any, batch: int) -> tuple[Any, ...]:
    import jax

    return (jax.random.normal(key, (batch, ACTION)),)


def _jax_step(
    weights: Mapping[str, Any], carry: tuple[Any, ...], noise: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`TDMPC2WorldModel.step` in JAX."""
    import jax
    import jax.numpy as jnp

    (latent,), (drawn,) = carry, noise

    def net(name: str, x: Any) -> Any:
        return jax_mlp(weights, f"{name}.net", x, 3, jax.nn.mish, norm=True)

    mean, raw = jnp.split(net("policy", latent), 2, -1)
    log_std = LOG_STD_LOW + 0.5 * (LOG_STD_HIGH - LOG_STD_LOW) * (jnp.tanh(raw) + 1)
    action = jnp.tanh(mean + drawn * jnp.exp(log_std))
    both = jnp.concatenate((latent, action), -1)
    logits = net("dynamics", both)
    groups = logits.reshape(*logits.shape[:-1], -1, GROUP)
    following = jax.nn.softmax(groups, -1).reshape(logits.shape)
    return action, following, jax_two_hot(net("reward", both))


def _start(model: Model, batch: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"latent": SimNorm(GROUP)(torch.randn((batch, LATENT), generator=generator))}


def suite() -> Suite:
    carry, model = {"latent": LATENT}, TDMPC2WorldModel()
    return Suite(
        name="tdmpc2",
        make=TDMPC2WorldModel,
        jax_step=_jax_step,
        carry=carry,
        action=ACTION,
        macs=linear_macs(model),
        activations=activations_of(model, carry),
        start=_start,
        draws=_draws,
        jax_draws=_jax_draws,
    )
