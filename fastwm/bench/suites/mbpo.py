"""``mbpo``: an ensemble of seven probabilistic networks on observations, as in PETS and MBPO.

Each row of each step is sent on by a member drawn at random, and its change and reward are drawn
from the Gaussian that this member gives. As they are written, all implementations compute all
members and then pick, seven times the products that the result needs; the floor counts the needed
ones, which are all that the fused engine computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional

from fastwm.bench.suites.base import (
    Model,
    Parts,
    Suite,
    activations_of,
    linear_macs,
    normal_start,
)
from fastwm.bench.suites.layers import jax_mlp, tanh_normal, tanh_normal_policy
from fastwm.models.layers import GaussianHead, mlp

__all__ = ["EnsembleWorldModel", "suite"]

MEMBERS, OBS, ACTION, HIDDEN, DEPTH = 7, 17, 6, 200, 4
TARGETS = OBS + 1
WIDTHS = (OBS + ACTION, *(HIDDEN,) * DEPTH, 2 * TARGETS)


class _EnsembleLinear(nn.Module):
    """One linear layer per member: ``[B, I]`` or ``[M, B, I]`` to ``[M, B, O]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(MEMBERS, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(MEMBERS, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(MEMBERS, *x.shape[-2:]), self.weight)


class _Ensemble(nn.Module):
    """Observation and action to the next observation and the reward, both drawn."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS):
            layers += [_EnsembleLinear(inputs, outputs), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.max_logvar = nn.Parameter(torch.full((TARGETS,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((TARGETS,), -10.0))
        with torch.no_grad():
            # Noise of a trained model's size.
            layers[-2].bias[..., TARGETS:] -= 4.0  # type: ignore[index,operator]

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        of_all = self.net(torch.cat((obs, action), -1))
        member = torch.randint(MEMBERS, obs.shape[:1], device=obs.device)
        chosen = of_all.gather(0, member.view(1, -1, 1).expand(1, -1, 2 * TARGETS)).squeeze(0)
        mean, logvar = chosen.chunk(2, -1)
        logvar = self.max_logvar - functional.softplus(self.max_logvar - logvar)
        logvar = self.min_logvar + functional.softplus(logvar - self.min_logvar)
        drawn = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        delta, reward = drawn.split((OBS, 1), -1)
        return obs + delta, reward


def _scale(log_std: Tensor) -> Tensor:
    return log_std.clamp(-20.0, 2.0).exp()


class EnsembleWorldModel(Model):
    """Seven members of four hidden layers of 200 SiLU units; a tanh-Gaussian policy of 2 x 256."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = GaussianHead(mlp((OBS, 256, 256, 2 * ACTION), nn.SiLU), _scale)
        self.dynamics = _Ensemble()

    def step(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action = tanh_normal(*self.policy(obs))
        following, reward = self.dynamics(obs, action)
        return action, following, reward

    def parts(self) -> Parts:
        return Parts(
            TensorDictModule(self.dynamics, ["obs", "action"], [("next", "obs"), "predicted"]),
            # The dynamics predict the reward along with the rest.
            TensorDictModule(nn.Identity(), ["predicted"], [("next", "reward")]),
            tanh_normal_policy(self.policy, ["obs"]),
        )


def _draws(batch: int) -> tuple[Tensor, ...]:
    action = torch.randn(batch, ACTION)
    member = torch.randint(MEMBERS, (batch,))
    return action, member, torch.randn(batch, TARGETS)


def _jax_draws(key: Any, batch: int) -> tuple[Any, ...]:
    import jax

    one, two, three = jax.random.split(key, 3)
    return (
        jax.random.normal(one, (batch, ACTION)),
        jax.random.randint(two, (batch,), 0, MEMBERS),
        jax.random.normal(three, (batch, TARGETS)),
    )


def _jax_step(
    weights: Mapping[str, Any], carry: tuple[Any, ...], noise: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`EnsembleWorldModel.step` in JAX."""
    import jax
    import jax.numpy as jnp

    (obs,), (of_action, member, of_target) = carry, noise
    loc, log_std = jnp.split(jax_mlp(weights, "policy.net", obs, 3, jax.nn.silu), 2, -1)
    action = jnp.tanh(loc + jnp.exp(jnp.clip(log_std, -20.0, 2.0)) * of_action)
    x = jnp.concatenate((obs, action), -1)
    x = jnp.broadcast_to(x, (MEMBERS, *x.shape))
    for i in range(DEPTH + 1):
        name = f"dynamics.net.{2 * i}"
        x = jnp.matmul(x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]
        x = jax.nn.silu(x) if i < DEPTH else x
    chosen = jnp.take_along_axis(x, member[None, :, None], 0)[0]
    mean, logvar = jnp.split(chosen, 2, -1)
    high, low = weights["dynamics.max_logvar"], weights["dynamics.min_logvar"]
    logvar = high - jax.nn.softplus(high - logvar)
    logvar = low + jax.nn.softplus(logvar - low)
    drawn = mean + jnp.exp(0.5 * logvar) * of_target
    return action, obs + drawn[:, :OBS], drawn[:, OBS:]


def suite() -> Suite:
    carry, model = {"obs": OBS}, EnsembleWorldModel()
    of_policy = linear_macs(model)
    of_member = sum(i * o for i, o in pairwise(WIDTHS))
    of_members = sum(p.numel() for p in model.dynamics.net.parameters())
    others = sum(p.numel() for p in model.parameters()) - of_members
    return Suite(
        name="mbpo",
        make=EnsembleWorldModel,
        jax_step=_jax_step,
        carry=carry,
        action=ACTION,
        macs=of_policy + of_member,
        macs_done=of_policy + MEMBERS * of_member,
        activations=activations_of(model, carry),
        start=normal_start(carry),
        draws=_draws,
        jax_draws=_jax_draws,
        # Members that no row of the batch drew are not read.
        weights_read=lambda batch: others + of_members * (1 - (1 - 1 / MEMBERS) ** batch),
    )
