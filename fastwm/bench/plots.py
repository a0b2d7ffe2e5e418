"""Figures from recorded rows and from nothing else, with the conditions under each.

Every figure shows the latest run of each configuration; all its providers were timed in turns in
that run.
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastwm.bench.providers import REFERENCE
from fastwm.bench.rows import MemoryRow, Row, TimeRow, read
from fastwm.bench.stats import quartiles
from fastwm.bench.suites import SUITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["conditions_of", "draw", "latest"]

#: One look per provider, the same in every figure: peers muted, ours strong. (colour, marker, line)
STYLES = {
    "torchrl": ("#111111", "", "--"),
    "torch-loop": ("#8c8c8c", "o", "-"),
    "torch-compile": ("#b59a5b", "s", "-"),
    "torch-compile-graphs": ("#8f7a2e", "D", "-"),
    "torch-compile-loop": ("#c98a6b", "^", "-"),
    "jax-scan": ("#8d6cab", "v", "-"),
    "fastwm-eager": ("#8fc1ea", "o", ":"),
    "fastwm-captured": ("#1763c6", "o", "-"),
    "fastwm-captured-inductor": ("#0b8f7d", "s", "-"),
    "fastwm-fused": ("#d1254a", "D", "-"),
}
SPARE = ("#5b6c2f", "P", "-")


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each configuration on each machine, the rows of its latest run.

    "Latest" is by place in the file: rows are only ever appended.
    """
    runs: dict[tuple[Any, ...], tuple[str, list[Row]]] = {}
    for row in rows:
        key = (row.kind, *_group(row), row.batch, row.horizon, row.direction)
        if key not in runs or runs[key][0] != row.run:
            runs[key] = (row.run, [])
        runs[key][1].append(row)
    return [row for _, found in runs.values() for row in found]


def _group(row: Row) -> tuple[Any, ...]:
    return row.suite, row.device, row.threads, row.machine.get("gpu") or row.machine["cpu"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def conditions_of(rows: Sequence[Row]) -> str:
    """What to know about a figure's rows: hardware, threads, versions, code, dates, parity."""

    def distinct(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(v) for v in values if v not in (None, "")}))

    first = rows[0]
    versions = [
        f"{package} {distinct(r.versions.get(package) for r in rows)}"
        for package in ("python", "torch", "torchrl", "tensordict", "jax")
        if any(r.versions.get(package) for r in rows)
    ]
    versions.append(f"pandas {distinct(r.versions.get('pandas') for r in rows) or 'not installed'}")
    commits = distinct(f"{(r.commit or 'none')[:9]}{' (changed)' if r.dirty else ''}" for r in rows)
    parts = [
        distinct(r.machine.get("gpu") or r.machine["cpu"] for r in rows),
        f"{first.machine['isa']}, {first.threads} of {first.machine['cores']} cores",
        first.dtype,
        *versions,
        f"fastwm commit {commits}",
        distinct(r.date[:10] for r in rows),
    ]
    timed = [r for r in rows if isinstance(r, TimeRow)]
    if timed:
        rounds = sorted({r.rounds for r in timed})
        peaks = sorted({round(r.limits["gflops"]) for r in timed})
        peak = f"{peaks[0]}" if len(peaks) == 1 else f"{peaks[0]} to {peaks[-1]}"
        count = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
        parts.append(f"medians of {count} rounds, providers in turns; bars: quartiles")
        parts.append(f"measured peak {peak} GFLOP/s (torch.mm)")
        if first.device == "cpu" and first.threads == 1:
            parts.append(f"had the core {min(r.cpu_share for r in timed):.0%} of the time or more")
    worst = max(max(r.parity["worst"].values(), default=0.0) for r in rows)
    parts.append(f"parity green for all shown, worst {worst:.0e} of a key's largest value")
    return "; ".join(parts)


def _style(name: str, ours: bool) -> dict[str, Any]:
    colour, marker, line = STYLES.get(name, SPARE)
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "markersize": 4,
        "linewidth": 2.0 if ours and line == "-" else 1.2,
        "zorder": 3 if ours else 2,
    }


#: Median, lower and upper quartile of what a figure shows of one provider in one run.
Measure = Callable[[TimeRow, dict[str, TimeRow]], tuple[float, float, float] | None]


def _times_faster(row: TimeRow, run: dict[str, TimeRow]) -> tuple[float, float, float] | None:
    if REFERENCE not in run:
        return None
    pairs = zip(run[REFERENCE].samples_ms, row.samples_ms, strict=True)
    low, middle, high = quartiles([theirs / own for theirs, own in pairs])
    return middle, low, high


def _part_of_peak(row: TimeRow, run: dict[str, TimeRow]) -> tuple[float, float, float] | None:
    rates = [100 * 1e3 * row.gflop / ms / row.limits["gflops"] for ms in row.samples_ms]
    low, middle, high = quartiles(rates)
    return middle, low, high


