"""The README's table of what examples learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastwm.bench.learned import learned


def curve(folder: Path, backend: str, seed: int, means: list[float], core: float) -> None:
    points: list[dict[str, Any]] = [
        {"step": 100 * (i + 1), "mean": mean, "cpu_seconds": core * (i + 1)}
        for i, mean in enumerate(means)
    ]
    (folder / f"tdmpc2-{backend}-seed{seed}.json").write_text(json.dumps({
        "family": "tdmpc2", "env": "Pendulum-v1", "seed": seed, "goal": -250.0,
        "options": {"backend": backend}, "evaluations": points,
    }))  # fmt: skip


def row(folder: Path) -> list[str]:
    line = next(x for x in learned(folder).splitlines() if x.startswith("| TD-MPC2"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_says_when_the_goal_was_reached_and_what_it_took(tmp_path: Path) -> None:
    curve(tmp_path, "auto", 1, [-900.0, -800.0], 60.0)
    curve(tmp_path, "auto", 0, [-900.0, -250.0, -120.0], 60.0)
    assert row(tmp_path)[3:6] == ["200 / not reached", "-120 / -800", "3.0 / 2.0"]


def test_eager_is_compared_at_the_last_step_that_both_evaluated(tmp_path: Path) -> None:
    curve(tmp_path, "auto", 0, [-900.0, -250.0, -120.0], 60.0)
    curve(tmp_path, "eager", 0, [-900.0, -250.0], 150.0)
    assert row(tmp_path)[6] == "2.5x"


def test_without_curves_a_family_has_no_figures(tmp_path: Path) -> None:
    assert row(tmp_path)[3:] == ["", "", "", ""]
