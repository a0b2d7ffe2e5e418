"""The peer everybody can write: a loop over plain modules, lists, and one stack per output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastwm.bench.problem import Problem, gradients
from fastwm.bench.providers.base import Built

__all__ = ["build", "from_rollout", "loop"]

Step = Callable[..., tuple[Tensor, ...]]
Rollout = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def loop(
    step: Step, start: Mapping[str, Tensor], horizon: int, outputs: Sequence[str]
) -> dict[str, Tensor]:
    """Roll out ``step`` for ``horizon`` steps; outputs are ``[B, T, ...]``.

    Args:
        step: ``(*carry) -> (action, *next carry, reward)``.
        start: the first carry.
        outputs: names of what is stacked, as :attr:`Suite.outputs` orders them.
    """
    carry = tuple(start.values())
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(horizon):
        action, *following, reward = step(*carry)
        steps.append((*carry, action, *following, reward))
        carry = tuple(following)
    return {k: torch.stack(v, 1) for k, v in zip(outputs, zip(*steps, strict=True), strict=True)}


def from_rollout(problem: Problem, rollout: Rollout) -> Built:
    """With gradients or without, as the problem asks."""

    def run() -> Any:
        problem.reseed()
        if problem.backward:
            return gradients(problem, rollout(problem.start))
        with torch.no_grad():
            return rollout(problem.start)

    return Built(run, lambda raw: raw)


def build(problem: Problem) -> Built:
    step, outputs = problem.model.step, problem.suite.outputs
    return from_rollout(problem, lambda start: loop(step, start, problem.horizon, outputs))
