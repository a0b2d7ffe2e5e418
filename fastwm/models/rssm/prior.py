"""torchrl's priors for any number of batch dims: torch's ``GRUCell`` takes one at most."""

from __future__ import annotations

from typing import Any

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


class Prior(_AnyBatch, RSSMPrior):
    """``torchrl.modules.RSSMPrior``, for any batch.

    Example:
        >>> import torch
        >>> from fastwm.models.rssm.prior import Prior
        >>> prior = Prior(torch.empty(1), hidden_dim=8, rnn_hidden_dim=8, state_dim=4, action_dim=1)
        >>> [x.shape[:2] for x in prior(torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), torch.zeros(2, 3, 1))]
        [torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2, 3])]
    """


class PriorV3(_AnyBatch, RSSMPriorV3):
    """``torchrl.modules.RSSMPriorV3``, for any batch."""
