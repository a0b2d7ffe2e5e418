"""The models that are timed. A suite is one model: its modules, its arithmetic and its JAX twin.

Every provider runs the same suite with the same weights, so a suite knows no provider and a
provider knows no suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["OUTPUTS", "SUITES", "MLPWorldModel", "Model", "Suite", "suite"]

#: What every provider returns, stacked over time: the state a step starts from, what was done
#: there, and what came of it.
OUTPUTS = ("latent", "action", "next_latent", "reward")


class Model(Protocol):
    """What a provider needs of a model: three parts, and the plain step made of them."""

    policy: nn.Module
    dynamics: nn.Module
    reward: nn.Module

    def step(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs),
    )


class _LatentAndAction(nn.Module):
    """The dynamics: concatenate, then an MLP."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((latent, action), -1))


class MLPWorldModel(nn.Module):
    """Policy, dynamics and reward head as MLPs of two hidden SiLU layers each.

    Example:
        >>> import torch
        >>> from fastwm.bench.models import MLPWorldModel
        >>> action, following, reward = MLPWorldModel().step(torch.zeros(3, 64))
        >>> action.shape, following.shape, reward.shape
        (torch.Size([3, 6]), torch.Size([3, 64]), torch.Size([3, 1]))
    """

    def __init__(self, latent: int = 64, hidden: int = 256, action: int = 6) -> None:
        super().__init__()
        self.policy = _mlp(latent, hidden, action)
        self.dynamics = _LatentAndAction(_mlp(latent + action, hidden, latent))
        self.reward = _mlp(latent, hidden, 1)

    def step(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent ``[B, Z]`` to action ``[B, A]``, next latent ``[B, Z]`` and reward ``[B, 1]``."""
        action = self.policy(latent)
        following = self.dynamics(latent, action)
        return action, following, self.reward(following)


def _jax_mlp_step(weights: Mapping[str, Any], latent: Any) -> tuple[Any, Any, Any]:
    """`MLPWorldModel.step` in JAX. ``weights``: names of the state_dict, matrices transposed."""
    import jax
    import jax.numpy as jnp

    def mlp(prefix: str, x: Any) -> Any:
        for layer in (0, 2, 4):
            x = x @ weights[f"{prefix}.{layer}.weight"] + weights[f"{prefix}.{layer}.bias"]
            x = jax.nn.silu(x) if layer < 4 else x
        return x

    action = mlp("policy", latent)
    following = mlp("dynamics.net", jnp.concatenate((latent, action), -1))
    return action, following, mlp("reward", following)


@dataclass(frozen=True)
class Suite:
    """A model, what it computes, and its sizes.

    Args:
        make: builds the torch module from the default generator.
        jax_step: the same step over a dict of arrays, or None where there is no JAX twin.
        latent, action: widths.
        macs: multiply-adds of the matrix products, per row and step.
        activations: floats that one step writes per row when it keeps every intermediate.
    """

    name: str
    make: Callable[[], MLPWorldModel]
    jax_step: Callable[[Mapping[str, Any], Any], tuple[Any, Any, Any]] | None
    latent: int
    action: int
    macs: int
    activations: int

    def model(self, device: str = "cpu", seed: int = 0) -> MLPWorldModel:
        """The module with seeded weights; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(device)

    def flop(self, batch: int, horizon: int, backward: bool) -> int:
        """Floating-point operations of the matrix products of one rollout.

        The backward pass has two products of the same size per product of the forward pass (towards
        the input and towards the weights), so forward and backward together are three times the
        forward.
        """
        return 2 * self.macs * batch * horizon * (3 if backward else 1)

    def output_bytes(self, batch: int, horizon: int) -> int:
        """Size of the four stacked outputs in float32."""
        return 4 * batch * horizon * (2 * self.latent + self.action + 1)


def _macs(model: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def _mlp_suite() -> Suite:
    latent, hidden, action = 64, 256, 6
    return Suite(
        name="mlp",
        make=MLPWorldModel,
        jax_step=_jax_mlp_step,
        latent=latent,
        action=action,
        macs=_macs(MLPWorldModel(latent, hidden, action)),
        # Four hidden-wide tensors per MLP (before and after each SiLU), its output, one
        # concatenation.
        activations=3 * 4 * hidden + action + latent + 1 + (latent + action),
    )


SUITES: dict[str, Callable[[], Suite]] = {"mlp": _mlp_suite}


def suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> from fastwm.bench.models import suite
        >>> suite("mlp").flop(batch=1, horizon=1, backward=False)
        530944
    """
    if name not in SUITES:
        raise ValueError(f"Unknown suite {name!r}; choose one of {', '.join(SUITES)}.")
    return SUITES[name]()
