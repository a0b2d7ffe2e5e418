"""Functions that Triton lacks, or has only in libdevice, which the interpreter cannot run.

Near zero, ``exp(x) - 1`` and ``log(1 + x)`` are corrected by what was lost in rounding (Kahan; Goldberg 1991,
theorem 4).
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

__all__ = ["expm1", "log1p", "sigmoid", "two_floats"]


@triton.jit
def expm1(x):
    u = tl.exp(x)
    d = u - 1.0
    inner = d * x / tl.log(tl.where((u == 1.0) | (d == -1.0) | (u > 1e38), 2.0, u))
    return tl.where(u == 1.0, x, tl.where((d == -1.0) | (u > 1e38), d, inner))


@triton.jit
def log1p(x):
    u = x + 1.0
    exact = (u == 1.0) | (u > 1e38)
    inner = tl.log(u) * x / (tl.where(exact, 2.0, u) - 1.0)
    return tl.where(u == 1.0, x, tl.where(u > 1e38, tl.log(u), inner))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


def two_floats(scalar: float) -> tuple[float, float]:
    """A kernel's float argument is a float32: a float64 goes over as two of them."""
    most = float(np.float32(scalar))
    return most, scalar - most
