"""What planning costs: finding the plan when nothing changed, finding it after an optimizer step, making it.

    pytest bench/test_plan_overhead.py --benchmark-enable

Targets on one CPU core without Inductor: under 40 us around the loop of the linear and MLP cases when
nothing changed, under 1 s for a first call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastwm
from fastwm.plan import cache_of, plan_for
from fastwm.request import Request
from fastwm.rollout import start_of
from tests.models import make_case

CASES = ("linear", "mlp_sampled", "rssm_sampled", "multi_agent")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(name: str) -> tuple[Any, Request, Any]:
    case = make_case(name)
    env = case.env([16])
    start = case.start(16)
    return env, Request(15, case.policy, tensordict=start), case


@pytest.mark.parametrize("name", CASES)
def test_nothing_changed(benchmark: Any, name: str) -> None:
    """``plan_for`` alone: the key, the watch, the kinds of the constants."""
    env, request, _ = made(name)
    td = start_of(env, request)
    plan_for(env, request, td, None)
    benchmark(plan_for, env, request, td, None)
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("name", CASES)
def test_all_before_the_loop(benchmark: Any, name: str) -> None:
    """What a rollout unlike the one before does before its first step: checks, the start, the plan."""
    env, request, _ = made(name)

    def plan() -> None:
        request.refuse(env)
        plan_for(env, request, start_of(env, request), request.feed(env, td.batch_size))

    td = start_of(env, request)
    plan()
    benchmark(plan)
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("name", CASES)
def test_all_around_the_loop(benchmark: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole rollout like the one before, but for the loop itself."""
    env, request, case = made(name)
    with torch.no_grad(), fastwm.backend("captured"):
        env.rollout(15, case.policy, tensordict=request.tensordict)
        plans: Any = cache_of(env).plans.values()
        ((plan,),) = plans
        results: list[Any] = []
        run = plan.loop.run

        def kept(*args: Any, **kwargs: Any) -> Any:
            results.append(run(*args, **kwargs))
            return results[0]

        monkeypatch.setattr(plan.loop, "run", kept)
        env.rollout(15, case.policy, tensordict=request.tensordict)
        monkeypatch.setattr(plan.loop, "run", lambda *_, **__: results[0])
        benchmark(env.rollout, 15, case.policy, tensordict=request.tensordict)
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("name", CASES)
def test_after_an_optimizer_step(benchmark: Any, name: str) -> None:
    env, request, case = made(name)
    td = start_of(env, request)
    plan_for(env, request, td, None)
    parameters = [p for p in case.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    for p in parameters:
        p.grad = torch.zeros_like(p)

    def setup() -> None:
        optimizer.step()

    benchmark.pedantic(plan_for, (env, request, td, None), setup=setup, rounds=200)
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("name", CASES)
def test_first_call(benchmark: Any, name: str) -> None:
    """Watching, tracing twice, generating and verifying the loop."""

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        env, request, _ = made(name)
        return (env, request, start_of(env, request), None), {}

    benchmark.pedantic(plan_for, setup=setup, rounds=10, warmup_rounds=1)
