"""The ops of row programs: for each, the type of its result and its reference in plain torch.

The references define what an op means. They take tensors of shape ``[rows, *shape]`` for row values and
``shape`` for uniforms, floats for immediates; the C++ (and Triton) executors are held against them.

Elementwise ops take operands of one shape, or of a single element (row value, uniform or immediate).
Where a table says ``[*G, n]``, the op works along the last dim, for each of the ``G`` groups by itself.

| op | operands | attributes | result |
|---|---|---|---|
| unary, see ``UNARY`` | x | parameters by name | shape of x |
| unary_grad, see ``UNARY_GRAD`` | g, x (of ``tanh``, ``sigmoid``: g, y) | as the unary's | shape of x |
| binary, see ``BINARY`` | a, b | | shape of the larger |
| clamp_min, clamp_max (binary) | a, bound | | as maximum, minimum; at a tie the gradient is all a's |
| where | c, a, b | | shape of the largest |
| fill | | value, shape, kind | the same number everywhere, in every row |
| row | u uniform | | the uniform as a row value |
| cast | x | kind | x as another kind: to int truncates, to bool is ``!= 0`` |
| reshape | x | shape | same elements |
| index | x | map, shape | ``out[j] = x[map[j]]``, both flat: slice, permute, expand, repeat |
| index_add | g | map, shape | ``out[map[j]] += g[j]`` |
| concat | x, ... | | flat, one after the other |
| sum, mean, max, min | x ``[*G, n]`` | | ``[*G]`` |
| argmax, argmin | x ``[*G, n]`` | | int ``[*G]``, the first of equals |
| logsumexp, softmax, log_softmax | x ``[*G, n]`` | | ``[*G]``; ``[*G, n]`` |
| softmax_grad, log_softmax_grad | g, y (the result) | | gradient of x |
| layer_norm | x ``[*G, n]``, w or None ``[n]``, b or None | eps | ``[*G, n]`` |
| layer_norm_grad | g, x, w or None | eps | gradient of x |
| one_hot | i int ``[*G]`` | n | ``[*G, n]`` |
| take | x ``[*G, m, n]``, i int ``[*G]`` | | ``[*G, n]``: entry ``i`` of each group |
| put | g ``[*G, n]``, i int ``[*G]`` | m | ``[*G, m, n]``: ``g`` at entry ``i``, else 0 |
| linear | x ``[*G, K]``, w uniform, b or None | layout, act, act_params | ``[*G, N]`` |
| grouped_linear | x ``[G, K]`` or ``[K]``, w ``[G, ...]``, b or None ``[G, N]`` | the same | ``[G, N]`` |
| member_linear | x ``[K]``, w ``[M, ...]``, b or None ``[M, N]``, i int ``[]`` | the same | ``[N]`` |
| outer | x ``[*G, K]``, g ``[*G, N]`` | layout, target | sum of target: as w |
| grouped_outer | x ``[G, K]`` or ``[K]``, g ``[G, N]`` | layout, target | the same |
| member_outer | x ``[K]``, g ``[N]``, i | layout, target, members | the same |
| row_sum | g | target | sum of target: shape of g |
| member_row_sum | g ``[N]``, i | target, members | sum of target ``[M, N]`` |

``layout`` says how a matrix lies: ``"nk"`` is ``[N, K]`` as in ``nn.Linear``, ``"kn"`` is ``[K, N]``. ``act``
names a unary op applied to the result, ``act_params`` its attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fastwm.row_program.program import Arg, Program, ProgramError, RowType, Val

__all__ = [
    "BINARY", "MOVEMENT", "PRODUCTS", "REDUCE", "REFERENCES", "SUMS", "UNARY", "UNARY_GRAD", "result_type",
]  # fmt: skip

Tensor = torch.Tensor


class _SafeTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        y = x.tanh().clamp(-limit, limit)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y), None


#: name -> (reference, names of its parameters)
UNARY: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "neg": (torch.neg, ()),
    "exp": (torch.exp, ()),
    "log": (torch.log, ()),
    "log1p": (torch.log1p, ()),
    "expm1": (torch.expm1, ()),
    "sqrt": (torch.sqrt, ()),
    "rsqrt": (torch.rsqrt, ()),
    "reciprocal": (torch.reciprocal, ()),
    "square": (torch.square, ()),
    "abs": (torch.abs, ()),
    "sign": (torch.sign, ()),
    "floor": (torch.floor, ()),
    "ceil": (torch.ceil, ()),
    "round": (torch.round, ()),
    "trunc": (torch.trunc, ()),
    "sin": (torch.sin, ()),
    "cos": (torch.cos, ()),
    "erf": (torch.erf, ()),
    "tanh": (torch.tanh, ()),
    # tanh kept within [-limit, limit], its gradient that of the tanh: torchrl's own, g * (1 - y * y)
    "safe_tanh": (lambda x, limit: _SafeTanh.apply(x, limit), ("limit",)),
    "sigmoid": (torch.sigmoid, ()),
    "log_sigmoid": (F.logsigmoid, ()),
    "relu": (torch.relu, ()),
    "silu": (F.silu, ()),
    "mish": (F.mish, ()),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ()),
    "leaky_relu": (lambda x, slope: F.leaky_relu(x, slope), ("slope",)),
    "softplus": (lambda x, beta, threshold: F.softplus(x, beta, threshold), ("beta", "threshold")),
    "elu": (
        lambda x, alpha, scale, input_scale: torch.where(
            x > 0, x * scale, torch.expm1(x * input_scale) * (alpha * scale)
        ),
        ("alpha", "scale", "input_scale"),
    ),
    "detach": (lambda x: x.detach(), ()),  # passes no gradient on
    "not": (lambda x: (x == 0).to(x.dtype), ()),
    "isnan": (lambda x: x.isnan().to(x.dtype), ()),
    "isfinite": (lambda x: x.isfinite().to(x.dtype), ()),
}
_PREDICATES = {"not", "isnan", "isfinite"}


def _through(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of a unary, by autograd: what torch itself computes."""

    def gradient(g: Tensor, x: Tensor, **params: float) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(forward(leaf, **params), leaf, g)
        return found

    return gradient


