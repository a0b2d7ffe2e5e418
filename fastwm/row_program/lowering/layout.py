"""Where the batch lies within a traced tensor, and how the rest of it lies within a row.

A traced tensor of shape ``[6, 2, 5]`` may hold three rows' two groups merged, then two of something, then
five copies. Each dim is a list of atoms, major first: here ``[batch 3, inner 2], [inner 2], [repeat 5]``.
A *batch* atom is a batch dim, an *inner* atom varies within the row, along a *repeat* atom nothing varies.
Dims of size 1 hold no atoms. Views and permutations move atoms about and cost nothing; ``order`` keeps how
the inner atoms lie in the row's memory.

Nothing here is inferred from sizes: a batch of three rows of three features is no riddle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastwm.row_program.lowering.errors import Misfit, RowsMix
from fastwm.row_program.program import Val

__all__ = ["Atom", "Dims", "Fill", "Fixed", "Laid", "align", "inner_atoms", "regrouped", "repeats"]


@dataclass(frozen=True, eq=False)
class Atom:
    """An indivisible piece of a dim; ``kind`` is "batch", "inner" or "repeat". Compared by identity."""

    kind: str
    size: int

    def __repr__(self) -> str:
        return f"{self.kind} {self.size}"


Dims = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True)
class Fill:
    """The same number everywhere."""

    value: float | int | bool


@dataclass(frozen=True)
class Fixed:
    """A value of the prologue, by number: a constant, or computed from constants alone."""

    node: int
    frozen: bool = False


@dataclass(frozen=True)
class Laid:
    """A traced tensor: what holds its elements, and where they lie.

    Attributes:
        ref: a value of the program, of the prologue, or a number.
        dims: atoms of each dim.
        order: the inner atoms as they lie in memory, major first.
        kind: "float", "int" or "bool".
        bound: for ints, no element is larger in magnitude; None where unknown.
    """

    ref: Val | Fixed | Fill
    dims: Dims
    order: tuple[Atom, ...]
    kind: str = "float"
    bound: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(a.size for a in dim) for dim in self.dims)

    @property
    def width(self) -> int:
        return math.prod(a.size for a in self.order)

    @property
    def is_row(self) -> bool:
        return isinstance(self.ref, Val)

    def atoms(self, kind: str | None = None) -> list[Atom]:
        return [a for dim in self.dims for a in dim if kind in (None, a.kind)]

    def with_dims(self, dims: Iterable[Iterable[Atom]]) -> Laid:
        return replace(self, dims=tuple(tuple(d) for d in dims))

    def substituted(self, pieces: dict[Atom, tuple[Atom, ...]]) -> Laid:
        """With atoms replaced by what they are made of."""

        def spread(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
            return tuple(p for a in atoms for p in pieces.get(a, (a,)))

        return replace(self, dims=tuple(map(spread, self.dims)), order=spread(self.order))


def inner_atoms(dims: Dims) -> tuple[Atom, ...]:
    return tuple(a for dim in dims for a in dim if a.kind == "inner")


def repeats(shape: Sequence[int]) -> Dims:
    """Dims of that shape along which nothing varies."""
    return tuple((Atom("repeat", n),) if n > 1 else () for n in shape)


def split_atom(atom: Atom, sizes: Sequence[int]) -> tuple[Atom, ...]:
    if atom.kind == "batch":
        raise RowsMix("a view that cuts through the batch dim")
    return tuple(Atom(atom.kind, n) for n in sizes if n > 1)


def regrouped(laid: Laid, shape: Sequence[int]) -> Laid | None:
    """The tensor viewed with another shape; None where its inner atoms must first be put in order."""
    flat = laid.atoms()
    # Neighbours that are neighbours in memory, too, make one atom, which may then be cut anywhere.
    runs: list[list[Atom]] = []
    follows = dict(zip(laid.order, laid.order[1:], strict=False))
    for atom in flat:
        last = runs[-1][-1] if runs else None
        joins = last is not None and last.kind == atom.kind != "batch"
        if joins and (atom.kind == "repeat" or follows.get(last) is atom):  # type: ignore[arg-type]
            runs[-1].append(atom)
        else:
            runs.append([atom])
    whole = [
        run[0] if len(run) == 1 else Atom(run[0].kind, math.prod(a.size for a in run))
        for run in runs
    ]
    first = {run[0]: atom for run, atom in zip(runs, whole, strict=True)}
    rest = {a for run in runs for a in run[1:]}
    order = [first[a] for a in laid.order if a not in rest]
    dims: list[tuple[Atom, ...]] = []
    todo = whole[::-1]
    pieces: dict[Atom, tuple[Atom, ...]] = {}
    for size in shape:
        left, taken = size, []
        while left > 1:
            if not todo:
                raise Misfit(f"a view of {laid.shape} as {tuple(shape)}")
            atom = todo.pop()
            if left % atom.size == 0:
                taken.append(atom)
                left //= atom.size
            elif atom.size % left == 0:
                cut = split_atom(atom, (left, atom.size // left))
                origin = next((k for k, v in pieces.items() if atom in v), None)
                if origin is None:
                    pieces[atom] = cut
                else:
                    pieces[origin] = (*(p for p in pieces[origin] if p is not atom), *cut)
                taken.append(cut[0])
                todo.append(cut[1])
                left = 1
            elif atom.kind == "batch":
                raise RowsMix("a view that cuts through the batch dim")
            else:
                return None
        dims.append(tuple(taken))
    return replace(
        laid,
        dims=tuple(dims),
        order=tuple(p for a in order for p in pieces.get(a, (a,))),
    )


def align(
    operands: Sequence[Laid], what: str = "an elementwise op"
) -> tuple[list[Laid], list[dict[Atom, Atom]], Dims]:
    """Broadcast: the operands cut into common atoms, for each own atom -> atom of the result, and its dims.

    Raises:
        RowsMix: the batch of one meets something else of another.
    """
    rank = max(len(o.dims) for o in operands)
    padded = [((),) * (rank - len(o.dims)) + o.dims for o in operands]
    cuts: list[dict[Atom, list[Atom]]] = [{} for _ in operands]
    maps: list[dict[Atom, Atom]] = [{} for _ in operands]
    dims: list[tuple[Atom, ...]] = []
    for position in range(rank):
        queues = {k: list(dim[position])[::-1] for k, dim in enumerate(padded) if dim[position]}
        origin = {k: {a: a for a in queue} for k, queue in queues.items()}
        made: list[Atom] = []
        while any(queues.values()):
            if not all(queues.values()):
                raise Misfit(f"{what}: sizes that do not broadcast")
            heads = {k: queue.pop() for k, queue in queues.items()}
            batch = {a for a in heads.values() if a.kind == "batch"}
            size = min(a.size for a in heads.values())
            if batch:
                if len(batch) > 1 or any(a.kind == "inner" for a in heads.values()):
                    raise RowsMix(f"{what} mixes rows of the batch")
                (result,) = batch
                size = result.size
            else:
                varies = any(a.kind == "inner" for a in heads.values())
                result = Atom("inner" if varies else "repeat", size)
            for k, head in heads.items():
                source = origin[k][head]
                if head.size == size:
                    piece = head
                elif head.size % size or head.size < size:
                    raise Misfit(f"{what}: dims that are grouped in different ways")
                else:
                    piece, tail = split_atom(head, (size, head.size // size))
                    queues[k].append(tail)
                    origin[k][tail] = source
                cuts[k].setdefault(source, []).append(piece)
                maps[k][piece] = result
            made.append(result)
        dims.append(tuple(made))
    batch_atoms = [a for dim in dims for a in dim if a.kind == "batch"]
    if len(set(batch_atoms)) != len(batch_atoms):
        raise RowsMix(f"{what} mixes rows of the batch")
    cut = [
        replace(o, dims=p).substituted({a: tuple(v) for a, v in c.items()})
        for o, p, c in zip(operands, padded, cuts, strict=True)
    ]
    return cut, maps, tuple(dims)


def describe(laid: Any) -> str:
    """For messages: ``[batch 3, 5]``."""
    return "[" + ", ".join("·".join(map(repr, d)) or "1" for d in laid.dims) + "]"
