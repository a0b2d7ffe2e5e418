"""What planners are given and cannot use: a clear error, or no trace of it in the action."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrl.modules import ValueOperator
from torchrl.objectives.value import TDLambdaEstimator

import fastwm
from fastwm.planning import CEMPlanner, ICEMPlanner, MPPIPlanner, Planner, TDMPC2Planner
from tests.models import AsDone, make_case, module, spec_env
from tests.planning.models import ACTION, ENGINES, LATENT, OBS, Parts

NAN = float("nan")


def env_of(reward: Callable[[Tensor, Tensor], Tensor], parts: Parts) -> fastwm.WorldModelEnv:
    world_model = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(parts.dynamics, ["latent", "action"], [("next", "latent")]),
        module(reward, ["latent", "action"], [("next", "reward")]),
    )
    return fastwm.WorldModelEnv(
        world_model, spec_env(obs=OBS, action=ACTION, bounded=True), batch_size=[]
    )


def all_planners(env: fastwm.WorldModelEnv, parts: Parts, **kwargs: Any) -> list[Planner]:
    value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
    advantage = TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value)
    sizes = {"planning_horizon": 3, "optim_steps": 3, "num_candidates": 32, "top_k": 20, **kwargs}
    tdmpc2 = {name: value for name, value in kwargs.items() if name == "backend"}
    return [
        CEMPlanner(env, **sizes),
        ICEMPlanner(env, **sizes),
        MPPIPlanner(env, advantage, temperature=1.0, **sizes),
        TDMPC2Planner(
            env, policy=parts.policy, value=parts.value, num_samples=32, num_elites=20,
            num_pi_trajs=4, iterations=3, max_std=1.0, **tdmpc2,
        ),
    ]  # fmt: skip


def half_nan(latent: Tensor, action: Tensor) -> Tensor:
    """NaN for a first action above 0.8, inf for one below -0.9, else the second action."""
    x = action[..., :1]
    reward = action[..., 1:] + 0 * latent[..., :1]
    reward = torch.where(x > 0.8, NAN, reward)
    return torch.where(x < -0.9, float("inf"), reward)


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_candidates_that_are_not_finite_are_never_elites(engine: str) -> None:
    parts = Parts()
    for plan in all_planners(env_of(half_nan, parts), parts, backend=engine):
        state = parts.start(6)
        for _ in range(2):
            state = plan(state)
            first = state["action"][:, 0]
            assert torch.isfinite(state["action"]).all(), type(plan)
            # Elites alone shape the mean, and each has a first action in [-0.9, 0.8].
            if isinstance(plan, TDMPC2Planner):
                first = state["plan"][:, 0, 0]
            assert ((first <= 0.8) & (first >= -0.9)).all(), (type(plan), first)


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_with_nothing_finite_the_mean_is_played_and_a_warning_says_so_once(engine: str) -> None:
    parts = Parts()
    env = env_of(lambda z, a: NAN * a[..., :1] + 0 * z[..., :1], parts)
    for plan in all_planners(env, parts, backend=engine):
        state = parts.start(3)
        with pytest.warns(UserWarning, match="no candidate had a finite return"):
            out = plan(state.clone())
        assert torch.equal(out["action"], torch.zeros(3, ACTION)), type(plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if isinstance(plan, (ICEMPlanner, TDMPC2Planner)):
                state["plan"] = torch.full((3, 3, ACTION), 0.25)
            if isinstance(plan, ICEMPlanner):
                state["plan_elites"] = torch.full((3, plan.num_kept, 3, ACTION), NAN)
            again = plan(state)
        want = 0.25 if "plan" in plan.out_keys else 0.0
        torch.testing.assert_close(again["action"], torch.full((3, ACTION), want))
        assert all(torch.isfinite(v).all() for v in again.values())


@torch.no_grad()
def test_one_bad_state_leaves_the_others_as_they_are() -> None:
    parts = Parts()
    for plan in all_planners(parts.env(), parts):
        state = parts.start(3)
        torch.manual_seed(0)
        want = plan(state.clone())["action"]
        state["latent"][1] = NAN
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="no candidate had a finite return"):
            got = plan(state)["action"]
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_policy_gone_wrong_does_not_reach_the_action() -> None:
    """Also where its NaN does not show in the return."""
    parts = Parts()
    broken = module(lambda z: NAN * z[..., :ACTION], ["latent"], ["action"])

    def dynamics(latent: Tensor, action: Tensor) -> Tensor:
        return latent + torch.where(action == action, action, 0.0).sum(-1, keepdim=True)

    world_model = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], [("next", "latent")]),
        module(lambda z: -z.square().sum(-1, keepdim=True), [("next", "latent")], [("next", "reward")]),
    )  # fmt: skip
    base = spec_env(obs=OBS, action=ACTION, bounded=True)
    env = fastwm.WorldModelEnv(world_model, base, batch_size=[])
    for engine in ENGINES:
        plan = TDMPC2Planner(env, policy=broken, num_samples=32, num_elites=32, backend=engine)
        out = plan(parts.start(2))
        assert torch.isfinite(out["action"]).all()
        assert torch.isfinite(out["plan"]).all()


@torch.no_grad()
def test_an_iteration_without_a_finite_return_keeps_what_the_ones_before_found() -> None:
    class Fails(nn.Module):
        """NaN from the second iteration on: after three steps."""

        calls = 0

        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            self.calls += 1
            return (action[..., :1] + 0 * latent[..., :1]) * (1.0 if self.calls <= 3 else NAN)

    parts = Parts()
    state = parts.start(2)
    found: dict[int, list[Tensor]] = {}
    for steps in (1, 3):
        found[steps] = []
        for which in (0, 2):  # those without a memory
            torch.manual_seed(0)
            env = env_of(Fails(), parts)
            plan = all_planners(env, parts, optim_steps=steps, backend="eager")[which]
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found[steps].append(plan(state.clone())["action"])
    for one, three in zip(found[1], found[3], strict=True):
        assert one.abs().min() > 0
        assert torch.equal(one, three)


@torch.no_grad()
def test_one_elite_gives_no_nan() -> None:
    parts = Parts()
    plan = CEMPlanner(parts.env(), 3, 3, 16, 1)
    assert torch.isfinite(plan(parts.start(2))["action"]).all()


# ---------------------------------------------------------------- errors


def test_more_elites_than_candidates() -> None:
    parts = Parts()
    env = parts.env()
    for make in (
        lambda: CEMPlanner(env, 3, 3, 8, 9),
        lambda: ICEMPlanner(env, num_candidates=8, top_k=9),
        lambda: MPPIPlanner(env, nn.Identity(), 1.0, 3, 3, 8, 9),
        lambda: TDMPC2Planner(env, num_samples=8, num_elites=9),
    ):
        with pytest.raises(ValueError, match=r"=9 of num_(candidates|samples)=8"):
            make()


def test_policy_sequences_leave_room_to_draw() -> None:
    parts = Parts()
    with pytest.raises(ValueError, match="num_pi_trajs=16 of num_samples=16"):
        TDMPC2Planner(
            parts.env(), policy=parts.policy, num_samples=16, num_elites=4, num_pi_trajs=16
        )
    with pytest.raises(ValueError, match="num_pi_trajs=3 without a policy"):
        TDMPC2Planner(parts.env(), num_pi_trajs=3)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_plan_of_another_horizon(steps: int) -> None:
    parts = Parts()
    state = parts.start(2)
    state["plan"] = torch.zeros(2, steps, ACTION)
    state["plan_elites"] = torch.zeros(2, 3, steps, ACTION)
    for plan in (TDMPC2Planner(parts.env()), ICEMPlanner(parts.env(), planning_horizon=3)):
        with pytest.raises(ValueError, match=rf"'plan' .*\({steps}, 2\).*horizon 3.*\(3, 2\)"):
            plan(state)


def test_an_action_that_no_module_provides() -> None:
    parts = Parts()
    with pytest.raises(KeyError, match="reads the action 'action', which no module provides"):
        TDMPC2Planner(parts.env(), value=parts.value)


def test_a_policy_that_writes_something_else() -> None:
    parts = Parts()
    policy = module(nn.Linear(LATENT, ACTION), ["latent"], ["control"])
    with pytest.raises(KeyError, match=r"writes \['control'\], not the action 'action'"):
        TDMPC2Planner(parts.env(), policy=policy)


def test_a_value_that_writes_something_else() -> None:
    parts = Parts()
    with pytest.raises(KeyError, match=r"writes .*'state_action_value'.*, not value_key='q'"):
        TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, value_key="q")


def test_an_action_key_that_the_env_lacks() -> None:
    with pytest.raises(KeyError, match=r"takes no action 'move'; it takes \['action'\]"):
        CEMPlanner(Parts().env(), 3, 3, 8, 2, action_key="move")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reward_key_that_no_step_writes(engine: str) -> None:
    parts = Parts()
    plan = CEMPlanner(parts.env(), 3, 3, 8, 2, reward_key=("next", "gain"), backend=engine)
    with pytest.raises(KeyError, match=r"no step writes \('next', 'gain'\)"):
        plan(parts.start(2))


def test_a_state_without_the_latent() -> None:
    parts = Parts()
    state = parts.start(2).rename_key_("latent", "observation")
    with pytest.raises(KeyError, match=r"reads 'latent'.*holds \['observation'\].*encode"):
        CEMPlanner(parts.env(), 3, 3, 8, 2)(state)


def test_a_policy_key_that_the_state_lacks() -> None:
    parts = Parts()
    policy = module(lambda z, task: z[..., :ACTION] + task, ["latent", "task"], ["action"])
    plan = TDMPC2Planner(parts.env(), policy=policy, num_samples=16, num_elites=4)
    with pytest.raises(KeyError, match="reads 'task', which the tensordict lacks"):
        plan(parts.start(2))


def test_an_env_of_a_fixed_batch() -> None:
    parts = Parts()
    env = fastwm.WorldModelEnv(parts.world_model(), spec_env(obs=OBS), batch_size=[3])
    with pytest.raises(
        ValueError, match=r"batch_size=\[3\]; a planner needs one with batch_size=\[\]"
    ):
        CEMPlanner(env, 3, 3, 8, 2)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'quick'"):
        CEMPlanner(Parts().env(), 3, 3, 8, 2, backend="quick")


def test_a_horizon_of_nothing() -> None:
    with pytest.raises(ValueError, match="planning_horizon=0"):
        CEMPlanner(Parts().env(), 0, 3, 8, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_rewards_of_several_agents_are_named(engine: str) -> None:
    case = make_case("multi_agent")
    state = case.start(2)
    state["agents"].batch_size = [2, 3]
    keys = {"action_key": ("agents", "action"), "reward_key": ("next", "agents", "reward")}
    plan = CEMPlanner(case.env([]), 3, 2, 8, 2, backend=engine, **keys)
    with pytest.raises(ValueError, match=r"one number per step and row under .*'agents', 'reward'"):
        plan(state)


def test_an_engine_by_name_that_cannot_run_says_why() -> None:
    class Reads(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return latent * float(latent.sum() > 0)

    parts = Parts()
    world_model = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(parts.dynamics, ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
        done_head=module(
            nn.Sequential(Reads(), AsDone(LATENT)), [("next", "latent")], [("next", "done")]
        ),
    )
    base = spec_env(obs=OBS, action=ACTION, bounded=True)
    env = fastwm.WorldModelEnv(world_model, base, batch_size=[])
    state = parts.start(2)
    for engine in ("fused", "captured"):
        with pytest.raises(
            RuntimeError, match=f"backend='{engine}' cannot run this planner: .*Python"
        ):
            CEMPlanner(env, 3, 3, 8, 2, backend=engine)(state)
    plan = CEMPlanner(env, 3, 3, 8, 2)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="runs on the eager engine: .*Python reads"):
        got = plan(state.clone())["action"]
    torch.manual_seed(0)
    want = CEMPlanner(env, 3, 3, 8, 2, backend="eager")(state.clone())["action"]
    assert torch.equal(got, want)
    assert plan.explain(state).engine == "eager"
