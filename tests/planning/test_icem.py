"""iCEM: against the same algorithm in plain torch, its noise, and what it carries on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm.planning import ICEMPlanner
from fastwm.planning.noise import coloured
from tests.planning import reference
from tests.planning.models import ACTION, ENGINES, Parts

SIZES: dict[str, Any] = {
    "planning_horizon": 5, "optim_steps": 3, "num_candidates": 24, "top_k": 5, "keep": 0.4,
    "noise_beta": 2.0, "alpha": 0.2, "decay": 1.5,
}  # fmt: skip
KEPT = 2


def decide(parts: Parts, latent: Tensor, last: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """One state's action, mean and kept elites, written from algorithm 1 of the paper."""
    horizon, k = SIZES["planning_horizon"], SIZES["top_k"]
    mean, std = torch.zeros(horizon, ACTION), torch.full((horizon, ACTION), 0.5)
    if last is not None:
        mean = torch.cat([last[0][1:], last[0][-1:]])
    colour = coloured(horizon, SIZES["noise_beta"]).float()
    elite_actions = elite_returns = torch.empty(0)
    for i, count in enumerate([24 + KEPT, 16, 10]):
        white = torch.randn(count, horizon, ACTION)
        noise = torch.einsum("nta,ts->nsa", white, colour)
        actions = (mean + std * noise).clamp(-1, 1)
        if i == 0 and last is not None:
            actions[-KEPT:, :-1] = last[1][:, 1:]
        if i == 2:
            actions[0] = mean
        _, rewards, _, _ = reference._follow(parts, latent.expand(count, -1), actions, horizon)
        returns = rewards.sum(-1)
        if i:
            actions = torch.cat([actions, elite_actions[:KEPT]])
            returns = torch.cat([returns, elite_returns[:KEPT]])
        order = returns.sort(descending=True).indices[:k]
        elite_actions, elite_returns = actions[order], returns[order]
        mean = 0.8 * elite_actions.mean(0) + 0.2 * mean
        std = 0.8 * elite_actions.std(0, unbiased=False) + 0.2 * std
    return elite_actions[0, 0], mean, elite_actions[:KEPT]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_two_decisions_are_those_of_plain_torch(engine: str, done: bool) -> None:
    parts = Parts(done=done)
    plan, state = ICEMPlanner(parts.env(), backend=engine, **SIZES), parts.start(1)
    torch.manual_seed(4)
    want: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        last = want[-1][1:] if want else None
        want.append(decide(parts, state["latent"][0], last))
    torch.manual_seed(4)
    for action, mean, kept in want:
        state = plan(state)
        torch.testing.assert_close(state["plan"][0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["plan_elites"][0], kept, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["action"][0], action, rtol=1e-4, atol=1e-5)


def test_the_number_of_candidates_decays_to_twice_the_elites() -> None:
    plan = ICEMPlanner(Parts().env(), optim_steps=5, num_candidates=40, top_k=10)
    assert plan.populations() == [40, 32, 25, 20, 20]


@torch.no_grad()
def test_a_row_that_begins_anew_decides_as_if_it_had_no_memory() -> None:
    parts = Parts()
    plan, state = ICEMPlanner(parts.env(), **SIZES), parts.start(3)
    torch.manual_seed(0)
    fresh = plan(state.clone())
    state["plan"] = torch.rand(3, 5, ACTION)
    state["plan_elites"] = torch.rand(3, KEPT, 5, ACTION)
    state["is_init"] = torch.tensor([[True], [False], [True]])
    torch.manual_seed(0)
    mixed = plan(state.clone())
    for key in ("action", "plan", "plan_elites"):
        assert torch.equal(mixed[key][0], fresh[key][0])
        assert torch.equal(mixed[key][2], fresh[key][2])
    assert not torch.equal(mixed["plan"][1], fresh["plan"][1])


@torch.no_grad()
def test_the_best_sequence_is_never_lost_from_one_iteration_to_the_next() -> None:
    """With elites kept, more iterations never end on a worse action sequence."""
    parts = Parts()
    state = parts.start(1)
    scores = []
    for steps in (1, 2, 3, 4):
        plan = ICEMPlanner(parts.env(), **{**SIZES, "optim_steps": steps, "alpha": 1.0})
        torch.manual_seed(0)
        best = plan(state.clone())["plan_elites"][0, :1]
        _, rewards, _, _ = reference._follow(parts, state["latent"], best, 5)
        scores.append(rewards.sum().item())
    # The first iterations are the same draws but for the mean's place among the last one's.
    assert scores[1:] == sorted(scores[1:])


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 3.5])
def test_coloured_noise_has_the_spectrum_and_unit_variance(beta: float) -> None:
    matrix = coloured(16, beta)
    torch.testing.assert_close(matrix.square().sum(0), torch.ones(16, dtype=torch.float64))
    noise = torch.randn(40_000, 16, dtype=torch.float64) @ matrix
    power = torch.fft.rfft(noise).abs().square().mean(0)
    frequency = torch.arange(1, 9, dtype=torch.float64)
    want = power[1] * frequency**-beta
    torch.testing.assert_close(power[1:], want, rtol=0.06, atol=0)


@torch.no_grad()
def test_the_first_deviation_is_part_of_the_bounds() -> None:
    from torchrl.data import Bounded

    import fastwm
    from tests.models import spec_env

    parts = Parts()
    base = spec_env(obs=5, action=ACTION)
    base.action_spec = Bounded(-1.0, 5.0, (ACTION,))
    env = fastwm.WorldModelEnv(parts.world_model(), base, batch_size=[])
    plan = ICEMPlanner(env, optim_steps=1, num_candidates=400, top_k=400, alpha=0.0, keep=0.0)
    out = plan(parts.start(1))["plan"]
    torch.testing.assert_close(out, torch.full_like(out, 2.0), rtol=0, atol=0.3)
