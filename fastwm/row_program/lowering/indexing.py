"""Indexing by computed positions: one member of an ensemble, a table's entries, scatters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastwm.row_program.lowering.errors import NotLowerable, RowsMix
from fastwm.row_program.lowering.layout import Atom, Fill, Fixed, Laid, align, inner_atoms
from fastwm.row_program.lowering.registry import Call, lowers
from fastwm.row_program.program import Val

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__: list[str] = []

_LARGEST_TABLE = 1 << 12


def _range(s: Step, val: Val) -> tuple[float, float]:
    """The least and the largest that a value can be, where its making tells."""
    while True:
        if val.index in s.b.ranges:
            return s.b.ranges[val.index]
        if s.b.program.type(val).kind == "bool":
            return 0.0, 1.0
        made = next((i for i in reversed(s.b.program.instrs) if i.out == val), None)
        first = made.args[0] if made is not None and made.args else None
        if made is None:
            return -math.inf, math.inf
        if made.op == "fill":
            return made.attrs["value"], made.attrs["value"]
        if not isinstance(first, Val):
            return -math.inf, math.inf
        if made.op in ("argmax", "argmin"):
            return 0.0, s.b.program.type(first).shape[-1] - 1.0
        if made.op not in ("reshape", "index", "cast"):
            return -math.inf, math.inf
        val = first


def _checked(s: Step, index: Laid, n: int, *, wrap: bool = False) -> Laid:
    """The index, checked to be one of ``n`` places, as eager does; ``wrap``: or counted from the end."""
    index = s.b.as_row(index)
    assert isinstance(index.ref, Val)
    least, most = _range(s, index.ref)
    if most >= n:
        s.check(s.b.elementwise("lt", index, float(n)))
    if least < 0:
        s.check(s.b.elementwise("ge", index, float(-n if wrap else 0)))
        if wrap:
            below = s.b.elementwise("lt", index, 0.0)
            index = s.b.elementwise(
                "where", below, s.b.elementwise("add", index, float(n)), index, kind="int"
            )
    return replace(index, bound=float(n))


def _taken(s: Step, x: Laid, dim: int, index: Laid, *, wrap: bool = False) -> Laid:
    """``x.gather(dim, index)`` for an index of size 1 there; that dim stays, of size 1.

    Along dims where the index only repeats, one ``take`` moves all entries at once.
    """
    index = _checked(s, index, x.shape[dim], wrap=wrap)
    x = s.b.merged(s.b.as_row(x), dim)
    flat = x.with_dims((*x.dims[:dim], (), *x.dims[dim + 1 :]))
    (xc, ic), (xm, im), dims = align([flat, index], "gather")
    along = x.dims[dim]
    groups = tuple(a for a in inner_atoms(dims) if a in im.values() and a in
                   {im[b] for b in ic.atoms("inner")})  # fmt: skip
    rest = tuple(
        a for a in inner_atoms(dims)
        if a not in groups and a in {xm[b] for b in xc.atoms("inner")}
    )  # fmt: skip
    order = (*groups, *along, *rest)
    own = replace(xc, order=tuple(xm.get(a, a) for a in xc.order))
    g, m, n = (math.prod(a.size for a in part) for part in (groups, along, rest))
    lead = (g,) if groups else ()
    value = s.b.ordered(own, order, (*lead, m, n))
    at = replace(ic, order=tuple(im[a] for a in ic.order))
    where = s.b.ordered(at, groups, lead)
    out = s.b.program.emit("take", value, where)
    return Laid(out, dims, (*groups, *rest), x.kind, x.bound)


@lowers("gather")
def _gather(s: Step, c: Call) -> Laid:
    x, index = c["self"], c["index"]
    dim = c["dim"] % max(len(x.dims), 1)
    for i, (have, want) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i != dim and have != want:
            x = s.narrowed(x, i, 0, want)
    if index.dims[dim] and all(a.kind == "repeat" for a in index.dims[dim]):
        # The same entry several times.
        once = index.with_dims((*index.dims[:dim], (), *index.dims[dim + 1 :]))
        out = _taken(s, x, dim, s.b.as_row(once))
        return out.with_dims((*out.dims[:dim], index.dims[dim], *out.dims[dim + 1 :]))
    if index.dims[dim]:
        if any(a.kind == "batch" for a in index.dims[dim]):
            raise RowsMix("aten.gather along the batch dim")
        # Several entries: the index' dim becomes one of its own.
        wide = x.with_dims((*x.dims[: dim + 1], (), *x.dims[dim + 1 :]))
        apart = index.with_dims((*index.dims[:dim], (), *index.dims[dim:]))
        out = _taken(s, wide, dim, s.b.as_row(apart))
        return out.with_dims(d for i, d in enumerate(out.dims) if i != dim)
    return _taken(s, x, dim, s.b.as_row(index))


@lowers("index_select")
def _index_select(s: Step, c: Call) -> Laid:
    x, dim = c["self"], c["dim"] % max(len(c["self"].dims), 1)
    return _indexed(s, x, [*[None] * dim, c["index"]])


@lowers("index")
def _index(s: Step, c: Call) -> Laid:
    return _indexed(s, c["self"], list(c["indices"]))


@lowers("embedding")
def _embedding(s: Step, c: Call) -> Laid:
    for name, none in (("padding_idx", -1), ("scale_grad_by_freq", False), ("sparse", False)):
        if c.get(name, none) != none:
            raise NotLowerable(f"an embedding with {name}")
    return _looked_up(s, c["weight"], c["indices"])


def _looked_up(s: Step, table: Laid, index: Laid, *, wrap: bool = False) -> Laid:
    """``table[index]`` for a constant table: one member's layer, or rows weighted by a one-hot."""
    n, rest = table.shape[0], table.dims[1:]
    if n > _LARGEST_TABLE:
        raise NotLowerable(f"a look-up in a table of {n} rows")
    index = _checked(s, index, n, wrap=wrap)
    size = math.prod(table.shape[1:])
    if table.kind != "float":
        raise NotLowerable(f"a look-up in a table of {table.kind}s")
    assert isinstance(index.ref, Val)
    i = s.b.reshaped(index.ref, (index.width,) if index.order else ())
    if table.atoms("repeat"):
        table = s.expanded(table)
        rest = table.dims[1:]
    order = inner_atoms(table.dims)
    if index.width == 1:  # other entries, NaN as they may be, are not touched
        one = s.b.fill(1.0, (1,), "float")
        members = s.b.uniform(table, order, (n, 1, size), "float")
        out = s.b.program.emit(
            "member_linear", one, members, None, s.b.reshaped(i, ()), layout="kn"
        )
        out = s.b.reshaped(out, (*((1,) if index.order else ()), size))
    else:
        hot = s.b.program.emit("one_hot", i, n=n)
        matrix = s.b.uniform(table, order, (n, size), "float")
        out = s.b.program.emit("linear", hot, matrix, None, layout="kn")
    return Laid(out, (*index.dims, *rest), (*index.order, *order[bool(table.dims[0]) :]))


