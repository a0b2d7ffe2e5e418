"""Running the scripts of ``examples/`` as a user does."""

from __future__ import annotations

import contextlib
import io
import json
import random
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchrl

FOLDER = Path(__file__).parents[2] / "examples"
# What scripts import from their folder: each run has its own.
SHARED = tuple(path.stem for path in FOLDER.glob("*.py"))


def run_example(
    name: str, out: Path, *arguments: str, status: int = 0
) -> subprocess.CompletedProcess:
    """``python examples/<name>.py --quick --out <out> ...``, in this process, which has torch imported.

    Everything that a script sets for its process is put back.
    """
    script = FOLDER / f"{name}.py"
    command = [str(script), "--quick", "--out", str(out), *arguments]
    threads, level = torch.get_num_threads(), torchrl.logger.level
    states = random.getstate(), np.random.get_state()
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        torch.random.fork_rng(),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [str(FOLDER), *sys.path]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc(file=stderr)
            code = 1
        finally:
            for module in SHARED:
                sys.modules.pop(module, None)
            torch.set_num_threads(threads)
            torchrl.logger.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])
    if isinstance(code, str):  # as the interpreter does
        stderr.write(code + "\n")
        code = 1
    done = subprocess.CompletedProcess(command, code or 0, stdout.getvalue(), stderr.getvalue())
    assert done.returncode == status, done.stderr
    return done


def curve(out: Path) -> dict[str, Any]:
    """The learning curve that a run left."""
    return json.loads((out / "curve.json").read_text())
