"""Emitting instructions on laid-out tensors: broadcasting, putting atoms in order, reading uniforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastwm.row_program.kinds import kind_of
from fastwm.row_program.lowering.errors import Misfit, NotLowerable, RowsMix
from fastwm.row_program.lowering.layout import (
    Atom,
    Dims,
    Fill,
    Fixed,
    Laid,
    align,
    inner_atoms,
    regrouped,
    repeats,
)  # fmt: skip
from fastwm.row_program.lowering.prologue import Leaf, Nodes, Uniform
from fastwm.row_program.program import Arg, Program, Val

__all__ = ["Builder"]

Operand = Laid | float | int | bool


class Builder:
    """A program under construction.

    Args:
        dtype: of its floats.
        constants: the graph's, for their shapes.
        batch: sizes of the batch dims.
    """

    def __init__(
        self, dtype: torch.dtype, constants: Sequence[torch.Tensor], batch: Sequence[int]
    ) -> None:
        self.program = Program(dtype=dtype)
        self.nodes = Nodes(constants)
        self.uniforms: list[Uniform] = []
        self._uniform_of: dict[tuple[Leaf, str], Val] = {}
        self.batch = tuple(Atom("batch", n) if n > 1 else None for n in batch)
        self.largest = 2.0**24 if dtype is torch.float32 else 2.0**53
        self.quiet: set[int] = set()  # values that carry no gradient anyhow
        self.ranges: dict[int, tuple[float, float]] = {}  # least and largest of ints, where known

    @property
    def batch_dims(self) -> Dims:
        return tuple((a,) if a is not None else () for a in self.batch)

    # -- values

    def fixed(self, value: torch.Tensor) -> Laid:
        """A tensor known now."""
        kind = kind_of(value.dtype)
        if value.numel() == 1:
            return Laid(Fill(value.item()), repeats(value.shape), (), kind)
        return self.node(self.nodes.literal(value), tuple(value.shape), kind)

    def node(self, number: int, shape: tuple[int, ...], kind: str, frozen: bool = False) -> Laid:
        dims = tuple((Atom("inner", n),) if n > 1 else () for n in shape)
        return Laid(Fixed(number, frozen), dims, inner_atoms(dims), kind)

    def literal(self, laid: Laid) -> torch.Tensor | None:
        """Its elements, where they are known now and do not vary from row to row."""
        if isinstance(laid.ref, Fill):
            return torch.full(laid.shape, laid.ref.value)
        if isinstance(laid.ref, Fixed) and laid.ref.node in self.nodes.literals:
            return self.leaf(laid, full=True).read(self.nodes.literals[laid.ref.node])
        return None

    def leaf(self, laid: Laid, *, full: bool) -> Leaf:
        """A prologue value as torch is to see it: in its traced shape, repeats of size 1 unless ``full``."""
        assert isinstance(laid.ref, Fixed)
        node, order = laid.ref.node, laid.order
        present = inner_atoms(laid.dims)
        compact = tuple(math.prod(a.size for a in dim if a.kind == "inner") for dim in laid.dims)
        perm = None if present == order else tuple(order.index(a) for a in present)
        view = None if perm is None else tuple(a.size for a in order)
        expand = None
        if full and compact != laid.shape:
            if any(len({a.kind for a in dim}) > 1 for dim in laid.dims):
                raise NotLowerable("a constant repeated within a dim")
            expand = laid.shape
        return Leaf(node, view, perm, compact, expand, laid.ref.frozen)

    def uniform(
        self, laid: Laid, order: tuple[Atom, ...], shape: tuple[int, ...], kind: str | None = None
    ) -> Val:
        """The program's uniform for a prologue value, its atoms in ``order``; of its own kind by default.

        Whatever products and normalisations take is of kind float.
        """
        assert isinstance(laid.ref, Fixed)
        perm = None
        view: tuple[int, ...] | None = None
        if order != laid.order:
            perm = tuple(laid.order.index(a) for a in order)
            view = tuple(a.size for a in laid.order)
        leaf = Leaf(laid.ref.node, view, perm, shape, None, laid.ref.frozen)
        kind = kind or laid.kind
        key = leaf, kind
        if key not in self._uniform_of:
            name = ("const", len(self.uniforms))
            literal = self.nodes.literals.get(leaf.node)
            if literal is not None and literal.is_floating_point():
                self.nodes.literals[leaf.node] = literal.to(self.program.dtype)
            constant = leaf.node if leaf.node < self.nodes.count and perm is None else None
            self._uniform_of[key] = self.program.input(name, "uniform", shape, kind)
            self.uniforms.append(Uniform(name, shape, constant, leaf.frozen, leaf, kind))
        return self._uniform_of[key]

    def as_row(self, laid: Laid) -> Laid:
        """The same tensor held by a value of the program."""
        if isinstance(laid.ref, Fill):
            val = self.fill(float(laid.ref.value), (), laid.kind)
            return replace(laid, ref=val)
        if isinstance(laid.ref, Fixed):
            shape = tuple(a.size for a in laid.order)
            val = self.program.emit("row", self.uniform(laid, laid.order, shape))
            return replace(laid, ref=val)
        return laid

    def fill(self, value: float, shape: tuple[int, ...], kind: str) -> Val:
        val = self.program.emit("fill", value=value, shape=shape, kind=kind)
        self.quiet.add(val.index)
        return val

    # -- memory

    def index(self, val: Val, positions: torch.Tensor) -> Val:
        return self.program.emit(
            "index", val, map=tuple(positions.flatten().tolist()), shape=tuple(positions.shape)
        )

    def reshaped(self, val: Val, shape: tuple[int, ...]) -> Val:
        if self.program.type(val).shape == shape:
            return val
        return self.program.emit("reshape", val, shape=shape)

    def ordered(self, laid: Laid, order: Sequence[Atom], shape: tuple[int, ...]) -> Val:
        """The row with its inner atoms in ``order``, spread along those of ``order`` that it lacks."""
        laid = self.as_row(laid)
        assert isinstance(laid.ref, Val)
        order = tuple(order)
        if laid.order == order:
            return self.reshaped(laid.ref, shape)
        if not set(laid.order) <= set(order):
            raise Misfit("an op on dims that are grouped in different ways")
        positions = torch.arange(laid.width).reshape([a.size for a in laid.order])
        own = [a for a in order if a in laid.order]
        positions = positions.permute([laid.order.index(a) for a in own])
        positions = positions.reshape([a.size if a in laid.order else 1 for a in order])
        positions = positions.expand([a.size for a in order]).reshape(shape)
        return self.index(laid.ref, positions)

    def solid(self, laid: Laid, dims: Sequence[int]) -> Laid:
        """Repeats in these dims written out, since an op will treat their entries apart."""
        here = {a for d in dims for a in laid.dims[d] if a.kind == "repeat"}
        if any(a.kind == "batch" for d in dims for a in laid.dims[d]):
            raise RowsMix("an op over the batch dim")
        if not here:
            return laid
        laid = self.as_row(laid)
        made = {a: Atom("inner", a.size) for a in here}
        swapped = laid.with_dims([made.get(a, a) for a in dim] for dim in laid.dims)
        order = (*laid.order, *made.values())
        val = self.ordered(replace(laid, dims=swapped.dims), order, tuple(a.size for a in order))
        return replace(swapped, ref=val, order=order)

    def merged(self, laid: Laid, dim: int) -> Laid:
        """With at most one inner atom in a dim, whatever it is made of."""
        laid = self.solid(laid, [dim])
        pieces = laid.dims[dim]
        if len(pieces) <= 1:
            return laid
        start = laid.order.index(pieces[0])
        if laid.order[start : start + len(pieces)] != pieces:
            rest = tuple(a for a in laid.order if a not in pieces)
            order = (*rest, *pieces)
            val = self.ordered(laid, order, tuple(a.size for a in order))
            laid = replace(laid, ref=val, order=order)
            start = len(rest)
        whole = Atom("inner", math.prod(a.size for a in pieces))
        order = (*laid.order[:start], whole, *laid.order[start + len(pieces) :])
        dims = (*laid.dims[:dim], (whole,), *laid.dims[dim + 1 :])
        return replace(laid, dims=dims, order=order)

    def view(self, laid: Laid, shape: Sequence[int]) -> Laid:
        found = regrouped(laid, shape)
        if found is None:
            order = inner_atoms(laid.dims)
            val = self.ordered(laid, order, tuple(a.size for a in order))
            found = regrouped(replace(laid, ref=val, order=order), shape)
        if found is None:
            raise Misfit(f"a view of {laid.shape} as {tuple(shape)}")
        return found

    def picked(self, laid: Laid, move: Any, dims: Sequence[int], fresh: Sequence[int]) -> Laid:
        """Slices, flips, gathers with fixed positions: whatever only moves elements within the row.

        Args:
            move: torch function of a tensor of the traced rank, batch and repeats of size 1.
            dims: traced dims that it tells apart.
            fresh: traced dims of the result whose entries it made anew; others keep their atoms.
        """
        laid = self.solid(self.as_row(laid), dims)
        assert isinstance(laid.ref, Val)
        natural = inner_atoms(laid.dims)
        positions = torch.arange(laid.width).reshape([a.size for a in laid.order])
        positions = positions.permute([laid.order.index(a) for a in natural])
        compact = [math.prod(a.size for a in d if a.kind == "inner") for d in laid.dims]
        positions = move(positions.reshape(compact))
        old = iter([d for i, d in enumerate(laid.dims) if i not in dims])
        out: list[tuple[Atom, ...]] = []
        for i, n in enumerate(positions.shape):
            if i in fresh:
                out.append((Atom("inner", n),) if n > 1 else ())
            else:
                out.append(next(old))
        dims_out = tuple(out)
        order = inner_atoms(dims_out)
        if positions.numel() != math.prod(a.size for a in order):
            raise NotLowerable("an op that moves elements in an unexpected way")
        if torch.equal(positions.flatten(), torch.arange(laid.width)) and laid.order == natural:
            return replace(laid, dims=dims_out, order=order)
        shape = tuple(a.size for a in order)
        val = self.index(laid.ref, positions.reshape(shape))
        if laid.ref.index in self.quiet:
            self.quiet.add(val.index)
        return replace(laid, ref=val, dims=dims_out, order=order)

    # -- elementwise

    def elementwise(
        self, op: str, *operands: Operand, kind: str | None = None, **attrs: Any
    ) -> Laid:
        """Emit ``op`` on broadcast operands, one of which at least is a row value."""
        given = [o if isinstance(o, Laid) else Laid(Fill(o), (), ()) for o in operands]
        if not any(o.is_row for o in given):
            given[0] = self.as_row(given[0])
        cut, maps, dims = align(given, op)
        wanted = inner_atoms(dims)
        own = [tuple(m[a] for a in o.order) for o, m in zip(cut, maps, strict=True)]
        full = [i for i, order in enumerate(own) if len(order) == len(wanted)]
        rows = [i for i in full if cut[i].is_row]
        leader = rows[0] if rows else full[0] if full and wanted else None
        order = wanted if leader is None else own[leader]
        shape = tuple(a.size for a in order)
        if rows and isinstance(ref := cut[rows[0]].ref, Val):
            shape = self.program.type(ref).shape
        args: list[Arg] = []
        for laid, had in zip(cut, own, strict=True):
            laid = replace(laid, order=had)
            if isinstance(laid.ref, Fill):
                args.append(float(laid.ref.value))
            elif isinstance(laid.ref, Fixed):
                if had and had != order and (set(had) != set(order)):
                    args.append(self.ordered(replace(laid, dims=dims), order, shape))
                elif not had:
                    args.append(self.uniform(laid, (), ()))
                else:
                    args.append(self._uniform_in(laid, had, order, shape))
            elif had == order or not had:
                args.append(self.reshaped(laid.ref, shape) if had else laid.ref)
            else:
                args.append(self.ordered(replace(laid, dims=dims), order, shape))
        if not any(isinstance(a, Val) and a.index not in self.program.uniforms() for a in args):
            position = next(i for i, a in enumerate(args) if isinstance(a, Val))
            args[position] = self.program.emit("row", args[position])
        val = self.program.emit(op, *args, **attrs)
        made = self.program.type(val)
        return Laid(val, dims, order, kind or made.kind)

    def _uniform_in(
        self, laid: Laid, had: tuple[Atom, ...], order: tuple[Atom, ...], shape: tuple[int, ...]
    ) -> Val:
        return self.uniform(replace(laid, order=had), order, shape)

    def unary(self, op: str, x: Laid, kind: str | None = None, **attrs: float) -> Laid:
        x = self.as_row(x)
        val = self.program.emit(op, x.ref, **attrs)  # type: ignore[arg-type]
        if op == "detach" or (x.ref.index in self.quiet):  # type: ignore[union-attr]
            self.quiet.add(val.index)
        return replace(x, ref=val, kind=kind or self.program.type(val).kind, bound=None)

    def cast(self, x: Laid, kind: str) -> Laid:
        if kind == x.kind:
            return x
        if isinstance(x.ref, Fill):
            make = {"float": float, "int": int, "bool": bool}[kind]
            return replace(x, ref=Fill(make(x.ref.value)), kind=kind)
        x = self.as_row(x)
        bound = 1.0 if x.kind == "bool" else x.bound if x.kind == "int" else None
        val = self.program.emit("cast", x.ref, kind=kind)  # type: ignore[arg-type]
        return replace(x, ref=val, kind=kind, bound=bound)

    def bounded(self, x: Laid, bound: float | None) -> Laid:
        """An int known to be no larger than ``bound``, or checked to be held exactly."""
        if bound is None or bound > self.largest:
            if x.is_row:
                small = self.elementwise("lt", self.unary("abs", x), self.largest)
                assert isinstance(small.ref, Val)
                self.program.checks.append(small.ref)
            bound = self.largest
        return replace(x, bound=bound)

    # -- along a dim

    def grouped(
        self, x: Laid, dims: Sequence[int]
    ) -> tuple[Val, tuple[Atom, ...], tuple[int, ...]]:
        """``[*G, n]``, the entries of these dims last; the atoms of G; and their shape."""
        x = self.solid(self.as_row(x), dims)
        last = tuple(a for d in dims for a in x.dims[d])
        lead = tuple(a for a in x.order if a not in last)
        n = math.prod(a.size for a in last)
        shape = (math.prod(a.size for a in lead),) if lead else ()
        return self.ordered(x, (*lead, *last), (*shape, n)), lead, shape
