"""One configuration, and the one problem that all providers solve in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastwm.bench.models import MLPWorldModel, Suite

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
    """Weights, start and cotangents, the same for every provider.

    ``cotangents`` are fixed random numbers for the next latents and the rewards, which is what an
    actor-critic loss over an imagined batch sends back; given directly, so that no loss is timed.
    Their scale keeps gradients of order one whatever the batch, so that one tolerance fits all.
    """

    suite: Suite
    model: MLPWorldModel
    start: Tensor
    horizon: int
    backward: bool
    cotangents: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, suite: Suite, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.device)

        start = normal(case.batch, suite.latent).requires_grad_(case.backward)
        cotangents = {}
        if case.backward:
            scale = (case.batch * case.horizon) ** -0.5
            rows = (case.batch, case.horizon)
            cotangents["next_latent"] = normal(*rows, suite.latent) * scale
            cotangents["reward"] = normal(*rows, 1) * scale
        model = suite.model(case.device, seed)
        return cls(suite, model, start, case.horizon, case.backward, cotangents)

    @property
    def batch(self) -> int:
        return self.start.shape[0]

    @property
    def device(self) -> torch.device:
        return self.start.device

    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by name."""
        assert isinstance(self.model, nn.Module)
        return {**dict(self.model.named_parameters()), "start": self.start}


def gradients(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``outputs`` and, in a backward problem, every gradient under ``"grad/<name>"``."""
    if not problem.backward:
        return outputs
    names, leaves = zip(*problem.leaves().items(), strict=True)
    heads = list(problem.cotangents)
    found = torch.autograd.grad(
        [outputs[h] for h in heads], leaves, [problem.cotangents[h] for h in heads]
    )
    return {**outputs, **{f"grad/{n}": g for n, g in zip(names, found, strict=True)}}
