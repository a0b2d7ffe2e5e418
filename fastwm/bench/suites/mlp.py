"""``mlp``: policy, dynamics and reward head are MLPs of two hidden SiLU layers; nothing is random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from fastwm.bench.suites.base import Model, Parts, Suite, linear_macs, normal_start
from fastwm.bench.suites.layers import jax_mlp
from fastwm.models.layers import Concat, mlp

__all__ = ["MLPWorldModel", "suite"]

LATENT, HIDDEN, ACTION = 64, 256, 6


class MLPWorldModel(Model):
    """Policy, dynamics and reward head as MLPs of two hidden SiLU layers each.

    Example:
        >>> import torch
        >>> from fastwm.bench.suites.mlp import MLPWorldModel
        >>> action, following, reward = MLPWorldModel().step(torch.zeros(3, 64))
        >>> action.shape, following.shape, reward.shape
        (torch.Size([3, 6]), torch.Size([3, 64]), torch.Size([3, 1]))
    """

    def __init__(self, latent: int = LATENT, hidden: int = HIDDEN, action: int = ACTION) -> None:
        super().__init__()
        self.policy = mlp((latent, hidden, hidden, action), nn.SiLU)
        self.dynamics = Concat(mlp((latent + action, hidden, hidden, latent), nn.SiLU))
        self.reward = mlp((latent, hidden, hidden, 1), nn.SiLU)

    def step(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent ``[B, Z]`` to action ``[B, A]``, next latent ``[B, Z]`` and reward ``[B, 1]``."""
        action = self.policy(latent)
        following = self.dynamics(latent, action)
        return action, following, self.reward(following)

    def parts(self) -> Parts:
        return Parts(
            TensorDictModule(self.dynamics, ["latent", "action"], [("next", "latent")]),
            TensorDictModule(self.reward, [("next", "latent")], [("next", "reward")]),
            TensorDictModule(self.policy, ["latent"], ["action"]),
        )


def _jax_step(
    weights: Mapping[str, Any], carry: tuple[Any, ...], noise: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`MLPWorldModel.step` in JAX."""
    import jax
    import jax.numpy as jnp

    (latent,) = carry
    action = jax_mlp(weights, "policy", latent, 3, jax.nn.silu)
    both = jnp.concatenate((latent, action), -1)
    following = jax_mlp(weights, "dynamics.net", both, 3, jax.nn.silu)
    return action, following, jax_mlp(weights, "reward", following, 3, jax.nn.silu)


def suite() -> Suite:
    carry = {"latent": LATENT}
    return Suite(
        name="mlp",
        make=MLPWorldModel,
        jax_step=_jax_step,
        carry=carry,
        action=ACTION,
        macs=linear_macs(MLPWorldModel()),
        # Four hidden-wide tensors per MLP (before and after each SiLU), its output, one
        # concatenation.
        activations=3 * 4 * HIDDEN + ACTION + LATENT + 1 + (LATENT + ACTION),
        start=normal_start(carry),
    )
