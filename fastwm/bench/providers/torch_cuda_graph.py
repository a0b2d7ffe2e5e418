"""The plain loop as one CUDA graph: what a user gets who records the whole rollout by hand.

The graph holds its results; a call replays it and copies them out, as any library must that gives memory
away. It reads the start where it lies, which spares it a copy that others make.
"""

from __future__ import annotations

from typing import Any

import torch

from fastwm.bench.problem import Problem, gradients
from fastwm.bench.providers.base import Built, Unavailable
from fastwm.bench.providers.torch_loop import loop
from fastwm.engines.cuda_graph import CudaRecorder

__all__ = ["build"]

_WARMUPS = 3


def build(problem: Problem) -> Built:
    if problem.device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    step, outputs = problem.model.step, problem.suite.outputs

    def rollout() -> dict[str, torch.Tensor]:
        found = loop(step, problem.start, problem.horizon, outputs)
        return gradients(problem, found) if problem.backward else found

    with torch.set_grad_enabled(problem.backward):
        static, replay = CudaRecorder(problem.device).record(rollout, _WARMUPS)

    def run() -> Any:
        problem.reseed()
        replay()
        return {name: value.detach().clone() for name, value in static.items()}

    return Built(run, lambda raw: raw)
