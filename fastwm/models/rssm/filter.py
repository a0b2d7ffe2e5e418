"""`RSSMFilter`: the latents of a real env's present step, and what a policy there has to remember."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

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

__all__ = ["FirstLatents", "RSSMFilter", "Remember"]


class RSSMFilter(TensorDictModuleBase):
    """The latents of a real env's present step: one step of prior and posterior.

    ``state``, ``belief`` and ``previous_action`` of the step before, the embedding
    (``encoded_latents``) of the present observation and ``is_init``, at which the first three count
    as zero, to the present ``state`` and ``belief``, written over those of before.

    Args:
        prior: ``(state, belief, action) -> (..., state, belief)``.
        posterior: ``(belief, embedding) -> (..., state)``.
    """

    def __init__(self, prior: nn.Module, posterior: nn.Module) -> None:
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

    def __init__(self, prior: nn.Module, posterior: nn.Module, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.prior, self.posterior, self.sizes = prior, posterior, sizes

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        state, belief, action = (embedding.new_zeros(*embedding.shape[:-1], n) for n in self.sizes)
        return _filtered(self.prior, self.posterior, state, belief, action, embedding)


def _filtered(
    prior: nn.Module,
    posterior: nn.Module,
    state: Tensor,
    belief: Tensor,
    action: Tensor,
    embedding: Tensor,
) -> tuple[Tensor, Tensor]:
    """State and belief after an action and what was then observed."""
    *_, belief = prior(state, belief, action)
    *_, state = posterior(belief, embedding)
    return state, belief


class Remember(TensorDictModuleBase):
    """Hands latents and action on to the next step of a real env."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys = [*LATENTS, ACTION]
        self.out_keys = [*NEXT_LATENTS, ("next", PREVIOUS_ACTION)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key, following in zip(self.in_keys, self.out_keys, strict=True):
            tensordict.set(following, tensordict.get(key))
        return tensordict
