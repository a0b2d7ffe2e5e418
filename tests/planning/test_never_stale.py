"""Whatever eager planning would see, the next decision sees; and nothing of a planner's is aliased."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrl.envs.utils import ExplorationType, set_exploration_type

import fastwm
from fastwm.models.tdmpc2 import tdmpc2
from fastwm.plan import cache_of
from fastwm.planning import CEMPlanner, TDMPC2Planner
from fastwm.planning.traced import _known
from tests.models import spec_env
from tests.planning.models import OBS, Parts

SIZES: dict[str, Any] = {
    "num_samples": 32, "num_elites": 6, "num_pi_trajs": 4, "iterations": 2,
}  # fmt: skip
FAST = ["captured", "fused"]


def decisions(plan: TDMPC2Planner, state: Any, engine: str) -> Any:
    torch.manual_seed(5)
    with fastwm.backend(engine), torch.no_grad():
        return plan(state.clone())


def assert_follows(plan: TDMPC2Planner, state: Any, engine: str, before: Any) -> None:
    """The decision is eager's, and another one than before."""
    got, want = decisions(plan, state, engine), decisions(plan, state, "eager")
    torch.testing.assert_close(got["plan"], want["plan"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["action"], want["action"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got["plan"], before["plan"], rtol=1e-3, atol=1e-3)


def optimizer_step(parts: Parts) -> None:
    with torch.no_grad():
        for p in parts.parameters():
            p.add_(0.3 * torch.randn_like(p))


def new_values(parts: Parts) -> None:
    other = Parts()
    parts.ensemble.load_state_dict(other.ensemble.state_dict(), assign=True)
    parts.dynamics.net[0].weight = nn.Parameter(other.dynamics.net[0].weight.detach() * 2)


def another_policy(parts: Parts) -> None:
    parts.prior.net = nn.Sequential(parts.prior.net, nn.Hardtanh(-0.5, 0.2))


def another_value(parts: Parts) -> None:
    parts.ensemble.nets = Parts().ensemble.nets


def another_reward(parts: Parts) -> None:
    parts.reward.last = nn.Sequential(parts.reward.last, nn.Softplus())


@pytest.mark.parametrize(
    "change", [optimizer_step, new_values, another_policy, another_value, another_reward]
)
@pytest.mark.parametrize("engine", FAST)
def test_changes_of_the_model_are_seen(engine: str, change: Callable[[Parts], None]) -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(3)
    before = decisions(plan, state, engine)
    change(parts)
    assert_follows(plan, state, engine, before)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 30.0), ("discount", 0.1), ("num_elites", 1), ("max_std", 0.3),
                        ("iterations", 4)]
)  # fmt: skip
@pytest.mark.parametrize("engine", FAST)
def test_changed_settings_are_seen(engine: str, name: str, value: float) -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(3)
    before = decisions(plan, state, engine)
    setattr(plan, name, value)
    assert_follows(plan, state, engine, before)


@pytest.mark.parametrize("which", ["policy", "value"])
@pytest.mark.parametrize("engine", FAST)
def test_another_module_given_to_the_planner_is_seen(engine: str, which: str) -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(3)
    before = decisions(plan, state, engine)
    setattr(plan, which, getattr(Parts(), which))
    assert_follows(plan, state, engine, before)
    other = TDMPC2Planner(parts.env(), policy=plan.policy, value=plan.value, **SIZES)
    want = decisions(other, state, "eager")
    torch.testing.assert_close(
        decisions(plan, state, engine)["plan"], want["plan"], rtol=1e-4, atol=1e-5
    )


def test_the_state_dict_holds_each_module_once() -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    decisions(plan, parts.start(1), "fused")
    tops = {name.partition(".")[0] for name in plan.state_dict()}
    assert tops == {"module", "env", "policy", "value"}  # the first two as in torchrl


