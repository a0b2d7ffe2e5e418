"""Views, permutations, slices, concatenation: elements on the move within the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastwm.row_program.lowering.errors import NotLowerable
from fastwm.row_program.lowering.layout import (
    Atom,
    Fill,
    Fixed,
    Laid,
    align,
    inner_atoms,
    repeats,
)  # fmt: skip
from fastwm.row_program.lowering.registry import Call, lowers

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__ = ["joined", "narrowed"]


@lowers("alias", "clone", "lift_fresh", "lift_fresh_copy", "contiguous", "positive",
        "_conj", "resolve_conj", "_neg_view", layout_only=True)  # fmt: skip
def _same(s: Step, c: Call) -> Laid:
    if c.name in ("_conj", "_neg_view"):
        raise NotLowerable(f"aten.{c.name}: no row-wise form")
    return c.x


@lowers("detach", layout_only=True)
def _detach(s: Step, c: Call) -> Laid:
    return s.detached(c.x)


@lowers("_to_copy", layout_only=True)
def _to_copy(s: Step, c: Call) -> Laid:
    meta = c.out[0]
    assert meta is not None
    kind = s.kind(meta)
    x = c.x
    if isinstance(x.ref, Fixed) and kind != x.kind:
        return s.computed(c)
    if kind == "float" and x.kind == "float":
        return x
    return s.b.cast(x, kind)


@lowers("view", "reshape", "_unsafe_view", "_reshape_alias", layout_only=True)
def _view(s: Step, c: Call) -> Laid:
    if c.name == "view" and "dtype" in c.given:
        raise NotLowerable("aten.view as another dtype")
    meta = c.out[0]
    assert meta is not None
    return s.view(c.x, tuple(meta.shape))


@lowers("squeeze", "unsqueeze", layout_only=True)
def _squeeze(s: Step, c: Call) -> Laid:
    dims = list(c.x.dims)
    if c.name == "unsqueeze":
        dims.insert(c["dim"] % (len(dims) + 1), ())
        return c.x.with_dims(dims)
    given = c.get("dim")
    which = range(len(dims)) if given is None else [given] if isinstance(given, int) else given
    gone = {d % max(len(dims), 1) for d in which}
    return c.x.with_dims(d for i, d in enumerate(dims) if d or i not in gone)


@lowers("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", layout_only=True)
def _permute(s: Step, c: Call) -> Laid:
    dims = list(c.x.dims)
    n = len(dims)
    if c.name == "permute":
        return c.x.with_dims(dims[d % n] for d in c["dims"])
    if c.name == "t":
        return c.x.with_dims(dims[::-1])
    if c.name not in ("transpose", "swapaxes"):
        raise NotLowerable(f"aten.{c.name}: no row-wise form")
    if n:
        a, b = c["dim0"] % n, c["dim1"] % n
        dims[a], dims[b] = dims[b], dims[a]
    return c.x.with_dims(dims)


@lowers("expand", layout_only=True)
def _expand(s: Step, c: Call) -> Laid:
    meta = c.out[0]
    assert meta is not None
    dims = [() for _ in range(len(meta.shape) - len(c.x.dims))] + list(c.x.dims)
    spread = repeats(meta.shape)
    return c.x.with_dims(d or e for d, e in zip(dims, spread, strict=True))


@lowers("repeat", layout_only=True)
def _repeat(s: Step, c: Call) -> Laid:
    times = c["repeats"]
    dims = [() for _ in range(len(times) - len(c.x.dims))] + list(c.x.dims)
    return c.x.with_dims(
        (*((Atom("repeat", n),) if n > 1 else ()), *d) for d, n in zip(dims, times, strict=True)
    )


def _fixed_dim(s: Step, c: Call, dim: int) -> tuple[Laid, int]:
    return c.x, dim % len(c.x.dims)


@lowers("select")
def _select(s: Step, c: Call) -> Laid:
    x, dim = _fixed_dim(s, c, c["dim"])
    if not x.dims[dim] or all(a.kind == "repeat" for a in x.dims[dim]):
        return x.with_dims(d for i, d in enumerate(x.dims) if i != dim)
    index = c["index"]
    return s.b.picked(x, lambda t: t.select(dim, index), [dim], [])


def narrowed(s: Step, x: Laid, dim: int, start: int, length: int, step: int = 1) -> Laid:
    size = x.shape[dim]
    if start == 0 and length == size and step == 1:
        return x
    if x.dims[dim] and all(a.kind == "repeat" for a in x.dims[dim]):
        dims = list(x.dims)
        dims[dim] = repeats([length])[0]
        return x.with_dims(dims)
    if length == 0:
        raise NotLowerable("a slice of nothing")
    stop = start + (length - 1) * step + 1
    entries = torch.arange(start, stop, step)
    return s.b.picked(x, lambda t: t.index_select(dim, entries), [dim], [dim])


@lowers("slice", "narrow")
def _slice(s: Step, c: Call) -> Laid:
    x, dim = _fixed_dim(s, c, c["dim"])
    if c.name == "narrow":
        return narrowed(s, x, dim, c["start"] % x.shape[dim], c["length"])
    start, stop, step = slice(c["start"], c["end"], c["step"]).indices(x.shape[dim])
    return narrowed(s, x, dim, start, len(range(start, stop, step)), step)


@lowers("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "unsafe_chunk",
        "tensor_split")  # fmt: skip
def _split(s: Step, c: Call) -> list[Laid]:
    x, dim = _fixed_dim(s, c, c.get("dim", 0))
    out, start = [], 0
    for meta in c.out:
        assert meta is not None
        out.append(narrowed(s, x, dim, start, meta.shape[dim]))
        start += meta.shape[dim]
    return out


@lowers("unbind")
def _unbind(s: Step, c: Call) -> list[Laid]:
    x, dim = _fixed_dim(s, c, c["dim"])
    out = []
    for k in range(x.shape[dim]):
        piece = narrowed(s, x, dim, k, 1)
        out.append(piece.with_dims(d for i, d in enumerate(piece.dims) if i != dim))
    return out


@lowers("flip")
def _flip(s: Step, c: Call) -> Laid:
    dims = [d % len(c.x.dims) for d in c["dims"]]
    return s.b.picked(c.x, lambda t: t.flip(dims), dims, dims)


@lowers("roll")
def _roll(s: Step, c: Call) -> Laid:
    if not c["dims"]:
        raise NotLowerable("aten.roll of all elements")
    dims = [d % len(c.x.dims) for d in c["dims"]]
    return s.b.picked(c.x, lambda t: t.roll(c["shifts"], dims), dims, dims)


def joined(s: Step, pieces: Sequence[Laid], dim: int) -> Laid:
    """Concatenate along ``dim``."""
    if len(pieces) == 1:
        return pieces[0]
    if all(isinstance(p.ref, Fill) for p in pieces):
        values = {(p.ref.value, p.kind) for p in pieces if isinstance(p.ref, Fill)}
        if len(values) == 1:
            shape = list(pieces[0].shape)
            shape[dim] = sum(p.shape[dim] for p in pieces)
            return replace(pieces[0], dims=repeats(shape))
    solid = []
    for piece in pieces:
        piece = s.b.merged(s.b.as_row(piece), dim)
        solid.append(piece)
    # All other dims must agree, and one piece's repeats may be what varies in another.
    others = [p.with_dims((*p.dims[:dim], (), *p.dims[dim + 1 :])) for p in solid]
    cut, maps, dims = align(others, "cat")
    rest = inner_atoms(dims)
    atom = Atom("inner", sum(p.shape[dim] for p in solid))
    result = (*dims[:dim], (atom,), *dims[dim + 1 :])
    natural = inner_atoms(result)
    args, places, start = [], [], 0
    for piece, own, found in zip(solid, cut, maps, strict=True):
        along = piece.dims[dim]
        order = tuple(found.get(a, a) for a in own.order)
        if len(order) != len(rest) + len(along):
            order = tuple(a for n in natural for a in (along if n is atom else (n,)))
        sizes = tuple(a.size for a in order)
        laid = replace(piece, order=tuple(found.get(a, a) for a in own.order))
        args.append(s.b.ordered(laid, order, sizes))
        # Where each of its elements stands among all, by the result's dims.
        here = torch.arange(math.prod(sizes)).reshape(sizes) + start
        here = here.permute([order.index(a) for a in natural if a is not atom or along
                             for a in (along if a is atom else (a,))])  # fmt: skip
        if not along:
            here = here.unsqueeze(natural.index(atom))
        places.append(here)
        start += here.numel()
    val = s.b.program.emit("concat", *args)
    where = torch.cat(places, natural.index(atom))
    if not torch.equal(where.flatten(), torch.arange(start)):
        val = s.b.index(val, where)
    elif where.dim() > 1:
        val = s.b.reshaped(val, tuple(where.shape))
    if all(a.index in s.b.quiet for a in args):
        s.b.quiet.add(val.index)
    bound = max((p.bound or math.inf for p in solid), default=None)
    return Laid(val, result, natural, solid[0].kind, bound if bound != math.inf else None)


def _same_kind(s: Step, pieces: Sequence[Laid], kind: str) -> list[Laid]:
    return [p if p.kind == kind else s.b.cast(p, kind) for p in pieces]


@lowers("cat", "concat")
def _cat(s: Step, c: Call) -> Laid:
    meta = c.out[0]
    assert meta is not None
    dim = c["dim"] % len(meta.shape)
    # An empty one-dim tensor may be among those joined.
    pieces = [p for p in c["tensors"] if math.prod(p.shape)]
    return joined(s, _same_kind(s, pieces, s.kind(meta)), dim)


@lowers("stack")
def _stack(s: Step, c: Call) -> Laid:
    meta = c.out[0]
    assert meta is not None
    dim = c["dim"] % len(meta.shape)
    pieces = [p.with_dims((*p.dims[:dim], (), *p.dims[dim:])) for p in c["tensors"]]
    return joined(s, _same_kind(s, pieces, s.kind(meta)), dim)


@lowers("constant_pad_nd")
def _pad(s: Step, c: Call) -> Laid:
    x, pad = c.x, list(c["pad"])
    for k in range(len(pad) // 2):
        dim = len(x.dims) - 1 - k
        before, after = pad[2 * k : 2 * k + 2]
        if before < 0 or after < 0:
            raise NotLowerable("aten.constant_pad_nd that cuts")
        pieces: list[Laid] = []
        for n, here in ((before, None), (None, x), (after, None)):
            if here is not None:
                pieces.append(here)
            elif n:
                shape = list(x.shape)
                shape[dim] = n
                pieces.append(Laid(Fill(c["value"]), repeats(shape), (), x.kind))
        x = joined(s, pieces, dim)
    return x


@lowers("unfold", "diagonal", "tril", "triu", "as_strided", "_efficientzerotensor")
def _refused(s: Step, c: Call) -> Any:
    raise NotLowerable(f"aten.{c.name}: no row-wise form")


@lowers("copy")
def _copy(s: Step, c: Call) -> Laid:
    source = c["src"]
    if source.kind != c["self"].kind:
        source = s.b.cast(source, c["self"].kind)
    dims = [()] * (len(c["self"].dims) - len(source.dims)) + list(source.dims)
    shape = repeats(c["self"].shape)
    return source.with_dims(d or e for d, e in zip(dims, shape, strict=True))
