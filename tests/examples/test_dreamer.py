"""``examples/dreamer.py``: a quick run leaves its files, resumes, and learns alike on other engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.examples import curve, run_example

LEARNT = ("returns", "imagined_return", "value_error", "loss_model_kl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dreamer") / "results"
    run_example("dreamer", out)
    return out


def test_quick_run_leaves_its_files(finished: Path) -> None:
    record = curve(finished)
    assert [point["step"] for point in record["evaluations"]] == [20, 40, 60, 80]
    assert all(len(point["returns"]) == 2 for point in record["evaluations"])
    assert record["family"] == "dreamer"
    assert record["options"]["backend"] == "auto"
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoint.pt").exists()


def test_a_resumed_run_is_the_run_that_was_never_stopped(finished: Path, tmp_path: Path) -> None:
    run_example("dreamer", tmp_path, "--steps", "40")
    assert [point["step"] for point in curve(tmp_path)["evaluations"]] == [20, 40]
    run_example("dreamer", tmp_path, "--resume")
    whole, resumed = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    for key in LEARNT:
        assert [p[key] for p in resumed] == [p[key] for p in whole], key


@pytest.mark.parametrize("choice", [("--backend", "eager"), ("--classes", "torchrl")])
def test_eager_and_torchrls_env_learn_from_the_same_dreams(
    choice: tuple[str, str], finished: Path, tmp_path: Path
) -> None:
    run_example("dreamer", tmp_path, *choice)
    own, other = curve(finished)["evaluations"], curve(tmp_path)["evaluations"]
    for ours, theirs in zip(own, other, strict=True):
        for key in LEARNT:
            # Roundings of the engine, grown over the updates and the episodes since.
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3), key
