"""Products as tensor cores have them: of operands rounded to fewer bits, summed in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RoundedProducts", "bfloat16", "tf32", "tf32_truncated"]

_ATEN = torch.ops.aten
# Product -> where its factors stand among the arguments.
_FACTORS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.addmv.default: (1, 2),
    _ATEN.mv.default: (0, 1),
}


def tf32(x: Tensor) -> Tensor:
    """To the nearest with 10 bits after the leading one, ties to even."""
    bits = x.contiguous().view(torch.int32)
    even = (bits >> 13) & 1
    return ((bits + 0xFFF + even) & ~0x1FFF).view(torch.float32)


def tf32_truncated(x: Tensor) -> Tensor:
    """The last 13 bits dropped, as hardware reads a float32 that nobody rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def bfloat16(x: Tensor) -> Tensor:
    """To the nearest with 7 bits after the leading one, ties to even."""
    return x.bfloat16().float()


class RoundedProducts(TorchDispatchMode):
    """Within it every float32 product has rounded factors, forward and backward.

    Args:
        rounded: how a factor is rounded.
    """

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounded = rounded
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        at = _FACTORS.get(func)
        if at is not None and args[at[0]].dtype is torch.float32:
            self.products += 1
            args = tuple(self.rounded(a) if i in at else a for i, a in enumerate(args))
        return func(*args, **kwargs or {})
