"""Triton kernels and their launchers, shipped as ``fastwm.kernels``.

Importing this package does not import Triton: the CPU builds of torch come without it, and no
module of fastwm outside this folder may fail for the lack of it.

Each kernel file ends with ``builds()``, the specialisations that are checked ahead of time; a new
file is one line in ``MODULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

__all__ = ["MODULES", "Build", "signature"]

MODULES = (
    "balanced_kl",
    "gae",
    "gaussian_nll",
    "lambda_return",
    "row_program",
    "sub_losses",
    "two_hot_cross_entropy",
)


class Build(NamedTuple):
    """One specialisation of a kernel, as ``python -m fastwm.kernels.aot`` compiles it.

    ``spills`` is how many bytes of registers it may spill, stores and loads together.
    """

    variant: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    spills: int = 0


def signature(
    kernel: Any, constexprs: Collection[str], pointer: str, number: Callable[[str], str]
) -> dict[str, str]:
    """The types of a kernel's arguments: of pointers, which are named ``p_...``, and of numbers by name."""
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        else:
            types[name] = f"*{pointer}" if name.startswith("p_") else number(name)
    return types
