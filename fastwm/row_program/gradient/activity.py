"""Which values of a program get a gradient: those that depend on a wanted input and matter for a given one.

Both questions go round through the carries until nothing changes: a start that wants no gradient is still
active from the second step on if a parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastwm.row_program.gradient.rules import gradient_positions
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["active_values", "next_value"]


def next_value(program: Program, carry: Any) -> Val:
    """A carry's value at the next step: itself where the program leaves it alone."""
    return program.carries.get(carry, program.inputs[carry].val)


def active_values(
    program: Program, wrt: Iterable[Any], output_grads: Iterable[Any], final_grads: Iterable[Any]
) -> set[int]:
    """The numbers of the values whose gradient the backward pass needs."""
    carries = [name for name, item in program.inputs.items() if item.role == "carry"]

    varies = {program.inputs[name].val.index for name in wrt}
    size = -1
    while size != len(varies):
        size = len(varies)
        for instr in program.instrs:
            if instr.out is not None and any(v.index in varies for v in _through(program, instr)):
                varies.add(instr.out.index)
        for name in carries:
            if next_value(program, name).index in varies:
                varies.add(program.inputs[name].val.index)

    matters = {program.outputs[name].index for name in output_grads}
    matters |= {next_value(program, name).index for name in final_grads}
    size = -1
    while size != len(matters):
        size = len(matters)
        for instr in reversed(program.instrs):
            if instr.out is not None and instr.out.index in matters:
                matters |= {v.index for v in _through(program, instr)}
        for name in carries:
            if program.inputs[name].val.index in matters:
                matters.add(next_value(program, name).index)

    return {i for i in varies & matters if program.types[i].kind == "float"}


def _through(program: Program, instr: Instr) -> Iterator[Val]:
    """The operands through which a gradient passes."""
    if instr.out is None or program.type(instr.out).kind != "float":
        return
    positions = gradient_positions(instr.op)
    for position, arg in enumerate(instr.args):
        if isinstance(arg, Val) and program.type(arg).kind == "float":
            if positions is None or position in positions:
                yield arg
