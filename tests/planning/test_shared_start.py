"""What a first step makes of the one latent that all candidates share, made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastwm
from fastwm.planning import CEMPlanner, ICEMPlanner, Planner, TDMPC2Planner, traced
from fastwm.planning.shared_start import SharedStart, divide
from fastwm.tracing import trace
from tests.models import make_case, module, spec_env
from tests.planning.models import ACTION, LATENT, Parts


@pytest.fixture(autouse=True)
def _always(monkeypatch: Any) -> None:
    """However little it spares."""
    monkeypatch.setattr(traced, "_WORTH", 0)


def decided(plan: Planner, state: Any, engine: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with fastwm.backend(engine), torch.no_grad():
        return plan(state.clone())


def assert_shares(plan: Planner, state: Any, shares: bool = True) -> None:
    with torch.no_grad(), plan._mode():
        pieces = plan._traced(plan._start(state), "fused").pieces
    found = {kind for (kind, _), piece in pieces.items() if isinstance(piece, SharedStart)}
    assert found == ({"candidates"} if shares else set())


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_decisions_are_those_of_eager(horizon: int) -> None:
    parts = Parts(done=True)
    env = parts.env()
    sizes = {"num_samples": 24, "num_elites": 5, "iterations": 2, "planning_horizon": horizon}
    plans = [
        CEMPlanner(env, horizon, 3, 24, 5),
        ICEMPlanner(env, horizon, 3, 24, 5),
        TDMPC2Planner(env, policy=parts.policy, value=parts.value, num_pi_trajs=0, **sizes),
        # As many sequences of the policy as are drawn.
        TDMPC2Planner(env, policy=parts.policy, value=parts.value, num_pi_trajs=12, **sizes),
    ]
    for plan in plans:
        for seed in range(2):
            state = parts.start(3)
            got, want = decided(plan, state, "fused", seed), decided(plan, state, "eager", seed)
            for key, value in want.items():
                torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
        assert_shares(plan, state)
        with torch.no_grad():
            parts.dynamics.net[0].weight.add_(0.2)
            parts.reward.net[0].bias.add_(0.2)
        got, want = decided(plan, state, "fused"), decided(plan, state, "eager")
        torch.testing.assert_close(got["action"], want["action"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("linear_done", True), ("mlp", True), ("rssm_sampled", True), ("context", True)],
)
def test_other_models(name: str, shares: bool) -> None:
    case = make_case(name)
    plan, state = CEMPlanner(case.env([]), 3, 3, 24, 5), case.start(2)
    got, want = decided(plan, state, "fused"), decided(plan, state, "eager")
    torch.testing.assert_close(got["action"], want["action"], rtol=1e-4, atol=1e-5)
    assert_shares(plan, state, shares)


def test_a_step_without_such_a_product_is_left_whole() -> None:
    parts = Parts()
    gain = nn.Parameter(torch.ones(LATENT))
    wm = fastwm.WorldModel(
        module(parts.encoder, ["observation"], ["latent"]),
        module(lambda z, a: z * gain + a.sum(-1, keepdim=True), ["latent", "action"],
               [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )  # fmt: skip
    env = fastwm.WorldModelEnv(wm, spec_env(obs=5, action=ACTION), batch_size=[])
    assert_shares(CEMPlanner(env, 3, 3, 24, 5), parts.start(2), shares=False)


def test_little_work_is_not_worth_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(traced, "_WORTH", 10_000_000)
    parts = Parts()
    assert_shares(CEMPlanner(parts.env(), 3, 3, 24, 5), parts.start(2), shares=False)


def test_a_division_that_gives_something_else_is_not_taken(monkeypatch: Any) -> None:
    def wrong(self: Any, inputs: Any, count: int) -> Any:
        made = right(self, inputs, count)
        return {k: v.flip(-1) if k[0] == "shared" else v for k, v in made.items()}

    right = SharedStart.prepared
    monkeypatch.setattr(SharedStart, "prepared", wrong)
    parts = Parts()
    assert_shares(CEMPlanner(parts.env(), 3, 3, 24, 5), parts.start(2), shares=False)


# ---------------------------------------------------------------- dividing


def divided(step: Any, weights: list[Tensor], *, rows: int = 4) -> Any:
    inputs = {("z",): torch.randn(rows, 3), ("feed", ("a",)): torch.randn(rows, 2)}

    def named(values: Any) -> Any:
        return {("td", ("y",)): step(values["z",], values["feed", ("a",)])}

    with torch.no_grad():
        graph, _, _ = trace(named, inputs, lambda t: any(t is w for w in weights))
    return divide(graph, [("feed", ("a",))])


def test_the_work_spared_is_that_of_the_latents_columns() -> None:
    w, b = torch.randn(7, 5), torch.randn(7)
    parts = divided(lambda z, a: nn.functional.linear(torch.cat([z, a], -1), w, b), [w, b])
    assert parts.saved == 3 * 7
    assert [op.name for op in parts.before.ops] == ["t", "slice.Tensor", "addmm"]
    assert "cat" not in [op.name for op in parts.after.ops]


def test_a_whole_network_of_the_latent_is_made_once() -> None:
    w, v, u = torch.randn(3, 8), torch.randn(8, 6), torch.randn(2, 6)
    parts = divided(lambda z, a: torch.tanh(z @ w) @ v + a @ u, [w, v, u])
    assert parts.saved == 3 * 8 + 8 * 6
    assert [op.name for op in parts.after.ops] == ["mm", "add.Tensor"]


def test_steps_that_are_left_whole() -> None:
    w = torch.randn(5, 4)
    # Of the action alone; an op that may look at several rows.
    assert divided(lambda z, a: a @ w[:2], [w]) is None
    assert divided(lambda z, a: z.cumsum(0) @ w[:3] + a @ w[3:], [w]) is None


def test_what_is_written_in_place_is_a_copy() -> None:
    w = torch.randn(5, 4)
    parts = divided(lambda z, a: (z @ w[:3]).add_(a @ w[3:]), [w])
    assert parts.saved == 3 * 4
    assert [op.name for op in parts.after.ops] == ["clone", "slice.Tensor", "mm", "add_.Tensor"]