#: ``<unary>_grad``: (reference, names of its parameters). Others are built from these and the arithmetic.
UNARY_GRAD: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "tanh_grad": (lambda g, y: g * (1 - y * y), ()),
    "sigmoid_grad": (lambda g, y: g * y * (1 - y), ()),
    **{
        f"{name}_grad": (_through(UNARY[name][0]), UNARY[name][1])
        for name in ("relu", "silu", "mish", "gelu", "gelu_tanh", "leaky_relu", "softplus", "log_sigmoid")
    },
    "elu_grad": (
        lambda g, x, alpha, scale, input_scale: torch.ops.aten.elu_backward(
            g, alpha, scale, input_scale, False, x
        ),
        UNARY["elu"][1],
    ),
}  # fmt: skip


def _float(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: fn(a, b).to(a.dtype if isinstance(a, Tensor) else b.dtype)


def _tensors(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For torch functions that take no Python numbers."""

    def call(a: Any, b: Any) -> Tensor:
        like = a if isinstance(a, Tensor) else b
        return fn(
            *(x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (a, b))
        )

    return call


#: name -> reference. Comparisons and logic give 0 or 1.
BINARY: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": torch.pow,
    "maximum": _tensors(torch.maximum),  # NaN where either is NaN
    "minimum": _tensors(torch.minimum),
    # torch.clamp: the same values, but at a tie the gradient is a's alone, where maximum splits it in half
    "clamp_min": _tensors(lambda a, b: torch.clamp(a, min=b)),
    "clamp_max": _tensors(lambda a, b: torch.clamp(a, max=b)),
    "gt": _float(_tensors(torch.gt)),
    "ge": _float(_tensors(torch.ge)),
    "lt": _float(_tensors(torch.lt)),
    "le": _float(_tensors(torch.le)),
    "eq": _float(_tensors(torch.eq)),
    "ne": _float(_tensors(torch.ne)),
    "and": _float(_tensors(torch.logical_and)),
    "or": _float(_tensors(torch.logical_or)),
    "xor": _float(_tensors(torch.logical_xor)),
}
_COMPARE = {"gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor"}
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "min": lambda x: x.amin(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "argmax": lambda x: x.argmax(-1).to(x.dtype),
    "argmin": lambda x: x.argmin(-1).to(x.dtype),
}
#: Matrices times rows.
PRODUCTS = {"linear", "grouped_linear", "member_linear"}
#: Those that only add to one of the program's sums.
SUMS = {"outer", "grouped_outer", "member_outer", "row_sum", "member_row_sum"}
#: Those that only move numbers, and cost little wherever they run.
MOVEMENT = {"reshape", "index", "concat", "cast", "fill", "row"}


# ------------------------------------------------------------------ types


def result_type(
    program: Program, op: str, args: tuple[Arg, ...], attrs: dict[str, Any]
) -> RowType | None:
    """The type of an instruction's result; None for those that add to a sum.

    Raises:
        ProgramError: no such op, or operands that do not fit it.
    """
    uniform = program.uniforms()

    def fail(why: str) -> ProgramError:
        given = ", ".join(str(program.type(a)) if isinstance(a, Val) else str(a) for a in args)
        return ProgramError(f"{op}({given}): {why}")

    def row(position: int) -> RowType:
        arg = args[position]
        if not isinstance(arg, Val):
            raise fail(f"operand {position} must be a value")
        if arg.index in uniform:
            raise fail(f"operand {position} must be a row value, not a uniform")
        return program.type(arg)

    def uniform_or_none(position: int, shape: tuple[int, ...]) -> None:
        arg = args[position]
        if arg is None:
            return
        if not isinstance(arg, Val) or arg.index not in uniform:
            raise fail(f"operand {position} must be a uniform or None")
        if program.type(arg).shape != shape:
            raise fail(f"operand {position} must have shape {list(shape)}")

    def count(n: int) -> None:
        if len(args) != n:
            raise fail(f"takes {n} operands")

    def last(shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape:
            raise fail("needs at least one dim within the row")
        return shape[:-1]

    def parameters(names: tuple[str, ...]) -> None:
        if set(attrs) != set(names):
            raise fail(f"takes the parameters {names}, got {tuple(attrs)}")

    def elementwise(kind: str) -> RowType:
        types = [program.type(a) for a in args if isinstance(a, Val)]
        if not any(isinstance(a, Val) and a.index not in uniform for a in args):
            raise fail("needs a row value among its operands")
        full = max(types, key=lambda t: (t.width, len(t.shape)))
        for t in types:
            if t.shape != full.shape and t.width != 1:
                raise fail("operands must have one shape, or a single element")
        return RowType(full.shape, kind)

    def matrix(w: Arg, lead: tuple[int, ...], k: int) -> int:
        if not isinstance(w, Val) or w.index not in uniform:
            raise fail("the matrix must be a uniform")
        shape = program.type(w).shape
        if attrs.get("layout") not in ("nk", "kn"):
            raise fail("layout must be 'nk' or 'kn'")
        if len(shape) != len(lead) + 2 or shape[: len(lead)] != lead:
            raise fail(f"the matrix has shape {list(shape)}")
        n, kk = shape[-2:] if attrs["layout"] == "nk" else shape[:-3:-1]
        if kk != k:
            raise fail(f"the matrix takes {kk} features, the row has {k}")
        act = attrs.get("act")
        if act is not None and act not in UNARY:
            raise fail(f"no activation {act!r}")
        return n

    if op in UNARY:
        count(1)
        parameters(UNARY[op][1])
        return RowType(row(0).shape, "bool" if op in _PREDICATES else "float")
    if op in UNARY_GRAD:
        count(2)
        parameters(UNARY_GRAD[op][1])
        if row(0).shape != row(1).shape:
            raise fail("operands must have one shape")
        return RowType(row(0).shape)
    if op in BINARY:
        count(2)
        if op in _COMPARE:
            return elementwise("bool")
        kinds = {program.type(a).kind for a in args if isinstance(a, Val)}
        whole = kinds <= {"int"} and all(
            isinstance(a, Val) or float(a).is_integer() for a in args if a is not None
        )
        return elementwise("int" if whole and op not in ("div", "pow") else "float")
    if op == "where":
        count(3)
        kinds = {program.type(a).kind for a in args[1:] if isinstance(a, Val)}
        return elementwise(kinds.pop() if len(kinds) == 1 else "float")
    if op == "fill":
        count(0)
        parameters(("value", "shape", "kind"))
        return RowType(tuple(attrs["shape"]), attrs["kind"])
    if op == "row":
        count(1)
        arg = args[0]
        if not isinstance(arg, Val) or arg.index not in uniform:
            raise fail("operand 0 must be a uniform")
        return program.type(arg)
    if op == "cast":
        count(1)
        return RowType(row(0).shape, attrs["kind"])
    if op == "reshape":
        count(1)
        if math.prod(attrs["shape"]) != row(0).width:
            raise fail(f"cannot become {list(attrs['shape'])}")
        return RowType(tuple(attrs["shape"]), row(0).kind)
    if op == "index":
        count(1)
        width = row(0).width
        if len(attrs["map"]) != math.prod(attrs["shape"]):
            raise fail("map and shape differ in size")
        if any(not 0 <= i < width for i in attrs["map"]):
            raise fail("map leads outside the row")
        return RowType(tuple(attrs["shape"]), row(0).kind)
    if op == "index_add":
        count(1)
        width = math.prod(attrs["shape"])
        if len(attrs["map"]) != row(0).width or any(not 0 <= i < width for i in attrs["map"]):
            raise fail("map does not fit")
        return RowType(tuple(attrs["shape"]))
    if op == "concat":
        types = [row(i) for i in range(len(args))]
        kinds = {t.kind for t in types}
        return RowType((sum(t.width for t in types),), kinds.pop() if len(kinds) == 1 else "float")
    if op in REDUCE:
        count(1)
        lead = last(row(0).shape)
        if row(0).shape[-1] == 0:
            raise fail("nothing to reduce")
        kind = "int" if op.startswith("arg") else "float"
        return RowType(lead, row(0).kind if op in ("max", "min") else kind)
    if op in ("softmax", "log_softmax"):
        count(1)
        last(row(0).shape)
        return RowType(row(0).shape)
    if op in ("softmax_grad", "log_softmax_grad"):
        count(2)
        if row(0).shape != row(1).shape:
            raise fail("operands must have one shape")
        return RowType(row(0).shape)
    if op in ("layer_norm", "layer_norm_grad"):
        count(3)
        x = row(0 if op == "layer_norm" else 1)
        last(x.shape)
        for position in (1, 2) if op == "layer_norm" else (2,):
            uniform_or_none(position, x.shape[-1:])
        if op == "layer_norm_grad" and row(0).shape != x.shape:
            raise fail("operands must have one shape")
        return RowType(x.shape)
    if op == "one_hot":
        count(1)
        return RowType((*row(0).shape, attrs["n"]))
    if op == "take":
        count(2)
        x, i = row(0), row(1)
        if len(x.shape) != len(i.shape) + 2 or x.shape[: len(i.shape)] != i.shape:
            raise fail("operands must be [*G, m, n] and [*G]")
        return RowType((*i.shape, x.shape[-1]), x.kind)
    if op == "put":
        count(2)
        g, i = row(0), row(1)
        if g.shape[:-1] != i.shape or not g.shape:
            raise fail("operands must be [*G, n] and [*G]")
        return RowType((*i.shape, attrs["m"], g.shape[-1]))
    if op == "linear":
        count(3)
        lead = last(row(0).shape)
        n = matrix(args[1], (), row(0).shape[-1])
        uniform_or_none(2, (n,))
        return RowType((*lead, n))
    if op == "grouped_linear":
        count(3)
        x = row(0)
        w = args[1]
        groups = program.type(w).shape[0] if isinstance(w, Val) else 0
        if x.shape[:-1] not in ((), (groups,)):
            raise fail("the row must be [G, K] or [K]")
        n = matrix(w, (groups,), x.shape[-1])
        uniform_or_none(2, (groups, n))
        return RowType((groups, n))
    if op == "member_linear":
        count(4)
        x = row(0)
        w = args[1]
        members = program.type(w).shape[0] if isinstance(w, Val) else 0
        if len(x.shape) != 1 or row(3).width != 1:
            raise fail("the row must be [K], the member a single int")
        n = matrix(w, (members,), x.shape[-1])
        uniform_or_none(2, (members, n))
        return RowType((n,))
    if op in SUMS:
        target = program.sums.get(attrs.get("target"))
        if target is None:
            raise fail("no such sum; declare it with add_sum")
        if op == "row_sum":
            shape: tuple[int, ...] = row(0).shape
        elif op == "member_row_sum":
            shape = (attrs["members"], *row(0).shape)
        else:
            k, n = row(0).shape[-1], row(1).shape[-1]
            shape = (n, k) if attrs["layout"] == "nk" else (k, n)
            if op == "grouped_outer":
                shape = (row(1).shape[0], *shape)
            if op == "member_outer":
                shape = (attrs["members"], *shape)
        if math.prod(shape) != math.prod(target.shape):
            raise fail(f"adds {list(shape)} to a sum of shape {list(target.shape)}")
        return None
    raise ProgramError(f"no op {op!r}")


# ------------------------------------------------------------------ references


def _matrix(w: Tensor, layout: str) -> Tensor:
    """As ``[..., K, N]``."""
    return w.mT if layout == "nk" else w


def _activated(y: Tensor, attrs: dict[str, Any]) -> Tensor:
    act = attrs.get("act")
    return y if act is None else UNARY[act][0](y, **(attrs.get("act_params") or {}))


def _linear(x: Tensor, w: Tensor, b: Tensor | None, **attrs: Any) -> Tensor:
    y = x @ _matrix(w, attrs["layout"])
    return _activated(y if b is None else y + b, attrs)


def _grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, **attrs: Any) -> Tensor:
    m = _matrix(w, attrs["layout"])  # [G, K, N]
    x = x.unsqueeze(1) if x.ndim == 2 else x  # [R, G or 1, K]
    y = torch.einsum("rgk,gkn->rgn", x.expand(-1, m.shape[0], -1), m)
    return _activated(y if b is None else y + b, attrs)


def _member_linear(x: Tensor, w: Tensor, b: Tensor | None, i: Tensor, **attrs: Any) -> Tensor:
    index = i.reshape(-1).long()
    y = torch.einsum("rk,rkn->rn", x, _matrix(w, attrs["layout"])[index])
    return _activated(y if b is None else y + b[index], attrs)


def _outer(x: Tensor, g: Tensor, layout: str, target: Any) -> Tensor:
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    return g.T @ x if layout == "nk" else x.T @ g


def _grouped_outer(x: Tensor, g: Tensor, layout: str, target: Any) -> Tensor:
    x = (x.unsqueeze(1) if x.ndim == 2 else x).expand(-1, g.shape[1], -1)
    return torch.einsum("rgk,rgn->gnk" if layout == "nk" else "rgk,rgn->gkn", x, g)


def _member_outer(
    x: Tensor, g: Tensor, i: Tensor, layout: str, target: Any, members: int
) -> Tensor:
    hot = F.one_hot(i.reshape(-1).long(), members).to(x.dtype)
    return torch.einsum("rm,rk,rn->mnk" if layout == "nk" else "rm,rk,rn->mkn", hot, x, g)


def _member_row_sum(g: Tensor, i: Tensor, target: Any, members: int) -> Tensor:
    return torch.einsum("rm,rn->mn", F.one_hot(i.reshape(-1).long(), members).to(g.dtype), g)


def _layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def _layer_norm_grad(g: Tensor, x: Tensor, w: Tensor | None, eps: float) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(_layer_norm(leaf, w, None, eps), leaf, g)
    return found


def _softmax_grad(g: Tensor, y: Tensor) -> Tensor:
    return y * (g - (g * y).sum(-1, keepdim=True))


def _log_softmax_grad(g: Tensor, y: Tensor) -> Tensor:
    return g - y.exp() * g.sum(-1, keepdim=True)


def _flat(x: Tensor) -> Tensor:
    """``[rows, width]``; ``flatten(1)`` takes no single elements, ``[rows]``."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _index(x: Tensor, map: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return _flat(x)[:, list(map)].reshape(len(x), *shape)


def _index_add(g: Tensor, map: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    out = g.new_zeros(len(g), math.prod(shape))
    out = out.index_add(1, torch.tensor(map, dtype=torch.long, device=g.device), _flat(g))
    return out.reshape(len(g), *shape)


def _cast(x: Tensor, kind: str) -> Tensor:
    if kind == "int":
        return x.trunc()
    return (x != 0).to(x.dtype) if kind == "bool" else x


def _one_hot(i: Tensor, n: int) -> Tensor:
    return (i.unsqueeze(-1) == torch.arange(n, device=i.device)).to(i.dtype)


def _take(x: Tensor, i: Tensor) -> Tensor:
    at = i.long()[..., None, None].expand(*i.shape, 1, x.shape[-1])
    return x.gather(-2, at).squeeze(-2)


def _put(g: Tensor, i: Tensor, m: int) -> Tensor:
    return _one_hot(i, m).to(g.dtype).unsqueeze(-1) * g.unsqueeze(-2)


#: op -> function of (operands, **attributes). Row values are ``[rows, *shape]``.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    **{name: fn for name, (fn, _) in UNARY.items()},
    **{name: fn for name, (fn, _) in UNARY_GRAD.items()},
    **BINARY,
    **REDUCE,
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    # One row; the interpreter spreads it over all.
    "fill": lambda value, shape, kind: torch.full((1, *shape), float(value), dtype=torch.float64),
    "row": lambda u: u.unsqueeze(0),
    "cast": _cast,
    "reshape": lambda x, shape: x.reshape(len(x), *shape),
    "index": _index,
    "index_add": _index_add,
    "concat": lambda *xs: torch.cat([_flat(x) for x in xs], 1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax_grad": _softmax_grad,
    "log_softmax_grad": _log_softmax_grad,
    "layer_norm": _layer_norm,
    "layer_norm_grad": _layer_norm_grad,
    "one_hot": _one_hot,
    "take": _take,
    "put": _put,
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "member_linear": _member_linear,
    "outer": _outer,
    "grouped_outer": _grouped_outer,
    "member_outer": _member_outer,
    "row_sum": lambda g, target: g.sum(0),
    "member_row_sum": _member_row_sum,
}
