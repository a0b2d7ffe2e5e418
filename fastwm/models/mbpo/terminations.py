"""When episodes of some MuJoCo tasks end, as rules for ``mbpo(..., termination=...)``.

Each is ``(observation, action, next_observation) -> terminated``, shapes ``[*B, O], [*B, A], [*B, O] ->
bool [*B, 1]``. HalfCheetah and Pendulum never terminate: they need none.

Source: the termination sections of Gymnasium's pages of these tasks (v4 and v5, default arguments), which
the official MBPO code (``static/*.py``) has as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hopper", "inverted_pendulum", "walker2d"]


def hopper(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Hopper: it fell (height at most 0.7 or a lean of 0.2 rad), or a coordinate left (-100, 100).

    Example:
        >>> import torch
        >>> from fastwm.models.mbpo import terminations
        >>> upright = torch.tensor([[1.25, *[0.0] * 10], [0.5, *[0.0] * 10]])
        >>> terminations.hopper(upright, torch.zeros(2, 3), upright)
        tensor([[False],
                [ True]])
    """
    height, lean = following[..., :1], following[..., 1:2]
    others = following[..., 1:].abs().amax(-1, keepdim=True)
    return _not(torch.logical_and((height > 0.7) & (lean.abs() < 0.2), others < 100))


def walker2d(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Walker2d: its height left (0.8, 2) or its lean (-1, 1) rad."""
    height, lean = following[..., :1], following[..., 1:2]
    return _not((height > 0.8) & (height < 2.0) & (lean.abs() < 1.0))


def inverted_pendulum(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """InvertedPendulum: the pole leans by more than 0.2 rad."""
    return _not(following[..., 1:2].abs() <= 0.2)


def _not(healthy: Tensor) -> Tensor:
    # Written as the negation of what is healthy, so that NaN ends an episode.
    return torch.logical_not(healthy)
