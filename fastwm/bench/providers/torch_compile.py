"""`torch.compile` of the plain loop: of a step, driven from outside, and of all steps, unrolled.

Where a suite draws numbers, Inductor is told to draw them as eager does (`fallback_random`): its own
would be other numbers, and nothing could be compared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers import torch_loop
from fastwm.bench.providers.base import Built, Unavailable

__all__ = ["check_compiler", "loop", "step", "too_long"]

#: Compile time of an unrolled loop grows with the horizon: 15 steps of this MLP took 39 s on two
#: cores.
LONGEST_UNROLLED = 15


def _dynamic(problem: Problem) -> bool | None:
    """One compilation for all batches but 1, which always gets its own.

    Measured on the whole loop of 5 steps: within 1 % of static shapes forward, 1 to 4 % with
    gradients.
    """
    return True if problem.batch > 1 else None


def too_long(case: Case) -> str | None:
    if case.horizon <= LONGEST_UNROLLED:
        return None
    return f"unrolled, it compiles longer with the horizon; timed up to {LONGEST_UNROLLED} steps"


def check_compiler(problem: Problem) -> None:
    """Raise :class:`Unavailable` where Inductor has nothing to compile with."""
    if problem.device.type == "cpu" and not any(
        shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++")
    ):
        raise Unavailable("torch.compile needs a C++ compiler, and there is none")
    # Versions for each batch, direction and horizon live side by side; the default limit is 8.
    torch._dynamo.config.recompile_limit = 256
    import torch._inductor.config as inductor

    inductor.fallback_random = problem.suite.draws is not None


def step(mode: str | None = None) -> Callable[[Problem], Built]:
    """One compiled step, looped from Python: compile time does not depend on the horizon."""

    def build(problem: Problem) -> Built:
        check_compiler(problem)
        model = problem.model
        # A CUDA graph is of one shape anyway.
        dynamic = False if mode else _dynamic(problem)
        compiled = torch.compile(model.step, mode=mode, dynamic=dynamic)
        if mode == "reduce-overhead":

            def one(*carry: Tensor) -> tuple[Tensor, ...]:
                # The graph's outputs are overwritten by its next replay.
                torch.compiler.cudagraph_mark_step_begin()
                return tuple(value.clone() for value in compiled(*carry))
        else:
            one = compiled
        horizon, outputs = problem.horizon, problem.suite.outputs
        return torch_loop.from_rollout(
            problem, lambda start: torch_loop.loop(one, start, horizon, outputs)
        )

    return build


def loop(problem: Problem) -> Built:
    """The whole loop compiled at once."""
    check_compiler(problem)
    model, horizon, outputs = problem.model, problem.horizon, problem.suite.outputs

    def rollout(start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return torch_loop.loop(model.step, start, horizon, outputs)

    compiled = torch.compile(rollout, dynamic=_dynamic(problem), fullgraph=True)
    return torch_loop.from_rollout(problem, compiled)
