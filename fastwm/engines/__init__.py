"""The engines that run a traced step over the horizon, and which of them can run on this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import torch

from fastwm.ops.library import cpu_isa, cpu_library

__all__ = ["Engine", "available"]


@dataclass(frozen=True)
class Engine:
    """An engine as this machine has it.

    Attributes:
        name: what ``backend=`` calls it, or a variant of that.
        usable: whether it can run here.
        reason: why not, or what it is.
    """

    name: str
    usable: bool
    reason: str


def available() -> list[Engine]:
    """Every engine, fastest first.

    Example:
        >>> from fastwm.engines import available
        >>> [engine.name for engine in available()]
        ['fused', 'captured + CUDA graphs', 'captured + Inductor', 'captured', 'eager']
    """
    cuda = torch.cuda.is_available()
    library = cpu_library()
    fused = f"row programs in C++ ({cpu_isa()}), on the CPU" if library.loaded else library.reason
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    return [
        Engine("fused", library.loaded, fused),
        Engine("captured + CUDA graphs", cuda, "CUDA device found" if cuda else "no CUDA device"),
        Engine(
            "captured + Inductor", compiler is not None or cuda,
            f"compiles with {compiler}" if compiler else "no C++ compiler on PATH",
        ),
        Engine("captured", True, "traced step, looped without TensorDict"),
        Engine("eager", True, "EnvBase.rollout, the reference"),
    ]  # fmt: skip
