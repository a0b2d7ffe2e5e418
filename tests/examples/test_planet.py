"""``examples/planet.py``: a smoke run leaves its files, resumes, and is the same on other engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.examples import curve, run_example


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planet") / "results"
    run_example("planet", out)
    return out


def test_quick_run_leaves_its_files(finished: Path) -> None:
    record = curve(finished)
    assert [point["step"] for point in record["evaluations"]] == [20, 40, 60]
    assert all(len(point["returns"]) == 2 for point in record["evaluations"])
    assert all(point["loss_model_reward"] > 0 for point in record["evaluations"])
    assert record["family"] == "planet"
    assert record["options"]["backend"] == "auto"
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoint.pt").exists()


def test_a_resumed_run_is_the_run_that_was_never_stopped(finished: Path, tmp_path: Path) -> None:
    run_example("planet", tmp_path, "--steps", "40")
    assert [point["step"] for point in curve(tmp_path)["evaluations"]] == [20, 40]
    run_example("planet", tmp_path, "--resume")
    whole, resumed = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    assert [p["returns"] for p in resumed] == [p["returns"] for p in whole]
    assert [p["loss_model_kl"] for p in resumed] == [p["loss_model_kl"] for p in whole]


@pytest.mark.parametrize("choice", [("--backend", "eager"), ("--classes", "torchrl")])
def test_eager_and_torchrls_classes_learn_from_the_same_numbers(
    choice: tuple[str, str], finished: Path, tmp_path: Path
) -> None:
    run_example("planet", tmp_path, *choice)
    own, other = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    for ours, theirs in zip(own, other, strict=True):
        # Roundings of the engine, grown over the updates and the episodes since.
        assert theirs["returns"] == pytest.approx(ours["returns"], rel=1e-3)