def _indexed(s: Step, x: Laid, indices: list[Laid | None]) -> Laid:
    given = {i: t for i, t in enumerate(indices) if t is not None}
    if any(t.kind == "bool" for t in given.values()):
        raise NotLowerable("indexing with a mask")
    # Positions that run along the batch, as in x[member, arange(batch)], pick each row for itself.
    along: dict[int, Laid] = {}
    for i, index in list(given.items()):
        known = s.b.literal(index) if not index.is_row else None
        here = x.dims[i]
        if known is not None and here and all(a.kind == "batch" for a in here):
            n = x.shape[i]
            if index.width == n and torch.equal(known.flatten().long(), torch.arange(n)):
                dims = tuple(here if d else () for d in index.dims)
                along[i] = Laid(Fill(0), dims, (), "int")
                del given[i]
        elif known is not None and not here and len(indices) > 1 and not known.any():
            along[i] = replace(index, ref=Fill(0))  # a batch of one
            del given[i]
    if not given:
        raise RowsMix("indexing the batch dim")
    fixed = {i: s.b.literal(t) for i, t in given.items() if not t.is_row}
    if not along and len(fixed) == len(given) == 1:
        ((i, known),) = fixed.items()
        if known is None:
            raise NotLowerable("an index that a buffer holds")
        return _by_positions(s, x, i, known.long())
    if isinstance(x.ref, Fixed) and list(given) == [0] and not along:
        return _looked_up(s, x, given[0], wrap=True)
    if len(given) != 1 or fixed:
        raise NotLowerable("indexing several dims at once by computed positions")
    ((dim, index),) = given.items()
    places = sorted([dim, *along])
    if any(a.kind == "batch" for a in x.dims[dim]):
        raise RowsMix("indexing the batch dim by computed positions")
    # Common dims of all positions; they come first unless the indexed dims are neighbours.
    operands = [index, *along.values()]
    _, _, dims = align(operands, "indexing")
    rank = len(dims)
    neighbours = places == list(range(places[0], places[-1] + 1))
    first = places[0] if neighbours else 0
    kept = [d for i, d in enumerate(x.dims) if i not in places]
    batch = {a for d in dims for a in d if a.kind == "batch"}
    mine = {a for d in kept for a in d if a.kind == "batch"}
    if batch & mine:
        raise RowsMix("indexing by positions of other rows")
    inside = {a for i in along for a in x.dims[i]}
    if any(a.kind == "batch" for d in index.dims for a in d) and (
        inside != batch and x.atoms("batch")
    ):
        raise RowsMix("indexing by positions of other rows")
    before, after = kept[:first], kept[first:]
    # As a gather: the value with all of the positions' dims in place, the indexed one last of all.
    x_dims = (*before, *[()] * rank, *after, x.dims[dim])
    value = x.with_dims(x_dims)
    value = replace(value, order=x.order)
    i_dims = (*[()] * len(before), *[()] * (rank - len(index.dims)), *index.dims,
              *[()] * len(after), ())  # fmt: skip
    out = _taken(s, value, len(x_dims) - 1, s.b.as_row(index.with_dims(i_dims)), wrap=True)
    return out.with_dims(out.dims[:-1])


