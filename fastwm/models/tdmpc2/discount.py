"""`discount_of`: how far ahead to look, by how long episodes are."""

from __future__ import annotations

__all__ = ["discount_of"]


def discount_of(
    episode_length: int,
    *,
    denominator: float = 5.0,
    low: float = 0.95,
    high: float = 0.995,
) -> float:
    """The discount of a task by the length of its episodes.

    A fifth of the length counts as the effective horizon; the discount stays within bounds.

    Example:
        >>> from fastwm.models.tdmpc2 import discount_of
        >>> [discount_of(steps) for steps in (25, 200, 500, 5000)]
        [0.95, 0.975, 0.99, 0.995]

    Source: Hansen et al. 2024, "TD-MPC2", appendix H; ``discount_denom``, ``discount_min`` and
    ``discount_max`` of the official repository.
    """
    effective = episode_length / denominator
    return min(max((effective - 1) / effective, low), high)
