"""Rows made by hand, for tests that must not measure."""

from __future__ import annotations

import statistics
from typing import Any

from fastwm.bench.rows import MemoryRow, TimeRow

MACHINE = {
    "cpu": "Test CPU 9000", "isa": "AVX9", "cores": 8, "cores_used": 1, "load": 0.1, "system": "Test",
}  # fmt: skip
COMMON: dict[str, Any] = {
    "run": "run0",
    "date": "2025-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "code": "c0de",
    "command": "python -m fastwm bench",
    "machine": MACHINE,
    "versions": {"python": "3.11.0", "torch": "2.13.0", "jax": None},
    "suite": "mlp",
    "batch": 16,
    "horizon": 15,
    "direction": "forward",
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "provider": "torchrl",
    "ours": False,
    "parity": {"reference": "torchrl", "worst": {"reward": 1e-7}, "used": {"reward": 0.1}},
    "absent": {},
}


def time_row(samples: tuple[float, ...] = (2.0, 4.0, 3.0), **changes: Any) -> TimeRow:
    """A timing whose derived numbers fit its samples."""
    values: dict[str, Any] = {
        **COMMON,
        "rounds": len(samples),
        "calls": 1,
        "samples_ms": list(samples),
        "cpu_share": 0.99,
        "median_ms": statistics.median(samples),
        "q1_ms": min(samples),
        "q3_ms": max(samples),
        "vs_reference": 1.0,
        "vs_best_peer": 1.0,
        "best_peer": "torchrl",
        "gflop": 0.3,
        "gflops": 100.0,
        "limits": {"gflops": 150.0, "how": "by hand", "read_gbs": 50.0},
        "floor_ms": 2.0,
        "floor_compute_ms": 2.0,
        "floor_weights_ms": 1.0,
    }
    return TimeRow(**{**values, **changes})


def memory_row(**changes: Any) -> MemoryRow:
    values: dict[str, Any] = {
        **COMMON,
        "peak_bytes": 48 << 20,
        "output_bytes": 32 << 20,
        "kept_bytes": 0,
        "step_bytes": 50 << 20,
        "how": "by hand",
    }
    return MemoryRow(**{**values, **changes})
