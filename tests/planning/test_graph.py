"""A decision as one CUDA graph: its staging, through the recorder that replays on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

import fastwm
from fastwm.planning import CEMPlanner, ICEMPlanner, Planner, TDMPC2Planner, base
from fastwm.planning.traced import _known
from tests.engines.recorder import CpuRecorder
from tests.models import make_case
from tests.planning.models import Parts

TDMPC2: dict[str, Any] = {"num_samples": 32, "num_elites": 6, "num_pi_trajs": 4, "iterations": 2}


class Counting(CpuRecorder):
    """Counts recordings and replays; may be told to fail."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fails = False

    def record(self, work: Any, warmups: int) -> Any:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        result, replay = super().record(work, warmups)

        def counted() -> None:
            self.replayed += 1
            replay()

        return result, counted


@pytest.fixture
def recorder(monkeypatch: Any) -> Counting:
    made = Counting()
    monkeypatch.setattr(base, "recorder_for", lambda device: made)
    return made


def planners(parts: Parts) -> list[Planner]:
    env = parts.env(backend="captured")
    return [
        CEMPlanner(env, 3, 3, 24, 5),
        ICEMPlanner(env, 3, 3, 24, 5),
        TDMPC2Planner(env, policy=parts.policy, value=parts.value, **TDMPC2),
    ]


def decided(plan: Planner, state: Any, engine: str = "captured", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with fastwm.backend(engine), torch.no_grad():
        return plan(state.clone())


def assert_same(got: Any, want: Any) -> None:
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


def test_replays_are_the_decisions_of_eager_for_fresh_states(recorder: Counting) -> None:
    parts = Parts(done=True)
    for plan in planners(parts):
        recorder.recorded = recorder.replayed = 0
        for seed in range(3):
            state = parts.start(2)
            assert_same(decided(plan, state, seed=seed), decided(plan, state, "eager", seed))
        assert (recorder.recorded, recorder.replayed) == (1, 3), type(plan)


def test_the_last_plan_is_an_input_of_the_graph(recorder: Counting) -> None:
    parts = Parts()
    for plan in planners(parts)[1:]:
        state = want = parts.start(2)
        for seed in range(4):
            state, want = decided(plan, state, seed=seed), decided(plan, want, "eager", seed)
            assert_same(state, want)
            state["is_init"] = want["is_init"] = torch.tensor([[False], [seed == 1]])
        # One without a plan, one with.
        assert len(_known[plan].recorded.graphs) == 2


def test_a_weight_written_in_place_needs_no_new_graph_and_one_that_moved_does(
    recorder: Counting,
) -> None:
    parts = Parts()
    plan, state = planners(parts)[2], parts.start(2)
    decided(plan, state)
    with torch.no_grad():
        for p in parts.parameters():
            p.add_(0.2 * torch.randn_like(p))
    assert_same(decided(plan, state), decided(plan, state, "eager"))
    assert recorder.recorded == 1
    weight = parts.dynamics.net[0].weight
    parts.dynamics.net[0].weight = nn.Parameter(2 * weight.detach())
    assert_same(decided(plan, state), decided(plan, state, "eager"))
    assert recorder.recorded == 2
    assert len(_known[plan].recorded.graphs) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 20.0), ("discount", 0.2), ("max_std", 0.3)]
)
def test_changed_settings_are_seen(recorder: Counting, name: str, value: float) -> None:
    parts = Parts()
    plan, state = planners(parts)[2], parts.start(2)
    before = decided(plan, state)
    setattr(plan, name, value)
    after = decided(plan, state)
    assert_same(after, decided(plan, state, "eager"))
    assert not torch.allclose(before["plan"], after["plan"])
    assert recorder.recorded == 2


def test_the_exploration_type_is_seen(recorder: Counting) -> None:
    parts = Parts()
    plan, state = planners(parts)[2], parts.start(2)
    noisy = decided(plan, state)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        quiet, want = decided(plan, state), decided(plan, state, "eager")
    assert_same(quiet, want)
    assert not torch.allclose(quiet["action"], noisy["action"])


def test_results_are_the_callers(recorder: Counting) -> None:
    parts = Parts()
    for plan in planners(parts):
        first = decided(plan, parts.start(2))
        kept = first.clone()
        decided(plan, parts.start(2), seed=1)
        assert (first == kept).all()


def test_a_model_that_draws(recorder: Counting) -> None:
    case = make_case("rssm_sampled")
    plan = CEMPlanner(case.env([]), 3, 3, 24, 5)
    for seed in range(2):
        state = case.start(2)
        assert_same(decided(plan, state, seed=seed), decided(plan, state, "eager", seed))
    assert recorder.replayed == 2


def test_what_cannot_be_recorded_runs_unrecorded(recorder: Counting) -> None:
    recorder.fails = True
    parts = Parts()
    plan, state = planners(parts)[2], parts.start(2)
    with pytest.warns(
        UserWarning, match="not one CUDA graph: CUDA graph capture failed: .*permitted"
    ):
        got = decided(plan, state)
    assert_same(got, decided(plan, state, "eager"))
    recorder.fails = False
    assert_same(decided(plan, state), got)
    assert recorder.recorded == 0  # it is not tried again


def test_the_fused_engine_is_not_recorded(recorder: Counting) -> None:
    parts = Parts()
    plan, state = planners(parts)[2], parts.start(2)
    assert_same(decided(plan, state, "fused"), decided(plan, state, "eager"))
    assert recorder.recorded == 0


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_decisions_on_a_gpu_are_those_of_eager(which: int) -> None:
    parts = Parts(done=True)
    parts.cuda()
    env = parts.env(device="cuda")
    make: Any = [
        lambda: CEMPlanner(env, 3, 3, 24, 5),
        lambda: ICEMPlanner(env, 3, 3, 24, 5),
        lambda: TDMPC2Planner(env, policy=parts.policy, value=parts.value, **TDMPC2),
    ][which]
    plan, state = make(), parts.start(2)
    for seed in range(3):
        got, want = decided(plan, state, seed=seed), decided(plan, state, "eager", seed)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4)
    assert len(_known[plan].recorded.graphs) == 1
