"""The arithmetic of the report: medians, quartiles, ratios per round."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence

__all__ = ["best_peer", "median_ratio", "quartiles"]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile.

    Example:
        >>> from fastwm.bench.stats import quartiles
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster ``ours`` is: the median over rounds of that round's ratio.

    Round by round, because a slow moment of the machine then hits both sides of the ratio.

    Raises:
        ValueError: the two were not timed in the same rounds.

    Example:
        >>> from fastwm.bench.stats import median_ratio
        >>> median_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
        3.0
    """
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def best_peer(samples: Mapping[str, Sequence[float]], ours: Collection[str]) -> str | None:
    """The provider with the smallest median among those that are not ours; None when there is none.

    Example:
        >>> from fastwm.bench.stats import best_peer
        >>> best_peer({"a": [3.0], "b": [2.0], "mine": [1.0]}, ours={"mine"})
        'b'
    """
    peers = {name: statistics.median(ms) for name, ms in samples.items() if name not in ours}
    return min(peers, key=lambda name: peers[name]) if peers else None
