"""``rssm``: a Gaussian recurrent state-space model, as in PlaNet and Dreamer: belief and state."""

from __future__ import annotations

from collections.abc import Mapping
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
from fastwm.bench.suites.layers import (
    jax_gru,
    jax_mlp,
    jax_softplus_actor,
    softplus_scale,
    tanh_normal,
    tanh_normal_policy,
)
from fastwm.models.layers import Concat, GaussianHead, mlp

__all__ = ["BeliefAndState", "RSSMWorldModel", "suite"]

BELIEF, STATE, HIDDEN, ACTION = 200, 30, 200, 6


class _Prior(nn.Module):
    """One step without an observation: a recurrent belief, and a state drawn from it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(STATE + ACTION, HIDDEN)
        self.rnn = nn.GRUCell(HIDDEN, BELIEF)
        self.to_state = mlp((BELIEF, HIDDEN, 2 * STATE), nn.ELU)

    def forward(self, belief: Tensor, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        belief = self.rnn(functional.elu(self.project(torch.cat((state, action), -1))), belief)
        mean, raw = self.to_state(belief).chunk(2, -1)
        return belief, mean + softplus_scale(raw) * torch.randn_like(mean)


class BeliefAndState(Model):
    """A step of actor, prior and reward head on belief and state."""

    policy: GaussianHead
    dynamics: nn.Module
    reward: Concat

    def step(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        action = tanh_normal(*self.policy(belief, state))
        belief, state = self.dynamics(belief, state, action)
        return action, belief, state, self.reward(belief, state)

    def parts(self) -> Parts:
        carry = ["belief", "state"]
        following = [("next", key) for key in carry]
        return Parts(
            TensorDictModule(self.dynamics, [*carry, "action"], following),
            TensorDictModule(self.reward, following, [("next", "reward")]),
            tanh_normal_policy(self.policy, carry),
        )


class RSSMWorldModel(BeliefAndState):
    """Prior, actor and reward head, all with 200 ELU units."""

    def __init__(self) -> None:
        super().__init__()
        wide = (BELIEF + STATE, HIDDEN, HIDDEN)
        self.policy = GaussianHead(mlp((*wide, 2 * ACTION), nn.ELU), softplus_scale)
        self.dynamics = _Prior()
        self.reward = Concat(mlp((*wide, 1), nn.ELU))


def _draws(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, ACTION), torch.randn(batch, STATE)


def _jax_draws(key: Any, batch: int) -> tuple[Any, ...]:
    import jax

    one, two = jax.random.split(key)
    return jax.random.normal(one, (batch, ACTION)), jax.random.normal(two, (batch, STATE))


def _jax_step(
    weights: Mapping[str, Any], carry: tuple[Any, ...], noise: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`RSSMWorldModel.step` in JAX."""
    import jax
    import jax.numpy as jnp

    (belief, state), (of_action, of_state) = carry, noise

    def net(name: str, x: Any, layers: int) -> Any:
        return jax_mlp(weights, name, x, layers, jax.nn.elu)

    both = jnp.concatenate((belief, state), -1)
    action = jax_softplus_actor(net("policy.net", both, 3), of_action)
    x = jnp.concatenate((state, action), -1)
    x = jax.nn.elu(x @ weights["dynamics.project.weight"] + weights["dynamics.project.bias"])
    belief = jax_gru(weights, "dynamics.rnn", x, belief)
    mean, raw = jnp.split(net("dynamics.to_state", belief, 2), 2, -1)
    state = mean + (jax.nn.softplus(raw) + 0.1) * of_state
    reward = net("reward.net", jnp.concatenate((belief, state), -1), 3)
    return action, belief, state, reward


def suite() -> Suite:
    carry, model = {"belief": BELIEF, "state": STATE}, RSSMWorldModel()
    return Suite(
        name="rssm",
        make=RSSMWorldModel,
        jax_step=_jax_step,
        carry=carry,
        action=ACTION,
        macs=linear_macs(model),
        activations=activations_of(model, carry),
        start=normal_start(carry),
        draws=_draws,
        jax_draws=_jax_draws,
    )
