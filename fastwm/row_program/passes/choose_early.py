"""One member of an ensemble per row: choose before computing, not after.

An ensemble's step computes all members for every row and then takes one. What is taken is followed back
through slices, activations and norms to the layers, which then compute that member alone.
"""

from __future__ import annotations

from typing import Any

import torch

from fastwm.row_program.ops import BINARY, REDUCE, UNARY
from fastwm.row_program.passes.dce import dce
from fastwm.row_program.passes.rewrite import copied, definitions, substituted
from fastwm.row_program.program import Arg, Instr, Program, Val

__all__ = ["choose_early"]

_ALONG = {"softmax", "log_softmax", "layer_norm"}


def choose_early(program: Program) -> Program:
    """Layers with one member per row compute that member, wherever all members are not wanted anyhow.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.passes import choose_early
        >>> p = Program()
        >>> x, w = p.input("x", "carry", (2,)), p.input("w", "uniform", (7, 2, 2))
        >>> i = p.input("i", "step", (), "int")
        >>> all_of_them = p.emit("tanh", p.emit("grouped_linear", x, w, None, layout="kn"))
        >>> p.carries["x"] = p.emit("take", all_of_them, i)
        >>> [i.op for i in choose_early(p).instrs]
        ['member_linear', 'tanh']
    """
    if not any(i.op == "take" for i in program.instrs):
        return program
    layers = {i.out.index for i in program.instrs if i.op == "grouped_linear" and i.out is not None}
    if not layers:
        return program
    early = _Early(program)
    found = early.run()
    if not early.replaced:
        return program
    left = {i.out.index for i in found.instrs if i.out is not None}
    # A layer whose members are all wanted would be computed twice.
    return program if early.replaced & left else found


