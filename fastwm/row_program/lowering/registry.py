"""Which function lowers which ATen op: by the op's name, whatever its overload and whether in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastwm.row_program.lowering.layout import Laid
from fastwm.step_graph import Meta, Op

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering

__all__ = ["HANDLERS", "LAYOUT_ONLY", "Call", "lowers"]

#: op name without namespace, e.g. "addmm" -> its lowering
HANDLERS: dict[str, Callable[[StepLowering, Call], Any]] = {}
#: ops that only move atoms about: they apply to constants as to row values
LAYOUT_ONLY: set[str] = set()


@dataclass
class Call:
    """One op of the step with its tensors laid out.

    Attributes:
        name: without namespace, overload and the underscore of in-place ops.
        given: its arguments by the schema's names, defaults filled in.
        out: what is known of each result.
    """

    op: Op
    name: str
    given: dict[str, Any]
    out: list[Meta | None]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.given.get(name, default)

    @property
    def x(self) -> Laid:
        """The first tensor argument."""
        for value in self.given.values():
            if isinstance(value, Laid):
                return value
        raise AssertionError(f"{self.name} takes no tensor")


def lowers(*names: str, layout_only: bool = False) -> Callable[[Any], Any]:
    """Register the lowering of these ops: ``(step, call) -> Laid`` or a list of them."""

    def register(fn: Any) -> Any:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = fn
            if layout_only:
                LAYOUT_ONLY.add(name)
        return fn

    return register
