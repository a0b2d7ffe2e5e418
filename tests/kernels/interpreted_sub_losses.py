"""The Triton sub-losses against the reference; run by ``test_interpreter.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.ops.sub_losses import DISTANCES, _backward, _losses
from tests.losses import assert_gradients_near, assert_loss_near


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, shift: int) -> tuple[list[Any], ...]:
    """Pairs with the distances from ``shift`` on; flags for what is a cross-entropy."""
    predictions, targets, codes = [], [], []
    for i, shape in enumerate(shapes):
        code = (i + shift) % len(DISTANCES)
        x, y = 2 * torch.randn(2, *shape, dtype=dtype)
        flags = DISTANCES[code].startswith("binary")
        predictions.append(x.sigmoid() if DISTANCES[code] == "binary_cross_entropy" else x)
        targets.append(y > 0 if flags else y)
        codes.append(code)
    return predictions, targets, codes


def assert_equal_the_reference(kernels: Any, *arguments: Any) -> None:
    actual, expected = kernels.forward(*arguments), _losses(*arguments)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    for got, want in zip(actual, expected, strict=True):
        if want.isnan():
            assert got.isnan()
        else:
            assert_loss_near(got, want)
    grads = [torch.randn((), dtype=x.dtype) for x in expected]
    assert_gradients_near(kernels.backward(grads, *arguments), _backward(grads, *arguments))


SHAPES = [
    [(1,)],
    [(3, 1), (3, 17)],
    [(5, 1), (5, 1), (5, 129), (40, 33)],
    [(7, 2), (0, 3), (1, 1), (7,), (2000,), (4, 4)],
]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("shift", range(len(DISTANCES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", SHAPES)
def test_equals_the_reference(
    kernels: Any, shapes: list[Any], dtype: torch.dtype, shift: int, mean: bool, nan_filled: None
) -> None:
    predictions, targets, codes = make(shapes, dtype, shift)
    weights = [0.1 + i for i in range(len(shapes))]
    assert_equal_the_reference(kernels, predictions, targets, [], codes, weights, mean)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kind", ["rows", "elements", "nothing"])
def test_masks(kernels: Any, kind: str, mean: bool, nan_filled: None) -> None:
    predictions, targets, codes = make([(5, 1), (5, 3), (5, 400)], torch.float32, 1)
    masks = [torch.rand(5) < 0.5] * 3
    if kind == "elements":
        masks = [torch.rand(x.shape) < 0.5 for x in predictions]
    if kind == "nothing":
        masks = [torch.zeros(5) > 0] * 3
    arguments = (predictions, targets, masks, codes, [1.0, 2.0, 3.0], mean)
    assert_equal_the_reference(kernels, *arguments)


def test_mixed_dtypes_and_strides(kernels: Any, nan_filled: None) -> None:
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    single: list[Tensor] = [torch.randn(3, 5).T, torch.randn(5, 3)]
    arguments = ([x, single[0]], [y, single[1]], [], [1, 0], [1 / 3, 1.0], True)
    assert not single[0].is_contiguous()
    assert_equal_the_reference(kernels, *arguments)


def test_what_is_no_probability_is_nan_with_a_gradient_of_zero(kernels: Any) -> None:
    x, y = torch.tensor([0.5, 1.5]), torch.tensor([True, True])
    (loss,) = kernels.forward([x], [y], [], [3], [1.0], False)
    (grad,) = kernels.backward([torch.ones(())], [x], [y], [], [3], [1.0], False)
    assert loss.isnan()
    assert grad.tolist() == [-2.0, 0.0]


def test_certainty_costs_100(kernels: Any) -> None:
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([True, False])
    (loss,) = kernels.forward([x], [y], [], [3], [1.0], False)
    assert loss == 200.0
