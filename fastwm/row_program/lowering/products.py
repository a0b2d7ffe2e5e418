"""Matrix products: a row value with a constant matrix, or small ones of two row values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastwm.row_program.lowering.elementwise import times
from fastwm.row_program.lowering.errors import NotLowerable, RowsMix
from fastwm.row_program.lowering.layout import Atom, Dims, Fixed, Laid, align
from fastwm.row_program.lowering.registry import Call, lowers
from fastwm.row_program.program import Val

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__: list[str] = []

_LARGEST = 1 << 14  # elements that a product of two row values may spread over


def _flipped(x: Laid) -> Laid:
    return x.with_dims((*x.dims[:-2], x.dims[-1], x.dims[-2]))


def _single(s: Step, x: Laid, dim: int, what: str) -> Laid:
    if any(a.kind == "batch" for a in x.dims[dim]):
        raise RowsMix(f"{what} sums over the batch dim")
    return s.b.merged(x, dim)


def _matrix(s: Step, w: Laid, lead: tuple[Atom, ...]) -> tuple[Val, str]:
    """A constant ``[..., K, N]`` as the program takes it, the way it lies where that is possible."""
    if any(a.kind == "repeat" for a in (*w.dims[-1], *w.dims[-2])):
        w = s.expanded(w)
    k, n = w.dims[-2], w.dims[-1]
    sizes = tuple(a.size for a in lead)
    size_k, size_n = (math.prod(a.size for a in d) for d in (k, n))
    assert isinstance(w.ref, Fixed)
    if w.order == (*lead, *n, *k) and w.order != (*lead, *k, *n):
        return s.b.uniform(w, w.order, (*sizes, size_n, size_k), "float"), "nk"
    if (
        size_n == 1 and not n
    ):  # one column: the same elements either way, and this way is a plain Linear's
        return s.b.uniform(w, (*lead, *k), (*sizes, 1, size_k), "float"), "nk"
    return s.b.uniform(w, (*lead, *k, *n), (*sizes, size_k, size_n), "float"), "kn"


def _bias(s: Step, bias: Laid | None, dims: Dims, lead: int) -> tuple[Atom, ...] | None:
    """The bias' atoms if it is constant and only depends on the members and the features."""
    if bias is None or not isinstance(bias.ref, Fixed):
        return None
    padded: list[Any] = [()] * (len(dims) - len(bias.dims)) + list(bias.dims)
    own = [[a for a in d if a.kind == "inner"] for d in padded]
    sizes = [math.prod(a.size for a in d) for d in own]
    full = [math.prod(a.size for a in d) for d in dims]
    keep = {len(dims) - 1, *range(lead)}
    for i, size in enumerate(sizes):
        if size != (full[i] if i in keep else 1):
            return None
    return tuple(a for d in own for a in d)


def _plus(s: Step, out: Laid, bias: Laid | None) -> Laid:
    return out if bias is None else s.arith("add", out, bias)


def _product(s: Step, x: Laid, w: Laid, bias: Laid | None = None) -> Laid:
    """``[P, K] @ [K, N]``, one of them a row value."""
    if not x.is_row and not isinstance(x.ref, Fixed):
        x = s.b.as_row(x)
    if isinstance(w.ref, Fixed) and not any(a.kind == "batch" for a in w.atoms()):
        x = _single(s, s.b.as_row(x), 1, "a matrix product")
        val, lead = s.b.grouped(x, [1])[:2]
        if not x.dims[1]:  # one feature
            val = s.b.reshaped(val, (*s.b.program.type(val).shape[:-1], 1))
        matrix, layout = _matrix(s, w, ())
        n = w.shape[1]
        atom = (Atom("inner", n),) if n > 1 else ()
        dims = (x.dims[0], atom)
        found = _bias(s, bias, dims, 0)
        b = None if found is None or bias is None else s.b.uniform(bias, found, (n,), "float")
        result = s.b.program.emit("linear", val, matrix, b, layout=layout)
        made = Laid(result, dims, (*lead, *atom))
        return made if b is not None else _plus(s, made, bias)
    if isinstance(x.ref, Fixed) and not any(a.kind == "batch" for a in x.atoms()):
        out = _flipped(_product(s, _flipped(w), _flipped(x)))
        return _plus(s, out, bias)
    out = _of_rows(s, x.with_dims(((), *x.dims)), w.with_dims(((), *w.dims)))
    out = out.with_dims(out.dims[1:])
    return _plus(s, out, bias)


def _of_rows(s: Step, x: Laid, w: Laid) -> Laid:
    """``[D, P, K] @ [D, K, N]`` of two row values: products and a sum, in the open."""
    left = x.with_dims((*x.dims, ()))
    right = w.with_dims((w.dims[0], (), w.dims[1], w.dims[2]))
    _, _, dims = align([left, right], "a product of two row values")
    size = math.prod(a.size for d in dims for a in d if a.kind == "inner")
    if size > _LARGEST:
        raise NotLowerable(f"a product of two row values of {size} multiply-adds per row")
    spread = s.b.elementwise("mul", left, right)
    return s.reduced("sum", spread, [2], False)


