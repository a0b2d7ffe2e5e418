"""What the demo found, as a JSON record, a picture and tables of text."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastwm.bench import conditions
from fastwm.demo.settings import Settings
from fastwm.demo.speed import Row

__all__ = ["Record", "draw", "speed_table"]

# Okabe and Ito's colours: told apart by everyone.
GREY, SKY, BLUE, ORANGE = "#999999", "#56b4e9", "#0072b2", "#d55e00"
COLORS = {
    "torchrl": GREY, "fastwm eager": SKY, "fastwm captured": BLUE, "fastwm fused": ORANGE,
}  # fmt: skip


@dataclass
class Record:
    """Everything that is saved.

    Args:
        losses: of the last training, as parts of the targets' variances.
        errors: per held-out set, what :func:`~fastwm.demo.model.prediction_error` returned.
        returns: of each real episode, with random actions and planned, from the same starts.
        speed: the timed rows; empty when parity is red.
        red: what parity found wrong.
        seconds: wall time of each part.
    """

    seed: int
    quick: bool
    threads: int
    settings: Settings
    losses: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    returns: dict[str, list[float]] = field(default_factory=dict)
    speed: list[Row] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        commit, changed = conditions.commit()
        self.conditions = {
            "machine": conditions.machine("cpu"),
            "versions": conditions.versions(),
            "commit": commit,
            "uncommitted_changes": changed,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def describe(self) -> str:
        """The conditions in a few lines."""
        s = self.settings
        machine, versions = self.conditions["machine"], self.conditions["versions"]
        code = (self.conditions["commit"] or "not from a git checkout")[:12]
        code += " with uncommitted changes" if self.conditions["uncommitted_changes"] else ""
        rounds = sorted({row.rounds for row in self.speed}) or [0]
        return (
            f"Gymnasium Pendulum-v1, seed {self.seed}"
            f"{', QUICK RUN: numbers mean nothing' if self.quick else ''}. "
            "World model: latent 3, action 1, dynamics and reward MLPs of two hidden SiLU layers of "
            f"{s.width}; timed rollouts: a policy MLP of two hidden tanh layers of {s.width}; float32, "
            f"no gradients. CEM: {s.horizon} steps, {s.candidates} candidates x {s.refinements} "
            f"refinements, {s.episodes} episodes at once. Speed: medians over {rounds[0]} to "
            f"{rounds[-1]} rounds in which the providers take turns. {machine['cpu']} "
            f"({machine['isa']}), {self.threads} thread{'s' if self.threads > 1 else ''} of "
            f"{machine['cores']} cores, load {machine['load']} before, {machine['system']}. "
            f"Python {versions['python']}, torch {versions['torch']}, torchrl {versions['torchrl']}, "
            f"tensordict {versions['tensordict']}, fastwm {versions['fastwm']}, commit {code}."
        )


def speed_table(rows: Sequence[Row]) -> str:
    """Milliseconds per call and, in brackets, times faster than the first provider of the row."""
    names = list(dict.fromkeys(n for row in rows for n in (*row.milliseconds, *row.absent)))
    width = max(len(row.work) for row in rows)
    lines = [" " * width + "".join(f"{name:>24}" for name in names)]
    for row in rows:
        cells = [
            f"{row.milliseconds[n]:.2f} ms ({row.speedup[n]:.2f}x)"
            if n in row.speedup
            else "cannot"
            for n in names
        ]
        lines.append(f"{row.work:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    absent = {name: error for row in rows for name, error in row.absent.items()}
    notes = [
        textwrap.shorten(f"{name} cannot plan: {error}", 110) for name, error in absent.items()
    ]
    return "\n".join(lines + notes)


def draw(record: Record, path: Path) -> None:
    """Prediction, planning and speed side by side, the conditions under them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.2), dpi=110)
    FigureCanvasAgg(figure)
    predicted, planned, fast = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 0.9, 1.6]})
    _draw_errors(predicted, record)
    _draw_returns(planned, record)
    _draw_speed(fast, record)
    for axes in (predicted, planned, fast):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=12, fontweight="bold")
    figure.tight_layout(rect=(0, 0.09, 1, 1), w_pad=3)
    figure.text(
        0.012,
        0.02,
        textwrap.fill(record.describe(), 240),
        fontsize=8.5,
        color="#444444",
        va="bottom",
    )
    figure.savefig(path)


