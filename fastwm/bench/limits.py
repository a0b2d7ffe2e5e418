"""What this machine can do, measured in the providers' own process, and the floor that follows.

The peak is the best rate of ``torch.mm`` in float32 over a few square sizes. It is what the best
matrix product at hand reaches, not what the data sheet promises, so a kernel may in principle come
out above 100 %. Where the C++ library is there, the rate of bare multiply-adds is recorded as well, and the
floor is taken from the larger of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from fastwm.bench.problem import Case
from fastwm.bench.suites.base import Suite
from fastwm.bench.timing import synchronizer

__all__ = ["Floor", "Limits", "floor", "measure"]


@dataclass(frozen=True)
class Limits:
    """Measured limits of the machine at one thread count.

    Args:
        gflops: multiply-adds as two operations, ``torch.mm``.
        how: the shape that reached it.
        read_gbs: reading a buffer of the size of the model's weights again and again.
        fma_gflops: multiply-adds in registers; None where there is nothing to measure it with.
    """

    gflops: float
    how: str
    read_gbs: float
    fma_gflops: float | None = None

    @property
    def peak_gflops(self) -> float:
        """The highest rate seen; no product can be faster for long."""
        return max(self.gflops, self.fma_gflops or 0.0)

    def to_dict(self) -> dict[str, float | str | None]:
        return asdict(self)


def _best_seconds(run: Callable[[], object], sync: Callable[[], None], budget_s: float) -> float:
    run()
    sync()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < budget_s:
        at = time.perf_counter()
        run()
        sync()
        best = min(best, time.perf_counter() - at)
    return best


def measure(weight_bytes: int, device: str = "cpu", budget_s: float = 1.2) -> Limits:
    """Measure both limits in about ``budget_s`` seconds.

    The read rate is the best of a sum, a dot product and a matrix-vector product over a buffer of
    ``weight_bytes``: at small batches every step has to read all the weights, from whichever cache
    holds them.
    """
    sync = synchronizer(device)
    sizes = (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192)
    gflops, how = 0.0, ""
    with torch.no_grad():
        for n in sizes:
            a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
            out = torch.empty(n, n, device=device)

            product = partial(torch.mm, a, b, out=out)
            rate = 2 * n**3 / _best_seconds(product, sync, budget_s / (2 * len(sizes))) / 1e9
            if rate > gflops:
                gflops, how = rate, f"torch.mm float32 {n}x{n}x{n}"
        columns = 256
        matrix = torch.randn(max(1, weight_bytes // (4 * columns)), columns, device=device)
        flat, vector = matrix.view(-1), torch.randn(columns, device=device)
        reads: tuple[Callable[[], object], ...] = (
            flat.sum,
            lambda: torch.dot(flat, flat),
            lambda: torch.mv(matrix, vector),
        )
        seconds = min(_best_seconds(read, sync, budget_s / (2 * len(reads))) for read in reads)
    return Limits(gflops, how, 4 * flat.numel() / seconds / 1e9, _fma_gflops(device))


def _fma_gflops(device: str, budget_s: float = 0.2) -> float | None:
    """GFLOP/s of multiply-adds in registers: a thread's best, times the threads; None without the library."""
    op = getattr(torch.ops.fastwm, "multiply_add_peak", None)
    if op is None or device != "cpu":
        return None
    done, best, begin = op(1000), 0.0, time.perf_counter()
    while time.perf_counter() - begin < budget_s:
        at = time.perf_counter()
        done = op(500_000)
        best = max(best, done / (time.perf_counter() - at))
    return best * torch.get_num_threads() / 1e9


@dataclass(frozen=True)
class Floor:
    """The least time of a configuration: the larger of arithmetic and reading the weights."""

    compute_ms: float
    weights_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.weights_ms)


def floor(case: Case, suite: Suite, limits: Limits, weight_bytes: int) -> Floor:
    """Needed products at the peak; needed weights read once per step and pass, at the measured
    rate."""
    passes = 2 if case.backward else 1
    if suite.weights_read is not None:
        weight_bytes = int(4 * suite.weights_read(case.batch))
    return Floor(
        compute_ms=suite.flop(case.batch, case.horizon, case.backward) / limits.peak_gflops / 1e6,
        weights_ms=passes * case.horizon * weight_bytes / limits.read_gbs / 1e6,
    )