class _Early:
    def __init__(self, program: Program) -> None:
        self.out = copied(program)
        self.out.instrs = []
        self.made = definitions(program)
        self.known: dict[Any, Val] = {}
        self.replaced: set[int] = set()
        self.program = program

    def run(self) -> Program:
        instead: dict[int, Val] = {}
        for instr in self.program.instrs:
            if instr.op == "take" and instr.out is not None:
                x, i = instr.args
                assert isinstance(x, Val)
                assert isinstance(i, Val)
                type = self.program.type(x)
                if len(type.shape) == 2 and self.program.type(i).shape == ():
                    positions = torch.arange(type.width).reshape(type.shape)
                    taken = self.pick(x, positions, instead.get(i.index, i))
                    instead[instr.out.index] = self.shaped(
                        taken, self.program.type(instr.out).shape
                    )
                    continue
            self.out.instrs.append(instr)
        out = substituted(self.out, instead)
        out._next = self.out._next
        return dce(out)

    # -- what a member's elements are made of

    def emit(self, op: str, *args: Arg, **attrs: Any) -> Val:
        return self.out.emit(op, *args, **attrs)

    def shaped(self, v: Val, shape: tuple[int, ...]) -> Val:
        return v if self.out.type(v).shape == shape else self.emit("reshape", v, shape=shape)

    def pick(self, v: Val, positions: torch.Tensor, i: Val) -> Val:
        """``v.flatten()[positions[i]]``, a flat value; ``positions`` is ``[members, n]``."""
        key = (v.index, tuple(positions.flatten().tolist()), positions.shape[0], i.index)
        if key not in self.known:
            self.known[key] = self._pick(v, positions, i)
        return self.known[key]

    def _pick(self, v: Val, positions: torch.Tensor, i: Val) -> Val:
        members, n = positions.shape
        if bool((positions == positions[0]).all()):
            return self.emit("index", v, map=tuple(positions[0].tolist()), shape=(n,))
        instr = self.made.get(v.index)
        found = None if instr is None else self._of(instr, positions, i)
        if found is not None:
            return found
        flat = self.emit("index", v, map=tuple(positions.flatten().tolist()), shape=(members, n))
        return self.emit("take", flat, i)

    def _of(self, instr: Instr, positions: torch.Tensor, i: Val) -> Val | None:
        op, args, attrs = instr.op, instr.args, instr.attrs
        x = args[0] if args else None
        if op in UNARY or op == "cast":
            assert isinstance(x, Val)
            return self.emit(op, self.pick(x, positions, i), **attrs)
        if op == "fill":
            return self.emit(op, **{**attrs, "shape": (positions.shape[1],)})
        if op in BINARY or op == "where":
            return self.elementwise(instr, positions, i)
        if op == "reshape":
            assert isinstance(x, Val)
            return self.pick(x, positions, i)
        if op == "index":
            assert isinstance(x, Val)
            moved = torch.tensor(attrs["map"])[positions]
            return self.pick(x, moved, i)
        if op == "concat":
            return self.concat(instr, positions, i)
        if op in _ALONG:
            return self.along(instr, positions, i)
        if op in REDUCE:
            assert isinstance(x, Val)
            n = self.program.type(x).shape[-1]
            inside = positions.unsqueeze(-1) * n + torch.arange(n)
            picked = self.pick(x, inside.flatten(1), i)
            return self.emit(op, self.shaped(picked, (positions.shape[1], n)), **attrs)
        if op == "grouped_linear":
            return self.layer(instr, positions, i)
        return None

    def elementwise(self, instr: Instr, positions: torch.Tensor, i: Val) -> Val | None:
        assert instr.out is not None
        uniform = self.program.uniforms()
        width = self.program.type(instr.out).width
        args: list[Arg] = []
        for arg in instr.args:
            if not isinstance(arg, Val) or self.program.type(arg).width == 1:
                args.append(arg)
            elif self.program.type(arg).width != width:
                return None
            elif arg.index in uniform:
                row = self.emit("row", arg)
                args.append(self.pick(row, positions, i))
            else:
                args.append(self.pick(arg, positions, i))
        return self.emit(instr.op, *args, **instr.attrs)

    def concat(self, instr: Instr, positions: torch.Tensor, i: Val) -> Val | None:
        starts, total = [], 0
        for arg in instr.args:
            assert isinstance(arg, Val)
            starts.append(total)
            total += self.program.type(arg).width
        piece = torch.bucketize(positions, torch.tensor(starts), right=True) - 1
        if not bool((piece == piece[0]).all()):
            return None
        pieces, column = [], 0
        which = piece[0].tolist()
        while column < len(which):
            stop = column
            while stop < len(which) and which[stop] == which[column]:
                stop += 1
            arg = instr.args[which[column]]
            assert isinstance(arg, Val)
            inside = positions[:, column:stop] - starts[which[column]]
            pieces.append(self.pick(arg, inside, i))
            column = stop
        return pieces[0] if len(pieces) == 1 else self.emit("concat", *pieces)

    def along(self, instr: Instr, positions: torch.Tensor, i: Val) -> Val | None:
        """Norms and softmax: the groups that are read, whole, and of these the entries that are."""
        x = instr.args[0]
        assert isinstance(x, Val)
        n = self.program.type(x).shape[-1]
        group, entry = positions // n, positions % n
        if not bool((entry == entry[0]).all()):
            return None
        # Groups that the columns read, each a list of one group per member.
        columns = [tuple(column.tolist()) for column in group.T]
        wanted = list(dict.fromkeys(columns))
        whole = torch.tensor(wanted).T.unsqueeze(-1) * n + torch.arange(n)
        picked = self.shaped(self.pick(x, whole.flatten(1), i), (len(wanted), n))
        out = self.emit(instr.op, picked, *instr.args[1:], **instr.attrs)
        read = tuple(
            wanted.index(c) * n + e for c, e in zip(columns, entry[0].tolist(), strict=True)
        )
        if read == tuple(range(len(wanted) * n)):
            return self.shaped(out, (len(read),))
        return self.emit("index", out, map=read, shape=(len(read),))

    def layer(self, instr: Instr, positions: torch.Tensor, i: Val) -> Val | None:
        assert instr.out is not None
        members, n = self.program.type(instr.out).shape
        columns = positions[0] % n
        own = torch.arange(members).unsqueeze(1) * n + columns
        if positions.shape[0] != members or not torch.equal(positions, own):
            return None
        x, w, b = instr.args
        assert isinstance(x, Val)
        shape = self.program.type(x).shape
        if len(shape) == 2:
            x = self.pick(x, torch.arange(shape[0] * shape[1]).reshape(shape), i)
        out = self.emit("member_linear", x, w, b, i, **instr.attrs)
        self.replaced.add(instr.out.index)
        if torch.equal(columns, torch.arange(n)):
            return out
        return self.emit("index", out, map=tuple(columns.tolist()), shape=(len(columns),))