def _panel(axes: Axes, rows: Sequence[TimeRow], measure: Measure) -> None:
    runs: dict[str, dict[str, TimeRow]] = defaultdict(dict)
    for row in rows:
        runs[f"{row.run}/{row.batch}"][row.provider] = row
    for name in [*STYLES, *sorted({r.provider for r in rows} - set(STYLES))]:
        points = []
        for row in sorted((r for r in rows if r.provider == name), key=lambda r: r.batch):
            value = measure(row, runs[f"{row.run}/{row.batch}"])
            if value is not None:
                points.append((row.batch, value, row.ours))
        if not points:
            continue
        middle = [p[1][0] for p in points]
        axes.errorbar(
            [p[0] for p in points],
            middle,
            yerr=[
                [max(0.0, p[1][0] - p[1][1]) for p in points],
                [max(0.0, p[1][2] - p[1][0]) for p in points],
            ],
            elinewidth=0.7,
            label=name,
            **_style(name, points[0][2]),
        )
    batches = sorted({r.batch for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(figure: Figure, title: str, rows: Sequence[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    width, height = figure.get_size_inches()
    lines = textwrap.wrap(conditions_of(rows), int(width * 19))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes[1:]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    columns = max(1, min(len(labels), int(width / 1.9)))
    legend_rows = -(-len(labels) // columns) if labels else 0
    text, legend = 0.135 * len(lines) + 0.1, 0.18 * legend_rows + 0.05
    figure.text(0.02, 1 - 0.08 / height, title, fontsize=11, va="top")
    if labels:
        figure.legend(
            handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=8,
            bbox_to_anchor=(0.5, text / height),
        )  # fmt: skip
    figure.text(0.02, 0.06 / height, "\n".join(lines), fontsize=7, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, (text + legend) / height, 1, 1 - 0.3 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _grid(
    rows: Sequence[TimeRow], measure: Measure, title: str, ylabel: str, log: bool, path: Path
) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    directions = [d for d in ("forward", "backward") if any(r.direction == d for r in rows)]
    horizons = sorted({r.horizon for r in rows})
    size = (max(7.0, 3.3 * len(horizons) + 0.6), 2.5 * len(directions) + 1.5)
    figure, grid = plt.subplots(
        len(directions), len(horizons), figsize=size, squeeze=False, sharex=True, sharey="row"
    )
    for i, direction in enumerate(directions):
        for j, horizon in enumerate(horizons):
            axes = grid[i][j]
            shown = [r for r in rows if (r.direction, r.horizon) == (direction, horizon)]
            _panel(axes, shown, measure)
            what = "forward + backward" if direction == "backward" else "forward"
            axes.set_title(f"{what}, {horizon} steps", fontsize=9)
            axes.tick_params(labelsize=8)
            if log:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            if i == len(directions) - 1:
                axes.set_xlabel("batch", fontsize=8)
            if j == 0:
                axes.set_ylabel(ylabel, fontsize=8)
        if not log:
            grid[i][0].set_ylim(bottom=0)
    return _finish(figure, title, rows, path)


def _memory(rows: Sequence[MemoryRow], title: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    mib = 2**20
    figure, axes = plt.subplots(figsize=(7.5, 0.34 * len(rows) + 1.9))
    names = [r.provider for r in rows]
    output = [r.output_bytes / mib for r in rows]
    above = [(r.peak_bytes - r.output_bytes) / mib for r in rows]
    colours = [STYLES.get(r.provider, SPARE)[0] for r in rows]
    places = range(len(rows))
    axes.barh(places, output, color="#d9d9d9", label="output")
    axes.barh(places, above, left=output, color=colours)
    for place, row in zip(places, rows, strict=True):
        peak = row.peak_bytes / mib
        axes.text(peak, place, f" {peak:.0f}", va="center", fontsize=8)
    limit, label = (rows[0].output_bytes + rows[0].step_bytes) / mib, "output + one step"
    if rows[0].direction == "backward":
        limit = max((r.peak_bytes for r in rows if r.provider == REFERENCE), default=0) / 4 / mib
        label = "a quarter of torchrl's"
    axes.axvline(limit, color="#111111", linewidth=1, linestyle="--", label=label)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("peak MiB (grey: what is returned)", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _finish(figure, title, rows, path)


def draw(results: Path) -> list[Path]:
    """Draw every figure that the rows of a folder allow; return what was written.

    Args:
        results: the folder of the ``.jsonl`` files; figures go beside them.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    # Other records lie beside these, such as the kernels' registers.
    files = [results / f"{suite}.jsonl" for suite in SUITES]
    for file in filter(Path.exists, files):
        for row in latest(read(file)):
            groups[_group(row)].append(row)
    written = []
    for (suite, device, threads, machine), rows in groups.items():
        where = f"{threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device
        stem = f"{suite}-{_slug(machine)}-{_slug(where)}"
        what = f"Imagined rollouts, {suite} model"
        timed = [r for r in rows if isinstance(r, TimeRow)]
        if timed:
            speed, peak = results / f"{stem}-speed.png", results / f"{stem}-peak.png"
            title = f"{what}, {where}: times faster than torchrl's classes"
            written.append(
                _grid(timed, _times_faster, title, "times faster than torchrl", True, speed)
            )
            title = f"{what}, {where}: part of the measured peak"
            written.append(_grid(timed, _part_of_peak, title, "% of measured peak", False, peak))
        peaks: dict[tuple[int, int, str], list[MemoryRow]] = defaultdict(list)
        for row in rows:
            if isinstance(row, MemoryRow):
                peaks[row.batch, row.horizon, row.direction].append(row)
        for (batch, horizon, direction), found in peaks.items():
            with_gradients = direction == "backward"
            how = "with gradients" if with_gradients else "no gradients"
            title = f"{what}, B={batch}, T={horizon}, {how}: peak memory"
            end = "-backward" if with_gradients else ""
            path = results / f"{stem}-memory-b{batch}-t{horizon}{end}.png"
            written.append(_memory(found, title, path))
    return written
