"""The table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

import fastwm
from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers.env_rollout import fastwm as engine
from fastwm.bench.suites import suite
from fastwm.tolerances import TOLERANCES, Tolerance, rollout_tolerance, tolerance
from tests.models import make_case
from tests.rounded_products import RoundedProducts, tf32, tf32_truncated


def test_every_line_says_where_it_comes_from() -> None:
    assert all(len(line.why.split()) >= 3 for line in TOLERANCES.values())


def test_the_designs_promise_is_kept() -> None:
    assert tolerance("rollout", torch.float32).rtol == 1e-5


def test_float64_is_never_looser_than_float32() -> None:
    for (what, dtype), line in TOLERANCES.items():
        if dtype == torch.float64:
            single = tolerance(what, torch.float32)
            assert (line.rtol, line.atol) <= (single.rtol, single.atol)


def test_what_has_no_line_is_refused() -> None:
    with pytest.raises(KeyError, match=r"no line for 'nothing' at torch\.float32"):
        tolerance("nothing", torch.float32)


# ---------------------------------------------------------------- tensor-float32


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def line(precision: str, gradient: bool) -> Tolerance:
    what = "rollout.gradient" if gradient else "rollout"
    return tolerance(what if precision == "highest" else f"{what}.tf32", torch.float32)


@pytest.mark.parametrize("gradient", [False, True])
def test_float32_on_cuda_is_held_to_how_torch_multiplies_there(
    precision: str, gradient: bool
) -> None:
    for device in ("cuda", torch.device("cuda", 3)):
        found = rollout_tolerance(torch.float32, device, gradient=gradient)
        assert found is line(precision, gradient)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_torch_never_multiplies_in_tf32_keeps_its_line(precision: str, gradient: bool) -> None:
    what = "rollout.gradient" if gradient else "rollout"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert rollout_tolerance(dtype, "cpu", gradient=gradient) is tolerance(what, dtype)
    for dtype in (torch.float64, torch.bfloat16):
        assert rollout_tolerance(dtype, "cuda", gradient=gradient) is tolerance(what, dtype)


def test_parity_takes_that_line(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def as_on_cuda(
        dtype: torch.dtype, device: torch.device, *, gradient: bool, rounds_weights: bool
    ) -> Tolerance:
        assert not rounds_weights
        asked.append(device.type)
        return rollout_tolerance(dtype, "cuda", gradient=gradient)

    monkeypatch.setattr("fastwm.parity.rollout_tolerance", as_on_cuda)
    case = make_case("linear")
    report = fastwm.check_parity(case.env([2]), case.policy, case.start(2), 3)
    assert set(asked) == {"cpu"}  # where the results lie, and nowhere else
    for comparison in report.engines[0].comparisons:
        if comparison.tolerance:  # flags have none
            bound = line(precision, comparison.name.startswith("grad of"))
            assert bound.rtol <= comparison.tolerance
            # Values of order one: of float32's line nothing is near tensor-float32's.
            assert (comparison.tolerance > 1e-3) is (precision != "highest")


@cache
def rollout(name: str, rounded: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Fifteen steps and all gradients of one of the bench's models, eagerly, with products so rounded."""
    problem = Problem.of(Case(name, 16, 15, "backward", 1), suite(name))
    built = engine("eager")(problem)
    with nullcontext() if rounded is None else RoundedProducts(rounded) as mode:
        found = built.read(built.run())
    assert mode is None or mode.products
    return found


def excess(name: str, one: dict[str, Tensor], other: dict[str, Tensor], suffix: str) -> float:
    """The largest error as a part of what the lines allow for it."""
    worst = 0.0
    for key, want in other.items():
        what = "rollout.gradient" if key.startswith("grad/") else "rollout"
        bound = tolerance(what + suffix, torch.float32)
        allowed = bound.atol + bound.rtol * want.abs()
        worst = max(worst, ((one[key] - want).abs() / allowed).max().item())
    return worst


def bfloat16_truncated(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


# Not of rssm_v3: where its categorical draws are near ties, rounded probabilities choose another class.
@pytest.mark.parametrize("name", ["mlp", "mbpo", "rssm", "tdmpc2"])
def test_the_line_of_tf32_holds_and_is_not_idle(name: str) -> None:
    exact = rollout(name, None)
    nearest, truncated = rollout(name, tf32), rollout(name, tf32_truncated)
    for one, other in ((nearest, exact), (truncated, exact), (truncated, nearest)):
        assert excess(name, one, other, "") > 10  # float32's line would call it wrong
        assert excess(name, one, other, ".tf32") < 1
    # Three bits less are seen.
    assert excess(name, rollout(name, bfloat16_truncated), exact, ".tf32") > 1
