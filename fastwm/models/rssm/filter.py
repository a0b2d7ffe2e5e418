"""`RSSMFilter`: the latents of a real env's present step, and what a policy there has to remember."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec

from fastwm.models.rssm.keys import (
    ACTION,
    BELIEF,
    EMBEDDING,
    IS_INIT,
    LATENTS,
    NEXT_LATENTS,
    PREVIOUS_ACTION,
    STATE,
)
from fastwm.models.rssm.prior import Prior, PriorV3

__all__ = ["Act", "FirstLatents", "RSSMFilter"]


class RSSMFilter(TensorDictModuleBase):
    """The latents of a real env's present step: one step of prior and posterior.

    ``state``, ``belief`` and ``previous_action`` of the step before, the embedding
    (``encoded_latents``) of the present observation and ``is_init``, at which the first three count
    as zero, to the present ``state`` and ``belief``, written over those of before.

    Args:
        prior: its belief is what is needed of it.
        posterior: ``(belief, embedding) -> (..., state)``.
    """

    def __init__(self, prior: Prior | PriorV3, posterior: nn.Module) -> None:
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.in_keys = [*LATENTS, PREVIOUS_ACTION, EMBEDDING, IS_INIT]
        self.out_keys = LATENTS

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        *before, embedding, reset = (tensordict.get(key) for key in self.in_keys)
        reset = reset.reshape(*tensordict.batch_size, 1)
        state, belief, action = (torch.where(reset, 0, value) for value in before)
        state, belief = _filtered(self.prior, self.posterior, state, belief, action, embedding)
        return tensordict.set(STATE, state).set(BELIEF, belief)


class FirstLatents(nn.Module):
    """State and belief of an episode's first observation: the same step from zero.

    ``embedding [*B, E] -> ([*B, S], [*B, H])``.

    Args:
        prior, posterior: see :class:`RSSMFilter`.
        sizes: widths of state, belief and action.
    """

    def __init__(
        self, prior: Prior | PriorV3, posterior: nn.Module, sizes: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.prior, self.posterior, self.sizes = prior, posterior, sizes

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        state, belief, action = (embedding.new_zeros(*embedding.shape[:-1], n) for n in self.sizes)
        return _filtered(self.prior, self.posterior, state, belief, action, embedding)


def _filtered(
    prior: Prior | PriorV3,
    posterior: nn.Module,
    state: Tensor,
    belief: Tensor,
    action: Tensor,
    embedding: Tensor,
) -> tuple[Tensor, Tensor]:
    """State and belief after an action and what was then observed."""
    belief = prior.belief(state, belief, action)
    *_, state = posterior(belief, embedding)
    return state, belief


class Act(TensorDictModuleBase):
    """Brings a real env's action within its bounds; hands it and the latents on to the next step.

    Args:
        spec: of the action.
    """

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_keys = [*LATENTS, ACTION]
        self.out_keys = [ACTION, *NEXT_LATENTS, ("next", PREVIOUS_ACTION)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if isinstance(self.spec, Bounded):
            action = tensordict.get(ACTION)
            space = self.spec.space
            low, high = space.low.to(action.device), space.high.to(action.device)
            tensordict.set(ACTION, action.clamp(low, high))
        for key, following in zip(self.in_keys, self.out_keys[1:], strict=True):
            tensordict.set(following, tensordict.get(key))
        return tensordict
