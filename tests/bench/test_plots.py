"""Figures show what the rows say, under the conditions that the rows name, and measure nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastwm.bench import limits, plots, report, rows, timing
from fastwm.bench.runner import Outcome
from tests.bench.samples import MACHINE, memory_row, time_row

pytest.importorskip("matplotlib", reason="matplotlib is not installed; nothing can be drawn")


CONDITIONS = (
    "Test CPU 9000", "AVX9", "1 of 8 cores", "torch 2.13.0", "012345678", "2025-01-02", "parity green",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a plot must be made from recorded rows only")

    for module, name in ((timing, "interleave"), (limits, "measure")):
        monkeypatch.setattr(module, name, fail)


def recorded(folder: Path) -> None:
    """Two batches, two directions; ours twice, then four times as fast as torchrl."""
    found: list[rows.Row] = []
    for direction in ("forward", "backward"):
        for batch, times in ((1, 4.0), (256, 2.0)):
            common = {"batch": batch, "direction": direction, "run": f"{direction}-{batch}"}
            theirs = (8.0, 80.0, 16.0)
            found.append(time_row(theirs, **common))
            mine = tuple(ms / times for ms in theirs)
            found.append(time_row(mine, provider="fastwm-captured", ours=True, **common))
    found += [memory_row(batch=4096), memory_row(batch=4096, provider="new-engine", ours=True)]
    rows.append(folder / "mlp.jsonl", found)


def test_figures_are_drawn_from_a_file_alone(tmp_path: Path) -> None:
    recorded(tmp_path)
    written = plots.draw(tmp_path)
    assert [path.name for path in written] == [
        "mlp-test-cpu-9000-1-thread-speed.png",
        "mlp-test-cpu-9000-1-thread-peak.png",
        "mlp-test-cpu-9000-1-thread-memory-b4096-t15.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_lines_are_the_rows_and_the_conditions_stand_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    recorded(tmp_path)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    plots.draw(tmp_path)
    speed, peak, _ = figures
    lines = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for container in speed.axes[0].containers
        for line in [container.lines[0]]
        for _ in [line.set_label(container.get_label())]
    }
    # Round by round, so the slow second round does not show.
    assert lines["fastwm-captured"] == ([1, 256], [4.0, 2.0])
    assert lines["torchrl"] == ([1, 256], [1.0, 1.0])
    # 0.3 GFLOP in 4 ms of 150 GFLOP/s.
    line = peak.axes[0].containers[1].lines[0]
    assert list(line.get_ydata()) == pytest.approx([50.0, 25.0])
    for figure in figures:
        below = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
        for condition in CONDITIONS:
            assert condition in below


def test_the_latest_run_of_a_configuration_is_shown(tmp_path: Path) -> None:
    old = [time_row(run="old"), time_row(run="old", provider="gone")]
    new = [time_row(run="new"), time_row(run="new", provider="fastwm-fused", ours=True)]
    elsewhere = time_row(run="old", machine={**MACHINE, "cpu": "another"})
    assert plots.latest([*old, elsewhere, *new]) == [*new, elsewhere]


def test_no_rows_no_figures(tmp_path: Path) -> None:
    assert plots.draw(tmp_path) == []


def test_the_table_is_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    from fastwm.bench.problem import Case

    row = time_row(
        (2.0, 2.0), provider="fastwm-captured", ours=True, vs_reference=3.25, vs_best_peer=1.5,
        gflops=75.0, floor_ms=1.0, best_peer="jax-scan",
    )  # fmt: skip
    outcome = Outcome(
        Case("mlp", 16, 15, "forward", 1), [row], {"jax": ("unavailable", "not here")}
    )
    report.show(outcome, 1, 1, False)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("fastwm-captured *")]
    assert line.split()[2:] == [
        "2.000",
        "2.000-2.000",
        "3.25x",
        "1.50x",
        "75.0",
        "50%",
        "50%",
        "1e-07",
    ]
    assert "best peer: jax-scan" in printed
    assert "jax: unavailable: not here" in printed
    assert "BUSY" not in printed
    report.show(Outcome(outcome.case, [replace(row, cpu_share=0.4)]), 1, 1, False)
    assert "BUSY MACHINE: this process had its core for 40% of the time" in capsys.readouterr().out
    loaded = replace(row, threads=2, cpu_share=0.9, machine={**MACHINE, "load": 3.5})
    report.show(Outcome(outcome.case, [loaded]), 1, 1, False)
    assert "BUSY MACHINE: its load is 3.5" in capsys.readouterr().out


def test_records_of_other_kinds_beside_the_rows_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kernels_aot.jsonl").write_text('{"kernel": "lambda_return", "registers": 34}\n')
    assert plots.draw(tmp_path) == []
