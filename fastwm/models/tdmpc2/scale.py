"""`RunningScale`: how far apart the values that a policy is trained on lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RunningScale"]


class RunningScale(nn.Module):
    """Divides by a moving average of the distance between the 5th and the 95th percentile.

    The distance counts as 1 where it is less; the average starts at 1.

    Args:
        tau: weight of what is new in the average; 0.01 in TD-MPC2.

    Example:
        >>> import torch
        >>> from fastwm.models.tdmpc2 import RunningScale
        >>> scale = RunningScale(tau=0.5)
        >>> scale.update(torch.arange(101.0))
        >>> scale.value
        tensor(45.5000)
        >>> scale(torch.tensor(91.0))
        tensor(2.)

    Source: the official repository's ``common/scale.py``; Hafner et al. 2023, "DreamerV3", equation 7.
    """

    value: Tensor
    percentiles: Tensor

    def __init__(self, tau: float = 0.01) -> None:
        super().__init__()
        self.tau = tau
        self.register_buffer("value", torch.ones(()))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take values of any shape into the average."""
        low, high = torch.quantile(x.flatten().to(self.value), self.percentiles)
        self.value.lerp_((high - low).clamp(min=1.0), self.tau)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.value
