"""Row programs on a GPU: the whole horizon of imagined steps in one launch.

``stages.py`` decides what runs in one pass and where values lie, ``source.py`` writes the kernel,
``functions.py`` has what its elementwise ops call, ``executor.py`` launches it.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastwm.kernels import Build
from fastwm.kernels.row_program.executor import TritonExecutor
from fastwm.kernels.row_program.source import Tile

__all__ = ["Tile", "TritonExecutor", "builds"]


def builds() -> Iterator[Build]:
    """Every kernel that is compiled ahead of time: see ``builds.py``."""
    from fastwm.kernels.row_program.builds import builds as of_the_suites

    return of_the_suites()
