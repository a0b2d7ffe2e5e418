"""The Triton balanced KL against the reference; run by ``test_interpreter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.ops.balanced_kl import _backward, _loss
from tests.losses import assert_gradients_near, assert_loss_near


def assert_equal_the_reference(
    kernels: Any, posterior: Tensor, prior: Tensor, *scalars: float
) -> None:
    assert_loss_near(kernels.forward(posterior, prior, *scalars), _loss(posterior, prior, *scalars))
    grad = torch.randn(posterior.shape[:-2], dtype=posterior.dtype)
    actual = kernels.backward(grad, posterior, prior, *scalars)
    assert_gradients_near(actual, _backward(grad, posterior, prior, *scalars))


@pytest.mark.parametrize("free_nats", [0.0, 3.0])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 17), (2, 3, 40, 32), (3, 129), (0, 2, 3)])
def test_equals_the_reference(
    kernels: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    unimix: float,
    free_nats: float,
    nan_filled: None,
) -> None:
    logits = torch.randn(2, *shape, dtype=dtype)
    assert_equal_the_reference(kernels, *logits, 0.7, 0.1, free_nats, unimix)


def test_strided(kernels: Any, nan_filled: None) -> None:
    posterior, prior = torch.randn(2, 3, 5, 4).permute(0, 3, 1, 2)
    assert not posterior.is_contiguous()
    assert_equal_the_reference(kernels, posterior, prior, 1.0, 0.1, 1.0, 0.01)


def test_too_many_classes_are_refused(kernels: Any) -> None:
    n = kernels.MOST_CLASSES + 1
    with pytest.raises(RuntimeError, match=f"up to {n - 1} classes: got {n}"):
        kernels.forward(torch.zeros(1, 1, n), torch.zeros(1, 1, n), 1.0, 0.1, 1.0, 0.01)
