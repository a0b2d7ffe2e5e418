"""Triton kernels in Triton's interpreter, which needs no GPU.

The interpreter has to be chosen before Triton is imported, for the whole process. So each
``interpreted_*.py`` beside this file, which a normal run does not collect, runs in a process of its
own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastwm.kernels import MODULES

HERE = Path(__file__).parent


@pytest.mark.parametrize("module", [*MODULES, "row_program_noise"])
def test_in_the_interpreter(module: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the CPU builds of torch come without it")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(HERE / f"interpreted_{module}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout, run.stdout