def _by_positions(s: Step, x: Laid, dim: int, known: torch.Tensor) -> Laid:
    if any(a.kind == "batch" for a in x.dims[dim]):
        raise RowsMix("indexing the batch dim by fixed positions")
    flat = known.flatten() % x.shape[dim]
    x = s.b.picked(x, lambda t: t.index_select(dim, flat), [dim], [dim])
    if known.dim() == 1:
        return x
    shape = (*x.shape[:dim], *known.shape, *x.shape[dim + 1 :])
    return s.view(x, shape)


@lowers("index_put", "_unsafe_index_put")
def _index_put(s: Step, c: Call) -> Laid:
    mask, *more = c["indices"]
    x, values = c["self"], c["values"]
    whole = mask is not None and mask.kind == "bool" and len(mask.dims) == len(x.dims)
    if more or not whole or math.prod(values.shape) != 1 or c["accumulate"]:
        raise NotLowerable("writing at indices other than one number under a mask")
    return s.b.elementwise("where", mask, values.with_dims(()), x, kind=x.kind)


@lowers("scatter", "scatter_add")
def _scatter(s: Step, c: Call) -> Laid:
    x, index = c["self"], s.b.as_row(c["index"])
    dim = c["dim"] % max(len(x.dims), 1)
    if index.dims[dim]:
        raise NotLowerable(f"aten.{c.name} to several places of a row at once")
    for i, (have, want) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i != dim and have != want:
            raise NotLowerable(f"aten.{c.name} into a part")
    n = x.shape[dim]
    index = _checked(s, index, n)
    atom = Atom("inner", n)
    hot_val = s.b.program.emit("one_hot", index.ref, n=n)  # type: ignore[arg-type]
    hot = Laid(
        hot_val, (*index.dims[:dim], (atom,), *index.dims[dim + 1 :]), (*index.order, atom), "bool"
    )
    source = c.get("value", c.get("src"))
    if c.get("reduce") is not None:
        raise NotLowerable("aten.scatter with a reduction")
    if isinstance(source, Laid):
        if source.shape != index.shape:
            source = s.narrowed(source, dim, 0, 1)
    if c.name == "scatter_add":
        return s.arith("add", x, s.b.elementwise("where", hot, source, 0.0, kind=x.kind))
    out = s.b.elementwise("where", hot, source, x, kind=x.kind)
    return replace(out, bound=s.most(source, x))
