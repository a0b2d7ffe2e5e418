"""The models that are timed. A suite is one model family: its modules, arithmetic and JAX twin.

Every provider runs the same suite with the same weights, so a suite knows no provider and a
provider knows no suite. A new one is a file here and a line in ``SUITES``.
"""

from __future__ import annotations

from collections.abc import Callable

from fastwm.bench.suites import mbpo, mlp, rssm, rssm_v3, tdmpc2
from fastwm.bench.suites.base import Model, Parts, Suite
from fastwm.bench.suites.mlp import MLPWorldModel

__all__ = ["SUITES", "MLPWorldModel", "Model", "Parts", "Suite", "suite"]

SUITES: dict[str, Callable[[], Suite]] = {
    "mlp": mlp.suite,
    "mbpo": mbpo.suite,
    "tdmpc2": tdmpc2.suite,
    "rssm": rssm.suite,
    "rssm_v3": rssm_v3.suite,
}


def suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> from fastwm.bench.suites import suite
        >>> suite("mlp").flop(batch=1, horizon=1, backward=False)
        530944
    """
    if name not in SUITES:
        raise ValueError(f"Unknown suite {name!r}; choose one of {', '.join(SUITES)}.")
    return SUITES[name]()
