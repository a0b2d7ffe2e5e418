"""Tensors made by the step itself: zeros, ones, full, empty, and what is written whole into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastwm.row_program.lowering.layout import Atom, Fill, Laid, repeats
from fastwm.row_program.lowering.registry import Call, lowers

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__: list[str] = []


@lowers("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full",
        "empty_strided", "new_empty_strided", "scalar_tensor", layout_only=True)  # fmt: skip
def _made(s: Step, c: Call) -> Laid:
    return _filled(s, c, None)


@lowers("empty_like", "zeros_like", "ones_like", "full_like", layout_only=True)
def _made_like(s: Step, c: Call) -> Laid:
    # Where the template's batch lies, there lies that of what is made like it.
    return _filled(s, c, c.x)


def _filled(s: Step, c: Call, like: Laid | None) -> Laid:
    meta = c.out[0]
    assert meta is not None
    value = c.get("fill_value", c.get("s", 1 if "ones" in c.name else 0))
    if isinstance(value, Laid):
        return _spread(s, c, value)
    dims = repeats(meta.shape)
    if like is not None:
        dims = tuple(
            tuple(a if a.kind == "batch" else Atom("repeat", a.size) for a in d) for d in like.dims
        )
    kind = s.kind(meta)
    make = {"float": float, "int": int, "bool": bool}[kind]
    return Laid(Fill(make(value)), dims, (), kind, abs(float(value)) if kind != "float" else None)


def _spread(s: Step, c: Call, value: Laid) -> Laid:
    meta = c.out[0]
    assert meta is not None
    value = s.b.cast(value, s.kind(meta))
    dims = [()] * (len(meta.shape) - len(value.dims)) + list(value.dims)
    return value.with_dims(d or e for d, e in zip(dims, repeats(meta.shape), strict=True))


@lowers("fill", "zero", layout_only=True)
def _fill(s: Step, c: Call) -> Laid:
    value = c.get("value", 0)
    if isinstance(value, Laid):
        return _spread(s, c, value)
    make = {"float": float, "int": int, "bool": bool}[c.x.kind]
    return Laid(Fill(make(value)), repeats(c.x.shape), (), c.x.kind)
