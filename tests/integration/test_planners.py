"""TorchRL's planners over an imagined env, for any leading batch shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import CEMPlanner, MPPIPlanner, ValueOperator
from torchrl.objectives.value import TDLambdaEstimator

import fastwm
from tests.models import ACTION, LATENT, OBS, CatMLP, linear_world_model, module, spec_env

pytestmark = pytest.mark.usefixtures("each_backend")

BATCHES = [(), (3,), (2, 3)]


def target_env(goal: float = 0.5, **kwargs: Any) -> fastwm.WorldModelEnv:
    """The best action is ``goal`` at every step, whatever the state: reward ``-|action - goal|^2``."""
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, ACTION), ["observation"], ["latent"]),
        module(
            lambda latent, action: action + 0 * latent, ["latent", "action"], [("next", "latent")]
        ),
        module(
            lambda z: -(z - goal).square().sum(-1, keepdim=True),
            [("next", "latent")],
            [("next", "reward")],
        ),
    )
    return fastwm.WorldModelEnv(wm, spec_env(bounded=True), batch_size=[], **kwargs)


def start(batch: Sequence[int], width: int = ACTION) -> TensorDict:
    flags = {name: torch.zeros(*batch, 1, dtype=torch.bool) for name in ("done", "terminated")}
    return TensorDict({"latent": torch.randn(*batch, width), **flags}, batch)


def planner(kind: str, env: fastwm.WorldModelEnv, width: int = ACTION, **kwargs: Any) -> Any:
    settings = {"planning_horizon": 4, "optim_steps": 8, "num_candidates": 64, "top_k": 8} | kwargs
    if kind == "cem":
        return CEMPlanner(env, **settings)
    value = ValueOperator(nn.Linear(width, 1), in_keys=["latent"])
    nn.init.zeros_(value.module.weight)
    nn.init.zeros_(value.module.bias)
    advantage = TDLambdaEstimator(gamma=0.9, lmbda=0.95, value_network=value)
    return MPPIPlanner(env, advantage, temperature=2.0, **settings)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["cem", "mppi"])
@torch.no_grad()
def test_the_plan_finds_the_best_action(kind: str, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    env = target_env()
    action = planner(kind, env)(start(batch))["action"]
    assert action.shape == (*batch, ACTION)
    torch.testing.assert_close(action, torch.full((*batch, ACTION), 0.5), rtol=0, atol=0.12)


@pytest.mark.parametrize("kind", ["cem", "mppi"])
@torch.no_grad()
def test_the_plan_is_that_of_the_eager_path(kind: str) -> None:
    """Every engine imagines the very candidates that eager imagines from the same seed."""
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(
        linear_world_model(done="done"), spec_env(bounded=True), batch_size=[]
    )
    plan, begin = planner(kind, env, LATENT), start((3,), LATENT)
    torch.manual_seed(1)
    got = plan(begin.clone())["action"]
    with fastwm.backend("eager"):
        torch.manual_seed(1)
        want = plan(begin.clone())["action"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["cem", "mppi"])
@torch.no_grad()
def test_a_planner_is_a_policy(kind: str, batch: tuple[int, ...]) -> None:
    """Imagination within imagination: each step of the rollout plans."""
    torch.manual_seed(0)
    env = target_env()
    plan = planner(kind, env)
    out = env.rollout(3, plan, tensordict=start(batch).select("latent"))
    assert out.shape == (*batch, 3)
    assert (out["action"] - 0.5).abs().mean() < 0.1


@pytest.mark.parametrize("kind", ["cem", "mppi"])
@torch.no_grad()
def test_rewards_after_done_do_not_count(kind: str) -> None:
    """A reward of 100 behind the end of the episode must not attract the plan."""

    class Trap(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            finished = z[..., :1]
            small = z[..., 1:].sum(-1, keepdim=True)
            return torch.where(finished > 1.5, torch.full_like(small, 100.0), small)

    def dynamics(latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        # The first action ends the episode when positive; a finished one counts on.
        ends = (action[..., :1] > 0) | (latent[..., :1] > 0)
        return torch.cat([latent[..., :1] + ends, action[..., 1:]], -1)

    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, ACTION), ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], [("next", "latent")]),
        module(Trap(), [("next", "latent")], [("next", "reward")]),
        done_head=module(lambda z: z[..., :1], [("next", "latent")], [("next", "done")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(bounded=True), batch_size=[])
    begin = start(())
    begin["latent"] = torch.zeros(ACTION)
    torch.manual_seed(0)
    action = planner(kind, env, num_candidates=256, top_k=16)(begin)["action"]
    assert action[0] <= 0
    assert action[1] > 0.3


def test_a_planner_on_an_env_of_a_fixed_batch_says_what_to_do() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[3])
    with pytest.raises(RuntimeError, match=r"shape==env.batch_size.*batch_size=\[\]"):
        planner("cem", env, LATENT)(start((3,), LATENT))


@torch.no_grad()
def test_a_planner_over_a_nonlinear_model_beats_random_actions() -> None:
    torch.manual_seed(0)
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(CatMLP(LATENT + ACTION, LATENT, 32), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(bounded=True), batch_size=[])
    begin = start((4,), LATENT).select("latent")
    planned = env.rollout(5, planner("cem", env, LATENT), tensordict=begin.clone())
    random = env.rollout(5, tensordict=begin.clone())
    assert (planned["next", "reward"].sum(1) > random["next", "reward"].sum(1)).all()
