"""Timing in turns: A B C A B C ..., so that whatever the machine does between, it does to all."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Effort", "Samples", "interleave", "synchronizer"]


@dataclass(frozen=True)
class Effort:
    """How long to time.

    Args:
        seconds: aim per configuration, all providers together.
        min_rounds, max_rounds: whatever ``seconds`` says.
        sample_seconds: a sample repeats a short call until it lasts about this long.
    """

    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 30
    sample_seconds: float = 0.02


@dataclass(frozen=True)
class Samples:
    """One provider's turns.

    Args:
        ms: milliseconds per call, one number per round.
        calls: per sample.
        cpu_share: processor time over wall time, median over rounds. Below 1 on one thread, something
            else had the core.
    """

    ms: tuple[float, ...]
    calls: int
    cpu_share: float


def synchronizer(device: str) -> Callable[[], None]:
    """Waits for the device; on CPU everything is done when it returns."""
    if device.startswith("cuda"):
        return torch.cuda.synchronize
    return lambda: None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected between samples, not in them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _seconds(run: Callable[[], Any], calls: int, sync: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds per call; the latter of all threads together."""
    sync()
    cpu, begin = time.process_time(), time.perf_counter()
    for _ in range(calls):
        run()
    sync()
    wall = time.perf_counter() - begin
    return wall / calls, (time.process_time() - cpu) / calls


def interleave(
    runs: Mapping[str, Callable[[], Any]], effort: Effort, device: str = "cpu"
) -> dict[str, Samples]:
    """Time every entry of ``runs`` once per round, all in the same order, round after round.

    Each sample begins with one untimed call where calls are short: the caches then hold its own
    data, not that of the provider before it. Call after warming up; nothing here waits for a
    compiler.
    """
    sync = synchronizer(device)
    with _no_collection():
        # Two looks: the first may still have met cold caches.
        first = {name: _seconds(run, 1, sync)[0] for name, run in runs.items()}
        once = {name: min(first[name], _seconds(run, 1, sync)[0]) for name, run in runs.items()}
        wanted_s = max(effort.sample_seconds, 1e-9)
        calls = {n: math.ceil(wanted_s / max(s, 1e-9)) for n, s in once.items()}
        a_round = sum((calls[n] + (calls[n] > 1)) * once[n] for n in runs)
        wanted = int(effort.seconds / max(a_round, 1e-9))
        rounds = min(max(wanted, effort.min_rounds), effort.max_rounds)
        ms: dict[str, list[float]] = {name: [] for name in runs}
        shares: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                if calls[name] > 1:
                    run()
                wall, cpu = _seconds(run, calls[name], sync)
                ms[name].append(1e3 * wall)
                shares[name].append(cpu / wall)
            gc.collect()
    return {
        name: Samples(tuple(values), calls[name], statistics.median(shares[name]))
        for name, values in ms.items()
    }
