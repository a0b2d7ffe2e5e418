"""Instructions that nobody reads go."""

from __future__ import annotations

from fastwm.row_program.passes.rewrite import copied
from fastwm.row_program.program import Program

__all__ = ["dce"]


def dce(program: Program) -> Program:
    """Without what no output, carry, check or sum needs.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import dce
        >>> p = Program()
        >>> x = p.input("x", "carry", (1,))
        >>> p.carries["x"] = p.emit("neg", x)
        >>> _ = p.emit("exp", x)
        >>> [i.op for i in dce(p).instrs]
        ['neg']
    """
    needed = {v.index for v in program.roots()}
    kept = []
    for instr in reversed(program.instrs):
        if instr.out is None or instr.out.index in needed:
            kept.append(instr)
            needed.update(v.index for v in instr.values())
    out = copied(program)
    out.instrs = kept[::-1]
    return out
