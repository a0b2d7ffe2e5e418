"""Running the scripts of ``examples/`` as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples"


def run_example(
    name: str, out: Path, *arguments: str, status: int = 0
) -> subprocess.CompletedProcess:
    """``python examples/<name>.py --quick --out <out> ...`` in a process of its own."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == status, done.stderr
    return done


def curve(out: Path) -> dict[str, Any]:
    """The learning curve that a run left."""
    return json.loads((out / "curve.json").read_text())
