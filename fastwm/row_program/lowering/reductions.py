"""Reductions and norms over dims within the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastwm.row_program.lowering.errors import NotLowerable
from fastwm.row_program.lowering.layout import Atom, Fill, Laid
from fastwm.row_program.lowering.registry import Call, lowers
from fastwm.row_program.program import Val

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__ = ["reduced"]

_LARGEST_CUMSUM = 256


def _dims(x: Laid, given: Any) -> list[int]:
    if given is None or given == []:
        return list(range(len(x.dims)))
    given = [given] if isinstance(given, int) else given
    return [d % max(len(x.dims), 1) for d in given]


def reduced(s: Step, op: str, x: Laid, dims: Sequence[int], keep: bool) -> Laid:
    """Emit a reduction of ``[*G, n]``."""
    if op.startswith("arg") and x.kind == "float":
        s.refuse_ties("the largest or smallest")
    x = s.b.as_row(x)
    if not x.dims:
        dims = []
    val, lead, _ = s.b.grouped(x, dims)
    out = s.b.program.emit(op, val)
    left = [() if i in dims else d for i, d in enumerate(x.dims) if keep or i not in dims]
    kind = "int" if op.startswith("arg") else x.kind if op in ("max", "min") else "float"
    return Laid(out, tuple(left), lead, kind)


@lowers("sum", "mean", "amax", "amin", "any", "all")
def _reduce(s: Step, c: Call) -> Laid:
    x = c.x
    op = {"amax": "max", "amin": "min", "any": "max", "all": "min"}.get(c.name, c.name)
    if c.name in ("any", "all"):
        x = s.b.cast(x, "bool")
    dims = _dims(x, c.get("dim"))
    out = reduced(s, op, x, dims, bool(c.get("keepdim")))
    if x.kind == "float" or c.name != "sum":
        return out
    n = math.prod(x.shape[d] for d in dims)
    bound = 1.0 if x.kind == "bool" else x.bound
    return s.b.bounded(replace(out, kind="int"), None if bound is None else bound * n)


@lowers("max", "min")
def _max(s: Step, c: Call) -> Any:
    if "other" in c.given:
        op = "maximum" if c.name == "max" else "minimum"
        return s.arith(op, c["self"], c["other"])
    x = c.x
    if c.get("dim") is None:
        return reduced(s, c.name, x, _dims(x, None), False)
    dims = _dims(x, c["dim"])
    index = _position(s, "arg" + c.name, x, dims, c["keepdim"])
    if x.kind != "float":
        return [reduced(s, c.name, x, dims, c["keepdim"]), index]
    # By its position: the gradient goes to that element alone, as in torch.
    val, _, shape = s.b.grouped(x, dims)
    n = s.b.program.type(val).shape[-1]
    assert isinstance(index.ref, Val)
    at = s.b.reshaped(index.ref, shape)
    best = s.b.program.emit("take", s.b.reshaped(val, (*shape, n, 1)), at)
    return [replace(index, ref=s.b.reshaped(best, shape), kind="float", bound=None), index]


def _position(s: Step, op: str, x: Laid, dims: list[int], keep: bool) -> Laid:
    out = reduced(s, op, x, dims, keep)
    return replace(out, kind="int", bound=float(math.prod(x.shape[d] for d in dims)))


@lowers("argmax", "argmin")
def _arg(s: Step, c: Call) -> Laid:
    return _position(s, c.name, c.x, _dims(c.x, c.get("dim")), bool(c.get("keepdim")))


@lowers("logsumexp")
def _logsumexp(s: Step, c: Call) -> Laid:
    return reduced(s, "logsumexp", c.x, _dims(c.x, c["dim"]), bool(c["keepdim"]))


@lowers("var", "std", "var_mean", "std_mean")
def _variance(s: Step, c: Call) -> Any:
    x = c.x
    dims = _dims(x, c.get("dim"))
    n = math.prod(x.shape[d] for d in dims)
    correction = c.get("correction")
    if correction is None:
        correction = 1 if c.get("unbiased", True) else 0
    if n - correction <= 0:
        raise NotLowerable(f"aten.{c.name} of {n} entries with correction {correction}")
    mean = reduced(s, "mean", x, dims, True)
    total = reduced(s, "sum", s.b.unary("square", s.b.elementwise("sub", x, mean)), dims, True)
    out = s.b.elementwise("div", total, float(n - correction))
    if c.name.startswith("std"):
        out = _root(s, out)
    both = [out, mean]
    if not c.get("keepdim"):
        both = [t.with_dims(d for i, d in enumerate(t.dims) if i not in dims) for t in both]
    return both if c.name.endswith("_mean") else both[0]


def _root(s: Step, x: Laid) -> Laid:
    """The root, with gradient 0 at 0, as torch's norms have it."""
    some = s.b.elementwise("gt", x, 0.0)
    safe = s.b.elementwise("where", some, x, 1.0)
    return s.b.elementwise("where", some, s.b.unary("sqrt", safe), x)


@lowers("linalg_vector_norm", "norm")
def _norm(s: Step, c: Call) -> Laid:
    x = c.x
    order = c.get("ord", c.get("p"))
    order = 2 if order is None else order
    dims, keep = _dims(x, c.get("dim")), bool(c.get("keepdim"))
    if order == 2:
        return _root(s, reduced(s, "sum", s.b.unary("square", x), dims, keep))
    if order == 1:
        return reduced(s, "sum", s.b.unary("abs", x), dims, keep)
    if order == math.inf:
        return reduced(s, "max", s.b.unary("abs", x), dims, keep)
    raise NotLowerable(f"a norm of order {order}")


