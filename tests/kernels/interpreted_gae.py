"""The Triton GAE against the reference; run by ``test_interpreter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.ops.gae import _backward, _estimate
from fastwm.tolerances import tolerance

GAMMA, LMBDA = 0.99, 0.95


def trajectory(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    done = torch.rand(shape) < 0.2
    terminated = done & (torch.rand(shape) < 0.5)
    return (*torch.randn(3, *shape, dtype=dtype).unbind(), done, terminated)


def assert_equal_the_reference(
    kernels: Any, data: tuple[Tensor, ...], gamma: Any = None, lmbda: Any = None
) -> None:
    value, next_value, reward, done, terminated = data
    rest = (done, terminated, gamma, lmbda, GAMMA, LMBDA)
    bound = tolerance("gae.triton", value.dtype).kwargs()
    actual = kernels.forward(value, next_value, reward, *rest)
    torch.testing.assert_close(actual, _estimate(value, next_value, reward, *rest), **bound)
    # The values stand in for gradients that come back, in whatever layout they have.
    actual = kernels.backward(reward, value, *rest)
    torch.testing.assert_close(actual, _backward(reward, value, *rest), **bound)


@pytest.mark.parametrize("coefficients", ["scalars", "gamma", "lmbda", "both", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 1), (129, 3, 1), (2, 3, 5, 2), (17, 7)])
def test_equals_the_reference(
    kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, coefficients: str, nan_filled: None
) -> None:
    gamma = lmbda = None
    if coefficients in ("gamma", "both"):
        gamma = torch.rand(shape, dtype=dtype)
    if coefficients in ("lmbda", "both"):
        lmbda = torch.rand(shape, dtype=dtype)
    if coefficients == "expanded":
        gamma = torch.rand((), dtype=dtype).expand(shape)
    assert_equal_the_reference(kernels, trajectory(shape, dtype), gamma, lmbda)


@pytest.mark.parametrize("dims", [(1, 0, 2), (2, 1, 0), (1, 0, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3)])
def test_strided(kernels: Any, dims: tuple[int, ...], nan_filled: None) -> None:
    """Among them batch dimensions that no view makes one."""
    data = tuple(x.permute(dims) for x in trajectory((3, 4, 5, 2)[: len(dims)], torch.float32))
    assert not all(x.is_contiguous() for x in data)
    assert_equal_the_reference(kernels, data, torch.rand(data[0].shape))


def test_more_rows_than_a_block(kernels: Any, nan_filled: None) -> None:
    from fastwm.kernels.trajectory import BLOCK

    assert_equal_the_reference(kernels, trajectory((2 * BLOCK + 1, 2, 1), torch.float32))


@pytest.mark.parametrize("shape", [(0, 5, 1), (3, 0, 1)])
def test_empty(kernels: Any, shape: tuple[int, ...]) -> None:
    for out in kernels.forward(*trajectory(shape, torch.float32), None, None, GAMMA, LMBDA):
        assert out.shape == shape
