"""What a row program's ops compute, as Triton functions; references are in ``fastwm/row_program/ops.py``.

Built from exp, log and the like alone (``kernels/elementary.py``), and not on libdevice, so that the
interpreter runs what a GPU runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastwm.kernels.elementary import expm1, log1p, sigmoid

NAN = tl.constexpr(float("nan"))

if triton.knobs.runtime.interpret:

    @triton.jit
    def zero():
        return 0

else:

    @triton.jit
    def zero():
        """0, which no compiler takes for granted: what is computed with it stays where it is."""
        return tl.inline_asm_elementwise(
            "mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


if triton.knobs.runtime.interpret:

    @triton.jit
    def add_bf16_product(a, w, acc):
        # The interpreter holds bfloat16 as 16 bits and does not compute with it: the same numbers in float32.
        bits = a.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        a = tl.where(a == a, bits.to(tl.float32, bitcast=True), a)
        w = (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return tl.dot(a, w, acc, input_precision="ieee")

else:

    @triton.jit
    def add_bf16_product(a, w, acc):
        """``acc + a @ w``, ``a`` rounded to ``w``'s bfloat16, sums in float32."""
        return tl.dot(a.to(tl.bfloat16), w, acc)


@triton.jit
def isnan(x):
    return x != x


@triton.jit
def where_nan(is_nan, x):
    """NaN there, else x."""
    return tl.where(is_nan, x + NAN, x)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (e + 2.0)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def softplus(x, beta, threshold):
    z = x * beta
    return tl.where(z > threshold, x, log1p(tl.exp(tl.where(z > threshold, 0.0, z))) / beta)


@triton.jit
def log_sigmoid(x):
    return tl.where(x > 0.0, 0.0, x) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def mish(x):
    return x * tanh(log1p(tl.exp(x)))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x > 0.0, x * scale, expm1(x * input_scale) * (alpha * scale))


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # NaN stays


@triton.jit
def leaky_relu(x, slope):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def safe_tanh(x, limit):
    y = tanh(x)
    return tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))


