"""Custom ``autograd.Function`` entries of a step: torchrl's own, whose gradient differs from their ops'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchrl.modules.distributions import utils as torchrl_utils

from fastwm.row_program.lowering.elementwise import atanh
from fastwm.row_program.lowering.errors import NotLowerable
from fastwm.row_program.lowering.layout import Laid
from fastwm.step_graph import Op

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__ = ["call_function"]


def _tanhs(*names: str) -> list[Any]:
    return [f for name in names if (f := getattr(torchrl_utils, name, None)) is not None]


def _limit(s: Step, args: list[Any]) -> float:
    eps = args[1] if len(args) > 1 and args[1] is not None else None
    return 1.0 - (torch.finfo(s.floats).resolution if eps is None else float(eps))


def call_function(s: Step, op: Op, args: list[Any]) -> Laid:
    """Lower one ``Function.apply``.

    Raises:
        NotLowerable: naming the class, whose backward nobody here knows.
    """
    cls = getattr(op.target, "__self__", None)
    x = args[0] if args else None
    if isinstance(x, Laid) and cls in _tanhs("_SafeTanh", "_SafeTanhNoEps"):
        return s.b.unary("safe_tanh", x, limit=_limit(s, args))
    if isinstance(x, Laid) and cls in _tanhs("_SafeaTanh", "_SafeaTanhNoEps"):
        # atanh within the limits, its gradient passing through them.
        limit = _limit(s, args)
        clipped = s.b.elementwise("clamp_max", s.b.elementwise("clamp_min", x, -limit), limit)
        x = s.b.elementwise("add", x, s.b.unary("detach", s.b.elementwise("sub", clipped, x)))
        return atanh(s, x)
    name = getattr(cls, "__name__", op.name)
    raise NotLowerable(f"custom autograd.Function {name}: its backward has no row-wise form")
