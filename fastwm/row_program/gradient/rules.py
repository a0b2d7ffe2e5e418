"""One rule per op: what its operands get from the gradient of its result.

A rule is given the builder, the instruction, the gradient ``g`` of its result, and emits. It refers to the
forward program's values as if they were there; the builder brings them into the backward program. At kinks
and ties the rules do what torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from fastwm.row_program.program import Arg, Instr, Program, RowType, Val

__all__ = ["RULES", "ZERO", "Builder", "gradient_positions"]


class Builder(Protocol):
    """What a rule may ask for; see ``build.Adjoint``."""

    program: Program

    def emit(self, op: str, *args: Arg, **attrs: Any) -> Val: ...

    def add_up(self, op: str, *args: Arg, of: Val, **attrs: Any) -> None:
        """Add to the sum that is the gradient of the uniform ``of``."""

    def either(self, first: Val, second: Val) -> Val:
        """Of two forward values that serve the same, whichever is at hand anyway."""

    def wants(self, arg: Arg) -> bool:
        """Whether an operand is to be given a gradient."""

    def give(self, arg: Arg, g: Val, *, negative: bool = False) -> None:
        """A part of the gradient of an operand; single elements get the sum over ``g``."""

    def give_at(self, arg: Arg, g: Val, map: tuple[int, ...]) -> None:
        """The same, for the elements at ``map``."""

    def is_uniform(self, arg: Arg) -> bool: ...

    def type(self, val: Val) -> RowType: ...


Rule = Callable[[Builder, Instr, Val], None]

# ------------------------------------------------------------------ elementwise

#: g, x, y, parameters -> the gradient of x, for the unaries that need the value of x or y
_UNARY: dict[str, Callable[[Builder, Val, Val, Val, dict[str, Any]], Val]] = {
    "exp": lambda b, g, x, y, p: b.emit("mul", g, y),
    "log": lambda b, g, x, y, p: b.emit("div", g, x),
    "log1p": lambda b, g, x, y, p: b.emit("div", g, b.emit("add", x, 1.0)),
    "expm1": lambda b, g, x, y, p: b.emit("mul", g, b.emit("add", y, 1.0)),
    "sqrt": lambda b, g, x, y, p: b.emit("div", g, b.emit("mul", y, 2.0)),
    "rsqrt": lambda b, g, x, y, p: b.emit(
        "mul", b.emit("mul", g, -0.5), b.emit("mul", b.emit("square", y), y)
    ),
    "reciprocal": lambda b, g, x, y, p: b.emit("mul", b.emit("neg", g), b.emit("square", y)),
    "square": lambda b, g, x, y, p: b.emit("mul", g, b.emit("mul", x, 2.0)),
    "abs": lambda b, g, x, y, p: b.emit("mul", g, b.emit("sign", x)),
    "sin": lambda b, g, x, y, p: b.emit("mul", g, b.emit("cos", x)),
    "cos": lambda b, g, x, y, p: b.emit("mul", b.emit("neg", g), b.emit("sin", x)),
    "erf": lambda b, g, x, y, p: b.emit(
        "mul",
        b.emit("mul", g, 2 / math.sqrt(math.pi)),
        b.emit("exp", b.emit("neg", b.emit("square", x))),
    ),
    "tanh": lambda b, g, x, y, p: b.emit("tanh_grad", g, y),
    "safe_tanh": lambda b, g, x, y, p: b.emit("tanh_grad", g, y),
    "sigmoid": lambda b, g, x, y, p: b.emit("sigmoid_grad", g, y),
    # Only the sign counts, and x and y agree in it (for slopes that are not negative).
    "relu": lambda b, g, x, y, p: b.emit("relu_grad", g, b.either(y, x)),
    "leaky_relu": lambda b, g, x, y, p: b.emit(
        "leaky_relu_grad", g, b.either(y, x) if p["slope"] >= 0 else x, **p
    ),
    **{
        name: lambda b, g, x, y, p, _op=f"{name}_grad": b.emit(_op, g, x, **p)  # type: ignore[misc]
        for name in ("silu", "mish", "gelu", "gelu_tanh", "softplus", "elu", "log_sigmoid")
    },
}


def _unary(b: Builder, instr: Instr, g: Val) -> None:
    x, y = instr.args[0], instr.out
    assert isinstance(x, Val)
    assert y is not None
    if instr.op == "neg":
        b.give(x, g, negative=True)
    else:
        b.give(x, _UNARY[instr.op](b, g, x, y, instr.attrs))


def _add(b: Builder, instr: Instr, g: Val) -> None:
    for position, arg in enumerate(instr.args):
        if b.wants(arg):
            b.give(arg, g, negative=instr.op == "sub" and position == 1)


def _mul(b: Builder, instr: Instr, g: Val) -> None:
    x, y = instr.args
    for arg, other in ((x, y), (y, x)):
        if b.wants(arg):
            b.give(arg, b.emit("mul", g, other))


def _div(b: Builder, instr: Instr, g: Val) -> None:
    x, y = instr.args
    if b.wants(x):
        b.give(x, b.emit("div", g, y))
    if b.wants(y):
        b.give(y, b.emit("mul", g, b.emit("div", b.emit("div", x, y), y)), negative=True)


def _pow(b: Builder, instr: Instr, g: Val) -> None:
    x, e = instr.args
    if b.wants(x):
        if not isinstance(e, Val):
            assert e is not None
            if e != 0:  # torch: no gradient, even where x is 0
                slope = x if e == 2 else b.emit("pow", x, e - 1)
                b.give(x, g if e == 1 else b.emit("mul", g, b.emit("mul", slope, e)))
        else:
            e = _as_row(b, e)
            slope = b.emit("mul", e, b.emit("pow", x, b.emit("sub", e, 1.0)))
            b.give(x, b.emit("where", b.emit("eq", e, 0.0), 0.0, b.emit("mul", g, slope)))
    if b.wants(instr.args[1]):
        e = _as_row(b, _val(instr.args[1]))
        if isinstance(x, Val):
            x = _as_row(b, x)
            none = b.emit("and", b.emit("eq", x, 0.0), b.emit("ge", e, 0.0))
            slope = b.emit("mul", instr.out, b.emit("log", x))
            b.give(instr.args[1], b.emit("where", none, 0.0, b.emit("mul", g, slope)))
        else:
            assert x is not None
            log = math.log(x) if x > 0 else -math.inf if x == 0 else math.nan
            part = b.emit("mul", g, b.emit("mul", instr.out, log))
            b.give(
                instr.args[1], part if x != 0 else b.emit("where", b.emit("ge", e, 0.0), 0.0, part)
            )


def _as_row(b: Builder, arg: Val) -> Val:
    """A uniform as a row value: unaries take no uniforms, nor does a binary with a number."""
    return b.emit("row", arg) if b.is_uniform(arg) else arg


def _maximum(b: Builder, instr: Instr, g: Val) -> None:
    x, y = instr.args
    # Selected, not multiplied: the side that lost may hold inf. Ties share; NaN passes to both, as in torch.
    half = b.emit("where", b.emit("eq", x, y), b.emit("mul", g, 0.5), g)
    loses = ("lt", "gt") if instr.op == "maximum" else ("gt", "lt")
    for arg, lost in zip((x, y), loses, strict=True):
        if b.wants(arg):
            b.give(arg, b.emit("where", b.emit(lost, x, y), 0.0, half))


def _clamp(b: Builder, instr: Instr, g: Val) -> None:
    x, bound = instr.args
    inside, outside = ("ge", "lt") if instr.op == "clamp_min" else ("le", "gt")
    if b.wants(x):
        b.give(x, b.emit("where", b.emit(inside, x, bound), g, 0.0))
    if b.wants(bound):
        b.give(bound, b.emit("where", b.emit(outside, x, bound), g, 0.0))


def _where(b: Builder, instr: Instr, g: Val) -> None:
    c, x, y = instr.args
    if b.wants(x):
        b.give(x, b.emit("where", c, g, 0.0))
    if b.wants(y):
        b.give(y, b.emit("where", c, 0.0, g))


def _cast(b: Builder, instr: Instr, g: Val) -> None:
    b.give(instr.args[0], g)  # float to float; the other kinds are never active


def _row(b: Builder, instr: Instr, g: Val) -> None:
    b.give(instr.args[0], g)


# ------------------------------------------------------------------ movement


def _reshape(b: Builder, instr: Instr, g: Val) -> None:
    b.give(instr.args[0], g)


def _index(b: Builder, instr: Instr, g: Val) -> None:
    b.give_at(instr.args[0], g, instr.attrs["map"])


def _index_add(b: Builder, instr: Instr, g: Val) -> None:
    x = _val(instr.args[0])
    b.give(x, b.emit("index", g, map=instr.attrs["map"], shape=b.type(x).shape))


def _concat(b: Builder, instr: Instr, g: Val) -> None:
    start = 0
    for arg in instr.args:
        type = b.type(_val(arg))
        stop = start + type.width
        if b.wants(arg):
            b.give(arg, b.emit("index", g, map=tuple(range(start, stop)), shape=type.shape))
        start = stop


def _take(b: Builder, instr: Instr, g: Val) -> None:
    x, i = instr.args
    b.give(x, b.emit("put", g, i, m=b.type(_val(x)).shape[-2]))


def _put(b: Builder, instr: Instr, g: Val) -> None:
    b.give(instr.args[0], b.emit("take", g, instr.args[1]))


# ------------------------------------------------------------------ along the last dim


def _spread(b: Builder, v: Val, shape: tuple[int, ...]) -> Val:
    """``[*G]`` as ``[*G, n]``; a single element stays one, elementwise ops take it as it is."""
    return v if b.type(v).width == 1 else _spread_fully(b, v, shape)


def _spread_fully(b: Builder, v: Val, shape: tuple[int, ...]) -> Val:
    map = tuple(j // shape[-1] for j in range(math.prod(shape)))
    return b.emit("index", v, map=map, shape=shape)


def _sum(b: Builder, instr: Instr, g: Val) -> None:
    x = _val(instr.args[0])
    shape = b.type(x).shape
    if instr.op == "mean":
        g = b.emit("div", g, float(shape[-1]))
    b.give(x, _spread_fully(b, g, shape))


def _extreme(b: Builder, instr: Instr, g: Val) -> None:
    x = _val(instr.args[0])
    shape = b.type(x).shape
    # Found again rather than saved: x may be recomputed, and must meet its extreme to the last bit.
    y = b.emit(instr.op, x)
    hit = b.emit("eq", x, _spread(b, y, shape))
    share = b.emit("div", g, b.emit("sum", hit))  # amax: evenly among ties
    b.give(x, b.emit("where", hit, _spread(b, share, shape), 0.0))


def _logsumexp(b: Builder, instr: Instr, g: Val) -> None:
    x, y = _val(instr.args[0]), _val(instr.out)
    shape = b.type(x).shape
    part = b.emit("exp", b.emit("sub", x, _spread(b, y, shape)))
    b.give(x, b.emit("mul", part, _spread(b, g, shape)))


def _softmax(b: Builder, instr: Instr, g: Val) -> None:
    b.give(instr.args[0], b.emit(f"{instr.op}_grad", g, instr.out))


def _layer_norm(b: Builder, instr: Instr, g: Val) -> None:
    x, w, bias = instr.args
    eps = instr.attrs["eps"]
    if b.wants(x):
        b.give(x, b.emit("layer_norm_grad", g, x, w, eps=eps))
    if b.wants(w):
        plain = b.emit("layer_norm", x, None, None, eps=eps)
        b.add_up("row_sum", _over_groups(b, b.emit("mul", g, plain)), of=_val(w))
    if b.wants(bias):
        b.add_up("row_sum", _over_groups(b, g), of=_val(bias))


def _over_groups(b: Builder, g: Val) -> Val:
    """``[*G, n]`` summed to ``[n]``."""
    width, n = b.type(g).width, b.type(g).shape[-1]
    if width == n:
        return g
    return b.emit("index_add", g, map=tuple(j % n for j in range(width)), shape=(n,))


# ------------------------------------------------------------------ matrices


def _flipped(layout: str) -> str:
    return "kn" if layout == "nk" else "nk"


def _linear(b: Builder, instr: Instr, g: Val) -> None:
    x, w, bias = (*instr.args[:3],)
    layout = instr.attrs["layout"]
    if b.wants(x):
        b.give(x, b.emit("linear", g, w, None, layout=_flipped(layout)))
    if b.wants(w):
        b.add_up("outer", x, g, of=_val(w), layout=layout)
    if b.wants(bias):
        b.add_up("row_sum", _over_groups(b, g), of=_val(bias))


def _grouped_linear(b: Builder, instr: Instr, g: Val) -> None:
    x, w, bias = (*instr.args[:3],)
    layout = instr.attrs["layout"]
    if b.wants(x):
        part = b.emit("grouped_linear", g, w, None, layout=_flipped(layout))
        b.give(x, _over_groups(b, part) if len(b.type(_val(x)).shape) == 1 else part)
    if b.wants(w):
        b.add_up("grouped_outer", x, g, of=_val(w), layout=layout)
    if b.wants(bias):
        b.add_up("row_sum", g, of=_val(bias))


def _member_linear(b: Builder, instr: Instr, g: Val) -> None:
    x, w, bias, i = instr.args
    layout, members = instr.attrs["layout"], b.type(_val(w)).shape[0]
    if b.wants(x):
        b.give(x, b.emit("member_linear", g, w, None, i, layout=_flipped(layout)))
    if b.wants(w):
        b.add_up("member_outer", x, g, i, of=_val(w), layout=layout, members=members)
    if b.wants(bias):
        b.add_up("member_row_sum", g, i, of=_val(bias), members=members)


def _val(arg: Arg) -> Val:
    assert isinstance(arg, Val)
    return arg


# ------------------------------------------------------------------ the tables

RULES: dict[str, Rule] = {
    "neg": _unary,
    **dict.fromkeys(_UNARY, _unary),
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "maximum": _maximum,
    "minimum": _maximum,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "where": _where,
    "cast": _cast,
    "row": _row,
    "reshape": _reshape,
    "index": _index,
    "index_add": _index_add,
    "concat": _concat,
    "take": _take,
    "put": _put,
    "sum": _sum,
    "mean": _sum,
    "max": _extreme,
    "min": _extreme,
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "member_linear": _member_linear,
}

#: Steps and choices: the gradient is zero. "detach" is the identity, but for the gradient.
ZERO = {"sign", "floor", "ceil", "round", "trunc", "detach", "not", "isnan", "isfinite"} | {
    "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "xor", "argmax", "argmin", "one_hot", "fill"
}  # fmt: skip

#: Where it is not every operand.
_POSITIONS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(ZERO, ()),
    "where": (1, 2),
    "take": (0,),
    "put": (0,),
    "member_linear": (0, 1, 2),
}


def gradient_positions(op: str) -> tuple[int, ...] | None:
    """The operands through which a gradient passes; None for all of them.

    Example:
        >>> gradient_positions("where"), gradient_positions("floor"), gradient_positions("mul")
        ((1, 2), (), None)
    """
    return _POSITIONS.get(op)
