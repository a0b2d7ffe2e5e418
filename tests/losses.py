"""What the tests of the fused losses share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastwm.tolerances import tolerance
from tests.compare import assert_close
from tests.row_program.executing import threads

__all__ = ["assert_gradients_near", "assert_loss_near", "at_one_and_two_threads", "gradients"]


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a fixed weighting of the elements of what ``function`` returns."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device)
    (out.reshape(-1) * weight).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_loss_near(actual: Tensor, expected: Tensor, off: float = 0.0) -> None:
    """``off``: what the input's own rounding may change, beside the table."""
    bound = tolerance("loss", expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=bound.rtol, atol=bound.atol + off)


def assert_gradients_near(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Relative to the largest of a gradient: its parts are differences that nearly cancel."""
    assert len(actual) == len(expected)
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert_close(got, want, "loss.gradient", f"gradient {i}")


def at_one_and_two_threads(function: Callable[[], Any]) -> tuple[Any, Any]:
    with threads(1):
        one = function()
    with threads(2):
        return one, function()
