"""The same instruction twice is one."""

from __future__ import annotations

from typing import Any

from fastwm.row_program.passes.rewrite import substituted, with_args
from fastwm.row_program.program import Program, Val

__all__ = ["cse"]


def cse(program: Program) -> Program:
    """With equal instructions merged. Those that add to sums stay.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import cse
        >>> p = Program()
        >>> x = p.input("x", "carry", (1,))
        >>> p.carries["x"] = p.emit("add", p.emit("neg", x), p.emit("neg", x))
        >>> [i.op for i in cse(p).instrs]
        ['neg', 'add']
    """
    known: dict[Any, Val] = {}
    instead: dict[int, Val] = {}
    kept = []
    for instr in program.instrs:
        instr = with_args(instr, lambda v: instead.get(v.index, v))
        if instr.out is not None:
            # repr: 0.0 and -0.0 are two numbers, NaN equals itself.
            key = (instr.op, repr(instr.args), _frozen(instr.attrs), program.type(instr.out).kind)
            if key in known:
                instead[instr.out.index] = known[key]
                continue
            known[key] = instr.out
        kept.append(instr)
    out = substituted(program, instead)
    out.instrs = kept
    return out


def _frozen(attrs: dict[str, Any]) -> Any:
    return tuple(
        (k, v if k == "map" else repr(v)) for k, v in sorted(attrs.items()) if v is not None
    )
