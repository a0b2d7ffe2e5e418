"""The Triton two-hot cross-entropy against the reference; run by ``test_interpreter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastwm.ops.two_hot_cross_entropy import _backward, _loss
from fastwm.tolerances import tolerance


@pytest.mark.parametrize("symlog", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (129, 3), (2, 3, 255), (17,), (0, 5)])
def test_equals_the_reference(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, symlog: bool, nan_filled: None
) -> None:
    """Targets beyond the bins among them, and on one."""
    logits, target = torch.randn(shape, dtype=dtype), 3 * torch.randn(shape[:-1], dtype=dtype)
    bins = torch.linspace(-2, 2, shape[-1], dtype=dtype)
    if target.numel() > 1:
        target.view(-1)[0], target.view(-1)[1] = 0.0, 2.0
    args = (logits, target, bins, symlog)
    grad = torch.randn(shape[:-1], dtype=dtype)
    bound = tolerance("loss", dtype).kwargs()
    torch.testing.assert_close(kernels.forward(*args), _loss(*args), **bound)
    bound = tolerance("loss.gradient", dtype).kwargs()
    torch.testing.assert_close(kernels.backward(grad, *args), _backward(grad, *args), **bound)


def test_strided(kernels: Any, nan_filled: None) -> None:
    logits, target = torch.randn(5, 7).T, torch.randn(7, 2)[:, 0]
    args = (logits, target, torch.linspace(-2, 2, 10)[::2], False)
    bound = tolerance("loss", torch.float32).kwargs()
    torch.testing.assert_close(kernels.forward(*args), _loss(*args), **bound)
    grad = torch.ones(()).expand(7)
    bound = tolerance("loss.gradient", torch.float32).kwargs()
    torch.testing.assert_close(kernels.backward(grad, *args), _backward(grad, *args), **bound)


def test_too_many_bins_are_refused(kernels: Any) -> None:
    n = kernels.MOST_BINS + 1
    with pytest.raises(RuntimeError, match=f"up to {n - 1} bins: got {n}"):
        kernels.forward(torch.zeros(1, n), torch.zeros(1), torch.arange(float(n)), False)
