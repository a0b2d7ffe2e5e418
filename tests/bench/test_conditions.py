"""What a row says about where it was measured: enough to repeat it, nothing about whose machine it was."""

from __future__ import annotations

import getpass
import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import fastwm
from fastwm.bench import cli, conditions, rows
from fastwm.bench.plan import Plan


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[str, list[rows.Row]]:
    """The code's fingerprint before a run, and the run's rows."""
    code = conditions.code_hash()
    command = (
        "--batch 2 --horizon 2 --direction forward --threads 1 --seconds 0.01 --rounds 2 2 --no-plot "
        f"--providers torch-loop --results {tmp_path / 'private'}"
    )
    assert cli.main(command.split()) == 0
    return code, list(rows.read(tmp_path / "private" / "mlp.jsonl"))


def test_rows_are_enough_to_repeat_them_and_name_nobody(
    recorded: tuple[str, list[rows.Row]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, (row, *_) = recorded
    assert row.versions["torch"] == torch.__version__
    assert row.versions["fastwm"] == fastwm.__version__
    assert row.machine["isa"] == torch.backends.cpu.get_cpu_capability()
    assert row.machine["cores_used"] == row.threads == 1
    # Either, so that a file saved meanwhile does not matter.
    assert row.code in (code, conditions.code_hash())
    text = json.dumps(asdict(row))
    private = [
        str(tmp_path),
        str(Path.home()),
        str(Path(fastwm.__file__).parent),
        getpass.getuser(),
    ]
    for word in [*private, platform.node()]:
        assert len(word) < 5 or word not in text

    # Typing the recorded command gives the plan that was run.
    plans: list[Plan] = []
    monkeypatch.setattr(cli, "_run_worker", lambda plan, threads: plans.append(plan) or 0)
    words = row.command.removeprefix("python -m fastwm bench ").split()
    assert cli.main([*words, "--no-plot", "--results", str(tmp_path)]) == 0
    (plan,) = plans
    assert plan.command() == row.command
    assert (plan.batches, plan.horizons, plan.threads) == ((2,), (2,), (1,))


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fastwm"
    (package / "bench").mkdir(parents=True)
    (package / "env.py").write_text("one")
    (package / "bench" / "plots.py").write_text("blue")
    monkeypatch.setattr(conditions, "PACKAGE", package)
    first = conditions.code_hash()
    (package / "bench" / "plots.py").write_text("red")
    assert conditions.code_hash() == first
    (package / "env.py").write_text("two")
    second = conditions.code_hash()
    assert second != first
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cpp").write_text("int x;")
    assert conditions.code_hash() not in (first, second)


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert conditions.commit() == (None, None)
