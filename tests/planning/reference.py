"""TD-MPC2's planner in plain torch, written from the papers for one state at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastwm.planning.imagination import members
from tests.planning.models import ACTION, Parts

__all__ = ["Decided", "plan"]


class Decided(NamedTuple):
    action: Tensor  # [A]
    plan: Tensor  # [T, A]


def _follow(
    parts: Parts, latent: Tensor, actions: Tensor | None, horizon: int
) -> tuple[Tensor, ...]:
    """Actions and rewards of every step, whether the episode goes on after it, and the last latent."""
    played, rewards, alive = [], [], []
    goes_on = torch.ones(latent.shape[0])
    for t in range(horizon):
        action = parts.prior(latent) if actions is None else actions[:, t]
        played.append(action)
        rewards.append(parts.reward(latent, action)[:, 0] * goes_on)
        latent = parts.dynamics(latent, action)
        if parts.ends is not None:
            goes_on = goes_on * (parts.done(latent)[:, 0] <= 0.5)
        alive.append(goes_on)
    return torch.stack(played, 1), torch.stack(rewards, 1), alive[-1], latent


def plan(
    parts: Parts,
    latent: Tensor,
    last_plan: Tensor | None,
    *,
    explore: bool,
    discount: float,
    planning_horizon: int,
    iterations: int,
    num_samples: int,
    num_elites: int,
    num_pi_trajs: int,
    temperature: float = 0.5,
    min_std: float = 0.05,
    max_std: float = 2.0,
) -> Decided:
    """Plan from ``latent [Z]``; draws in the order of the planner for a batch of one state."""
    horizon = planning_horizon
    mean, std = torch.zeros(horizon, ACTION), torch.full((horizon, ACTION), max_std)
    if last_plan is not None:
        mean[:-1] = last_plan[1:]
    own = _follow(parts, latent.expand(num_pi_trajs, -1), None, horizon)
    drawn = num_samples - num_pi_trajs
    for _ in range(iterations):
        sampled = (mean + std * torch.randn(drawn, horizon, ACTION)).clamp(-1, 1)
        new = _follow(parts, latent.expand(drawn, -1), sampled, horizon)
        actions, rewards, alive, last = (torch.cat([a, b]) for a, b in zip(own, new, strict=True))
        score = sum(discount**t * rewards[:, t] for t in range(horizon))
        pair = torch.rand(2)
        values = parts.ensemble(last, parts.prior(last))
        value = values[:, members(pair, values.shape[-1])].mean(-1)
        score = score + discount**horizon * alive * value
        best = score.sort(descending=True).indices[:num_elites]
        weight = torch.exp(temperature * (score[best] - score[best].max()))
        weight = weight / weight.sum()
        elite = actions[best]
        mean = (weight[:, None, None] * elite).sum(0)
        std = (weight[:, None, None] * (elite - mean) ** 2).sum(0).sqrt().clamp(min_std, max_std)
    gumbel = -torch.empty(num_elites).exponential_().log()
    action = elite[(weight.log() + gumbel).argmax(), 0]
    if explore:
        action = action + std[0] * torch.randn(ACTION)
    return Decided(action.clamp(-1, 1), mean)