@triton.jit
def sign(x):
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def trunc(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_(x):
    """To the nearest, ties to even."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5) != 0.0
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    return tl.where(up, low + 1.0, low)


@triton.jit
def pow_(a, b):
    magnitude = tl.exp2(b * tl.log2(tl.abs(a)))
    whole = b == tl.floor(b)
    odd = whole & (b - 2.0 * tl.floor(b * 0.5) != 0.0)
    signed = tl.where(a < 0.0, tl.where(odd, -magnitude, magnitude), magnitude)
    signed = where_nan((a < 0.0) & ~whole & (tl.abs(a) < float("inf")), signed)
    one = (b == 0.0) | (a == 1.0) | ((a == -1.0) & (tl.abs(b) == float("inf")))
    return tl.where(one, 1.0, signed)


@triton.jit
def maximum(a, b):
    return tl.where(isnan(a) | (a > b), a, b)


@triton.jit
def minimum(a, b):
    return tl.where(isnan(a) | (a < b), a, b)


# --- gradients: g comes back, x went in (of tanh and sigmoid: y came out)


@triton.jit
def tanh_grad(g, y):
    return g * (1.0 - y * y)


@triton.jit
def sigmoid_grad(g, y):
    return g * y * (1.0 - y)


@triton.jit
def relu_grad(g, x):
    return tl.where(x <= 0.0, 0.0, g)


@triton.jit
def leaky_relu_grad(g, x, slope):
    return tl.where(x > 0.0, g, g * slope)


@triton.jit
def silu_grad(g, x):
    s = sigmoid(x)
    return g * s * (1.0 + x * (1.0 - s))


@triton.jit
def mish_grad(g, x):
    t = tanh(log1p(tl.exp(x)))
    return g * (t + x * sigmoid(x) * (1.0 - t * t))


@triton.jit
def gelu_grad(g, x):
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return g * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)


@triton.jit
def gelu_tanh_grad(g, x):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return g * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)


@triton.jit
def softplus_grad(g, x, beta, threshold):
    z = x * beta
    return tl.where(z > threshold, g, g * sigmoid(z))


@triton.jit
def log_sigmoid_grad(g, x):
    return g * sigmoid(-x)


@triton.jit
def elu_grad(g, x, alpha, scale, input_scale):
    negative = g * (input_scale * alpha * scale) * tl.exp(x * input_scale)
    return tl.where(x > 0.0, g * scale, negative)


# --- along the last dim of a block; ``there`` is false in its padding


@triton.jit
def total(x, there, AXIS: tl.constexpr):
    return tl.sum(tl.where(there, x, 0.0), AXIS, keep_dims=True)


@triton.jit
def any_nan(x, there, AXIS: tl.constexpr):
    return tl.max((there & isnan(x)).to(tl.int32), AXIS, keep_dims=True) > 0


@triton.jit
def largest(x, there, AXIS: tl.constexpr):
    found = tl.max(tl.where(there & ~isnan(x), x, float("-inf")), AXIS, keep_dims=True)
    return where_nan(any_nan(x, there, AXIS), found)


@triton.jit
def smallest(x, there, AXIS: tl.constexpr):
    return -largest(-x, there, AXIS)


@triton.jit
def argmax(x, there, o_n, AXIS: tl.constexpr):
    """The first of the largest, or the first NaN; as a float."""
    most = largest(x, there, AXIS)
    hit = there & tl.where(isnan(most), isnan(x), x == most)
    place = tl.min(tl.where(hit, o_n, 1 << 30), AXIS, keep_dims=True)
    return place.to(x.dtype)


@triton.jit
def softmax(x, there, AXIS: tl.constexpr):
    e = tl.exp(tl.where(there, x, float("-inf")) - largest(x, there, AXIS))
    return e / total(e, there, AXIS)


@triton.jit
def logsumexp(x, there, AXIS: tl.constexpr):
    most = largest(x, there, AXIS)
    most = tl.where(tl.abs(most) == float("inf"), 0.0, most)
    return tl.log(total(tl.exp(x - most), there, AXIS)) + most


@triton.jit
def log_softmax(x, there, AXIS: tl.constexpr):
    most = largest(x, there, AXIS)
    return (x - most) - tl.log(total(tl.exp(x - most), there, AXIS))


@triton.jit
def softmax_grad(g, y, there, AXIS: tl.constexpr):
    return y * (g - total(g * y, there, AXIS))


@triton.jit
def log_softmax_grad(g, y, there, AXIS: tl.constexpr):
    return g - tl.exp(y) * total(g, there, AXIS)


@triton.jit
def normalized(x, there, n, eps, AXIS: tl.constexpr):
    centred = tl.where(there, x - total(x, there, AXIS) / n, 0.0)
    return centred / tl.sqrt(total(centred * centred, there, AXIS) / n + eps)


@triton.jit
def layer_norm_grad(g, x, there, n, eps, AXIS: tl.constexpr):
    """``g`` is already multiplied by the weight."""
    centred = tl.where(there, x - total(x, there, AXIS) / n, 0.0)
    scale = 1.0 / tl.sqrt(total(centred * centred, there, AXIS) / n + eps)
    y = centred * scale
    return scale * (g - total(g, there, AXIS) / n - y * (total(g * y, there, AXIS) / n))


# --- numbers that say where


@triton.jit
def whole(x):
    """As an integer; NaN and what no integer holds become 0."""
    return tl.where((x > -9e18) & (x < 9e18), x, 0.0).to(tl.int64)


@triton.jit
def index(x, n):
    """As an index below n."""
    i = whole(x).to(tl.int32)
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def select(c, a, b):
    return tl.where(c != 0.0, a, b)


@triton.jit
def fail(p_failed, i_t, bad):
    """Notes the first step at which a check did not hold."""
    tl.atomic_min(p_failed, i_t, mask=tl.max(bad.to(tl.int32)) > 0)
