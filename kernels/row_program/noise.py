"""Noise drawn within a kernel; its twin in torch, with all there is to say of it, is
``fastwm/row_program/noise.py``.

Triton's own ``tl.randn`` counts to one number per draw and cuts its normals at 5.7 standard deviations.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exponential", "normal", "uniform"]


@triton.jit
def words(p_key, column, row, step, number):
    """Four words of random bits for each element of a block."""
    zero = (row * 0 + column * 0).to(tl.uint32)  # as wide as both
    c0 = zero + column.to(tl.uint32)
    c1 = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(tl.load(p_key), c0, c1, zero + step.to(tl.uint32), zero + number)


@triton.jit
def whole(high, low):
    """53 random bits."""
    return (high.to(tl.uint64) << 21) | (low >> 11).to(tl.uint64)


@triton.jit
def fraction(high, low, dtype: tl.constexpr):
    """In [0, 1), evenly spaced."""
    if dtype == tl.float64:
        return whole(high, low).to(tl.float64) * 1.1102230246251565e-16
    else:
        return (high >> 8).to(tl.float32) * 5.960464477539063e-08


@triton.jit
def positive(high, low, dtype: tl.constexpr):
    """In (0, 1], the finer the nearer to 0."""
    if dtype == tl.float64:
        return (whole(high, low).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    else:
        return (high.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def uniform(p_key, column, row, step, number, low, scale, most, dtype: tl.constexpr):
    """From ``low`` on, ``most`` at most."""
    w0, w1, _, _ = words(p_key, column, row, step, number)
    x = fraction(w0, w1, dtype) * scale + low
    return tl.where(x > most, most, x)


@triton.jit
def exponential(p_key, column, row, step, number, rate, dtype: tl.constexpr):
    """Never 0."""
    w0, w1, _, _ = words(p_key, column, row, step, number)
    x = -tl.log(positive(w0, w1, dtype))
    if dtype == tl.float64:
        least = 5.551115123125783e-17
    else:
        least = 2.9802322387695312e-08
    return tl.where(x < least, least, x) / rate


@triton.jit
def normal(p_key, column, row, step, number, mean, std, dtype: tl.constexpr):
    """Box and Muller's."""
    w0, w1, w2, w3 = words(p_key, column, row, step, number)
    radius = tl.sqrt(tl.log(positive(w0, w1, dtype)) * -2.0)
    if dtype == tl.float64:
        angle = fraction(w2, w3, dtype)
    else:
        angle = fraction(w1, w0, dtype)
    return radius * tl.cos(angle * 6.283185307179586) * std + mean
