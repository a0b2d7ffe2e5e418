"""Arithmetic, comparisons, activations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastwm.row_program.lowering.errors import NotLowerable
from fastwm.row_program.lowering.layout import Atom, Fill, Laid
from fastwm.row_program.lowering.registry import Call, lowers

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__ = ["ELEMENTWISE", "atanh", "times"]

_UNARY = {
    "neg": "neg", "exp": "exp", "log": "log", "log1p": "log1p", "expm1": "expm1", "sqrt": "sqrt",
    "rsqrt": "rsqrt", "reciprocal": "reciprocal", "square": "square", "abs": "abs", "sign": "sign",
    "sgn": "sign", "floor": "floor", "ceil": "ceil", "round": "round", "trunc": "trunc", "sin": "sin",
    "cos": "cos", "erf": "erf", "tanh": "tanh", "sigmoid": "sigmoid", "relu": "relu", "silu": "silu",
    "mish": "mish", "isnan": "isnan", "isfinite": "isfinite", "logical_not": "not", "bitwise_not": "not",
}  # fmt: skip
_COMPARE = {
    "gt": "gt", "ge": "ge", "lt": "lt", "le": "le", "eq": "eq", "ne": "ne", "greater": "gt", "less": "lt",
    "greater_equal": "ge", "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
_LOGIC = {
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "bitwise_and": "and",
    "bitwise_or": "or", "bitwise_xor": "xor", "__and__": "and", "__or__": "or", "__xor__": "xor",
}  # fmt: skip
_KEEP_INT = {"neg", "abs", "sign", "sgn", "relu", "square"}


@lowers(*_UNARY)
def _unary(s: Step, c: Call) -> Laid:
    if c.name == "bitwise_not" and c.x.kind != "bool":
        raise NotLowerable("bitwise_not of integers")
    if c.name == "round" and c.get("decimals"):
        raise NotLowerable("round to decimals")
    out = s.b.unary(_UNARY[c.name], c.x)
    return replace(out, bound=c.x.bound if c.name in _KEEP_INT - {"square"} else None)


@lowers(*_COMPARE)
def _compare(s: Step, c: Call) -> Laid:
    a, b = c["self"], c["other"]
    if c.name == "eq" and isinstance(b, Laid):
        hot = _one_hot(s, a, b) or _one_hot(s, b, a)
        if hot is not None:
            return hot
    return s.b.elementwise(_COMPARE[c.name], a, b)


def _one_hot(s: Step, index: Laid, classes: Laid) -> Laid | None:
    """``index[..., None] == arange(n)``."""
    n = classes.shape[-1] if classes.dims else 0
    if not index.is_row or index.kind != "int" or not index.dims or index.dims[-1] or n < 2:
        return None
    if classes.width != n or len(classes.dims) > len(index.dims):
        return None
    known = s.b.literal(classes)
    if known is None or not torch.equal(known.flatten(), torch.arange(n, dtype=known.dtype)):
        return None
    atom = Atom("inner", n)
    val = s.b.program.emit("one_hot", index.ref, n=n)  # type: ignore[arg-type]
    return Laid(val, (*index.dims[:-1], (atom,)), (*index.order, atom), "bool", 1)


@lowers(*_LOGIC)
def _logic(s: Step, c: Call) -> Laid:
    for operand in (c["self"], c["other"]):
        whole = operand.kind if isinstance(operand, Laid) else type(operand).__name__
        if not c.name.startswith("logical") and whole != "bool":
            raise NotLowerable(f"{c.name} of {whole}s")
    return s.b.elementwise(_LOGIC[c.name], c["self"], c["other"], kind="bool")


def atanh(s: Step, x: Laid) -> Laid:
    up, down = s.b.unary("log1p", x), s.b.unary("log1p", s.b.unary("neg", x))
    return s.b.elementwise("mul", s.b.elementwise("sub", up, down), 0.5)


def times(s: Step, a: Any, alpha: Any) -> Any:
    if alpha in (None, 1):
        return a
    if not isinstance(a, Laid):
        return a * alpha
    return s.arith("mul", a, alpha)


@lowers("add", "sub", "rsub", "subtract")
def _add(s: Step, c: Call) -> Laid:
    a, b = c["self"], c["other"]
    if c.name == "rsub":
        a, b = b, a
    return s.arith("add" if c.name == "add" else "sub", a, times(s, b, c.get("alpha")))


@lowers("mul", "multiply")
def _mul(s: Step, c: Call) -> Laid:
    return s.arith("mul", c["self"], c["other"])


@lowers("div", "divide", "true_divide", "floor_divide")
def _div(s: Step, c: Call) -> Laid:
    mode = "floor" if c.name == "floor_divide" else c.get("rounding_mode")
    out = s.b.elementwise("div", c["self"], c["other"], kind="float")
    return out if mode is None else s.b.unary(mode, out)


@lowers("remainder")
def _remainder(s: Step, c: Call) -> Laid:
    if s.kind(c.out[0]) != "int":
        raise NotLowerable("remainder of floats")
    whole = s.b.unary("floor", s.b.elementwise("div", c["self"], c["other"]))
    return s.b.elementwise("sub", c["self"], s.b.elementwise("mul", whole, c["other"]))


@lowers("pow")
def _pow(s: Step, c: Call) -> Laid:
    x, exponent = c["self"], c["exponent"]
    if isinstance(exponent, Laid) and isinstance(exponent.ref, Fill):
        exponent = exponent.ref.value if not exponent.dims else exponent
    if isinstance(x, Laid) and not isinstance(exponent, Laid):
        plain = {2: "square", 0.5: "sqrt", -1: "reciprocal", -0.5: "rsqrt"}.get(exponent)
        if plain is not None:
            return s.b.unary(plain, x)
        if exponent == 1:
            return x
    return s.b.elementwise("pow", x, exponent)


@lowers("maximum", "minimum", "fmax", "fmin")
def _extreme(s: Step, c: Call) -> Laid:
    if c.name.startswith("f"):
        raise NotLowerable(f"{c.name}, which passes over NaN")
    return s.arith(c.name, c["self"], c["other"])


@lowers("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def _clamp(s: Step, c: Call) -> Laid:
    x = c["self"]
    low, high = c.get("min"), c.get("max")
    if c.name == "hardtanh":
        low, high = c["min_val"], c["max_val"]
    for name, bound in (("clamp_min", low), ("clamp_max", high)):
        if bound is not None:
            kind = s.kind(c.out[0])
            known = s.most(x, bound) if kind == "int" else None
            x = replace(s.b.elementwise(name, x, bound, kind=kind), bound=known)
    return x


@lowers("where")
def _where(s: Step, c: Call) -> Laid:
    if "other" not in c.given:
        raise NotLowerable("where without values")
    out = s.b.elementwise("where", c["condition"], c["self"], c["other"])
    return replace(out, bound=s.most(c["self"], c["other"]))


@lowers("masked_fill")
def _masked_fill(s: Step, c: Call) -> Laid:
    out = s.b.elementwise("where", c["mask"], c["value"], c["self"])
    return replace(out, bound=s.most(c["value"], c["self"]))


@lowers("lerp")
def _lerp(s: Step, c: Call) -> Laid:
    step = s.b.elementwise("sub", c["end"], c["self"])
    return s.arith("add", c["self"], s.arith("mul", step, c["weight"]))


@lowers("addcmul", "addcdiv")
def _addcmul(s: Step, c: Call) -> Laid:
    op = "mul" if c.name == "addcmul" else "div"
    inner = s.b.elementwise(op, c["tensor1"], c["tensor2"])
    return s.arith("add", c["self"], times(s, inner, c["value"]))


@lowers("softplus")
def _softplus(s: Step, c: Call) -> Laid:
    return s.b.unary("softplus", c.x, beta=float(c["beta"]), threshold=float(c["threshold"]))


@lowers("gelu")
def _gelu(s: Step, c: Call) -> Laid:
    return s.b.unary("gelu_tanh" if c["approximate"] == "tanh" else "gelu", c.x)


@lowers("leaky_relu")
def _leaky_relu(s: Step, c: Call) -> Laid:
    return s.b.unary("leaky_relu", c.x, slope=float(c["negative_slope"]))


@lowers("elu", "celu", "selu")
def _elu(s: Step, c: Call) -> Laid:
    alpha = float(c.get("alpha", 1.0))
    scale, steep = float(c.get("scale", 1.0)), float(c.get("input_scale", 1.0))
    if c.name == "celu":
        steep = 1 / alpha
    if c.name == "selu":
        alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return s.b.unary("elu", c.x, alpha=alpha, scale=scale, input_scale=steep)


@lowers("hardsigmoid", "hardswish")
def _hard(s: Step, c: Call) -> Laid:
    gate = s.b.elementwise("add", c.x, 3.0)
    gate = s.b.elementwise("minimum", s.b.elementwise("maximum", gate, 0.0), 6.0)
    gate = s.b.elementwise("div", gate, 6.0)
    return gate if c.name == "hardsigmoid" else s.b.elementwise("mul", c.x, gate)


@lowers("_prelu_kernel")
def _prelu(s: Step, c: Call) -> Laid:
    x, slope = c["self"], c["weight"]
    scaled = s.b.elementwise("mul", x, slope)
    return s.b.elementwise("where", s.b.elementwise("gt", x, 0.0), x, scaled)


@lowers("log_sigmoid_forward", "log_sigmoid")
def _log_sigmoid(s: Step, c: Call) -> list[Laid | None]:
    return [s.b.unary("log_sigmoid", c.x), None][: len(c.out)]


@lowers("log2", "log10")
def _log_base(s: Step, c: Call) -> Laid:
    per = 1 / math.log(2 if c.name == "log2" else 10)
    return s.b.elementwise("mul", s.b.unary("log", c.x), per)


@lowers("logit")
def _logit(s: Step, c: Call) -> Laid:
    x, eps = c.x, c.get("eps")
    if eps is not None:
        x = s.b.elementwise("clamp_max", s.b.elementwise("clamp_min", x, eps), 1 - eps)
    rest = s.b.elementwise("sub", 1.0, x)
    return s.b.unary("log", s.b.elementwise("div", x, rest))


@lowers("atanh")
def _atanh(s: Step, c: Call) -> Laid:
    return atanh(s, c.x)


@lowers("isinf")
def _isinf(s: Step, c: Call) -> Laid:
    return s.b.elementwise("eq", s.b.unary("abs", c.x), math.inf)


@lowers("isclose", "nan_to_num")
def _refused(s: Step, c: Call) -> Laid:
    raise NotLowerable(f"aten.{c.name}: no row-wise form")


@lowers("binary_cross_entropy_with_logits")
def _bce_with_logits(s: Step, c: Call) -> Laid:
    if c["weight"] is not None or c["pos_weight"] is not None or c["reduction"] != 0:
        raise NotLowerable("binary_cross_entropy_with_logits with weights or a reduction")
    x, target = c["self"], c["target"]
    rest = s.b.elementwise("mul", s.b.elementwise("sub", 1.0, target), x)
    return s.b.elementwise("sub", rest, s.b.unary("log_sigmoid", s.b.as_row(x)))


@lowers("glu")
def _glu(s: Step, c: Call) -> Laid:
    dim = c["dim"] % len(c.x.dims)
    half = c.x.shape[dim] // 2
    a, b = (
        s.b.picked(c.x, lambda t, k=k: t.narrow(dim, k * half, half), [dim], [dim]) for k in (0, 1)
    )
    return s.b.elementwise("mul", a, s.b.unary("sigmoid", b))


#: names that apply to each element by itself, with broadcasting: constants stay as small as they are
ELEMENTWISE = {
    *_UNARY, *_COMPARE, *_LOGIC, "add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide",
    "true_divide", "floor_divide", "remainder", "pow", "maximum", "minimum", "fmax", "fmin", "clamp", "clip",
    "clamp_min", "clamp_max", "hardtanh", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "softplus",
    "gelu", "leaky_relu", "elu", "celu", "selu", "hardsigmoid", "hardswish", "log2", "log10", "logit",
    "atanh",
    "isinf", "isclose", "nan_to_num", "asinh", "acosh", "sinh", "cosh", "tan", "atan", "asin", "acos", "erfc",
    "erfinv", "exp2", "lgamma", "digamma", "log_sigmoid", "_to_copy",
}  # fmt: skip
