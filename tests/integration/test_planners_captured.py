"""A planner's rollouts run captured, on one plan, however many candidates it sets."""

from __future__ import annotations

import pytest
import torch
from torchrl.modules import CEMPlanner, MPPIPlanner, ValueOperator
from torchrl.objectives.value import TDLambdaEstimator

import fastwm
from fastwm.plan import cache_of
from tests.models import LATENT, make_case


@pytest.mark.parametrize("planner", ["cem", "mppi"])
def test_decisions_share_one_trace_and_match_eager(planner: str) -> None:
    case = make_case("linear")
    env = case.env([])
    sizes = {"planning_horizon": 4, "optim_steps": 3, "num_candidates": 8, "top_k": 3}
    if planner == "cem":
        plan = CEMPlanner(env, **sizes)
    else:
        value = ValueOperator(torch.nn.Linear(LATENT, 1), in_keys=["latent"])
        advantage = TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value)
        plan = MPPIPlanner(env, advantage, temperature=1.0, **sizes)
    start = case.start(2)
    decisions = {}
    with torch.no_grad():
        for backend in ("eager", "captured"):
            with fastwm.backend(backend):
                torch.manual_seed(0)
                decisions[backend] = [plan(start.clone())["action"] for _ in range(8)]
    torch.testing.assert_close(decisions["captured"], decisions["eager"], rtol=1e-4, atol=1e-5)
    assert cache_of(env).traces == 1
