"""TD-MPC2's planner against the same algorithm in plain torch, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

import fastwm
from fastwm.planning import TDMPC2Planner
from tests.models import module, spec_env
from tests.planning import reference
from tests.planning.models import ACTION, ENGINES, Parts

SIZES: dict[str, Any] = {
    "planning_horizon": 3, "iterations": 4, "num_samples": 48, "num_elites": 8, "num_pi_trajs": 6,
    "discount": 0.95,
}  # fmt: skip


def base_env(action: int) -> Any:
    return spec_env(obs=5, action=action, bounded=True)


def planner(parts: Parts, **kwargs: Any) -> TDMPC2Planner:
    return TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **{**SIZES, **kwargs})


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_two_decisions_are_those_of_plain_torch(engine: str, explore: bool, done: bool) -> None:
    parts = Parts(done=done)
    plan, state = planner(parts, backend=engine), parts.start(1)
    mode = ExplorationType.RANDOM if explore else ExplorationType.DETERMINISTIC
    want, last = [], None
    torch.manual_seed(1)
    for _ in range(2):
        decided = reference.plan(parts, state["latent"][0], last, explore=explore, **SIZES)
        last = decided.plan
        want.append(decided)
    torch.manual_seed(1)
    for decided in want:
        with set_exploration_type(mode):
            state = plan(state)
        torch.testing.assert_close(state["plan"][0], decided.plan, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["action"][0], decided.action, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_about_half_of_the_reference_episodes_end() -> None:
    """Else the tests with ``done`` would show nothing."""
    parts = Parts(done=True)
    latent = parts.start(200)["latent"]
    *_, alive, _ = reference._follow(parts, latent, None, 3)
    assert 0.2 < alive.mean() < 0.8


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@torch.no_grad()
def test_engines_agree_for_any_batch(batch: tuple[int, ...]) -> None:
    parts = Parts(done=True)
    state = parts.start(*batch)
    state["plan"] = torch.randn(*batch, 3, ACTION).clamp(-1, 1)
    found = {}
    for engine in ENGINES:
        torch.manual_seed(2)
        found[engine] = planner(parts, backend=engine)(state.clone())
        assert found[engine]["action"].shape == (*batch, ACTION)
        assert found[engine]["plan"].shape == (*batch, 3, ACTION)
    for engine in ENGINES[1:]:
        for key in ("action", "plan"):
            torch.testing.assert_close(
                found[engine][key], found["eager"][key], rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
def test_auto_plans_fused() -> None:
    parts = Parts()
    told = planner(parts).explain(parts.start(2))
    assert told.engine == "fused", str(told)
    assert "linear" in told.source


@torch.no_grad()
def test_the_last_plan_moves_on_by_one_step_and_is_dropped_where_an_episode_begins() -> None:
    parts = Parts()
    plan = planner(parts, iterations=1, max_std=1e-4, min_std=1e-5, num_pi_trajs=0)
    state = parts.start(2)
    state["plan"] = torch.tensor([[0.1], [0.2], [0.3]]).expand(2, 3, ACTION).clone()
    state["is_init"] = torch.tensor([[False], [True]])
    out = plan(state)
    want = torch.tensor([[0.2, 0.3, 0.0], [0.0, 0.0, 0.0]])[..., None].expand(2, 3, ACTION)
    torch.testing.assert_close(out["plan"], want, rtol=0, atol=1e-3)


@torch.no_grad()
def test_without_exploration_only_the_noise_on_the_action_is_gone() -> None:
    parts = Parts()
    plan, state = planner(parts, min_std=0.3), parts.start(4)
    actions = {}
    for mode in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, ExplorationType.MEAN):
        with set_exploration_type(mode):
            torch.manual_seed(0)
            actions[mode] = plan(state.clone())
    quiet = actions[ExplorationType.DETERMINISTIC]
    assert torch.equal(quiet["action"], actions[ExplorationType.MEAN]["action"])
    assert torch.equal(quiet["plan"], actions[ExplorationType.RANDOM]["plan"])
    assert (quiet["action"] - actions[ExplorationType.RANDOM]["action"]).abs().max() > 0.05


@torch.no_grad()
def test_an_action_is_drawn_among_the_best_by_weight() -> None:
    """Of two elites whose scores differ by d, the better is played with sigmoid(temperature * d)."""
    parts = Parts()
    world_model = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(lambda z, a: z + 0 * a[..., :1], ["latent", "action"], [("next", "latent")]),
        module(
            lambda z, a: a[..., :1] + 0 * z[..., :1], ["latent", "action"], [("next", "reward")]
        ),
    )
    env = fastwm.WorldModelEnv(world_model, base_env(ACTION), batch_size=[])
    plan = TDMPC2Planner(
        env,
        iterations=1,
        num_samples=4,
        num_elites=2,
        planning_horizon=1,
        temperature=5.0,
        max_std=0.2,
    )
    count = 4000
    state = parts.start(1).expand(count).clone()
    torch.manual_seed(0)
    sampled = (0.2 * torch.randn(count, 4, 1, ACTION)).clamp(-1, 1)[:, :, 0]
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = plan(state)["action"]
    score, order = sampled[..., 0].sort(descending=True)
    weight = torch.sigmoid(5.0 * (score[:, 0] - score[:, 1]))
    ranked = sampled.gather(1, order[..., None].expand_as(sampled))
    first = (action == ranked[:, 0]).all(-1)
    assert (first | (action == ranked[:, 1]).all(-1)).all()
    assert 0.6 < weight.mean() < 0.9
    assert abs(weight.mean() - first.float().mean()) < 0.03


def test_iterations_are_two_more_for_wide_actions() -> None:
    parts = Parts()
    assert TDMPC2Planner(parts.env()).iterations == 6
    wide = fastwm.WorldModelEnv(parts.world_model(), base_env(20), batch_size=[])
    assert TDMPC2Planner(wide).iterations == 8


@torch.no_grad()
def test_a_value_of_the_latent_needs_no_policy() -> None:
    """Whatever the engine, and the value draws the plan to where it is high."""
    parts = Parts()
    goal = torch.full((ACTION,), 0.4)
    wm = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(lambda z, a: torch.cat([a, z[..., ACTION:]], -1), ["latent", "action"],
               [("next", "latent")]),
        module(lambda z: 0 * z[..., :1], [("next", "latent")], [("next", "reward")]),
    )  # fmt: skip
    env = fastwm.WorldModelEnv(wm, base_env(ACTION), batch_size=[])
    value = module(
        lambda z: -10 * (z[..., :ACTION] - goal).square().sum(-1, keepdim=True), ["latent"],
        ["state_value"],
    )  # fmt: skip
    for engine in ENGINES:
        plan = TDMPC2Planner(
            env, value=value, value_key="state_value", num_samples=256, num_elites=16,
            planning_horizon=2, backend=engine, temperature=5.0,
        )  # fmt: skip
        torch.manual_seed(0)
        last = plan(parts.start(3))["plan"][:, -1]
        torch.testing.assert_close(last, goal.expand(3, ACTION), rtol=0, atol=0.1)
