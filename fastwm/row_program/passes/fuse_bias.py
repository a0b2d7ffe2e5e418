"""A bias added right behind a linear layer, as block-wise layers do, becomes the layer's own."""

from __future__ import annotations

from dataclasses import replace

from fastwm.row_program.passes.rewrite import copied, uses
from fastwm.row_program.program import Program, Val

__all__ = ["fuse_bias"]


def fuse_bias(program: Program) -> Program:
    """With ``linear(x, w, None) + b`` as ``linear(x, w, b)``.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import fuse_bias
        >>> p = Program()
        >>> x, w = p.input("x", "carry", (2,)), p.input("w", "uniform", (2, 2))
        >>> b = p.input("b", "uniform", (2,))
        >>> p.carries["x"] = p.emit("add", p.emit("linear", x, w, None, layout="nk"), b)
        >>> fuse_bias(p).instrs
        [Instr(op='linear', args=(%0, %1, %2), attrs={'layout': 'nk'}, out=%4)]
    """
    counts, uniform = uses(program), program.uniforms()
    made = {i.out.index: n for n, i in enumerate(program.instrs) if i.out is not None}
    instrs = list(program.instrs)
    gone: set[int] = set()
    for n, instr in enumerate(program.instrs):
        if (
            instr.op != "add"
            or instr.out is None
            or not all(isinstance(a, Val) for a in instr.args)
        ):
            continue
        for x, b in (instr.args, instr.args[::-1]):
            assert isinstance(x, Val)
            assert isinstance(b, Val)
            at = made.get(x.index)
            if at is None or counts[x.index] != 1 or b.index not in uniform:
                continue
            layer = instrs[at]
            plain = layer.op in ("linear", "grouped_linear") and layer.args[2] is None
            wanted = 1 if layer.op == "linear" else 2
            shape = program.type(x).shape
            if not plain or layer.attrs.get("act") is not None or len(shape) != wanted:
                continue
            if program.type(b).shape == shape:
                instrs[at] = replace(layer, args=(*layer.args[:2], b), out=instr.out)
                made[instr.out.index] = at
                gone.add(n)
                break
    out = copied(program)
    out.instrs = [i for n, i in enumerate(instrs) if n not in gone]
    return out
