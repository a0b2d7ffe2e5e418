"""Triton kernels compiled ahead of time for chips that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastwm.kernels.aot import SHARED_LIMIT, faults

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "bench" / "results" / "kernels_aot.jsonl"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: the CPU builds of torch come without it",
)


def compiler_process(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter, which would compile nothing."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True
    )


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["kernel"], row["variant"], row["arch"]


def test_every_kernel_compiles_within_the_limits_of_the_chips(tmp_path: Path) -> None:
    record = tmp_path / "rows.jsonl"
    # The other model families' kernels take minutes; they are in the recorded rows.
    run = compiler_process(
        "-m", "fastwm.kernels.aot", "--arch", "80", "90", "--record", str(record),
        "--match", "^(?!row_program_kernel)|mlp|rssm-forward",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    compiled = rows(record)
    assert {row["arch"] for row in compiled} == {"sm_80", "sm_90"}
    for row in compiled:
        assert not faults(row), row
        assert 0 < row["registers"] <= 255, row
        if row["variant"].endswith("tf32"):
            assert row["tensor_core_products"] > 0, row
        assert bool(row["bf16_products"]) is row["variant"].endswith("bf16"), row
    recorded = {key(row) for row in rows(RECORD)}
    assert {key(row) for row in compiled} <= recorded, (
        f"record again: python -m fastwm.kernels.aot --record {RECORD.relative_to(ROOT)}"
    )


def test_random_row_programs_have_types() -> None:
    """The interpreter lets a loop change the shape of a variable; a compiler does not."""
    run = compiler_process("-m", "tests.kernels.typed", "--seconds", "15")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "forward and back" in run.stdout


def test_the_recorded_kernels_are_fit_for_every_chip() -> None:
    recorded = rows(RECORD)
    assert {row["arch"] for row in recorded} == {f"sm_{capability}" for capability in SHARED_LIMIT}
    assert not [fault for row in recorded for fault in faults(row)]


def test_a_kernel_that_spills_or_asks_too_much_is_found() -> None:
    """Starve a kernel of registers: the check has to see what ptxas then does."""
    code = """
import json
from fastwm.kernels import aot, lambda_return
build = list(lambda_return.builds())[-1]
build = build._replace(
    constexprs={**build.constexprs, "BLOCK": 1024}, options={**build.options, "maxnreg": 32}
)
print(json.dumps(aot._compile(build, 80)))
"""
    run = compiler_process("-c", code)
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout)
    assert row["registers"] <= 32
    assert any("spills" in fault for fault in faults(row)), row
    greedy = {**row, "shared": row["shared_limit"] + 1}
    assert any("shared memory" in fault for fault in faults(greedy))


def test_the_interpreter_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastwm.kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "TRITON_INTERPRET" in run.stderr