def test_under_a_dispatch_mode_the_ops_are_those_of_eager() -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(1)
    want = decisions(plan, state, "eager")
    with FlopCounterMode(display=False) as counter:
        got = decisions(plan, state, "auto")
    assert torch.equal(got["action"], want["action"])
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("engine", FAST)
def test_the_exploration_type_is_seen(engine: str) -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(3)
    noisy = decisions(plan, state, engine)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        quiet, want = decisions(plan, state, engine), decisions(plan, state, "eager")
    torch.testing.assert_close(quiet["action"], want["action"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(quiet["action"], noisy["action"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("engine", [*FAST, "eager"])
@torch.no_grad()
def test_a_pair_of_a_stacked_ensemble_is_evaluated_alone(engine: str, training: bool) -> None:
    """The family's Q functions. With dropout on, all of them draw, as in eager."""
    family = tdmpc2(
        spec_env(obs=OBS, action=2, bounded=True), latent_dim=16, mlp_dim=24, enc_dim=8, num_q=5
    ).train(training)
    for p in [*family.world_model.parameters(), *family.value.parameters()]:
        p.add_(0.1 * torch.randn_like(p))
    plan = TDMPC2Planner(
        family.env(spec_env(obs=OBS, action=2, bounded=True)), policy=family.policy, value=family.value,
        **SIZES,
    )  # fmt: skip
    observed = TensorDict({"observation": torch.randn(3, OBS)}, [3])
    state = family.world_model.encode(observed).select("latent")
    before = decisions(plan, state, engine)
    for _ in range(4):  # other pairs
        want = decisions(plan, state, "eager")
        got = decisions(plan, state, engine)
        torch.testing.assert_close(got["plan"], want["plan"], rtol=1e-4, atol=1e-5)
    if engine != "eager":
        piece = plan._traced(plan._start(state), engine).pieces["value", 32]
        paired = piece.graph.metas[piece.graph.outputs["td", ("state_action_value",)].index]
        assert paired.shape[-1] == (5 if training else 2)
    for p in family.value.parameters():
        p.mul_(2)
    if engine != "eager":
        assert_follows(plan, state, engine, before)


@pytest.mark.parametrize("engine", FAST)
@torch.no_grad()
def test_another_policy_is_seen_beside_an_ensemble_evaluated_in_part(engine: str) -> None:
    base = spec_env(obs=OBS, action=2, bounded=True)
    one, other = (tdmpc2(base, latent_dim=16, mlp_dim=24, enc_dim=8, num_q=5).eval() for _ in "ab")
    for p in [*one.value.parameters(), *one.policy.parameters(), *other.policy.parameters()]:
        p.add_(0.3 * torch.randn_like(p))
    plan = TDMPC2Planner(one.env(base), policy=one.policy, value=one.value, **SIZES)
    observed = TensorDict({"observation": torch.randn(3, OBS)}, [3])
    state = one.world_model.encode(observed).select("latent")
    before = decisions(plan, state, engine)
    plan.policy = other.policy
    assert_follows(plan, state, engine, before)


@pytest.mark.parametrize("engine", FAST)
@torch.no_grad()
def test_an_ensemble_that_cannot_be_evaluated_in_part_any_more_is_not(engine: str) -> None:
    base = spec_env(obs=OBS, action=2, bounded=True)
    family = tdmpc2(base, latent_dim=16, mlp_dim=24, enc_dim=8, num_q=5, dropout=0.5).eval()
    for p in family.value.parameters():
        p.add_(0.1 * torch.randn_like(p))
    plan = TDMPC2Planner(family.env(base), policy=family.policy, value=family.value, **SIZES)
    observed = TensorDict({"observation": torch.randn(3, OBS)}, [3])
    state = family.world_model.encode(observed).select("latent")
    for training in (False, True, False):
        family.train(training)  # dropout: two members draw other numbers than five
        got, want = decisions(plan, state, engine), decisions(plan, state, "eager")
        torch.testing.assert_close(got["plan"], want["plan"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", FAST)
def test_decisions_share_one_trace_of_each_kind(engine: str) -> None:
    parts = Parts()
    env = parts.env()
    plan = TDMPC2Planner(env, policy=parts.policy, value=parts.value, **SIZES)
    state = parts.start(2)
    for _ in range(3):
        state = decisions(plan, state, engine)
        optimizer_step(parts)
    assert cache_of(env).traces == 3  # candidates, policy, value
    assert len(_known[plan].pieces) == 3


@pytest.mark.parametrize("engine", FAST)
def test_results_are_the_callers(engine: str) -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    first = decisions(plan, parts.start(2), engine)
    kept = first.clone()
    decisions(plan, parts.start(2), engine)
    assert (first == kept).all()


@torch.no_grad()
def test_copies_and_pickles_plan_alike() -> None:
    parts = Parts()
    plan = CEMPlanner(parts.env(), 3, 2, 16, 4)
    state = parts.start(2)
    torch.manual_seed(0)
    want = plan(state.clone())["action"]
    buffer = io.BytesIO()
    torch.save(plan, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(plan), torch.load(buffer, weights_only=False)):
        torch.manual_seed(0)
        assert torch.equal(other(state.clone())["action"], want)


def test_a_planner_can_be_collected() -> None:
    parts = Parts()
    plan = TDMPC2Planner(parts.env(), policy=parts.policy, value=parts.value, **SIZES)
    decisions(plan, parts.start(1), "captured")
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    assert gone() is None
