"""The process of one thread count: a plan on standard input, tables on standard output.

Its own process, because JAX and OpenMP fix their threads when they start: the parent has set this
one's affinity and environment before anything is imported.
"""

from __future__ import annotations

import sys
import warnings

from fastwm.bench import report
from fastwm.bench.plan import Plan
from fastwm.bench.runner import run_plan

__all__ = ["main"]


def main() -> int:
    """Exit status 1 when something was red or failed."""
    # Deprecation notes of the peers' own dependencies would bury the tables.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    return 0 if run_plan(Plan.from_json(sys.stdin.read()), report.show) else 1


if __name__ == "__main__":
    sys.exit(main())