@lowers("_softmax", "_log_softmax", "softmax", "log_softmax")
def _softmax(s: Step, c: Call) -> Laid:
    x = c.x
    dims = _dims(x, c["dim"])
    x = s.b.solid(s.b.as_row(x), dims)
    last = x.dims[dims[0]] if x.dims else ()
    val, lead, _ = s.b.grouped(x, dims if x.dims else [])
    out = s.b.program.emit(c.name.lstrip("_"), val)
    return replace(x, ref=out, order=(*lead, *last), kind="float")


@lowers("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(s: Step, c: Call) -> Any:
    if "rms" in c.name:
        return _rms_norm(s, c)
    x, w, b = c["input"], c["weight"], c["bias"]
    count = len(c["normalized_shape"])
    dims = list(range(len(x.dims) - count, len(x.dims)))
    x = s.b.solid(s.b.as_row(x), dims)
    last = tuple(a for d in dims for a in x.dims[d])
    val, lead, _ = s.b.grouped(x, dims)
    n = math.prod(x.shape[d] for d in dims)
    uniforms = []
    for given in (w, b):
        plain = given is not None and not given.is_row and not _is_fill(given)
        uniforms.append(s.b.uniform(given, _inner(given), (n,), "float") if plain else None)
    # One of the two that the step computes goes by itself.
    computed_w = w is not None and uniforms[0] is None
    computed_b = b is not None and (uniforms[1] is None or computed_w)
    out = s.b.program.emit(
        "layer_norm", val, uniforms[0], None if computed_b else uniforms[1], eps=float(c["eps"])
    )
    made = replace(x, ref=out, order=(*lead, *last))
    if computed_w:
        made = s.arith("mul", made, w)
    if computed_b:
        made = s.arith("add", made, b)
    return [made, None, None][: len(c.out)] if c.name == "native_layer_norm" else made


def _inner(x: Laid) -> tuple[Atom, ...]:
    return tuple(x.atoms("inner"))


def _is_fill(x: Laid) -> bool:
    return isinstance(x.ref, Fill)


def _rms_norm(s: Step, c: Call) -> Any:
    x = c.x
    count = len(c["normalized_shape"])
    dims = list(range(len(x.dims) - count, len(x.dims)))
    eps = c.get("eps")
    eps = torch.finfo(s.floats).eps if eps is None else eps
    mean = reduced(s, "mean", s.b.unary("square", x), dims, True)
    scale = s.b.unary("rsqrt", s.b.elementwise("add", mean, float(eps)))
    out = s.b.elementwise("mul", x, scale)
    if c.get("weight") is not None:
        out = s.arith("mul", out, c["weight"])
    return [out, None] if len(c.out) == 2 else out


@lowers("native_group_norm")
def _group_norm(s: Step, c: Call) -> list[Laid | None]:
    x, w, b, groups = c["input"], c["weight"], c["bias"], c["group"]
    shape = x.shape
    lead = (shape[0], groups, math.prod(shape[1:]) // groups)
    split = s.view(x, lead)
    split = s.b.solid(s.b.as_row(split), [2])
    last = split.dims[2]
    val, order, _ = s.b.grouped(split, [2])
    out = s.b.program.emit("layer_norm", val, None, None, eps=float(c["eps"]))
    made = s.view(replace(split, ref=out, order=(*order, *last)), shape)
    tail = ((),) * (len(shape) - 2)
    if w is not None:
        made = s.arith("mul", made, w.with_dims((*w.dims, *tail)))
    if b is not None:
        made = s.arith("add", made, b.with_dims((*b.dims, *tail)))
    return [made, None, None]


@lowers("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
        "cudnn_batch_norm")  # fmt: skip
def _batch_norm(s: Step, c: Call) -> list[Laid | None]:
    if c.get("training"):
        raise NotLowerable("batch norm in train mode")
    x = c["input"]
    tail = ((),) * (len(x.dims) - 2)

    def channels(given: Laid) -> Laid:
        return given.with_dims((*given.dims, *tail))

    variance = s.b.elementwise("add", s.b.as_row(channels(c["running_var"])), float(c["eps"]))
    out = s.b.elementwise("sub", x, channels(c["running_mean"]))
    out = s.b.elementwise("mul", out, s.b.unary("rsqrt", variance))
    if c["weight"] is not None:
        out = s.arith("mul", out, channels(c["weight"]))
    if c["bias"] is not None:
        out = s.arith("add", out, channels(c["bias"]))
    return [out] + [None] * (len(c.out) - 1)


@lowers("cumsum")
def _cumsum(s: Step, c: Call) -> Laid:
    """As a product with a triangle of ones."""
    x = c.x
    if x.kind != "float":
        raise NotLowerable("aten.cumsum of integers")
    dims = _dims(x, c["dim"])
    if not x.dims or not x.dims[dims[0]]:
        return x
    x = s.b.solid(s.b.as_row(x), dims)
    val, lead, _ = s.b.grouped(x, dims)
    n = x.shape[dims[0]]
    if n > _LARGEST_CUMSUM:
        raise NotLowerable(f"aten.cumsum over {n} entries")
    ones = s.b.fixed(torch.ones(n, n, dtype=s.b.program.dtype).triu())
    triangle = s.b.uniform(ones, ones.order, (n, n), "float")
    out = s.b.program.emit("linear", val, triangle, None, layout="kn")
    return replace(x, ref=out, order=(*lead, *x.dims[dims[0]]))


@lowers("gru_cell", "_thnn_fused_gru_cell", "cumprod", "prod", "topk", "sort", "median",
        "nanmean", "nansum", "kthvalue", "convolution", "nll_loss_forward")  # fmt: skip
def _refused(s: Step, c: Call) -> Any:
    raise NotLowerable(f"aten.{c.name}: no row-wise form")