def _batched(s: Step, x: Laid, w: Laid, bias: Laid | None = None) -> Laid:
    """``[D, P, K] @ [D, K, N]``."""
    if isinstance(w.ref, Fixed) and not any(a.kind == "batch" for a in w.atoms()):
        members = [a for a in w.dims[0] if a.kind == "inner"]
        if not members:
            # One matrix for all of D.
            flat = w.with_dims(w.dims[1:])
            x = _single(s, s.b.as_row(x), 2, "a matrix product")
            out = _product(s, x.with_dims(((*x.dims[0], *x.dims[1]), x.dims[2])), flat)
            out = out.with_dims((x.dims[0], x.dims[1], out.dims[1]))
            return _plus(s, out, bias)
        x = _single(s, s.b.as_row(x), 2, "a matrix product")
        only = [x.with_dims(x.dims[:1]), w.with_dims(w.dims[:1])]
        (xc, wc), _, dims = align(only, "a product with one matrix per group")
        x = replace(x, dims=(xc.dims[0], *x.dims[1:]), order=xc.order)
        w = replace(w, dims=(wc.dims[0], *w.dims[1:]), order=wc.order)
        groups = [a for a in dims[0] if a.kind == "inner"]
        members = [a for a in w.dims[0] if a.kind == "inner"]
        if len(groups) != len(members):
            raise NotLowerable("a product with one matrix per group, for several rows of groups")
        mine = [a for a in x.dims[0] if a.kind == "inner"]
        extra = [a for a in x.dims[1] if a.kind == "inner"]
        if extra:
            raise NotLowerable("a product with one matrix per group, several times per row")
        if mine and len(mine) != len(members):
            raise NotLowerable("a product with one matrix per group, some of them shared")
        k = x.dims[2]
        count, size = math.prod(a.size for a in members), math.prod(a.size for a in k)
        shape = (count, size) if mine else (size,)
        val = s.b.ordered(x, (*mine, *k), shape)
        matrix, layout = _matrix_of_members(s, w, tuple(members), count)
        n = w.shape[2]
        atom = (Atom("inner", n),) if n > 1 else ()
        laid_out = (dims[0], x.dims[1], atom)
        found = _bias(s, bias, laid_out, 1)
        b = None
        if found is not None and bias is not None:
            b = s.b.uniform(bias, found, (count, n), "float")
        result = s.b.program.emit("grouped_linear", val, matrix, b, layout=layout)
        made = Laid(result, laid_out, (*groups, *atom))
        return made if b is not None else _plus(s, made, bias)
    if isinstance(x.ref, Fixed) and not any(a.kind == "batch" for a in x.atoms()):
        out = _flipped(_batched(s, _flipped(w), _flipped(x)))
        return _plus(s, out, bias)
    out = _of_rows(s, s.b.as_row(x), s.b.as_row(w))
    return _plus(s, out, bias)


def _matrix_of_members(s: Step, w: Laid, members: tuple[Atom, ...], count: int) -> tuple[Val, str]:
    val, layout = _matrix(s, w, members)
    shape = s.b.program.type(val).shape
    if len(shape) != 3:
        raise NotLowerable("a product with one matrix per group, grouped in several dims")
    return val, layout


def _with_scales(s: Step, c: Call, product: Any, a: str, b: str) -> Laid:
    bias, alpha, beta = c["self"], c.get("alpha", 1), c.get("beta", 1)
    if alpha == 1 and beta == 1:
        return product(s, c[a], c[b], bias)
    out = times(s, product(s, c[a], c[b]), alpha)
    return out if beta == 0 else s.arith("add", out, times(s, s.b.as_row(bias), beta))


@lowers("addmm")
def _addmm(s: Step, c: Call) -> Laid:
    return _with_scales(s, c, _product, "mat1", "mat2")


@lowers("mm")
def _mm(s: Step, c: Call) -> Laid:
    return _product(s, c["self"], c["mat2"])


@lowers("bmm")
def _bmm(s: Step, c: Call) -> Laid:
    return _batched(s, c["self"], c["mat2"])


@lowers("baddbmm")
def _baddbmm(s: Step, c: Call) -> Laid:
    return _with_scales(s, c, _batched, "batch1", "batch2")


@lowers("mv")
def _mv(s: Step, c: Call) -> Laid:
    x, v = c["self"], c["vec"]
    out = _product(s, x, v.with_dims((v.dims[0], ())))
    return out.with_dims(out.dims[:1])


@lowers("dot")
def _dot(s: Step, c: Call) -> Laid:
    return s.reduced("sum", s.b.elementwise("mul", c["self"], c["tensor"]), [0], False)


@lowers("linear")
def _linear(s: Step, c: Call) -> Laid:
    x, w = c["input"], c["weight"]
    if not isinstance(w.ref, Fixed):
        raise NotLowerable("aten.linear with a weight that the step computes")
    lead = tuple(a for d in x.dims[:-1] for a in d)
    flat = x.with_dims((lead, x.dims[-1]))
    out = _product(s, flat, w.with_dims(w.dims[::-1]), c.get("bias"))
    return out.with_dims((*x.dims[:-1], out.dims[1]))
