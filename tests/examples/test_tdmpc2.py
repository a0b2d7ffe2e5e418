"""``examples/tdmpc2.py``: a quick run leaves its curve and its checkpoint, and goes on from it."""

from __future__ import annotations

import math
from pathlib import Path

from tests.examples.examples import curve, run_example


def test_a_quick_run_and_its_resumption(tmp_path: Path) -> None:
    run_example("tdmpc2", tmp_path, "--steps", "20")
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "curve.json", "curve.png",
    }  # fmt: skip
    first = curve(tmp_path)
    assert first["family"] == "tdmpc2"
    assert [point["step"] for point in first["evaluations"]] == [20]

    # With the other engine, and a task that may terminate: another model, which is refused.
    other = run_example("tdmpc2", tmp_path, "--resume", "--episodic", status=1)
    assert "episodic: False in the checkpoint, True here" in other.stderr

    run_example("tdmpc2", tmp_path, "--steps", "40", "--resume", "--backend", "eager")
    second = curve(tmp_path)["evaluations"]
    assert second[0] == first["evaluations"][0]
    assert [point["step"] for point in second] == [20, 40]
    assert all(math.isfinite(point["loss_policy"]) for point in second)
