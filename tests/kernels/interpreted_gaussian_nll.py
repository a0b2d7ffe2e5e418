"""The Triton Gaussian loss against the reference; run by ``test_interpreter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.ops.gaussian_nll import _backward, _loss
from tests.losses import assert_gradients_near, assert_loss_near


def assert_equal_the_reference(kernels: Any, *inputs: Tensor) -> None:
    assert_loss_near(kernels.forward(*inputs), _loss(*inputs))
    grad = torch.randn(inputs[0].shape[:-1], dtype=inputs[0].dtype)
    assert_gradients_near(kernels.backward(grad, *inputs), _backward(grad, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 3), (2, 3, 129), (17,), (0, 5)])
def test_equals_the_reference(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, nan_filled: None
) -> None:
    mean, logvar, target = torch.randn(3, *shape, dtype=dtype)
    high, low = torch.randn(2, shape[-1], dtype=dtype)
    assert_equal_the_reference(kernels, mean, 4 * logvar, target, high.abs(), -2 - low.abs())


def test_strided(kernels: Any, nan_filled: None) -> None:
    inputs = (*torch.randn(3, 5, 7).mT, torch.full((5,), 0.5), torch.full((), -3.0).expand(5))
    assert not inputs[0].is_contiguous()
    assert_equal_the_reference(kernels, *inputs)
