"""Ratios, work, floors and turns: the numbers that the report is made of."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastwm.bench import stats
from fastwm.bench.limits import Limits, floor, measure
from fastwm.bench.plan import Plan
from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers import torch_loop
from fastwm.bench.suites import suite
from fastwm.bench.timing import Effort, interleave


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine was ten times slower in the second round; the ratio of medians would be 3.5.
    theirs, ours = [4.0, 40.0, 7.0], [2.0, 20.0, 2.0]
    assert stats.median_ratio(theirs, ours) == 2.0
    with pytest.raises(ValueError, match="zip"):
        stats.median_ratio([1.0, 2.0], [1.0])


def test_the_best_peer_is_the_fastest_that_is_not_ours() -> None:
    samples = {"slow": [9.0, 9.0], "peer": [3.0, 5.0], "ours": [1.0, 1.0]}
    assert stats.best_peer(samples, {"ours"}) == "peer"
    assert stats.best_peer({"ours": [1.0]}, {"ours"}) is None


def test_quartiles_of_one_and_of_many() -> None:
    assert stats.quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert stats.quartiles([1.0, 2.0, 3.0, 4.0]) == (1.75, 2.5, 3.25)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_counted_work_is_the_work_done(direction: str) -> None:
    case = Case("mlp", batch=3, horizon=4, direction=direction, threads=1)
    mlp = suite("mlp")
    problem = Problem.of(case, mlp)
    with FlopCounterMode(display=False) as counter:
        found = torch_loop.loop(problem.model.step, problem.start, problem.horizon, mlp.outputs)
        if case.backward:
            heads = [found[name] for name in problem.cotangents]
            torch.autograd.backward(heads, list(problem.cotangents.values()))
    assert mlp.flop(3, 4, case.backward) == counter.get_total_flops()


def test_the_floor_is_the_larger_of_arithmetic_and_reading() -> None:
    mlp, limits = suite("mlp"), Limits(gflops=100.0, how="by hand", read_gbs=50.0)
    small = floor(Case("mlp", 1, 10, "forward", 1), mlp, limits, weight_bytes=10**6)
    assert small.compute_ms == pytest.approx(10 * 530944 / 100e9 * 1e3)
    assert small.weights_ms == pytest.approx(10 * 1e6 / 50e9 * 1e3)
    assert small.ms == small.weights_ms
    large = floor(Case("mlp", 1000, 10, "backward", 1), mlp, limits, weight_bytes=10**6)
    assert large.compute_ms == pytest.approx(3000 * small.compute_ms)
    assert large.weights_ms == pytest.approx(2 * small.weights_ms)
    assert large.ms == large.compute_ms


def test_limits_are_measured() -> None:
    found = measure(weight_bytes=1 << 18, budget_s=0.05)
    # Any machine that runs torch is between these: a wrong unit would be a factor of 1000 off.
    assert 0.5 < found.gflops < 20_000
    assert 0.2 < found.read_gbs < 20_000
    assert "torch.mm" in found.how


def test_providers_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ABC"}
    effort = Effort(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=0.0)
    samples = interleave(runs, effort)
    assert order[-9:] == list("ABCABCABC")
    assert all(len(s.ms) == 3 and s.calls == 1 for s in samples.values())


def test_a_short_call_is_repeated_within_a_sample() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    effort = Effort(seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=1e-3)
    samples = interleave({"short": run}, effort)["short"]
    assert samples.calls > 10
    # Two looks to find out how short, then per round one call to warm up and the sample itself.
    assert calls == 2 + 2 * (1 + samples.calls)


def test_a_sample_measures_time() -> None:
    matrix = torch.randn(256, 256)
    effort = Effort(seconds=0.0, min_rounds=5, max_rounds=5, sample_seconds=0.01)
    found = interleave(
        {"one": lambda: matrix @ matrix, "four": lambda: [matrix @ matrix for _ in range(4)]},
        effort,
    )
    assert 2.5 < stats.median_ratio(found["four"].ms, found["one"].ms) < 6


def test_time_without_the_core_shows() -> None:
    effort = Effort(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=0.0)
    matrix = torch.randn(256, 256)

    def works() -> None:
        for _ in range(10):
            torch.mm(matrix, matrix)

    found = interleave({"waits": lambda: time.sleep(0.02), "works": works}, effort)
    assert found["waits"].cpu_share < 0.2
    assert found["works"].cpu_share > found["waits"].cpu_share


def test_a_plan_survives_the_way_to_its_process() -> None:
    plan = Plan("mlp", (1, 4), (5,), ("forward",), (1, 2), ("torchrl",), "cpu", "rows", Effort(2.0))
    assert Plan.from_json(plan.to_json()) == plan
    cases = list(plan.cases())
    assert [(c.threads, c.batch) for c in cases] == [(1, 1), (1, 4), (2, 1), (2, 4)]
