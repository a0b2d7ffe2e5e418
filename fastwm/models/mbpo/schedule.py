"""How far to imagine: MBPO lengthens its branches as its model becomes better."""

from __future__ import annotations

__all__ = ["rollout_length"]


def rollout_length(
    epoch: int, *, epochs: tuple[int, int] = (20, 100), lengths: tuple[int, int] = (1, 15)
) -> int:
    """Length of imagined branches: linear over some epochs, constant before and after.

    Args:
        epoch: the epoch now (of 1000 real steps, in MBPO).
        epochs: where the length begins and ceases to change, ``x`` and ``y``.
        lengths: the length up to there and from there on, ``a`` and ``b``.

    Returns:
        ``a + (epoch - x) / (y - x) * (b - a)``, held between both and rounded down.

    Raises:
        ValueError: the epochs are not in order.

    Source: Janner et al. 2019 (MBPO), appendix C, table "Hyperparameter settings" (its notation is
    ``a -> b over epochs x -> y``). The defaults are its Hopper row.

    Example:
        >>> from fastwm.models.mbpo import rollout_length
        >>> [rollout_length(epoch) for epoch in (0, 20, 60, 100, 300)]
        [1, 1, 8, 15, 15]
    """
    (begin, end), (first, last) = epochs, lengths
    if begin >= end:
        raise ValueError(f"epochs={epochs}: the first must come before the last.")
    # In integers, so that no rounding comes before the rounding down.
    done = min(max(epoch - begin, 0), end - begin)
    return (first * (end - begin) + done * (last - first)) // (end - begin)
