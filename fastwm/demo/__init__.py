"""The demo: real data, a world model, planning in imagination, and what the engines gain.

``python -m fastwm demo`` is the way in. The way of the data::

    real       transitions of Gymnasium's Pendulum-v1, through torchrl's GymEnv
    model      a world model trained on them with WorldModelLoss; its error on held-out episodes
    planning   CEM over WorldModelEnv, playing the real pendulum
    speed      the same imagined rollouts on torchrl's classes and on fastwm's engines; parity first
    report     all of it as a JSON record and one picture
    cli        the four in this order, on one page
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: command line without the program's name; None takes ``sys.argv``'s.

    Returns:
        0 when everything held; 1 when a parity check is red, planning is not clearly better than random
        actions, or a package is missing.
    """
    try:
        import gymnasium  # noqa: F401
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'fastwm[demo]'", file=sys.stderr)
        return 1
    from fastwm.demo.cli import run

    return run(argv)
