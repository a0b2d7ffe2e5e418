"""``examples/mbpo.py``: a smoke run leaves its files, resumes, and is the same on other engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.examples import curve, run_example


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mbpo") / "results"
    run_example("mbpo", out)
    return out


def test_quick_run_leaves_its_files(finished: Path) -> None:
    record = curve(finished)
    assert [point["step"] for point in record["evaluations"]] == [20, 40, 60]
    assert all(len(point["returns"]) == 2 for point in record["evaluations"])
    assert [point["length"] for point in record["evaluations"]] == [1, 2, 3]
    assert record["family"] == "mbpo"
    assert record["options"]["backend"] == "auto"
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoint.pt").exists()


def test_a_resumed_run_is_the_run_that_was_never_stopped(finished: Path, tmp_path: Path) -> None:
    run_example("mbpo", tmp_path, "--steps", "40")
    assert [point["step"] for point in curve(tmp_path)["evaluations"]] == [20, 40]
    run_example("mbpo", tmp_path, "--resume")
    whole, resumed = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    assert [p["returns"] for p in resumed] == [p["returns"] for p in whole]
    assert [p["model_error"] for p in resumed] == [p["model_error"] for p in whole]


@pytest.mark.parametrize("choice", [("--backend", "eager"), ("--classes", "torchrl")])
def test_eager_and_torchrls_classes_learn_from_the_same_imagination(
    choice: tuple[str, str], finished: Path, tmp_path: Path
) -> None:
    run_example("mbpo", tmp_path, *choice)
    own, other = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    for ours, theirs in zip(own, other, strict=True):
        # Roundings of the engine, grown over the updates and the episodes since.
        assert theirs["returns"] == pytest.approx(ours["returns"], rel=1e-3)


def test_help_says_what_torchrls_classes_lack(tmp_path: Path) -> None:
    printed = run_example("mbpo", tmp_path, "--help").stdout
    assert "--classes torchrl" in printed
    assert "rewards given their last dim back" in printed
