"""Path integral control with an advantage module: torchrl's decisions from the same seed."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.modules import MPPIPlanner as TorchRLPlanner
from torchrl.modules import ValueOperator
from torchrl.objectives.value import GAE, TDLambdaEstimator

import fastwm
from fastwm.planning import MPPIPlanner
from tests.models import LATENT, make_case
from tests.planning.models import ENGINES

SIZES: dict[str, Any] = {
    "temperature": 1.5, "planning_horizon": 4, "optim_steps": 4, "num_candidates": 32, "top_k": 5,
}  # fmt: skip


def estimator(kind: Any = TDLambdaEstimator) -> Any:
    value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
    return kind(gamma=0.9, lmbda=0.8, value_network=value)


def with_flags(start: TensorDict) -> TensorDict:
    for name in ("done", "terminated"):
        start[name] = torch.zeros(*start.batch_size, 1, dtype=torch.bool)
    return start


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("kind", [TDLambdaEstimator, GAE])
@torch.no_grad()
def test_decisions_are_those_of_torchrl(kind: Any, batch: tuple[int, ...]) -> None:
    case = make_case("linear_done")
    env, start, advantage = case.env([]), with_flags(case.start(*batch)), estimator(kind)
    with fastwm.backend("eager"):
        torch.manual_seed(3)
        want = TorchRLPlanner(env, advantage, **SIZES)(start.clone())["action"]
    for engine in ENGINES:
        torch.manual_seed(3)
        plan = MPPIPlanner(env, advantage, backend=engine, **SIZES)
        got = plan(start.clone())["action"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert plan.explain(start).engine == engine


class Sum(TensorDictModuleBase):
    """An advantage that knows of no flags."""

    in_keys: ClassVar = [("next", "reward")]
    out_keys: ClassVar = ["advantage"]

    def forward(self, tensordict: Any) -> Any:
        total = tensordict["next", "reward"].sum(-2, keepdim=True)
        return tensordict.set("advantage", total.expand_as(tensordict["next", "reward"]).clone())


@torch.no_grad()
def test_rewards_behind_the_end_do_not_count() -> None:
    case = make_case("linear_done")
    env, start = case.env([]), with_flags(case.start(3))
    with fastwm.backend("eager"):
        torch.manual_seed(3)
        want = TorchRLPlanner(env, Sum(), **SIZES)(start.clone())["action"]
    for engine in ENGINES:
        torch.manual_seed(3)
        got = MPPIPlanner(env, Sum(), backend=engine, **SIZES)(start.clone())["action"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_large_advantages_do_not_overflow() -> None:
    case = make_case("linear_done")
    env, start = case.env([]), case.start(3)
    plan = MPPIPlanner(env, estimator(), **{**SIZES, "temperature": 1e4})
    assert torch.isfinite(plan(start)["action"]).all()


def test_no_gradient_flows_through_the_action() -> None:
    case = make_case("linear_done")
    plan = MPPIPlanner(case.env([]), estimator(), **SIZES)
    assert not plan(case.start(3))["action"].requires_grad


@torch.no_grad()
def test_temperature_is_in_the_state_dict_as_in_torchrl() -> None:
    case = make_case("linear_done")
    env, advantage = case.env([]), estimator()
    ours = MPPIPlanner(env, advantage, **SIZES).state_dict()
    theirs = TorchRLPlanner(env, advantage, **SIZES).state_dict()
    assert set(ours) == set(theirs)
