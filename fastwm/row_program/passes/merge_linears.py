"""Several linear layers over the same value as one. Off by default.

It trades products for a concatenation of the matrices at every call, in the prologue. At small batches,
where a product would gain from being wider, the concatenation costs more than it saves (on two cores, a
256 x 256 layer is copied in about the time that eight rows go through it). It pays only for weights that do
not change between many long rollouts, so whoever calls it says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastwm.row_program.passes.dce import dce
from fastwm.row_program.passes.rewrite import copied, substituted
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["Merged", "merge_linears"]

Merged = dict[Any, list[Any]]


def merge_linears(program: Program) -> tuple[Program, Merged]:
    """The program with merged layers; and for each new uniform, those it is the concatenation of.

    Only layers with layout "nk", a bias and no activation: their matrices and biases lie one after the other.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import merge_linears
        >>> p = Program()
        >>> x = p.input("x", "carry", (2,))
        >>> w = [p.input(f"w{k}", "uniform", (2, 2)) for k in range(2)]
        >>> b = [p.input(f"b{k}", "uniform", (2,)) for k in range(2)]
        >>> one, two = (p.emit("linear", x, w[k], b[k], layout="nk") for k in range(2))
        >>> p.carries["x"] = p.emit("mul", one, two)
        >>> merged, of = merge_linears(p)
        >>> [i.op for i in merged.instrs], of
        (['linear', 'index', 'index', 'mul'], {('merged', 'w0', 'w1'): ['w0', 'w1'], ('merged', 'b0', 'b1'): ['b0', 'b1']})
    """  # noqa: E501
    names = {i.val.index: n for n, i in program.inputs.items()}
    together: dict[int, list[Instr]] = {}
    for instr in program.instrs:
        x, plain = instr.args[0] if instr.args else None, instr.attrs.get("act") is None
        if instr.op == "linear" and plain and instr.attrs["layout"] == "nk" and instr.args[2]:
            if isinstance(x, Val) and len(program.type(x).shape) == 1:
                together.setdefault(x.index, []).append(instr)
    out = copied(program)
    instead: dict[int, Val] = {}
    merged: Merged = {}
    for group in together.values():
        if len(group) < 2:
            continue
        new: list[Val] = []
        for position in (1, 2):
            parts = [i.args[position] for i in group]
            keys = [names[p.index] for p in parts if isinstance(p, Val)]
            shapes = [program.type(p).shape for p in parts if isinstance(p, Val)]
            name = ("merged", *keys)
            shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            if name not in out.inputs:
                out.input(name, "uniform", shape)
            new.append(out.inputs[name].val)
            merged[name] = keys
        start = len(out.instrs)
        whole = out.emit("linear", group[0].args[0], *new, layout="nk")
        first = 0
        for instr in group:
            assert instr.out is not None
            n = program.type(instr.out).shape[-1]
            cut = out.emit("index", whole, map=tuple(range(first, first + n)), shape=(n,))
            instead[instr.out.index] = cut
            first += n
        fresh = out.instrs[start:]
        del out.instrs[start:]
        at = next(k for k, i in enumerate(out.instrs) if i is group[0])
        out.instrs[at:at] = fresh
    if not merged:
        return program, {}
    out = dce(substituted(out, instead))
    read = {v.index for i in out.instrs for v in i.values()}
    inputs = {n: i for n, i in out.inputs.items() if i.role != "uniform" or i.val.index in read}
    return replace(out, inputs=inputs), merged
