"""One configuration, and the one problem that all providers solve in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastwm.bench.suites.base import Model, Suite
from fastwm.bench.suites.noise import reseed

__all__ = ["DIRECTIONS", "Case", "Problem", "gradients"]

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, order=True)
class Case:
    """A configuration: shapes, direction, threads, device.

    ``direction="backward"`` is the forward pass and all gradients: of the policy, the model and the
    start.
    """

    suite: str
    batch: int
    horizon: int
    direction: str
    threads: int
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        direction = "forward + backward" if self.backward else "forward"
        where = threads if self.device == "cpu" else self.device
        return f"{self.suite}  B={self.batch}  T={self.horizon}  {direction}  {where}"


@dataclass(frozen=True)
class Problem:
    """Weights, start, noise and cotangents, the same for every provider.

    ``start`` is the first step's carry, by key. Where the suite draws, every run starts with
    :meth:`reseed`. ``cotangents`` are fixed random numbers for the next carries and the rewards,
    which is what an actor-critic loss over an imagined batch sends back; given directly, so that no
    loss is timed. Their scale keeps gradients of order one whatever the batch, so that one
    tolerance fits all.
    """

    suite: Suite
    model: Model
    start: dict[str, Tensor]
    horizon: int
    backward: bool
    cotangents: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, suite: Suite, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.device)

        model = suite.model(case.device, seed)
        # Drawn before the cotangents, from the same generator.
        carry = suite.start(model, case.batch, case.horizon, generator)
        start = {k: v.to(case.device).requires_grad_(case.backward) for k, v in carry.items()}
        cotangents = {}
        if case.backward:
            scale = (case.batch * case.horizon) ** -0.5
            rows = (case.batch, case.horizon)
            for key, width in suite.carry.items():
                cotangents[f"next_{key}"] = normal(*rows, width) * scale
            cotangents["reward"] = normal(*rows, 1) * scale
        return cls(suite, model, start, case.horizon, case.backward, cotangents)

    @property
    def batch(self) -> int:
        return len(next(iter(self.start.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    def reseed(self) -> None:
        """Put the generator where every run begins; nothing where the suite draws nothing."""
        if self.suite.draws is not None:
            reseed(self.device.type)

    def noise(self) -> list[Tensor]:
        """What a run draws, as tensors ``[T, B, ...]`` in the order of a step's draws."""
        draws = self.suite.draws
        if draws is None:
            return []
        with torch.random.fork_rng(devices=[]):
            reseed()
            steps = [draws(self.batch) for _ in range(self.horizon)]
        return [torch.stack(drawn) for drawn in zip(*steps, strict=True)]

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by name: found once, so that no provider is timed looking."""
        of_start = {f"start.{key}": value for key, value in self.start.items()}
        return {**dict(self.model.named_parameters()), **of_start}


def gradients(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``outputs`` and, in a backward problem, every gradient under ``"grad/<name>"``."""
    if not problem.backward:
        return outputs
    names, leaves = zip(*problem.leaves.items(), strict=True)
    heads = list(problem.cotangents)
    found = torch.autograd.grad(
        [outputs[h] for h in heads], leaves, [problem.cotangents[h] for h in heads]
    )
    return {**outputs, **{f"grad/{n}": g for n, g in zip(names, found, strict=True)}}
