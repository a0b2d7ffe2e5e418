"""The peer everybody can write: a loop over plain modules, lists, and one stack per output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastwm.bench.models import OUTPUTS
from fastwm.bench.problem import Problem, gradients
from fastwm.bench.providers.base import Built

__all__ = ["build", "from_rollout", "loop"]

Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Rollout = Callable[[Tensor], dict[str, Tensor]]


def loop(step: Step, start: Tensor, horizon: int) -> dict[str, Tensor]:
    """Roll out ``step`` for ``horizon`` steps; outputs are ``[B, T, ...]``."""
    latent = start
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(horizon):
        action, following, reward = step(latent)
        steps.append((latent, action, following, reward))
        latent = following
    return {k: torch.stack(v, 1) for k, v in zip(OUTPUTS, zip(*steps, strict=True), strict=True)}


def from_rollout(problem: Problem, rollout: Rollout) -> Built:
    """With gradients or without, as the problem asks."""

    def run() -> Any:
        if problem.backward:
            return gradients(problem, rollout(problem.start))
        with torch.no_grad():
            return rollout(problem.start)

    return Built(run, lambda raw: raw)


def build(problem: Problem) -> Built:
    step = problem.model.step
    return from_rollout(problem, lambda start: loop(step, start, problem.horizon))
