"""Forward-mode AD: the kernels have no tangents, so that the references run, and none is lost in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastwm
from fastwm.ops.sub_losses import sub_losses

FLAGS = torch.zeros(3, 4, 1, dtype=torch.bool)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "lambda_return": lambda x: fastwm.lambda_return(0.9, 0.8, x, x * 2, FLAGS),
    "gae": lambda x: fastwm.gae(0.9, 0.8, x, x * 3, x * 2, FLAGS)[0],
    "two_hot_cross_entropy": lambda x: fastwm.two_hot_cross_entropy(
        x.expand(3, 4, 5), torch.ones(3, 4, 1), (-1.0, 1.0)
    ),
    "balanced_kl": lambda x: fastwm.balanced_kl(x.expand(3, 4, 5), x.expand(3, 4, 5) * 0.5),
    "gaussian_nll": lambda x: fastwm.gaussian_nll(
        x, x, torch.ones(3, 4, 1), torch.full((1,), 2.0), torch.full((1,), -2.0)
    ),
    "sub_losses": lambda x: sub_losses([x], [torch.ones(3, 4, 1)], ["l2"], [1.0])[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_goes_through(name: str) -> None:
    x, direction = torch.randn(2, 3, 4, 1, dtype=torch.float64)
    call = CALLS[name]

    def double(value: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return call(value)
        finally:
            torch.set_default_dtype(before)

    with forward_ad.dual_level():
        out = double(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    step = 1e-6
    by_differences = (double(x + step * direction) - double(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, by_differences, rtol=1e-5, atol=1e-7)
