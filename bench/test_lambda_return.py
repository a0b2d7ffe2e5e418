"""The lambda-return beside torchrl's two functions for it.

    pytest bench/test_lambda_return.py --benchmark-enable --benchmark-group-by=group

Each case first holds its provider to the reference: no figure comes from a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import (
    td_lambda_return_estimate,
    vec_td_lambda_return_estimate,
)

from fastwm.ops import lambda_return, lambda_return_reference

GAMMA, LMBDA = 0.99, 0.95
PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "torchrl": td_lambda_return_estimate,
    "torchrl vectorised": vec_td_lambda_return_estimate,
    "fastwm": lambda_return,
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("time", [15, 50])
@pytest.mark.parametrize("batch", [1, 16, 256, 4096])
def test_lambda_return(
    benchmark: Any, batch: int, time: int, backward: bool, provider: str, device: str
) -> None:
    torch.set_num_threads(1)
    shape = (batch, time, 1)
    value = torch.randn(shape, device=device, requires_grad=backward)
    reward = torch.randn(shape, device=device)
    done = torch.rand(shape, device=device) < 0.05
    function = PROVIDERS[provider]

    def run() -> Tensor:
        out = function(GAMMA, LMBDA, value, reward, done)
        if backward:
            value.grad = None
            out.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    # torchrl's vectorised form sums in another order, by convolution.
    expected = lambda_return_reference(GAMMA, LMBDA, value, reward, done)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)

    benchmark.group = (
        f"{device}, [{batch}, {time}, 1], {'forward+backward' if backward else 'forward'}"
    )
    # Read once: value, reward and two flags; written once: the returns.
    benchmark.extra_info["bytes"] = batch * time * (4 + 4 + 1 + 1 + 4)
    benchmark(run)
