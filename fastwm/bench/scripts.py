"""What the benches under ``bench/`` share: timing in turns on a machine that others use too, and rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastwm.bench.conditions import stamp
from fastwm.bench.timing import synchronizer

__all__ = ["in_turns", "record"]


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, *, warmups: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every run in every round, all in the same order, round after round.

    Args:
        runs: by name.
        warmups: rounds before the first that counts.
        device: on ``"cpu"`` processor time of this thread, which what else runs there does not lengthen;
            elsewhere wall time, waiting for the device.

    Example:
        >>> from fastwm.bench.scripts import in_turns
        >>> {name: len(ms) for name, ms in in_turns({"sum": lambda: sum(range(9))}, 3).items()}
        {'sum': 3}
    """
    clock = time.thread_time if device == "cpu" else time.perf_counter
    wait = synchronizer(device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmups + rounds):
        for name, run in runs.items():
            wait()
            begin = clock()
            run()
            wait()
            taken[name].append(1e3 * (clock() - begin))
    return {name: ms[warmups:] for name, ms in taken.items()}


def record(path: Path, row: Mapping[str, Any], device: str = "cpu") -> None:
    """Append a row, with machine, versions and commit, to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**row, **stamp(device)}) + "\n")
