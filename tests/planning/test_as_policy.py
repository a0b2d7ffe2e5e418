"""Planners as policies of real envs: what they carry in the tensordict, through rollouts and collectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, SerialEnv, TransformedEnv

import fastwm
from fastwm.planning import CEMPlanner, ICEMPlanner, TDMPC2Planner
from tests.models import module

LENGTH = 4  # steps of an episode


class Line(EnvBase):
    """A point that moves by its action; every episode has the same few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((2,)))
        self.action_spec = Bounded(-1.0, 1.0, (2,))
        self.reward_spec = Unbounded((1,))
        self.at, self.steps = torch.zeros(2), 0

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        self.at, self.steps = torch.randn(2), 0
        return self.observation_spec.zero().set("observation", self.at)

    def _step(self, tensordict: Any) -> Any:
        self.at, self.steps = self.at + 0.1 * tensordict["action"], self.steps + 1
        out = self.observation_spec.zero().set("observation", self.at)
        out.set("reward", -self.at.norm().reshape(1))
        out.set("done", torch.tensor([self.steps >= LENGTH]))
        return out.set("terminated", torch.tensor([False]))

    def _set_seed(self, seed: Any) -> None:
        pass


def model() -> tuple[fastwm.WorldModel, fastwm.WorldModelEnv]:
    """The line itself, as a world model."""
    world_model = fastwm.WorldModel(
        module(nn.Identity(), ["observation"], ["latent"]),
        module(lambda z, a: z + 0.1 * a, ["latent", "action"], [("next", "latent")]),
        module(lambda z: -z.norm(dim=-1, keepdim=True), [("next", "latent")], [("next", "reward")]),
    )
    return world_model, fastwm.WorldModelEnv(world_model, Line(), batch_size=[])


def agent(planner: Any, **kwargs: Any) -> TensorDictSequential:
    world_model, env = model()
    return TensorDictSequential(world_model.encoder, planner(env, **kwargs))


TDMPC2 = {"num_samples": 24, "num_elites": 6, "iterations": 2, "planning_horizon": 3}
ICEM = {"num_candidates": 24, "top_k": 6, "optim_steps": 2, "planning_horizon": 3}
CEM = {"num_candidates": 24, "top_k": 6, "optim_steps": 2, "planning_horizon": 3}
AGENTS = [(TDMPC2Planner, TDMPC2), (ICEMPlanner, ICEM), (CEMPlanner, CEM)]


@pytest.mark.parametrize(("planner", "sizes"), AGENTS)
@torch.no_grad()
def test_a_rollout_of_a_real_env(planner: Any, sizes: dict[str, Any]) -> None:
    env = TransformedEnv(Line(), InitTracker())
    out = env.rollout(10, agent(planner, **sizes))
    assert out.shape == (LENGTH,)
    # It walks towards the origin.
    assert out["next", "reward"][-1] > out["next", "reward"][0]


@torch.no_grad()
def test_each_decision_begins_with_the_plan_of_the_one_before(monkeypatch: Any) -> None:
    """And the first of an episode with none, whether it is stepped alone, or beside other envs."""
    seen: list[Any] = []
    search = TDMPC2Planner._search

    def spy(self: Any, imagine: Any, memory: Any, explore: bool) -> Any:
        out = search(self, imagine, memory, explore)
        seen.append((memory.get("plan"), out["plan"]))
        return out

    monkeypatch.setattr(TDMPC2Planner, "_search", spy)
    for env in (Line(), SerialEnv(2, Line)):
        seen.clear()
        env = TransformedEnv(env, InitTracker())
        out = env.rollout(10, agent(TDMPC2Planner, **TDMPC2), break_when_any_done=False)
        assert out.shape[-1] == 10
        assert len(seen) == 10
        for i, ((given, _), (_, before)) in enumerate(zip(seen[1:], seen[:-1], strict=True), 1):
            assert torch.equal(given, torch.zeros_like(given) if i % LENGTH == 0 else before)


@pytest.mark.parametrize(("planner", "sizes"), AGENTS)
def test_a_collector(planner: Any, sizes: dict[str, Any]) -> None:
    collector = Collector(
        SerialEnv(2, lambda: TransformedEnv(Line(), InitTracker())), agent(planner, **sizes),
        frames_per_batch=12, total_frames=24,
    )  # fmt: skip
    batches = list(collector)
    assert [batch.numel() for batch in batches] == [12, 12]
    assert torch.isfinite(torch.cat([batch["action"] for batch in batches])).all()
    if planner is not CEMPlanner:
        assert batches[0]["plan"].shape == (2, 6, 3, 2)
    collector.shutdown()
