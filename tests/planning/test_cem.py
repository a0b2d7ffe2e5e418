"""The cross-entropy planner: torchrl's decisions from the same seed, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv, ModelBasedEnvBase
from torchrl.modules import MLP, RSSMPrior, SafeModule, WorldModelWrapper
from torchrl.modules import CEMPlanner as TorchRLPlanner

import fastwm
from fastwm.planning import CEMPlanner
from tests.models import ACTION, make_case, module, spec_env
from tests.planning.models import ENGINES, Parts

SIZES: dict[str, Any] = {
    "planning_horizon": 4, "optim_steps": 4, "num_candidates": 32, "top_k": 5,
}  # fmt: skip


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def with_flags(start: TensorDict) -> TensorDict:
    """torchrl's planner needs the done flags in the start."""
    for name in ("done", "terminated"):
        start[name] = torch.zeros(*start.batch_size, 1, dtype=torch.bool)
    return start


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", ["linear_done", "mlp", "rssm_sampled", "context"])
@torch.no_grad()
def test_decisions_are_those_of_torchrl(name: str, batch: tuple[int, ...]) -> None:
    case = make_case(name)
    env, start = case.env([]), with_flags(case.start(*batch))
    with fastwm.backend("eager"):
        torch.manual_seed(3)
        want = TorchRLPlanner(env, **SIZES)(start.clone())["action"]
    for engine in ENGINES:
        torch.manual_seed(3)
        out = CEMPlanner(env, backend=engine, **SIZES)(start.clone())
        assert out["action"].shape == want.shape
        same(out["action"], want)
        assert set(out.keys(True, True)) == {*start.keys(True, True), "action"}


@torch.no_grad()
def test_a_bounded_action_is_projected_as_torchrl_does() -> None:
    parts = Parts(done=True)
    env, start = parts.env(), with_flags(parts.start(2))
    sizes = {**SIZES, "num_candidates": 8, "top_k": 2}
    for engine in ENGINES:
        torch.manual_seed(0)
        with fastwm.backend("eager"):
            want = TorchRLPlanner(env, **sizes)(start.clone())["action"]
        torch.manual_seed(0)
        same(CEMPlanner(env, backend=engine, **sizes)(start.clone())["action"], want)


class OtherEnv(ModelBasedEnvBase):
    """A model-based env of torchrl's own kind."""

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self.state_spec = Composite(hidden=Unbounded((4,)))
        self.observation_spec = Composite(hidden=Unbounded((4,)))
        self.action_spec = Unbounded((1,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: Any, **kwargs: Any) -> TensorDict:
        return self.full_state_spec.rand().update(self.full_observation_spec.rand())


@torch.no_grad()
def test_an_env_of_another_kind_plans_eagerly_as_under_torchrl() -> None:
    env = OtherEnv(
        WorldModelWrapper(
            SafeModule(
                MLP(out_features=4, depth=0, in_features=5), in_keys=["hidden", "action"],
                out_keys=["hidden"],
            ),
            SafeModule(nn.Linear(4, 1), in_keys=["hidden"], out_keys=["reward"]),
        )
    )  # fmt: skip
    start = with_flags(TensorDict({"hidden": torch.randn(3, 4)}, [3]))
    torch.manual_seed(1)
    want = TorchRLPlanner(env, **SIZES)(start.clone())["action"]
    plan = CEMPlanner(env, **SIZES)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="a OtherEnv has no engines"):
        same(plan(start.clone())["action"], want)
    assert plan.explain(start).engine == "eager"
    fastwm.accelerate(env)
    torch.manual_seed(1)
    same(plan(start.clone())["action"], want)
    assert plan.explain(start).engine == "fused"
    with pytest.warns(UserWarning, match="a planner decides anew"):
        assert env.rollout(2, plan).shape == (2,)


@torch.no_grad()
def test_torchrls_dreamer_env_once_accelerated() -> None:
    prior = RSSMPrior(Unbounded((1,)), 8, rnn_hidden_dim=8, state_dim=4, action_dim=1)
    outs = ["_", "_", "state", "belief"]
    reward = MLP(in_features=12, out_features=1, depth=0)
    env = DreamerEnv(
        WorldModelWrapper(
            TensorDictModule(prior, ["state", "belief", "action"], outs),
            TensorDictModule(reward, ["state", "belief"], ["reward"]),
        ),
        prior_shape=(4,),
        belief_shape=(8,),
    )
    env.observation_spec = Composite(state=Unbounded((4,)), belief=Unbounded((8,)))
    env.action_spec, env.reward_spec = Unbounded((1,)), Unbounded((1,))
    start = with_flags(TensorDict({"state": torch.randn(4), "belief": torch.randn(8)}, []))
    torch.manual_seed(0)
    want = TorchRLPlanner(env, **SIZES)(start.clone())["action"]
    plan = CEMPlanner(fastwm.accelerate(env), **SIZES)
    torch.manual_seed(0)
    same(plan(start.clone())["action"], want)
    assert plan.explain(start).engine == "fused"
    # torchrl's own planner cannot: a GRU cell takes one batch dim.
    assert plan(start.expand(2, 3).clone())["action"].shape == (2, 3, 1)


@torch.no_grad()
def test_nested_keys() -> None:
    case = make_case("nested")
    keys = {"action_key": ("control", "action"), "reward_key": ("next", "gain", "reward")}
    actions = {}
    start = case.start(3)
    for engine in ENGINES:
        torch.manual_seed(0)
        plan = CEMPlanner(case.env([]), backend=engine, **keys, **SIZES)
        actions[engine] = plan(start.clone())["control", "action"]
        assert actions[engine].shape == (3, ACTION)
    same(actions["captured"], actions["eager"])
    same(actions["fused"], actions["eager"])


@torch.no_grad()
def test_the_plan_finds_the_best_action() -> None:
    """Reward is highest at 0.5, whatever the state."""
    world_model = fastwm.WorldModel(
        module(nn.Linear(8, ACTION), ["observation"], ["latent"]),
        module(lambda z, a: a + 0 * z, ["latent", "action"], [("next", "latent")]),
        module(lambda z: -(z - 0.5).square().sum(-1, keepdim=True), [("next", "latent")],
               [("next", "reward")]),
    )  # fmt: skip
    env = fastwm.WorldModelEnv(world_model, spec_env(bounded=True), batch_size=[])
    plan = CEMPlanner(env, 4, 8, 64, 8)
    start = TensorDict({"latent": torch.randn(2, 3, ACTION)}, [2, 3])
    action = plan(start)["action"]
    torch.testing.assert_close(action, torch.full_like(action, 0.5), rtol=0, atol=0.12)


@torch.no_grad()
def test_a_planner_is_a_policy_of_an_imagined_env() -> None:
    case = make_case("linear")
    env = case.env([])
    plan = CEMPlanner(env, **SIZES)
    with pytest.warns(UserWarning, match="a planner decides anew at every step"):
        out = env.rollout(3, plan,
                          tensordict=case.start(2))  # fmt: skip
    assert out["action"].shape == (2, 3, ACTION)
    assert plan.explain(case.start(2)).engine == "fused"
