"""What the passes share: copies of programs, substitution of values, counts of uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from fastwm.row_program.program import Arg, Instr, Program, Val

__all__ = ["copied", "definitions", "renumbered", "substituted", "uses", "with_args"]


def copied(program: Program) -> Program:
    """A program that can be changed without the given one noticing; values keep their numbers."""
    return replace(
        program,
        inputs=dict(program.inputs),
        instrs=list(program.instrs),
        carries=dict(program.carries),
        outputs=dict(program.outputs),
        finals=list(program.finals),
        sums=dict(program.sums),
        checks=list(program.checks),
        types=dict(program.types),
    )


def uses(program: Program) -> Counter[int]:
    """How often each value is read, by instructions or from outside."""
    counts = Counter(v.index for i in program.instrs for v in i.values())
    counts.update(v.index for v in program.roots())
    return counts


def definitions(program: Program) -> dict[int, Instr]:
    return {i.out.index: i for i in program.instrs if i.out is not None}


def with_args(instr: Instr, fn: Callable[[Val], Val]) -> Instr:
    def one(arg: Arg) -> Arg:
        return fn(arg) if isinstance(arg, Val) else arg

    return replace(instr, args=tuple(map(one, instr.args)))


def substituted(program: Program, instead: dict[int, Val]) -> Program:
    """With values read as others. Chains are followed."""

    def final(v: Val) -> Val:
        while v.index in instead:
            v = instead[v.index]
        return v

    out = copied(program)
    out.instrs = [with_args(i, final) for i in program.instrs]
    out.carries = {k: final(v) for k, v in program.carries.items()}
    out.outputs = {k: final(v) for k, v in program.outputs.items()}
    out.checks = list(dict.fromkeys(final(v) for v in program.checks))
    return out


def renumbered(program: Program) -> Program:
    """Values numbered in order of definition: inputs first, then results."""
    out = Program(dtype=program.dtype, finals=list(program.finals), sums=dict(program.sums))
    names: dict[int, Val] = {}
    for name, item in program.inputs.items():
        names[item.val.index] = out.new(program.type(item.val))
        out.inputs[name] = replace(item, val=names[item.val.index])
    for instr in program.instrs:
        instr = with_args(instr, lambda v: names[v.index])
        if instr.out is not None:
            names[instr.out.index] = out.new(program.type(instr.out))
            instr = replace(instr, out=names[instr.out.index])
        out.instrs.append(instr)
    out.carries = {k: names[v.index] for k, v in program.carries.items()}
    out.outputs = {k: names[v.index] for k, v in program.outputs.items()}
    out.checks = [names[v.index] for v in program.checks]
    return out
