"""Noise whose steps hang together."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["coloured"]


@functools.lru_cache(maxsize=16)
def coloured(horizon: int, beta: float) -> Tensor:
    """The matrix that makes ``horizon`` steps of white noise into noise of a power spectrum ``1 / f**beta``.

    Each step keeps a variance of 1. The constant part has the power of the lowest frequency.

    Args:
        horizon: ``T``.
        beta: 0 for white noise, 1 for pink, 2 for that of a random walk.

    Returns:
        float64 ``[T, T]``, to multiply white noise ``[..., T]`` with from the right. Not to be written.

    Example:
        >>> import torch
        >>> from fastwm.planning.noise import coloured
        >>> torch.allclose(coloured(4, 0.0), torch.eye(4, dtype=torch.float64))
        True
        >>> coloured(8, 3.0).square().sum(0).sqrt().tolist()[0]
        1.0

    Source: Timmer and Koenig 1995, "On generating power law noise", as Pinneri et al. 2020 use it.
    """
    if horizon == 1:
        return torch.eye(1, dtype=torch.float64)
    frequency = torch.fft.rfftfreq(horizon, dtype=torch.float64).clamp(min=1.0 / horizon)
    white = torch.eye(horizon, dtype=torch.float64)
    matrix = torch.fft.irfft(torch.fft.rfft(white) * frequency ** (-beta / 2), n=horizon)
    return matrix / matrix.square().sum(0).sqrt()
