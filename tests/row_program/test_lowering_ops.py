"""Op by op: a small function of one batch, lowered, against the function itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastwm.row_program.lowering import Lowered, NotLowerable, lower
from fastwm.row_program.reference import interpret
from fastwm.tracing import trace

Fn = Callable[..., Tensor]
#: parameters that any function here may read; none of a size that a batch here has, but for ``square``
P = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(7))
    for name, shape in {
        "w": (6, 5), "wide": (5, 7), "b": (6,), "row": (5,), "scalar": (), "one": (1,), "col": (7, 1),
        "square": (5, 5), "members": (7, 5, 6), "turned": (7, 6, 5), "offset": (7, 1, 6), "groups": (5, 2, 3),
        "table": (9, 5), "log_std": (5,), "hidden": (15, 5), "hidden_b": (15,), "deep": (7, 6, 4),
    }.items()
}  # fmt: skip


def lowering(
    fn: Fn, batch: Sequence[int], inner: Sequence[Sequence[int]], dtype: torch.dtype, **kwargs: Any
) -> tuple[Lowered, list[Tensor], list[Tensor]]:
    """``fn(*inputs)`` lowered as an output; its constants; its inputs."""
    generator = torch.Generator().manual_seed(11)
    inputs = {
        (f"x{k}",): torch.randn(*batch, *shape, generator=generator, dtype=dtype)
        for k, shape in enumerate(inner)
    }
    torch.manual_seed(5)
    graph, _, _ = trace(lambda given: {("td", ("y",)): fn(*given.values())}, inputs, lambda t: True)
    lowered = lower(graph, [], [], len(batch), **kwargs)
    return lowered, [t for _, t in graph.constants], list(inputs.values())


def check(
    fn: Fn,
    batch: Sequence[int] = (3,),
    inner: Sequence[Sequence[int]] = ((5,), (5,)),
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Lowered:
    """The lowered function gives what the function gives."""
    lowered, constants, inputs = lowering(fn, batch, inner, dtype, **kwargs)
    torch.manual_seed(5)
    want = fn(*inputs)
    torch.manual_seed(5)
    rows = lowered.rows
    given: dict[Any, Tensor] = {
        ("in", (f"x{k}",)): x.reshape(rows, *x.shape[len(batch) :]) for k, x in enumerate(inputs)
    }
    for draw in lowered.draws:
        noise = draw.rows(draw.sample())
        given[draw.name] = noise.unsqueeze(1)
    tensors = lowered.prologue(constants)
    given |= {u.name: t.detach() for u, t in zip(lowered.uniforms, tensors, strict=True)}
    program = lowered.program
    if not any(i.role != "uniform" for i in program.inputs.values()):
        program.input("rows", "context", ())
        given["rows"] = torch.zeros(rows)
    if lowered.passed:
        return lowered
    result = interpret(program, given, 1)
    assert result.ok
    shape, kind = lowered.casts["td", ("y",)]
    got = result.outputs["td", ("y",)].reshape((*batch, *shape)).to(kind)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, equal_nan=True)
    return lowered


def ops(lowered: Lowered) -> list[str]:
    return [i.op for i in lowered.program.instrs]


# ---------------------------------------------------------------- elementwise

UNARY: dict[str, Fn] = {
    name: (lambda x, name=name: getattr(torch, name)(x))
    for name in (
        "neg", "exp", "expm1", "square", "abs", "sign", "floor", "ceil", "round", "trunc", "sin", "cos",
        "erf",
        "tanh", "sigmoid", "relu", "isnan", "isfinite", "isinf", "logical_not",
    )
} | {
    name: (lambda x, name=name: getattr(torch, name)(x.abs() + 0.1))
    for name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal", "log2", "log10")
} | {
    name: (lambda x, name=name: getattr(F, name)(3 * x))
    for name in (
        "silu", "mish", "gelu", "elu", "celu", "selu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid",
        "hardswish", "softplus", "logsigmoid",
    )
} | {
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu-args": lambda x: F.elu(x, 0.3),
    "celu-args": lambda x: F.celu(x, 0.3),
    "softplus-args": lambda x: F.softplus(x, 2.0, 1.0),
    "glu": lambda x: F.glu(torch.cat([x, x + 1], -1), -1),
    "logit": lambda x: torch.logit(x.sigmoid()),
    "logit-eps": lambda x: torch.logit(x, 0.1),
    "atanh": lambda x: torch.atanh(x.tanh() * 0.9),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp-min": lambda x: x.clamp(min=0.1),
    "clamp-max": lambda x: x.clamp_max(0.1),
    "clamp-tensor": lambda x: torch.clamp(x, P["row"] - 1, P["row"] + 1),
    "prelu": lambda x: F.prelu(x, P["one"]),
    "pow": lambda x: x.pow(2) + x.pow(3) + x.pow(1) + x.abs().pow(0.5) + (x.abs() + 1).pow(-1) + 2.0**x,
    "pow-tensor": lambda x: (x.abs() + 1) ** P["row"],
    "rsub": lambda x: 1 - x + torch.rsub(x, 2, alpha=3),
    "alpha": lambda x: torch.add(x, P["row"], alpha=0.5) - torch.sub(x, 3, alpha=2),
    "symexp": lambda x: x.sign() * (x.abs().exp() - 1),
    "symlog": lambda x: x.sign() * torch.log1p(x.abs()),
    "in-place": lambda x: x.clone().mul_(2).add_(1).clamp_(min=0).relu_().sigmoid_(),
    "masked-fill": lambda x: x.masked_fill(x > 0, -1.5),
    "masked-fill-in-place": lambda x: (x + 0).masked_fill_(x > 0, 2),
    "assign-under-mask": lambda x: _assigned(x),
    "detach": lambda x: x.detach() * 2 + x.data_free if hasattr(x, "data_free") else x.detach() * 2,
    "logic": lambda x: (x > 0) & (x < 1) | ~(x > -1) ^ (x == 0),
    "bools-add": lambda x: (x > 0) + (x < -1),
    "bools-mul": lambda x: (x > 0) * (x < 1),
    "to-int": lambda x: (x * 3).long() * 2 + (x > 0),
    "int-division": lambda x: (x * 9).long() // 2,
    "int-remainder": lambda x: (x * 9).long() % 4,
    "div-modes": lambda x: (
        torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc")
    ),
    "where-scalar": lambda x: torch.where(x > 0, x, 0.0) + torch.where(x > 0, 1.0, x),
    "nan-stays": lambda x: torch.maximum(x / 0 * 0, x).clamp(0, 1),
    "nothing-done": lambda x: x * 1,
}  # fmt: skip


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0.5] = 0.5
    return y


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_value(name: str) -> None:
    check(lambda x, y: UNARY[name](x))


BINARY: dict[str, Fn] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, y.sigmoid()),
    "addcmul": lambda x, y: torch.addcmul(x, y, x, value=2) + torch.addcdiv(x, y, x, value=0.5),
    "compare": lambda x, y: (x < y) | (x >= 2 * y) | (x != y) | (x.eq(y)),
    "where": lambda x, y: torch.where(x > y, x, y),
    "bce": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
    "one-of-each": lambda x, y: x[..., :1] * y + y[..., 2:3],
    "nested": lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2),
    "nested-then-flat": lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2),
    "turned": lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).mT + x.unsqueeze(-1),
    "constants": lambda x, y: x * P["row"] + P["scalar"] - y * P["one"] + 0.25,
    "constant-columns": lambda x, y: x.unsqueeze(-2) * P["col"] + y.unsqueeze(-2),
    "constant-matrix": lambda x, y: x.unsqueeze(-1) * P["wide"] + y.unsqueeze(-1),
    "computed-constant": lambda x, y: x * P["log_std"].exp() + y * P["row"].clamp(-1, 1),
    "expanded-constant": lambda x, y: x * P["log_std"].expand_as(x).exp() + y * P["one"].expand_as(y),
    "sum-of-expanded-constant": lambda x, y: (
        P["log_std"].expand_as(x).exp().log().sum(-1, keepdim=True) + y
    ),
    "literal": lambda x, y: x + torch.arange(5) * y + torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
    "zeros-and-ones": lambda x, y: x + torch.zeros_like(x) + torch.ones(5) * y + torch.full((5,), 2.0),
}  # fmt: skip


@pytest.mark.parametrize("batch", [(), (3,), (5,), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_values(name: str, batch: tuple[int, ...]) -> None:
    check(BINARY[name], batch)


# ---------------------------------------------------------------- movement

MOVEMENT: dict[str, Fn] = {
    "views": lambda x: x.reshape(*x.shape[:-2], -1).unsqueeze(-1).squeeze(-1),
    "regroup": lambda x: x.flatten(-2).unflatten(-1, (3, 4)),
    "regroup-turned": lambda x: x.mT.flatten(-2).unflatten(-1, (3, 2, 2)),
    "batch-flattened": lambda x: (x.reshape(-1, 6) * 2).reshape(x.shape),
    "everything-flattened": lambda x: (x.reshape(-1) * 2).reshape(x.shape),
    "permute": lambda x: x.mT.contiguous() + x.flatten(-2).unflatten(-1, (6, 2)),
    "batch-last": lambda x: (x.movedim(-1, 0).movedim(-1, 0) * 2).movedim(0, -1).movedim(0, -1),
    "select": lambda x: x[..., 1, 2:4] + x.select(-1, 0)[..., :2],
    "slice-step": lambda x: x[..., ::2] - x[..., 1::2],
    "narrow": lambda x: x.narrow(-1, 2, 3),
    "chunk": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "split": lambda x: torch.cat([t * k for k, t in enumerate(x.split([1, 2, 3], -1))], -1),
    "unbind": lambda x: torch.stack(x.unbind(-1)[::-1], -2),
    "unbind-rows": lambda x: sum(x.unbind(-2)),
    "cat-inner": lambda x: torch.cat([x, x * 2], -2),
    "cat-last": lambda x: torch.cat([x, x[..., :1], x.mT.reshape(x.shape)], -1),
    "cat-constant": lambda x: torch.cat([x, P["row"].expand(*x.shape[:-1], 5)], -1),
    "cat-zeros": lambda x: torch.cat([x, torch.zeros_like(x), torch.ones(*x.shape[:-1], 2)], -1),
    "stack": lambda x: torch.stack([x, x + 1], -3) + torch.stack([x, x * 2], -1).movedim(-1, -3),
    "expand": lambda x: x.unsqueeze(-2).expand(*x.shape[:-1], 3, 6) * 2,
    "expand-flat": lambda x: x.unsqueeze(-2).expand(*x.shape[:-1], 3, 6).flatten(-2),
    "repeat": lambda x: x.repeat(*[1] * (x.ndim - 1), 2) + x.repeat_interleave(2, -1),
    "flip": lambda x: x.flip(-1) + x.flip(-2, -1),
    "roll": lambda x: x.roll(2, -1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "fixed-index": lambda x: x[..., [5, 0, 0]] + x.index_select(-1, torch.tensor([1, 2, 3])),
    "clone": lambda x: x.clone().contiguous(),
}


@pytest.mark.parametrize("batch", [(), (3,), (2,), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", MOVEMENT)
def test_movement(name: str, batch: tuple[int, ...]) -> None:
    check(MOVEMENT[name], batch, [(2, 6)])


def test_views_cost_nothing() -> None:
    lowered = check(
        lambda x: x.reshape(-1, 6).exp().reshape(x.shape).unsqueeze(0)[0], (3,), [(2, 6)]
    )
    assert ops(lowered) == ["exp"]


# ---------------------------------------------------------------- reductions

REDUCTIONS: dict[str, Fn] = {
    "sum": lambda x: x.sum(-1) + x.sum(-1, keepdim=True)[..., 0],
    "sum-inner": lambda x: x.sum(-2),
    "sum-two": lambda x: x.sum((-1, -2)),
    "mean": lambda x: x.mean(-1) - x.mean((-1, -2))[..., None],
    "amax": lambda x: x.amax(-1) + x.amin(-2)[..., :2],
    "max": lambda x: x.max(-1).values + x.min(-1, keepdim=True)[0][..., 0],
    "max-index": lambda x: x.max(-1).indices + x.argmin(-2)[..., :2],
    "argmax": lambda x: x.argmax(-1, keepdim=True),
    "any-all": lambda x: (x > 0).any(-1) | (x > -1).all(-1),
    "count": lambda x: (x > 0).sum(-1),
    "softmax": lambda x: x.softmax(-1) + x.softmax(-2),
    "log-softmax": lambda x: x.log_softmax(-1) * x.log_softmax(-2),
    "logsumexp": lambda x: x.logsumexp(-1) + x.logsumexp((-1, -2), keepdim=True)[..., 0],
    "std": lambda x: x.std(-1) + x.var(-1, unbiased=False) + x.std((-1, -2))[..., None],
    "norm": lambda x: x.norm(dim=-1) + torch.linalg.vector_norm(x, 1, -1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cumsum": lambda x: x.cumsum(-1) + x.cumsum(-2),
    "layer-norm": lambda x: F.layer_norm(x, (6,), P["b"], P["b"] + 1, 1e-3),
    "layer-norm-plain": lambda x: F.layer_norm(x, (2, 6)),
    "rms-norm": lambda x: F.rms_norm(x, (6,), P["b"], 1e-4),
    "sim-norm": lambda x: x.unflatten(-1, (3, 2)).softmax(-1).flatten(-2),
    "two-hot": lambda x: (x.softmax(-1) * torch.linspace(-2, 2, 6)).sum(-1, keepdim=True),
    "two-hot-product": lambda x: x.softmax(-1) @ P["b"],
}


@pytest.mark.parametrize("batch", [(), (3,), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, batch: tuple[int, ...]) -> None:
    check(REDUCTIONS[name], batch, [(2, 6)])


def test_norms_over_channels() -> None:
    x = lambda fn: lambda x: fn(x.reshape(-1, 6)).reshape(x.shape)  # noqa: E731
    check(x(lambda t: F.group_norm(t, 3, P["b"], P["b"])), (4,), [(6,)])
    check(x(lambda t: F.batch_norm(t, P["b"], P["b"].exp(), P["b"], P["b"])), (4,), [(6,)])


# ---------------------------------------------------------------- products

PRODUCTS: dict[str, Fn] = {
    "linear": lambda x, y: F.linear(x, P["w"], P["b"]),
    "linear-no-bias": lambda x, y: F.linear(x, P["w"]),
    "matmul": lambda x, y: x @ P["wide"] + y @ P["square"].t() @ P["wide"],
    "matrix-vector": lambda x, y: x @ P["row"],
    "groups": lambda x, y: torch.stack([x, y], -2) @ P["wide"],
    "computed-matrix": lambda x, y: F.linear(x, P["w"].exp() * 0.1, P["b"] * 2),
    "transposed": lambda x, y: (P["w"] @ torch.stack([x, y], -1)).mT,
    "members": lambda x, y: torch.einsum("...k,mkn->...mn", x, P["members"]),
    "members-turned": lambda x, y: torch.einsum("...k,mnk->...mn", x, P["turned"]),
    "dot": lambda x, y: (x * y).sum(-1),
    "small-product": lambda x, y: x.unsqueeze(-2) @ y.unsqueeze(-1),
    "attention": lambda x, y: torch.softmax(torch.stack([x, y], -2) @ torch.stack([x, y], -1), -1),
}


@pytest.mark.parametrize("batch", [(), (3,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, batch: tuple[int, ...]) -> None:
    check(PRODUCTS[name], batch)


def test_matrices_are_taken_as_they_lie() -> None:
    lowered = check(lambda x: F.linear(x, P["w"], P["b"]) @ P["w"], (3,), [(5,)])
    assert [i.attrs["layout"] for i in lowered.program.instrs] == ["nk", "kn"]
    assert lowered.plain
    assert [u.constant for u in lowered.uniforms] == [0, 1]  # one matrix, read both ways


def _ensemble(x: Tensor, *, turned: bool = False) -> Tensor:
    """``[B, 5] -> [M, B, 6]``."""
    w = P["turned"].mT if turned else P["members"]
    h = torch.baddbmm(P["offset"], x.expand(7, *x.shape), w)
    return F.silu(h)


ENSEMBLES: dict[str, Fn] = {
    "all": lambda x, y: _ensemble(x).movedim(0, 1),
    "turned": lambda x, y: _ensemble(x, turned=True).movedim(0, 1),
    "deep": lambda x, y: torch.bmm(_ensemble(x), P["deep"]).movedim(0, 1),
    "mean": lambda x, y: _ensemble(x).mean(0) + _ensemble(x).std(0),
    "fixed": lambda x, y: _ensemble(x)[3],
    "drawn": lambda x, y: _ensemble(x)[torch.randint(7, (x.shape[0],)), torch.arange(x.shape[0])],
    "drawn-deep": lambda x, y: torch.bmm(_ensemble(x), P["deep"])[
        torch.randint(7, (x.shape[0],)), torch.arange(x.shape[0])
    ],
    "gathered": lambda x, y: (
        _ensemble(x)
        .gather(0, torch.randint(7, (x.shape[0],))[None, :, None].expand(1, -1, 6))
        .squeeze(0)
    ),
    "along-dim": lambda x, y: torch.take_along_dim(
        _ensemble(x).movedim(0, 1), y[:, :1, None].sigmoid().mul(6.99).long().expand(-1, 1, 6), 1
    ).squeeze(1),
    "gaussian": lambda x, y: _gaussian(torch.bmm(_ensemble(x), P["deep"])),
}


def _gaussian(out: Tensor) -> Tensor:
    """As in PETS and MBPO: bounds on the log variance, one member a row, a draw."""
    mean, log_std = out.chunk(2, -1)
    log_std = P["row"][1:3] - F.softplus(P["row"][1:3] - log_std)
    member = torch.randint(7, (out.shape[1],))
    rows = torch.arange(out.shape[1])
    mean, std = mean[member, rows], log_std.exp()[member, rows]
    return mean + std * torch.randn_like(mean)


@pytest.mark.parametrize("batch", [3, 5, 6, 7])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensembles(name: str, batch: int) -> None:
    lowered = check(ENSEMBLES[name], (batch,))
    if name in ("drawn", "drawn-deep", "gathered", "along-dim", "gaussian"):
        assert "grouped_linear" not in ops(lowered)
        assert "member_linear" in ops(lowered)


def test_members_wanted_anyhow_are_computed_once() -> None:
    def fn(x: Tensor) -> Tensor:
        every = _ensemble(x)
        chosen = every[torch.randint(7, (3,)), torch.arange(3)]
        return chosen + every.std(0)

    lowered = check(fn, (3,), [(5,)])
    assert ops(lowered).count("grouped_linear") == 1
    assert "member_linear" not in ops(lowered)


# ---------------------------------------------------------------- indexing

INDEXING: dict[str, Fn] = {
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "gather-several": lambda x: x.gather(-1, (x[..., :3] > 0).long() * 2),
    "gather-inner": lambda x: x.gather(-2, x.argmax(-2, keepdim=True)),
    "log-prob-of": lambda x: x.log_softmax(-1).gather(-1, x.argmax(-1)[..., None])[..., 0],
    "one-hot": lambda x: F.one_hot(x.argmax(-1), 6).to(x.dtype) * x,
    "scatter-value": lambda x: torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0),
    "scatter-source": lambda x: torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), x),
    "scatter-add": lambda x: x.scatter_add(-1, x.argmax(-1, keepdim=True), x),
    "embedding": lambda x: F.embedding(x.argmax(-1), P["table"]),
    "table": lambda x: P["table"][x.argmax(-1)] * 2,
    "straight-through": lambda x: F.one_hot(x.argmax(-1), 6) + x - x.detach(),
}


@pytest.mark.parametrize("batch", [(), (3,), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", INDEXING)
def test_indexing(name: str, batch: tuple[int, ...]) -> None:
    check(INDEXING[name], batch, [(2, 6)])


# ---------------------------------------------------------------- noise

DRAWS: dict[str, Fn] = {
    "randn-like": lambda x: x + torch.randn_like(x),
    "rand": lambda x: x * torch.rand(x.shape) + torch.rand_like(x),
    "randn-sizes": lambda x: x + torch.randn(*x.shape[:-1], 1),
    "shared": lambda x: x + torch.randn(5) + torch.rand(()),
    "normal_": lambda x: x + torch.empty_like(x).normal_(0.5, 2) * torch.zeros(x.shape).uniform_(-1, 3),
    "normal": lambda x: torch.normal(x, x.exp()) + torch.normal(0.5, x.exp()) + torch.normal(x, 2.0),
    "exponential": lambda x: x / torch.empty_like(x).exponential_(2.0),
    "randint": lambda x: x * torch.randint(-2, 5, (*x.shape[:-1], 1)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()) + x,
    "bernoulli-fixed": lambda x: torch.empty_like(x).bernoulli_(0.3) * x,
    "bernoulli-of-constant": lambda x: torch.bernoulli(P["row"].sigmoid().expand_as(x)) * x,
    "dropout": lambda x: F.dropout(x, 0.4, training=True),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1).reshape(-1, 5), 1).reshape(*x.shape[:-1], 1),
    "categorical": lambda x: torch.distributions.Categorical(logits=x).sample(),
    "gumbel": lambda x: F.gumbel_softmax(x, hard=True),
    "relaxed": lambda x: torch.distributions.RelaxedOneHotCategorical(torch.tensor(0.5), logits=x).rsample(),
    "through-a-transpose": lambda x: x.mT.contiguous().mT + torch.randn_like(x.mT).mT if x.ndim > 1 else x,
    "turned": lambda x: x + torch.randn(5, *x.shape[:-1]).movedim(0, -1),
    "laplace": lambda x: torch.distributions.Laplace(x, x.exp()).rsample(),
    "uniform": lambda x: torch.distributions.Uniform(x, x + 1).rsample(),
    "unread": lambda x: (torch.randn(7), x + torch.rand_like(x))[1],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (5,), (17,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_noise(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype is torch.float64 and name in ("randn-sizes", "rand", "shared", "turned", "normal_",
                                           "bernoulli-of-constant", "relaxed"):  # fmt: skip
        pytest.skip("draws float32")
    check(DRAWS[name], batch, [(5,)], dtype)


def test_groups_are_sampled_as_eager_samples_them() -> None:
    """Categorical flattens batch and groups: [B, G, n] becomes [B * G, n]."""
    for batch in ((3,), (2,), (4,), (2, 3)):
        check(
            lambda x: torch.distributions.OneHotCategoricalStraightThrough(logits=x).rsample(),
            batch, [(4, 2)],
        )  # fmt: skip


# ---------------------------------------------------------------- what is refused


def refuse(
    fn: Fn, *says: str, batch: Sequence[int] = (3,), inner: Any = ((5,),), **kwargs: Any
) -> None:
    with pytest.raises(NotLowerable) as error:
        lowering(fn, batch, inner, kwargs.pop("dtype", torch.float32), **kwargs)
    for words in says:
        assert words in str(error.value), str(error.value)


MIXING: dict[str, tuple[Fn, str]] = {
    "mean": (lambda x: x - x.mean(0, keepdim=True), "aten.mean"),
    "softmax": (lambda x: x.softmax(0), "_softmax"),
    "flip": (lambda x: x.flip(0), "flip"),
    "first": (lambda x: x + x[:1], "slice"),
    "select": (lambda x: x + x[0], "select"),
    "cat": (lambda x: torch.cat([x, x])[: len(x)], "cat"),
    "everything": (lambda x: x + x.sum(), "sum"),
    "gram": (lambda x: (x @ x.mT) @ x, "mm"),
    "outer": (lambda x: (x.unsqueeze(0) - x.unsqueeze(1)).sum(0), "sub"),
    "cumsum": (lambda x: x.cumsum(0), "cumsum"),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_are_refused(name: str) -> None:
    fn, word = MIXING[name]
    refuse(fn, word)


def test_views_that_cut_through_the_batch_are_refused() -> None:
    refuse(lambda x: x.reshape(2, 10).exp().reshape(4, 5), "cuts through the batch", batch=(4,))


@pytest.mark.parametrize("size", [3, 5])
def test_a_square_batch_hides_nothing(size: int) -> None:
    """Five rows of five: every mix that shapes alone would let pass."""
    refuse(lambda x: x + x.mT, "mixes rows", batch=(size,), inner=((size,),))
    refuse(lambda x: x.softmax(0), "batch", batch=(size,), inner=((size,),))
    refuse(lambda x: x @ x, "", batch=(size,), inner=((size,),))
    refuse(lambda x: x + torch.eye(size), "mixes rows", batch=(size,), inner=((size,),))
    refuse(lambda x: x.gather(0, x.argsort(0)), "", batch=(size,), inner=((size,),))
    check(lambda x: x + torch.randn(size), (size,), [(size,)])
    check(lambda x: x + torch.randn(size, size), (size,), [(size,)])
    check(lambda x: x + torch.randn(size, size).mT, (size,), [(size,)])
    check(lambda x: x @ torch.eye(size) + torch.arange(size), (size,), [(size,)])


REFUSED: dict[str, tuple[Fn, str]] = {
    "sort": (lambda x: x.sort(-1).values, "aten.sort"),
    "topk": (lambda x: x.topk(2, -1).values, "aten.topk"),
    "prod": (lambda x: x.prod(-1), "aten.prod"),
    "lgamma": (lambda x: x.lgamma(), "aten.lgamma"),
    "double": (lambda x: x.double().sin().float(), "float64"),
    "half": (lambda x: x.half().float(), "float16"),
    "complex": (lambda x: torch.fft.fft(x).real, "complex64"),
    "gamma": (lambda x: torch._standard_gamma(x.exp()), "_standard_gamma"),
    "poisson": (lambda x: torch.poisson(x.exp()), "poisson"),
    "randperm": (lambda x: x[torch.randperm(3)], "randperm"),
    "several-samples": (lambda x: torch.multinomial(x.exp(), 2), "several samples"),
    "overlap": (lambda x: _overlapping(x), "another view"),
    "buffer-index": (lambda x: x[:, P["indices"]], "an index that a buffer holds"),
    "per-row-constant": (lambda x: x + P["per_row"], "mixes rows"),
    "norm": (lambda x: x.norm(3, dim=-1), "a norm of order 3"),
    "uint8": (lambda x: x.to(torch.uint8), "uint8"),
    "mask": (lambda x: torch.where(x > 0, x, x).where(x > 0, x).fmax(x), "fmax"),
}
P["indices"] = torch.tensor([0, 1])
P["per_row"] = torch.randn(3, 1)


def _overlapping(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1:].mul_(2)
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_it_was(name: str) -> None:
    fn, words = REFUSED[name]
    refuse(fn, words)


def test_dtypes_are_refused_by_name() -> None:
    refuse(torch.exp, "float16 inputs", dtype=torch.float16)
    graph, _, _ = trace(lambda t: {("td", ("y",)): t["x",] + 1}, {("x",): torch.zeros(3)}, bool)
    with pytest.raises(NotLowerable, match="a step of float32 as a program of float64"):
        lower(graph, [], [], 1, dtype=torch.float64)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 3


def test_a_custom_function_is_refused_by_name() -> None:
    def step(given: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return {("td", ("y",)): Double.apply(given["x",])}

    graph, _, _ = trace(step, {("x",): torch.randn(3, 5, requires_grad=True)}, lambda t: True)
    with pytest.raises(NotLowerable, match=r"custom autograd\.Function Double"):
        lower(graph, [], [], 1)


# ---------------------------------------------------------------- the frame


def test_detached_constants_are_frozen() -> None:
    w = nn.Parameter(torch.randn(5, 5))

    def fn(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w.detach())

    lowered = check(fn, (3,), [(5,)])
    assert [u.frozen for u in lowered.uniforms] == [False, True]
    assert lowered.frozen == {lowered.uniforms[1].name}
    _, frozen = lowered.prologue([w])
    assert not frozen.requires_grad


def test_gradients_reach_parameters_through_the_prologue() -> None:
    log_std = nn.Parameter(torch.randn(5))
    lowered, constants, _ = lowering(
        lambda x: x * log_std.exp() + log_std, (3,), [(5,)], torch.float32
    )
    tensors = lowered.prologue(constants)
    assert not lowered.plain
    torch.stack(tensors).sum().backward()
    torch.testing.assert_close(log_std.grad, log_std.exp().detach() + 1)


def test_an_input_that_no_step_changes_is_the_callers_to_copy() -> None:
    x = torch.randn(3, 5)
    index = torch.arange(3).reshape(3, 1) * 2**40  # no float32 holds these
    graph, _, _ = trace(
        lambda t: {("td", ("i",)): t["i",], ("td", ("y",)): t["x",] + 1},
        {("x",): x, ("i",): index},
        lambda t: True,
    )
    lowered = lower(graph, [], [], 1)
    assert lowered.passed == {("td", ("i",)): ("in", ("i",))}
    assert list(lowered.program.inputs) == [("in", ("x",))]


def test_ints_too_large_fail_a_check() -> None:
    graph, _, _ = trace(
        lambda t: {("td", ("i",)): t["i",], ("state", ("i",)): t["i",] + 1},
        {("i",): torch.zeros(3, 1, dtype=torch.long)},
        lambda t: True,
    )
    lowered = lower(graph, [("i",)], [], 1)
    for start, ok in ((5, True), (2**24 + 2, False), (2**24 - 2, False)):
        given = {("in", ("i",)): torch.full((3, 1), start)}
        assert interpret(lowered.program, given, 4).ok is ok
    assert lowered.casts["td", ("i",)] == ((1,), torch.int64)


def test_failing_probabilities_fail_a_check() -> None:
    lowered, _, _ = lowering(lambda x: torch.multinomial(x.abs(), 1), (3,), [(5,)], torch.float32)
    noise = torch.ones(3, 1, 5)
    for value, ok in ((1.0, True), (math.nan, False), (0.0, False), (math.inf, False)):
        given = {("in", ("x0",)): torch.full((3, 5), value), ("draw", 0): noise}
        assert interpret(lowered.program, given, 1).ok is ok
