"""Draw learning curves: ``python examples/curves.py CURVE.json ... --out PICTURE.png``.

Return against real env steps and against wall time, one line per run; runs that differ only in their
seed share a colour.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "main"]

# Okabe and Ito's colours: told apart by everyone.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def draw(paths: Sequence[Path], out: Path) -> None:
    """Draw the curves in these ``curve.json`` files into one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [json.loads(path.read_text()) for path in paths]
    figure = Figure(figsize=(11, 4.6), dpi=110)
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    kinds = list(dict.fromkeys(_kind(curve) for curve in curves))
    for curve in curves:
        points = curve["evaluations"]
        color = COLORS[kinds.index(_kind(curve)) % len(COLORS)]
        mean = [point["mean"] for point in points]
        for axes, x in (
            (by_step, [point["step"] for point in points]),
            (by_time, [point["seconds"] / 60 for point in points]),
        ):
            axes.plot(x, mean, "-o", color=color, markersize=3, linewidth=1.2, alpha=0.85)
    goal = curves[0]["goal"]
    for axes, label in ((by_step, "steps of the real env"), (by_time, "wall time, minutes")):
        if goal is not None:
            axes.axhline(goal, color="#888888", linestyle=":")
        axes.set_xlabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.set_ylabel("evaluation return, mean of the episodes")
    if goal is not None:
        by_step.annotate(
            f"goal {goal:.0f}",
            (1, goal),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
        )
    handles = []
    for kind in kinds:
        seeds = sorted(curve["seed"] for curve in curves if _kind(curve) == kind)
        label = f"{kind}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        handles += by_time.plot(
            [], [], "-o", color=COLORS[kinds.index(kind) % len(COLORS)], label=label
        )
    by_time.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"{curves[0]['family']} on {curves[0]['env']}", fontweight="bold")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    note = textwrap.fill(_conditions(curves), 190)
    figure.text(0.012, 0.015, note, fontsize=7.5, color="#444444", va="bottom")
    figure.savefig(out)


def _kind(curve: dict[str, Any]) -> str:
    return f"{curve['classes']}, backend {curve['options']['backend']}"


def _conditions(curves: Sequence[dict[str, Any]]) -> str:
    options, found = curves[0]["options"], curves[0]["conditions"]
    commits = sorted({(c["conditions"]["commit"] or "no git")[:9] for c in curves})
    machine, versions = found["machine"], found["versions"]
    quick = "QUICK RUN: numbers mean nothing. " if options["quick"] else ""
    return (
        f"{quick}{machine['cpu']} ({machine['isa']}), {options['threads']} of {machine['cores']} cores; "
        f"torch {versions['torch']}, torchrl {versions['torchrl']}, tensordict {versions['tensordict']}; "
        f"fastwm commit {', '.join(commits)}. Wall time includes evaluation and what else the machine did."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    draw(options.curves, options.out)


if __name__ == "__main__":
    main()
