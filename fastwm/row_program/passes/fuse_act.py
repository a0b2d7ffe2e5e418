"""An activation right behind a linear layer, done while its results are still at hand."""

from __future__ import annotations

from dataclasses import replace

from fastwm.row_program.ops import PRODUCTS, UNARY
from fastwm.row_program.passes.rewrite import copied, uses
from fastwm.row_program.program import Program, Val

__all__ = ["fuse_act"]

_NOT = {"detach", "not", "isnan", "isfinite"}  # no functions to float, or none of forward alone


def fuse_act(program: Program) -> Program:
    """Linear layers with the unary op that alone reads them.

    For programs that keep nothing for a backward: the value before the activation is gone.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import fuse_act
        >>> p = Program()
        >>> x, w = p.input("x", "carry", (2,)), p.input("w", "uniform", (2, 2))
        >>> p.carries["x"] = p.emit("silu", p.emit("linear", x, w, None, layout="nk"))
        >>> [(i.op, i.attrs["act"]) for i in fuse_act(p).instrs]
        [('linear', 'silu')]
    """
    counts = uses(program)
    made = {i.out.index: n for n, i in enumerate(program.instrs) if i.out is not None}
    instrs = list(program.instrs)
    gone = set()
    for n, instr in enumerate(program.instrs):
        x = instr.args[0] if instr.args else None
        if instr.op not in UNARY or instr.op in _NOT or not isinstance(x, Val):
            continue
        at = made.get(x.index)
        if at is None or counts[x.index] != 1:
            continue
        before = program.instrs[at]
        if before.op not in PRODUCTS or before.attrs.get("act") is not None:
            continue
        attrs = {**before.attrs, "act": instr.op}
        if instr.attrs:
            attrs["act_params"] = dict(instr.attrs)
        instrs[at] = replace(before, attrs=attrs, out=instr.out)
        gone.add(n)
    out = copied(program)
    out.instrs = [i for n, i in enumerate(instrs) if n not in gone]
    return out
