"""Rows as tables. Everything printed comes out of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from fastwm.bench.rows import MemoryRow, Row, TimeRow
from fastwm.bench.runner import Outcome, bad

__all__ = ["memory_table", "show", "table", "time_table"]


#: Below this share of processor time, other work on the machine has distorted a single thread's times.
QUIET = 0.95


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in rest)]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, lines)])


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def time_table(rows: Sequence[TimeRow]) -> str:
    """One configuration."""
    first = rows[0]
    lines = [
        [
            row.provider + (" *" if row.ours else ""),
            f"{row.median_ms:.3f}",
            f"{row.q1_ms:.3f}-{row.q3_ms:.3f}",
            _times(row.vs_reference),
            _times(row.vs_best_peer),
            f"{row.gflops:.1f}",
            f"{row.gflops / row.limits['gflops']:.0%}",
            f"{row.floor_ms / row.median_ms:.0%}",
            f"{max(row.parity['worst'].values()):.0e}",
        ]
        for row in rows
    ]
    head = [
        "provider (* ours)", "ms", "quartiles", "vs torchrl", "vs best peer", "GFLOP/s", "of peak",
        "of floor", "parity",
    ]  # fmt: skip
    limit = first.limits
    fma = limit.get("fma_gflops")
    bare = f", multiply-adds alone {fma:.0f}" if fma else ""
    more = first.gflop_done or first.gflop
    note = (
        f"   peers multiply {more / first.gflop:.1f}x what is needed" if more > first.gflop else ""
    )
    notes = (
        f"best peer: {first.best_peer}   floor: {first.floor_ms:.3f} ms "
        f"(arithmetic {first.floor_compute_ms:.3f}, weights {first.floor_weights_ms:.3f})   "
        f"peak: {limit['gflops']:.0f} GFLOP/s ({limit['how']}{bare}){note}   rounds: {first.rounds}   "
        f"load: {first.machine['load']}"
    )
    return "\n".join(filter(None, [table(head, lines), notes, _busy(rows)]))


def _busy(rows: Sequence[TimeRow]) -> str:
    """A warning when other work had the cores, else nothing."""
    first, share = rows[0], min(row.cpu_share for row in rows)
    if first.device != "cpu":
        return ""
    if first.threads == 1 and share < QUIET:
        why = f"this process had its core for {share:.0%} of the time"
    elif first.machine["load"] > first.threads + 1:
        why = f"its load is {first.machine['load']}, this process can be {first.threads} of it"
    else:
        return ""
    return f"BUSY MACHINE: {why}. Do not trust these times."


def _within(row: MemoryRow) -> bool:
    """Whether the peak is within what the project promises for its fast engines."""
    if row.direction == "backward":
        return row.vs_reference is not None and row.vs_reference <= 0.25
    return row.peak_bytes <= row.output_bytes + row.step_bytes


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """One configuration."""
    mib = 2**20
    lines = [
        [
            row.provider + (" *" if row.ours else ""),
            f"{row.peak_bytes / mib:.1f}",
            f"{row.output_bytes / mib:.1f}",
            f"{(row.peak_bytes - row.output_bytes) / mib:.1f}",
            f"{row.kept_bytes / mib:.1f}",
            f"{row.step_bytes / mib:.1f}",
            "" if row.torch_bytes is None else f"{row.torch_bytes / mib:.1f}",
            "" if row.vs_reference is None else f"{row.vs_reference:.2f}",
            "yes" if _within(row) else "NO",
        ]
        for row in rows
    ]
    # Without gradients: output and one step's intermediates. With them: a quarter of torchrl's peak.
    head = [
        "provider (* ours)", "peak MiB", "output", "above output", "kept", "one step", "by torch",
        "of torchrl", "within",
    ]  # fmt: skip
    return table(head, lines) + f"\nmeasured as: {rows[0].how}"


def show(outcome: Outcome, number: int, count: int, known: bool) -> None:
    """Print one configuration: its table, then who is absent and why."""
    note = "   (already recorded for this code)" if known else ""
    print(f"\n[{number}/{count}] {outcome.case}{note}")
    rows: list[Row] = outcome.rows
    times = [row for row in rows if isinstance(row, TimeRow)]
    peaks = [row for row in rows if isinstance(row, MemoryRow)]
    if times:
        print(time_table(times))
    if peaks:
        print(memory_table(peaks))
    faults = bad(outcome.absent)
    for name, (status, reason) in outcome.absent.items():
        mark = "NOT REPORTED, " if name in faults else ""
        print(f"  {name}: {mark}{status}: {reason}")
    print(end="", flush=True)