def _draw_errors(axes: Any, record: Record) -> None:
    from matplotlib.ticker import PercentFormatter

    for (label, error), color in zip(record.errors.items(), (ORANGE, BLUE), strict=False):
        for (what, values), style in zip(error.items(), ("-o", "--s"), strict=True):
            ahead = range(1, len(values) + 1)
            axes.plot(ahead, values, style, color=color, markersize=4, label=f"{what}, {label}")
    axes.axhline(1, color=GREY, linestyle=":")
    axes.text(1, 0.92, "no better than a trivial guess *", color="#666666", va="top", fontsize=9)
    axes.set(
        title="The model predicts",
        xlabel="steps ahead, open loop\n* state: that it stays; reward: its mean",
        ylabel="error on held-out episodes",
        yscale="log",
        xticks=[1, *range(5, record.settings.open_loop + 1, 5)],
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))


def _draw_returns(axes: Any, record: Record) -> None:
    for x, (values, color) in enumerate(zip(record.returns.values(), (GREY, BLUE), strict=True)):
        spread = torch.linspace(-0.18, 0.18, len(values)).tolist()
        axes.scatter([x + s for s in spread], values, color=color, alpha=0.7, s=36, zorder=3)
        mean = statistics.fmean(values)
        axes.hlines(mean, x - 0.3, x + 0.3, color=color, linewidth=2.5)
        axes.text(x + 0.33, mean, f"mean\n{mean:.0f}", va="center", fontsize=10)
    axes.set(
        title="Planning in imagination works in reality",
        xticks=range(len(record.returns)),
        xticklabels=record.returns,
        xlim=(-0.5, len(record.returns) - 0.25),
        xlabel="a dot is one real episode; both from the same starts",
        ylabel=f"return of {record.settings.steps} real steps (0 is perfect)",
    )
    axes.set_ylim(top=max(0, axes.get_ylim()[1]))
    axes.grid(axis="y", alpha=0.3)


def _draw_speed(axes: Any, record: Record) -> None:
    width, labels = 0.21, []
    for x, row in enumerate(record.speed):
        first, *_, last = row.speedup
        for i, (name, times) in enumerate(row.speedup.items()):
            place = x + (i - (len(row.speedup) - 1) / 2) * width
            axes.bar(place, times, width * 0.95, color=COLORS[name])
            axes.text(
                place, times, f"{times:.1f}x" if name != first else "1", ha="center", va="bottom",
                fontsize=11 if name == last else 8,
                fontweight="bold" if name == last else "normal",
            )  # fmt: skip
        work = row.work.replace(", ", "†\n" if row.absent else "\n")
        labels.append(
            f"{work}\n{row.milliseconds[first]:.3g} ms →\n{row.milliseconds[last]:.2g} ms"
        )
    axes.axhline(1, color=GREY, linestyle=":")
    axes.set(
        title=f"The same imagination, faster: {record.settings.rollout}-step rollouts",
        xticks=range(len(labels)),
        ylabel="times faster than torchrl (higher is better)",
    )
    axes.set_xticklabels(labels, fontsize=9)
    worst = max((e for row in record.speed for e in row.worst.values()), default=float("nan"))
    note = f"parity checked first: largest relative error {worst:.1e}"
    if any(row.absent for row in record.speed):
        note += "\n† torchrl's env cannot be planned over: relative to fastwm eager"
    axes.set_xlabel(note, fontsize=9)
    there = {name for row in record.speed for name in row.speedup}
    handles = [axes.bar(0, 0, color=COLORS[n], label=n) for n in COLORS if n in there]
    axes.legend(handles=handles, frameon=False, fontsize=9.5)
    axes.set_ylim(0, 1.08 * max(max(row.speedup.values()) for row in record.speed))
