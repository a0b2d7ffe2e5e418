"""Heads on state and belief: continuation, two-hot scalars, policies."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, OneHot, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import (
    DreamerV3MLP,
    IndependentNormal,
    OneHotCategorical,
    SymExpTwoHot,
    TanhNormal,
)

from fastwm.models.rssm.keys import ACTION, LATENTS, NEXT_LATENTS

__all__ = [
    "NormalActor",
    "Terminates",
    "action_of",
    "continuation_head",
    "normal_actor",
    "one_hot_actor",
    "tanh_normal_actor",
    "two_hot_head",
]


class Terminates(nn.Module):
    """The logit of going on to the flag of ending: ``[*B, 1] -> bool [*B, 1]``."""

    def forward(self, logit: Tensor) -> Tensor:
        return logit < 0


def continuation_head(net: nn.Module) -> TensorDictSequential:
    """A continuation from a network ``(state, belief) -> logit [*B, 1]``."""
    return TensorDictSequential(
        TensorDictModule(net, NEXT_LATENTS, [("next", "continue_pred")]),
        TensorDictModule(Terminates(), [("next", "continue_pred")], [("next", "terminated")]),
    )


def two_hot_head(
    net: nn.Module, in_keys: list[Any], logits: NestedKey, scalar: NestedKey, bins: int
) -> TensorDictSequential:
    """A scalar from a network ``(state, belief) -> logits [*B, bins]``; both are written."""
    return TensorDictSequential(
        TensorDictModule(net, in_keys, [logits]),
        TensorDictModule(SymExpTwoHot(bins), [logits], [scalar]),
    )


def action_of(base_env: EnvBase) -> TensorSpec:
    """The action's spec: bounded or one-hot.

    Raises:
        ValueError: it is neither.
    """
    spec = base_env.full_action_spec_unbatched[ACTION]
    if not isinstance(spec, (Bounded, OneHot)):
        raise ValueError(
            f"The action must be bounded or one-hot, its spec is a {type(spec).__name__}."
        )
    return spec


def tanh_normal_actor(spec: TensorSpec, net: nn.Module) -> ProbabilisticTensorDictSequential:
    """A policy from ``(state, belief) -> (loc, scale)``: a Gaussian squashed to the action's bounds, its
    mean kept within 5 either way before that (as in Dreamer's code).

    Raises:
        ValueError: the action is not bounded.
    """
    if not isinstance(spec, Bounded):
        raise ValueError(f"The action must be bounded, its spec is a {type(spec).__name__}.")
    kwargs = {"tanh_loc": True, "low": spec.space.low, "high": spec.space.high}
    return _actor(net, ["loc", "scale"], TanhNormal, kwargs)


def normal_actor(spec: TensorSpec, net: nn.Module) -> ProbabilisticTensorDictSequential:
    """A policy from ``(state, belief) -> (loc, scale)``: a Gaussian, to be clipped by who acts with it.

    Raises:
        ValueError: the action's bounds are not -1 and 1.
    """
    space = spec.space
    if not ((space.low == -1).all() and (space.high == 1).all()):
        raise ValueError(
            "DreamerV3's actions are in [-1, 1], the env's are between "
            f"{space.low.tolist()} and {space.high.tolist()}: append "
            "torchrl.envs.transforms.ActionScaling() to it."
        )
    return _actor(net, ["loc", "scale"], IndependentNormal, {})


def one_hot_actor(net: nn.Module) -> ProbabilisticTensorDictSequential:
    """A policy from ``(state, belief) -> logits``: a categorical of one-hot actions."""
    return _actor(net, ["logits"], OneHotCategorical, {})


def _actor(
    net: nn.Module, parameters: list[str], distribution: type, kwargs: dict[str, Any]
) -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, LATENTS, parameters),
        ProbabilisticTensorDictModule(
            parameters,
            [ACTION],
            default_interaction_type=InteractionType.RANDOM,
            distribution_class=distribution,
            distribution_kwargs=kwargs,
        ),
    )


class NormalActor(nn.Module):
    """``(state, belief) -> (loc, scale)`` of DreamerV3: a mean in [-1, 1], a deviation in [0.1, 1].

    Args:
        net: to twice the action's width.

    Source: ``bounded_normal`` of the official repository (``embodied/jax/heads.py``), with ``minstd`` and
    ``maxstd`` of its ``configs.yaml``.
    """

    def __init__(self, net: DreamerV3MLP, min_std: float = 0.1, max_std: float = 1.0) -> None:
        super().__init__()
        self.net, self.min_std, self.max_std = net, min_std, max_std

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.net(state, belief).chunk(2, -1)
        scale = (self.max_std - self.min_std) * torch.sigmoid(scale + 2) + self.min_std
        return torch.tanh(loc), scale
