"""The fused losses and GAE beside torchrl's own functions, or the formulas in torch where it has
none.

    pytest bench/test_losses.py --benchmark-enable --benchmark-group-by=group

Each case first holds its provider to the reference: no figure comes from a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.modules import SymExpTwoHot
from torchrl.objectives import categorical_kl_terms, two_hot_cross_entropy
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

import fastwm
from fastwm.ops import gaussian_nll_reference, sub_losses, sub_losses_reference

Case = tuple[dict[str, Callable[..., Tensor]], list[Tensor]]


def gae(batch: int, device: str) -> Case:
    shape = (batch, 15, 1)
    values = list(torch.randn(3, *shape, device=device).unbind())
    done = torch.rand(shape, device=device) < 0.05
    functions = {
        "torchrl": generalized_advantage_estimate,
        "torchrl vectorised": vec_generalized_advantage_estimate,
        "fastwm": fastwm.gae,
    }
    return {
        name: lambda v, n, r, f=f: f(0.99, 0.95, v, n, r, done)[0].sum()
        for name, f in functions.items()
    }, values


def two_hot(batch: int, device: str) -> Case:
    bins = SymExpTwoHot().bins.to(device)
    target = 100 * torch.randn(batch, 1, device=device)
    functions = {"torchrl": two_hot_cross_entropy, "fastwm": fastwm.two_hot_cross_entropy}
    return {name: lambda x, f=f: f(x, target, bins).mean() for name, f in functions.items()}, [
        torch.randn(batch, 255, device=device)
    ]


def balanced_kl(batch: int, device: str) -> Case:
    def torchrl(posterior: Tensor, prior: Tensor) -> Tensor:
        dynamics, representation = categorical_kl_terms(posterior, prior)
        return dynamics + 0.1 * representation

    return {
        "torchrl": torchrl,
        "fastwm": lambda *x: fastwm.balanced_kl(*x).mean(),
    }, list(torch.randn(2, batch, 32, 32, device=device).unbind())


def gaussian_nll(batch: int, device: str) -> Case:
    bounds = torch.full((20,), 0.5, device=device), torch.full((20,), -10.0, device=device)
    return {
        "torch": lambda *x: gaussian_nll_reference(*x).mean(),
        "fastwm": lambda *x: fastwm.gaussian_nll(*x).mean(),
    }, [*torch.randn(3, batch, 20, device=device).unbind(), *bounds]


def four_sub_losses(batch: int, device: str) -> Case:
    widths = (1, 1, 64, 32)
    targets = [torch.randn(batch, n, device=device) for n in widths]
    targets[1] = targets[1] > 0
    distances = ["l2", "binary_cross_entropy_with_logits", "l2", "smooth_l1"]
    functions = {"torch": sub_losses_reference, "fastwm": sub_losses}
    return {
        name: lambda *x, f=f: sum(f(x, targets, distances, [1.0] * 4))  # type: ignore[misc]
        for name, f in functions.items()
    }, [torch.randn(batch, n, device=device) for n in widths]


CASES: dict[str, tuple[Callable[[int, str], Case], tuple[str, ...]]] = {
    "gae": (gae, ("torchrl", "torchrl vectorised", "fastwm")),
    "two_hot_cross_entropy": (two_hot, ("torchrl", "fastwm")),
    "balanced_kl": (balanced_kl, ("torchrl", "fastwm")),
    "gaussian_nll": (gaussian_nll, ("torch", "fastwm")),
    "sub_losses": (four_sub_losses, ("torch", "fastwm")),
}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize(
    ("case", "provider"), [(case, p) for case, (_, ps) in CASES.items() for p in ps]
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("batch", [16, 256, 4096])
def test_losses(
    benchmark: Any, batch: int, backward: bool, case: str, provider: str, device: str
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, (first, *_) = CASES[case]
    functions, inputs = make(batch, device)
    inputs = [x.requires_grad_(backward) for x in inputs]

    def run(name: str = provider) -> list[Tensor]:
        out = functions[name](*inputs)
        result = [out, *torch.autograd.grad(out, inputs)] if backward else [out]
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    # torchrl's vectorised GAE sums in another order, by convolution.
    torch.testing.assert_close(run(), run(first), rtol=1e-4, atol=1e-4)
    benchmark.group = f"{case}, {device}, {batch} rows, " + (
        "forward+backward" if backward else "forward"
    )
    benchmark(run)
