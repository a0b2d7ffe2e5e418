"""Instructions that change nothing: identities, moves of moves."""

from __future__ import annotations

from dataclasses import replace

from fastwm.row_program.passes.dce import dce
from fastwm.row_program.passes.rewrite import definitions, substituted, with_args
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["fold"]

# (op, position of the number, the number): the other operand comes out bit for bit, NaN and -0.0 too.
_NEUTRAL = {("mul", 1, 1.0), ("mul", 0, 1.0), ("div", 1, 1.0), ("sub", 1, 0.0), ("pow", 1, 1.0)}


def fold(program: Program, *, grad: bool = True) -> Program:
    """Without no-ops: reshapes to the same shape, index after index, ``x * 1``, ``-(-x)``.

    Args:
        grad: keep ``detach``; without gradients it is one more no-op.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import fold
        >>> p = Program()
        >>> x = p.input("x", "carry", (2,))
        >>> p.carries["x"] = p.emit("mul", p.emit("neg", p.emit("neg", x)), 1.0)
        >>> fold(p).instrs
        []
    """
    instead: dict[int, Val] = {}
    made = definitions(program)
    kept: list[Instr] = []
    uniform = program.uniforms()

    def final(v: Val) -> Val:
        return instead.get(v.index, v)

    for instr in program.instrs:
        instr = with_args(instr, final)
        instr = _through_moves(instr, made)
        same = _same_as(program, instr, made, grad)
        if same is not None and instr.out is not None and same.index not in uniform:
            instead[instr.out.index] = same
            continue
        if instr.out is not None:
            made[instr.out.index] = instr
        kept.append(instr)
    out = substituted(program, instead)
    out.instrs = kept
    return dce(out)


def _through_moves(instr: Instr, made: dict[int, Instr]) -> Instr:
    """A move of a moved value reads that value's source."""
    if instr.op not in ("reshape", "index") or not isinstance(instr.args[0], Val):
        return instr
    before = made.get(instr.args[0].index)
    while before is not None and before.op in ("reshape", "index"):
        if instr.op == "reshape" and before.op == "index":
            instr = replace(
                instr, op="index", args=before.args,
                attrs={"map": before.attrs["map"], "shape": instr.attrs["shape"]},
            )  # fmt: skip
        elif instr.op == "index" and before.op == "index":
            first = before.attrs["map"]
            instr = replace(
                instr, args=before.args,
                attrs={**instr.attrs, "map": tuple(first[i] for i in instr.attrs["map"])},
            )  # fmt: skip
        else:
            instr = replace(instr, args=before.args)
        source = instr.args[0]
        before = made.get(source.index) if isinstance(source, Val) else None
    return instr


def _whole(instr: Instr | None, ops: tuple[str, ...] = ("one_hot", "argmax", "argmin")) -> bool:
    return instr is not None and instr.op in ops


def _same_as(program: Program, instr: Instr, made: dict[int, Instr], grad: bool) -> Val | None:
    """The value that the instruction only repeats."""
    if instr.out is None:
        return None
    out = program.type(instr.out)
    x = instr.args[0] if instr.args else None
    if isinstance(x, Val):
        given = program.type(x)
        if instr.op == "reshape" and given.shape == out.shape:
            return x
        whole = instr.op == "index" and instr.attrs["map"] == tuple(range(given.width))
        if whole and given.shape == out.shape:
            return x
        # Every kind is held as a float: whole numbers stay what they are.
        if instr.op == "cast" and (
            given.kind == out.kind
            or (out.kind != "bool" and (given.kind != "float" or _whole(made.get(x.index))))
        ):
            return x
        if instr.op == "where" and instr.args[1:] == (1.0, 0.0):
            if given.kind == "bool" or _whole(made.get(x.index), ("one_hot",)):
                return x if given.shape == out.shape else None
        if instr.op == "concat" and len(instr.args) == 1 and given.shape == out.shape:
            return x
        if instr.op == "detach" and not grad:
            return x
        if instr.op == "neg":
            inner = made.get(x.index)
            if inner is not None and inner.op == "neg" and isinstance(inner.args[0], Val):
                return inner.args[0]
    for op, position, number in _NEUTRAL:
        if instr.op == op and len(instr.args) == 2 and instr.args[position] == number:
            other = instr.args[1 - position]
            if isinstance(other, Val) and program.type(other) == out:
                return other
    return None
