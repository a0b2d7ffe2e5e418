"""The README's table of what the examples learned, written from their recorded curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["learned"]

#: What is built, as the table names it: family (as examples record it), builders.
FAMILIES = {
    "mbpo": ("MBPO, PETS", "`models.mbpo`"),
    "tdmpc2": ("TD-MPC2", "`models.tdmpc2`"),
    "planet": ("PlaNet", "`models.planet`"),
    "dreamer": ("Dreamer v1, v2, v3", "`models.dreamer_v1`, `dreamer_v2`, `dreamer_v3`"),
}


def learned(folder: Path) -> str:
    """Families with a link to example and curve, and what was reached on Pendulum-v1, in Markdown.

    Args:
        folder: of the recorded curves, ``<family>-<backend>-seed<n>.json``.

    Returns:
        One row per family. Real steps to the goal, last mean return and minutes of one core (evaluations
        included) are those of the seeds on ``"auto"``, in the seeds' order; the last column is the eager
        path's core time over that of ``"auto"`` for the same seed and number of steps.
    """
    curves = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [
        "| family | builder | example | steps to -250, by seed | last return | core minutes | eager / auto |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, (title, builder) in FAMILIES.items():
        found = [c for c in curves if c["family"] == family and c["env"] == "Pendulum-v1"]
        fast = sorted(
            (c for c in found if c["options"]["backend"] == "auto"), key=lambda c: c["seed"]
        )
        eager = [c for c in found if c["options"]["backend"] == "eager"]
        picture = f", [curve]({folder}/{family}.png)" if fast else ""
        cells = [title, builder, f"[{family}.py](examples/{family}.py){picture}"]
        cells += [
            " / ".join(_reached(c) for c in fast),
            " / ".join(f"{c['evaluations'][-1]['mean']:.0f}" for c in fast),
            " / ".join(f"{_core(c) / 60:.1f}" for c in fast),
            _ratio(fast, eager),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _reached(curve: dict[str, Any]) -> str:
    steps = (e["step"] for e in curve["evaluations"] if e["mean"] >= curve["goal"])
    first = next(steps, None)
    return "not reached" if first is None else f"{first:,}"


def _core(curve: dict[str, Any], step: int | None = None) -> float:
    """Seconds of one core to that step, or in all."""
    points = [e for e in curve["evaluations"] if step is None or e["step"] == step]
    return points[-1]["cpu_seconds"]


def _ratio(fast: Sequence[dict[str, Any]], eager: Sequence[dict[str, Any]]) -> str:
    ratios = []
    for slow in eager:
        for quick in fast:
            same = {e["step"] for e in slow["evaluations"]} & {
                e["step"] for e in quick["evaluations"]
            }
            if quick["seed"] == slow["seed"] and same:
                ratios.append(_core(slow, max(same)) / _core(quick, max(same)))
    return f"{statistics.median(ratios):.1f}x" if ratios else ""
