"""torchrl's priors for any number of batch dims (torch's ``GRUCell`` takes one at most), and their belief
by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.modules import RSSMPrior, RSSMPriorV3

__all__ = ["Prior", "PriorV3"]


class _AnyBatch:
    """Flattens the batch for the class behind it. Planners have two dims: envs and candidates."""

    def forward(
        self, state: Tensor, belief: Tensor, action: Tensor, *noise: Tensor
    ) -> tuple[Tensor, ...]:
        """See the class behind; all are ``[*B, n]``."""
        parent: Any = super()
        batch = state.shape[:-1]
        if len(batch) < 2:
            return parent.forward(state, belief, action, *noise)
        flat = [x.reshape(-1, x.shape[-1]) for x in (state, belief, action, *noise)]
        return tuple(x.reshape(*batch, *x.shape[1:]) for x in parent.forward(*flat))

    def belief(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        """The next belief, ``[*B, H]``; the state that the prior expects is neither computed nor
        drawn."""
        batch = state.shape[:-1]
        flat = [x.reshape(-1, x.shape[-1]) for x in (state, belief, action)]
        return self._next_belief(*flat).reshape(*batch, -1)

    def _next_belief(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        raise NotImplementedError


class Prior(_AnyBatch, RSSMPrior):
    """``torchrl.modules.RSSMPrior``, for any batch.

    Example:
        >>> import torch
        >>> from fastwm.models.rssm.prior import Prior
        >>> prior = Prior(torch.empty(1), hidden_dim=8, rnn_hidden_dim=8, state_dim=4, action_dim=1)
        >>> inputs = torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), torch.zeros(2, 3, 1)
        >>> mean, std, state, belief = prior(*inputs)
        >>> mean.shape, belief.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3, 8]))
        >>> torch.equal(prior.belief(*inputs), belief)
        True
    """

    def _next_belief(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        return self.rnn(self.action_state_projector(torch.cat((state, action), -1)), belief)


class PriorV3(_AnyBatch, RSSMPriorV3):
    """``torchrl.modules.RSSMPriorV3``, for any batch."""

    def _next_belief(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        return self._update_belief(state, belief, action)  # as its RSSMStateEstimatorV3 does
