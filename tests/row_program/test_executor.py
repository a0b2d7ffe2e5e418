"""The C++ executor op by op, against the reference interpreter: every instruction set, section and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from fastwm.row_program import Program, ProgramError, Val
from fastwm.row_program.encode import encode
from fastwm.row_program.executor import Executor
from fastwm.row_program.ops import BINARY, REFERENCES, UNARY, UNARY_GRAD
from fastwm.row_program.reference import interpret
from tests.row_program.executing import (
    ISAS,
    WHY_NOT,
    Ran,
    assert_near,
    assert_ran,
    check,
    execute,
    given_as,
    threads,
)
from tests.row_program.random_programs import PARAMETERS, random_program

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"needs the C++ library: {WHY_NOT}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small work gains nothing from threads, and loses on a busy machine. Tests of threads ask for them."""
    with threads(1):
        yield


WIDTHS = (1, 5, 16, 31, 64, 200)
ROWS = (1, 3, 17, 129)
STEPS = (1, 2, 7)
POSITIVE = {"log", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "div"}
SUMS = {"outer", "grouped_outer", "member_outer", "row_sum", "member_row_sum"}
MEMBERS = 3


class Build:
    """A program with one op in all three sections: ``op(s)`` ahead of the loop, ``op(x)`` in it, ``op`` of x
    turned round after it.

    The op's operands are inputs or movements of them, so that float32 and float64 see the same numbers.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.p = Program(dtype=torch.float64)
        self.x = self.p.input("x", "carry", (n,))
        self.z = self.p.input("z", "carry", (n,))
        self.s = self.p.input("s", "step", (n,))
        self.c = self.p.input("c", "context", (n,))
        self.i = self.p.input("i", "step", (), "int")
        self.shared: dict[tuple[int, ...], Val] = {}
        self.targets = 0

    def __call__(self, op: str, *args: Any, **attrs: Any) -> Val:
        return self.p.emit(op, *args, **attrs)

    def u(self, *shape: int) -> Val:
        """A uniform: one for each shape."""
        if shape not in self.shared:
            self.shared[shape] = self.p.input(f"u{shape}", "uniform", shape)
        return self.shared[shape]

    def wide(self, v: Val, *shape: int) -> Val:
        """v repeated, as ``shape``."""
        count = torch.Size(shape).numel()
        repeated = tuple((7 * j + j // self.n) % self.n for j in range(count))
        return self("index", v, map=repeated, shape=shape)

    def one(self, v: Val, *shape: int) -> Val:
        return self("index", v, map=(self.n // 2,), shape=shape)

    def target(self, *shape: int) -> str:
        self.targets += 1
        self.p.add_sum(f"sum{self.targets}", shape)
        return f"sum{self.targets}"

    def turned(self) -> Val:
        return self("index", self.x, map=tuple(range(self.n))[::-1], shape=(self.n,))

    def finish(self, make: Callable[[Build, Val], Val | None], op: str) -> Program:
        p = self.p
        for name, v in (("ahead", self.s), ("loop", self.x), ("after", self.turned())):
            y = make(self, self("abs", v) if op in POSITIVE else v)
            if y is None:
                continue
            p.outputs[name] = y
            if name == "loop":
                width = p.type(y).width
                some = self(
                    "index", y, map=tuple(j % width for j in range(self.n)), shape=(self.n,)
                )
                p.carries["z"] = self("tanh", self("add", self("mul", self.z, 0.5), some))
        p.carries["x"] = self.turned()
        p.finals = ["x", "z"]
        return p

    def inputs(self, rows: int, steps: int, seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        found = {}
        for name, item in self.p.inputs.items():
            lead = {"uniform": (), "step": (rows, steps)}.get(item.role, (rows,))
            shape = (*lead, *self.p.type(item.val).shape)
            if name == "i":
                found[name] = torch.randint(MEMBERS, shape, generator=g).double()
            else:
                t = torch.randn(shape, generator=g)
                # Ties, zeros and whole numbers among them.
                t = torch.where(torch.rand(shape, generator=g) < 0.2, t.round(), t)
                found[name] = t.double()
        return found


Make = Callable[[Build, Val], Val | None]


def _forms(op: str) -> dict[str, Make]:
    """An elementwise op of two operands with every kind of operand."""
    forms: dict[str, Callable[[Build, Val], tuple[Any, Any]]] = {
        "rows": lambda b, v: (v, b.c),
        "same": lambda b, v: (v, v),
        "single": lambda b, v: (v, b.one(b.c, 1)),
        "single left": lambda b, v: (b.one(v), b.c),
        "uniform": lambda b, v: (v, b.u(b.n)),
        "uniform left": lambda b, v: (b.u(b.n), v),
        "single uniform": lambda b, v: (v, b.u()),
        "single uniform left": lambda b, v: (b.u(1), v),
        "single and uniform": lambda b, v: (b.one(v, 1), b.u(b.n)),
        "number": lambda b, v: (v, 0.5),
        "number left": lambda b, v: (2.0, v),
        "dims": lambda b, v: (b.wide(v, 2, b.n), b.u(2, b.n)),
    }
    return {
        f"{op}:{name}": lambda b, v, get=get: b(op, *get(b, v))  # type: ignore[misc]
        for name, get in forms.items()
    }


def _where_forms() -> dict[str, Make]:
    def operands(b: Build, v: Val) -> dict[str, Any]:
        return {
            "rows": b.c, "single": b.one(b.c, 1), "uniform": b.u(b.n), "one uniform": b.u(), "number": -1.5,
        }  # fmt: skip

    names = ("rows", "single", "uniform", "one uniform", "number")
    found: dict[str, Make] = {}
    for left in names:
        for right in names:
            found[f"where:{left}, {right}"] = lambda b, v, left=left, right=right: b(  # type: ignore[misc]
                "where", b("gt", v, 0.0), operands(b, v)[left], operands(b, v)[right]
            )
    found["where:single condition"] = lambda b, v: b("where", b("gt", b.one(v), 0.0), v, b.c)
    found["where:float condition"] = lambda b, v: b("where", v, v, b.u(b.n))
    return found


def _linear(op: str, x: Callable[[Build], tuple[int, ...]], n: int, layout: str, bias: bool,
            act: str | None = None) -> Make:  # fmt: skip
    def make(b: Build, v: Val) -> Val:
        shape = x(b)
        lead = {"linear": (), "grouped_linear": (3,), "member_linear": (MEMBERS,)}[op]
        k = shape[-1]
        w = b.u(*lead, *((n, k) if layout == "nk" else (k, n)))
        more = (b.i,) if op == "member_linear" else ()
        attrs = {"act": act, "act_params": PARAMETERS.get(act)} if act else {}
        bias_ = b.u(*lead, n) if bias else None
        return b(op, b.wide(v, *shape), w, bias_, *more, layout=layout, **attrs)

    return make


def _linears() -> dict[str, Make]:
    found: dict[str, Make] = {}
    shapes: dict[str, dict[str, Callable[[Build], tuple[int, ...]]]] = {
        "linear": {"n": lambda b: (b.n,), "2n": lambda b: (2, b.n), "n1": lambda b: (b.n, 1)},
        "grouped_linear": {"n": lambda b: (b.n,), "3n": lambda b: (3, b.n)},
        "member_linear": {"n": lambda b: (b.n,)},
    }
    for op, all_of_it in shapes.items():
        for name, x in all_of_it.items():
            for layout in ("nk", "kn"):
                for n in (1, 6, 16, 33, 112):
                    if name == "n1" and n > 6:
                        continue
                    bias = n != 6
                    found[f"{op}:{name} {layout} {n}"] = _linear(op, x, n, layout, bias)
        for act in UNARY:
            if act not in ("log", "sqrt", "rsqrt", "reciprocal", "log1p", *JUMPING):
                found[f"{op}:{act}"] = _linear(op, shapes[op]["n"], 7, "nk", True, act)
    return found


JUMPING = ("sign", "floor", "ceil", "round", "trunc", "not", "isnan", "isfinite")


def _outer(op: str, layout: str, n: int, lead: int) -> Make:
    def make(b: Build, v: Val) -> None:
        k = b.n
        shape = (n, k) if layout == "nk" else (k, n)
        x, g = v, b.wide(b.c, n)
        attrs: dict[str, Any] = {"layout": layout}
        more: tuple[Val, ...] = ()
        if op == "outer" and lead:
            x, g = b.wide(v, lead, k), b.wide(b.c, lead, n)
        elif op == "grouped_outer":
            x, g, shape = b.wide(v, 3, k) if lead else v, b.wide(b.c, 3, n), (3, *shape)
        elif op == "member_outer":
            more, shape = (b.i,), (MEMBERS, *shape)
            attrs["members"] = MEMBERS
        b(op, x, g, *more, target=b.target(*shape), **attrs)

    return make


def _row_sum(*lead: int) -> Make:
    def make(b: Build, v: Val) -> None:
        b("row_sum", b.wide(v, *lead, b.n), target=b.target(*lead, b.n))

    return make


def _unary_grad(op: str) -> Make:
    base = op.removesuffix("_grad")
    return lambda b, v: b(op, b.c, v, **PARAMETERS.get(base, {}))


#: name (the op before a colon) -> what emits it
CASES: dict[str, Make] = {
    **{op: lambda b, v, op=op: b(op, v, **PARAMETERS.get(op, {})) for op in UNARY},  # type: ignore[misc]
    **{op: _unary_grad(op) for op in UNARY_GRAD},
    "softplus:threshold": lambda b, v: b("softplus", v, beta=2.0, threshold=0.5),
    "softplus_grad:threshold": lambda b, v: b("softplus_grad", b.c, v, beta=2.0, threshold=0.5),
    **{name: make for op in BINARY for name, make in _forms(op).items()},
    **{f"pow:{e}": lambda b, v, e=e: b("pow", v, e) for e in (0.0, 1.0, 2.0, 3.0, -1.0, 0.5)},  # type: ignore[misc]
    **_where_forms(),
    **{
        f"{op}:{name}": lambda b, v, op=op, shape=shape: b(op, b.wide(v, *shape(b.n)))  # type: ignore[misc]
        for op in ("sum", "mean", "max", "min", "logsumexp", "argmax", "argmin", "softmax", "log_softmax")
        for name, shape in {
            "n": lambda n: (n,), "3n": lambda n: (3, n), "n2": lambda n: (n, 2), "n1": lambda n: (n, 1),
            "23n": lambda n: (2, 3, n), "n8": lambda n: (n, 8),
        }.items()
    },
    **{
        f"{op}:{name}": lambda b, v, op=op, shape=shape: b(  # type: ignore[misc]
            op, b.wide(b.c, *shape(b.n)), b(op.removesuffix("_grad"), b.wide(v, *shape(b.n)))
        )
        for op in ("softmax_grad", "log_softmax_grad")
        for name, shape in {"n": lambda n: (n,), "3n": lambda n: (3, n), "n2": lambda n: (n, 2)}.items()
    },
    "layer_norm": lambda b, v: b("layer_norm", v, b.u(b.n), b.u(b.n), eps=0.1),
    "layer_norm:plain": lambda b, v: b("layer_norm", v, None, None, eps=1e-3),
    "layer_norm:weight": lambda b, v: b("layer_norm", b.wide(v, 3, b.n), b.u(b.n), None, eps=1e-3),
    "layer_norm:bias": lambda b, v: b("layer_norm", b.wide(v, b.n, 2), None, b.u(2), eps=1e-2),
    "layer_norm_grad": lambda b, v: b("layer_norm_grad", b.c, v, b.u(b.n), eps=0.1),
    "layer_norm_grad:groups": lambda b, v: b(
        "layer_norm_grad", b.wide(b.c, 3, b.n), b.wide(v, 3, b.n), None, eps=1e-2
    ),
    "cast": lambda b, v: b("cast", v, kind="float"),
    "cast:int": lambda b, v: b("mul", b("cast", v, kind="int"), b.c),
    "cast:bool": lambda b, v: b("cast", v, kind="bool"),
    "cast:bool to int": lambda b, v: b("cast", b("gt", v, 0.0), kind="int"),
    "cast:bool to float": lambda b, v: b("add", b("cast", b("gt", v, 0.0), kind="float"), 0.5),
    "fill": lambda b, v: b("mul", b("fill", value=2.5, shape=(b.n,), kind="float"), v),
    "fill:alone": lambda b, v: b("fill", value=-1.0, shape=(2, b.n), kind="float"),
    "fill:bool": lambda b, v: b("fill", value=1.0, shape=(), kind="bool"),
    "row": lambda b, v: b("mul", b("row", b.u(b.n)), v),
    "row:alone": lambda b, v: b("row", b.u(3, b.n)),
    "row:single": lambda b, v: b("row", b.u()),
    "reshape": lambda b, v: b("reshape", v, shape=(1, b.n, 1)),
    "index": lambda b, v: b("index", v, map=tuple((5 * j) % b.n for j in range(37)), shape=(37,)),
    "index:slice": lambda b, v: b("index", v, map=tuple(range(b.n // 3, b.n)), shape=(b.n - b.n // 3,)),
    "index:head": lambda b, v: b("index", v, map=tuple(range(b.n // 2 + 1)), shape=(b.n // 2 + 1,)),
    "index:last": lambda b, v: b("index", v, map=(b.n - 1,), shape=()),
    "index:all": lambda b, v: b("index", v, map=tuple(range(b.n)), shape=(b.n, 1)),
    "index_add": lambda b, v: b(
        "index_add", v, map=tuple((3 * j) % 19 for j in range(b.n)), shape=(19,)
    ),
    "concat": lambda b, v: b("concat", v, b.one(v), b.c, v, b("gt", b.wide(v, 3), 0.0)),
    "concat:one": lambda b, v: b("concat", v),
    "one_hot": lambda b, v: b("one_hot", b("argmax", b.wide(v, 3, b.n)), n=b.n),
    "one_hot:outside": lambda b, v: b("one_hot", b("cast", v, kind="int"), n=2),
    "take": lambda b, v: b("take", b.wide(v, MEMBERS, b.n), b.i),
    "take:groups": lambda b, v: b("take", b.wide(v, 5, 4, b.n), b("argmin", b.wide(v, 5, 4))),
    "put": lambda b, v: b("put", v, b.i, m=MEMBERS),
    "put:groups": lambda b, v: b("put", b.wide(v, 5, b.n), b("argmax", b.wide(v, 5, 4)), m=4),
    **_linears(),
    **{
        f"{op}:{layout} {n} {lead}": _outer(op, layout, n, lead)
        for op in ("outer", "grouped_outer", "member_outer")
        for layout in ("nk", "kn") for n in (1, 6, 33) for lead in (0, 2)
        if lead == 0 or op != "member_outer"
    },
    "row_sum": _row_sum(),
    "row_sum:2": _row_sum(2),
    "row_sum:23": _row_sum(2, 3),
    "member_row_sum": lambda b, v: b(  # type: ignore[dict-item]
        "member_row_sum", v, b.i, target=b.target(MEMBERS, b.n), members=MEMBERS
    ),
}  # fmt: skip


def test_every_op_has_a_case() -> None:
    assert {name.partition(":")[0] for name in CASES} == set(REFERENCES)


@pytest.mark.parametrize("name", CASES)
def test_an_op(name: str) -> None:
    position = list(CASES).index(name)
    alike = [other for other in CASES if other.partition(":")[0] == name.partition(":")[0]]
    for w, n in enumerate(WIDTHS):
        if len(alike) > 3 and (w + alike.index(name)) % 3 != 0:
            continue  # the op's other cases have them
        b = Build(n)
        p = b.finish(CASES[name], name.partition(":")[0])
        executors: dict[Any, Executor] = {}
        # Over the widths and cases, every number of rows meets every number of steps.
        sizes = (w + position) % 4, (w + position + 1 + position % 3) % 4
        for r in sizes[: 1 if len(alike) > 3 else 2]:
            rows, steps = ROWS[r], STEPS[(position + w + r) % 3]
            inputs = b.inputs(rows, steps, seed=position)
            check(p, inputs, rows, steps, reverse=bool((position + r) % 2), executors=executors)


# ---------------------------------------------------------------- numbers that are none, or hardly

INF, NAN = torch.inf, torch.nan
SPECIAL = (
    0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 0.5, -0.5, 1.5, 2.5, 1.0, -1.0, 20.0, -20.0, 88.0, -88.0,
    90.0, -90.0, -104.0, 130.0, -130.0, 1e10, -1e10, 3e38, -3e38, INF, -INF, NAN,
)  # fmt: skip


def _special(*others: int) -> dict[str, torch.Tensor]:
    """Every special number with every other, as rows of two values ``[len]``."""
    s = torch.tensor(SPECIAL)
    x, y = torch.meshgrid(s, s, indexing="ij")
    return {"x": x.contiguous(), "y": y.contiguous()}


def _binary_program(emit: Callable[[Program, Val, Val], Val], dtype: torch.dtype) -> Program:
    p = Program(dtype=dtype)
    x, y = (p.input(n, "context", (len(SPECIAL),)) for n in "xy")
    p.outputs["z"] = emit(p, x, y)
    return p


SPECIAL_CASES = (*UNARY, *UNARY_GRAD, *BINARY, "where", "reductions")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", SPECIAL_CASES)
def test_special_numbers(op: str, dtype: torch.dtype) -> None:
    for isa in ISAS:
        assert_special_numbers(op, dtype, partial(execute, isa=isa))


def assert_special_numbers(
    op: str, dtype: torch.dtype, run: Callable[..., Ran], rtol: float = 3e-6
) -> None:
    """As torch in the same dtype: overflow, NaN and infinities where it has them.

    Args:
        rtol: in float32.
    """

    def emit(p: Program, x: Val, y: Val) -> Val:
        if op in UNARY:
            return p.emit(op, x, **PARAMETERS.get(op, {}))
        if op in UNARY_GRAD:
            return p.emit(op, x, y, **PARAMETERS.get(op.removesuffix("_grad"), {}))
        if op == "where":
            return p.emit("where", x, y, p.emit("neg", y))
        if op == "reductions":  # of three, one of them twice
            pairs = p.emit("index", p.emit("concat", x, y), map=tuple(
                k for j in range(len(SPECIAL)) for k in (j, j + len(SPECIAL), j)
            ), shape=(len(SPECIAL), 3))  # fmt: skip
            found = [
                p.emit(r, pairs)
                for r in ("sum", "mean", "max", "min", "logsumexp", "argmax", "argmin")
            ]
            found += [p.emit(r, pairs) for r in ("softmax", "log_softmax")]
            found += [p.emit(r, x) for r in ("max", "min", "argmax", "argmin")]
            return p.emit("concat", *found)
        return p.emit(op, x, y)

    p = _binary_program(emit, dtype)
    inputs = {n: t.to(dtype) for n, t in _special().items()}
    want = interpret(p, inputs, 1)
    ran = run(p, inputs, len(SPECIAL), 1)
    got, expected = ran.outputs["z"].squeeze(1).to(dtype), want.outputs["z"].squeeze(1)
    # A gradient is as near as its unary's slope: one of 1e-37 may be 0 before it meets a large g.
    slope = inputs["x"].abs().clamp(max=1e38) if op in UNARY_GRAD else torch.ones(())
    rtol = rtol if dtype is torch.float32 else 1e-12
    tiny = 4e-36 if dtype is torch.float32 else 1e-300
    if op == "reductions":  # a logarithm of a sum next to 1
        tiny = torch.finfo(dtype).eps
    near = (got - expected).abs() <= rtol * expected.abs() + tiny * (1 + slope)
    alike = near | (got == expected) | (got.isnan() & expected.isnan())
    wrong = ~alike & ~_torch_is_odd(op, inputs["x"], inputs["y"])
    found = [
        (SPECIAL[i], k, expected[i, k].item(), got[i, k].item())
        for i, k in wrong.nonzero().tolist()
    ]
    assert not found, found[:20]


def _torch_is_odd(op: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where eager overflows, or makes NaN, though the result is an ordinary number: not imitated."""
    if op == "gelu":  # float32 alone, in oneDNN
        return x > 1e38
    if op in ("softplus_grad", "elu_grad"):  # g times a product before what makes it small again
        return x.abs() > 1e38
    if op in ("log_sigmoid_grad", "silu_grad", "mish_grad"):  # the other way round: 1e-37 is 0 here
        return (x.abs() == INF) & (y.abs() > 87)
    return torch.zeros((), dtype=torch.bool)


# ---------------------------------------------------------------- the frame


def _small() -> tuple[Program, Val, Val]:
    p = Program()
    return p, p.input("x", "carry", (5,)), p.input("s", "step", (5,))


def _numbers(p: Program, rows: int, steps: int, seed: int = 0) -> dict[Any, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, item in p.inputs.items():
        lead = {"uniform": (), "step": (rows, steps)}.get(item.role, (rows,))
        shape, kind = (*lead, *p.type(item.val).shape), p.type(item.val).kind
        t = torch.randn(shape, generator=g)
        found[name] = (t > 0).float() if kind == "bool" else (3 * t).round() if kind == "int" else t
    return found


def _everywhere(p: Program, **kwargs: Any) -> None:
    for rows in (1, 3, 129):
        for steps in (0, 1, 2, 7):
            for reverse in (False, True):
                inputs = _numbers(p, rows, steps)
                check(p, inputs, rows, steps, reverse=reverse, **kwargs)


def test_carries_that_swap() -> None:
    p = Program()
    a, b, c = (p.input(n, "carry", (5,)) for n in "abc")
    p.carries |= {"a": b, "b": c, "c": a}
    p.outputs |= {"a": a, "sum": p.emit("add", a, b)}
    p.finals = ["a", "b", "c"]
    _everywhere(p)


def test_a_carry_that_becomes_another_through_a_view() -> None:
    p = Program()
    a, b = p.input("a", "carry", (6,)), p.input("b", "carry", (2, 3))
    p.carries["a"] = p.emit("reshape", b, shape=(6,))
    p.carries["b"] = p.emit("tanh", p.emit("reshape", a, shape=(2, 3)))
    p.outputs |= {"old": p.emit("reshape", a, shape=(3, 2)), "next": p.carries["b"]}
    p.finals = ["b", "a"]
    _everywhere(p)


def test_a_carry_that_is_not_updated() -> None:
    p, x, s = _small()
    p.outputs |= {"y": p.emit("mul", x, s), "x": x}
    p.finals = ["x"]
    _everywhere(p)


def test_a_carry_that_stays_itself() -> None:
    p, x, s = _small()
    p.carries["x"] = p.emit("detach", x)
    p.outputs["y"] = p.emit("add", p.carries["x"], s)
    p.finals = ["x"]
    _everywhere(p)


def test_carries_from_inputs() -> None:
    p, x, s = _small()
    y = p.input("y", "carry", (5,))
    p.carries |= {"x": s, "y": p.input("c", "context", (5,))}
    p.outputs["d"] = p.emit("sub", x, y)
    p.finals = ["x", "y"]
    _everywhere(p)


def test_carries_from_values_ahead_of_the_loop() -> None:
    p, x, s = _small()
    p.carries["x"] = p.emit("exp", s)
    p.outputs |= {"y": p.emit("add", x, s), "e": p.carries["x"]}
    p.finals = ["x"]
    _everywhere(p)


def test_two_carries_with_one_next_value() -> None:
    p, x, s = _small()
    y = p.input("y", "carry", (5,))
    p.carries["x"] = p.carries["y"] = p.emit("tanh", p.emit("sub", p.emit("mul", x, y), s))
    p.outputs |= {"x": p.carries["x"], "again": p.carries["x"], "before": y}
    p.finals = ["y", "x"]
    _everywhere(p)


def test_outputs_that_are_inputs() -> None:
    p, x, s = _small()
    c = p.input("c", "context", (3,))
    flag = p.input("flag", "step", (2,), "bool")
    p.carries["x"] = p.emit("tanh", x)
    p.outputs |= {"x": x, "s": s, "c": c, "flag": flag}
    p.outputs["part"] = p.emit("index", c, map=(1, 2), shape=(2,))
    _everywhere(p)


def test_a_program_without_outputs() -> None:
    p, x, s = _small()
    p.carries["x"] = p.emit("add", x, s)
    _everywhere(p)


def test_an_unread_input() -> None:
    p, _, s = _small()
    p.input("unread", "step", (7,))
    p.input("nor this", "uniform", (7,))
    p.outputs["y"] = p.emit("exp", s)
    _everywhere(p)


def test_time_major_inputs() -> None:
    p, x, s = _small()
    t = p.input("t", "step", (2, 3))
    whole = p.input("whole", "step", (), "int")
    p.carries["x"] = p.emit("tanh", p.emit("add", x, s))
    p.outputs |= {"y": p.carries["x"], "t": p.emit("mul", t, whole), "whole": whole}
    _everywhere(p, time_major=("t", "whole"))
    _everywhere(p, time_major=("s",))


def test_bools_and_ints_in_and_out() -> None:
    p = Program()
    count = p.input("count", "carry", (2,), "int")
    on = p.input("on", "carry", (2,), "bool")
    flags = p.input("flags", "step", (2,), "bool")
    table = p.input("table", "uniform", (2,), "int")
    mask = p.input("mask", "uniform", (2,), "bool")
    p.carries["on"] = p.emit("xor", on, flags)
    p.carries["count"] = p.emit("add", p.emit("where", p.carries["on"], count, table), 1.0)
    p.outputs |= {"on": p.carries["on"], "count": p.carries["count"], "as float": count}
    p.outputs |= {"flags": p.emit("and", flags, mask), "as int": p.emit("or", on, mask)}
    p.outputs["half"] = p.emit("mul", count, 0.5)
    p.finals = ["count", "on"]
    kinds = {"as float": "float", "as int": "int", "half": "int"}
    for rows, steps in ((1, 1), (3, 7), (129, 2)):
        inputs = _numbers(p, rows, steps)
        want = interpret(p, inputs, steps)
        for isa in ISAS:
            ran = execute(p, inputs, rows, steps, isa=isa, kinds=kinds)
            dtypes = {n: t.dtype for n, t in ran.outputs.items()}
            assert dtypes == {
                "on": torch.bool, "flags": torch.bool, "count": torch.int64, "as float": torch.float32,
                "as int": torch.int64, "half": torch.int64,
            }  # fmt: skip
            want.outputs["half"] = want.outputs["half"].trunc()
            assert_ran(ran, want, rtol=0.0)


def test_checks_say_at_which_step_the_first_failed() -> None:
    p, x, s = _small()
    p.carries["x"] = x
    p.checks = [
        p.emit("isfinite", s),
        p.emit("gt", x, -100.0),
        p.emit("lt", p.emit("sum", p.emit("add", x, s)), 1e6),
        p.input("flag", "step", (), "bool"),
    ]
    for rows, steps in ((1, 1), (129, 7)):
        good = _numbers(p, rows, steps) | {"flag": torch.ones(rows, steps)}
        for reverse in (False, True):
            assert execute(p, good, rows, steps, reverse=reverse).failed == 0
            for name, value in (("s", NAN), ("s", INF), ("x", -200.0), ("s", 1e7), ("flag", 0.0)):
                for step in {0, steps // 2, steps - 1}:
                    bad = {n: t.clone() for n, t in good.items()}
                    of_step = bad[name][-1] if name == "x" else bad[name][-1, step]
                    of_step.view(-1)[-1:] = value  # one element, one row, one step
                    first = 1 if name == "x" else step + 1
                    failed = execute(p, bad, rows, steps, reverse=reverse).failed
                    assert failed == first, (name, value, step)


def test_the_earliest_of_many_failures_counts() -> None:
    p, _, _ = _small()
    flag = p.input("flag", "step", (), "bool")
    p.checks = [flag] * 100
    inputs = _numbers(p, 300, 9) | {"flag": torch.ones(300, 9)}
    inputs["flag"][[7, 150, 299], [5, 3, 8]] = 0.0
    assert execute(p, inputs, 300, 9).failed == 4


def test_bits_do_not_depend_on_the_threads_nor_on_the_rows_around() -> None:
    """Tiles of one or two rows, at the end of a batch, add up in the order of all others."""
    p = Program()
    x = p.input("x", "carry", (128,))
    w = p.input("w", "uniform", (128, 128))
    p.carries["x"] = p.outputs["y"] = p.emit("linear", x, w, None, layout="nk", act="tanh")
    inputs = {"x": torch.randn(65, 128), "w": torch.randn(128, 128) / 11}
    executor, found = Executor(p), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(executor(inputs, 65, 5)["y"])
    torch.set_num_threads(1)
    found.append(
        torch.cat(
            [
                executor({**inputs, "x": inputs["x"][i : i + 13]}, 13, 5)["y"]
                for i in range(0, 65, 13)
            ]
        )
    )
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_sum_with_many_contributions() -> None:
    p, x, s = _small()
    w = p.input("w", "uniform", (5, 5))
    p.add_sum("w", (5, 5))
    p.add_sum("b", (5,))
    p.add_sum("nothing", (2, 3))
    y = p.emit("linear", x, w, None, layout="nk", act="tanh")
    p.carries["x"] = p.emit("add", p.emit("mul", y, 0.5), s)
    p.emit("outer", x, y, layout="nk", target="w")
    p.emit("outer", s, y, layout="kn", target="w")
    p.emit("row_sum", x, target="b")
    p.emit("row_sum", s, target="b")
    _everywhere(p)


def test_one_row_of_wide_products_on_two_threads() -> None:
    """Threads share the columns of a matrix, one product after another."""
    p = Program()
    x, s = p.input("x", "carry", (200,)), p.input("s", "step", (200,))
    y = p.emit("concat", x, s)
    for layout, k, n in (("nk", 400, 300), ("kn", 300, 257), ("nk", 257, 200)):
        shape = (n, k) if layout == "nk" else (k, n)
        w, b = p.input(f"w{k}", "uniform", shape), p.input(f"b{k}", "uniform", (n,))
        y = p.emit("linear", y, w, b, layout=layout, act="tanh")
    halves, w = p.emit("reshape", y, shape=(2, 100)), p.input("g", "uniform", (99, 100))
    g = p.emit("linear", halves, w, None, layout="nk")
    p.carries["x"] = p.outputs["y"] = y
    p.outputs["g"] = g
    inputs = _numbers(p, 1, 20)
    for name in inputs:
        if name not in ("x", "s"):
            inputs[name] *= 0.05
    for n in (1, 2, 3):
        with threads(n):
            check(p, inputs, 1, 20)


def test_no_rows() -> None:
    p, x, s = _small()
    p.add_sum("b", (5,))
    p.carries["x"] = p.outputs["y"] = p.emit("add", x, s)
    p.emit("row_sum", x, target="b")
    p.finals = ["x"]
    p.checks = [p.emit("gt", x, 0.0)]
    without, _, s = _small()
    without.outputs["y"] = without.emit("exp", s)
    for steps, n in ((0, 1), (3, 1), (3, 2)):
        with threads(n):
            ran = execute(p, _numbers(p, 0, steps), 0, steps)
            assert ran.outputs["y"].shape == (0, steps, 5)
            assert ran.finals["x"].shape == (0, 5)
            assert ran.sums["b"].tolist() == [0.0] * 5
            assert ran.failed == 0
            ran = execute(without, _numbers(without, 0, steps), 0, steps)
            assert ran.outputs["y"].shape == (0, steps, 5)


def test_ten_thousand_steps() -> None:
    p, x, s = _small()
    w = p.input("w", "uniform", (5, 5))
    p.add_sum("w", (5, 5))
    p.carries["x"] = p.outputs["y"] = p.emit(
        "linear", p.emit("add", x, s), w, None, layout="nk", act="tanh"
    )
    p.emit("outer", x, s, layout="nk", target="w")
    p.finals = ["x"]
    inputs = _numbers(p, 1, 10_000) | {"w": torch.eye(5) * 0.5}
    check(p, inputs, 1, 10_000, isas=[max(ISAS)])


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 31, 64, 97, 191, 193, 400, 1000])
def test_every_height_of_tiles(rows: int) -> None:
    made = random_program(7, depth=12, max_width=40)
    check(made.program, made.inputs(rows, 3, rows), rows, 3, rtol=3e-5)


def test_wide_values_make_low_tiles() -> None:
    p = Program()
    x, s = p.input("x", "carry", (3000,)), p.input("s", "step", (3000,))
    w = p.input("w", "uniform", (4, 3000))
    p.carries["x"] = p.emit("tanh", p.emit("add", x, s))
    p.outputs |= {"y": p.emit("linear", p.carries["x"], w, None, layout="nk"), "x": x}
    p.add_sum("s", (3000,))
    p.emit("row_sum", x, target="s")
    for rows in (1, 7, 61):
        check(p, _numbers(p, rows, 3), rows, 3, isas=[max(ISAS)])


# ---------------------------------------------------------------- rows and threads


def _with_sums(seed: int) -> tuple[Program, dict[str, torch.Tensor], int]:
    made = random_program(seed, depth=10, max_width=40)
    p = made.program
    for k, name in enumerate(p.outputs):
        p.add_sum(("s", name), p.type(p.outputs[name]).shape or (1,))
        if p.type(p.outputs[name]).shape:
            p.emit("row_sum", p.outputs[name], target=("s", name))
        assert k < 10
    rows = (1, 3, 64, 200, 601)[seed % 5]
    return p, made.inputs(rows, 5, seed), rows


@pytest.mark.parametrize("seed", range(10))
def test_results_do_not_depend_on_the_number_of_threads(seed: int) -> None:
    """Sums to the last bit, being cut into blocks by the rows alone; row values as near as other heights of
    the same product allow."""
    p, inputs, rows = _with_sums(seed)
    for reverse in (False, True):
        with threads(1):
            one = execute(p, inputs, rows, 5, reverse=reverse)
        for n in (2, 3):
            with threads(n):
                many = execute(p, inputs, rows, 5, reverse=reverse)
            for name, total in one.sums.items():
                assert torch.equal(many.sums[name], total), name
            for name, value in one.outputs.items():
                assert torch.equal(many.outputs[name], value), name
    made = random_program(seed, depth=10, max_width=40)  # without sums, tiles depend on the threads
    with threads(1):
        one = execute(made.program, inputs, rows, 5)
    with threads(2):
        many = execute(made.program, inputs, rows, 5)
    for name, value in one.outputs.items():
        assert_near(many.outputs[name], value, 1e-5, 1e-6, name)


@pytest.mark.parametrize("seed", range(6))
def test_a_row_does_not_know_of_the_others(seed: int) -> None:
    made = random_program(seed + 100, depth=10, max_width=24)
    p, steps = made.program, 3
    inputs = made.inputs(150, steps, seed)
    uniform = {n for n, i in p.inputs.items() if i.role == "uniform"}
    whole = execute(p, inputs, 150, steps).outputs
    for first, last in ((0, 1), (7, 10), (149, 150), (40, 140)):
        some = {n: t if n in uniform else t[first:last] for n, t in inputs.items()}
        part = execute(p, some, last - first, steps).outputs
        for name, value in part.items():
            assert_near(value, whole[name][first:last], 1e-5, 1e-6, name)
    # The same batch with other neighbours: the same kernels, so the same bits.
    others = {n: t if n in uniform else t.clone() for n, t in inputs.items()}
    for name in set(others) - uniform:
        if p.type(p.inputs[name].val).kind == "float":
            others[name][:75] = NAN
    got = execute(p, others, 150, steps).outputs
    for name, value in got.items():
        assert torch.equal(value[75:], whole[name][75:]), name


# ---------------------------------------------------------------- weights


def every_product() -> tuple[Program, dict[str, torch.Tensor]]:
    p = Program()
    x = p.input("x", "context", (40,))
    a, b = p.input("a", "uniform", (23, 40)), p.input("b", "uniform", (23,))
    y = p.emit("linear", x, a, b, layout="nk")
    z = p.emit("linear", x, p.input("c", "uniform", (40, 17)), None, layout="kn")
    i = p.input("i", "context", (), "int")
    m = p.emit("member_linear", x, p.input("d", "uniform", (3, 5, 40)), None, i, layout="nk")
    g = p.emit("grouped_linear", x, p.input("e", "uniform", (2, 5, 40)), None, layout="nk")
    f = p.input("f", "uniform", (40,))
    n = p.emit("layer_norm", x, f, None, eps=0.1)
    p.outputs |= {"y": y, "z": z, "m": m, "g": g, "n": n}
    inputs = _numbers(p, 50, 1)
    inputs["i"] = torch.arange(50.0) % 3
    return p, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_weights_written_in_place_are_seen(isa: int, dtype: torch.dtype) -> None:
    p, inputs = every_product()
    p.dtype = dtype
    given = given_as(p, inputs)
    executor = Executor(p, isa=isa)

    def agree(what: str) -> None:
        got, want = execute(p, given, 50, 1, executor=executor), interpret(p, given, 1)
        for name, value in got.outputs.items():
            assert_near(value, want.outputs[name], 1e-5, 0.0, f"{what}: {name}")

    agree("at first")
    for name in "abcdef":
        w = given[name]
        w.mul_(1.5)
        agree(f"{name} in place")
        w.data.neg_()
        agree(f"{name} signs")
        w.data.add_(1.0)
        agree(f"{name} data")
        w.view(-1)[-1] += 1.0
        agree(f"{name} the last element")
        w.view(-1)[0] *= -1.0
        agree(f"{name} the first sign")
        w.numpy()[..., 0] = 0.25
        agree(f"{name} through numpy")
        w.data.view(-1)[:2] = w.view(-1)[:2].flip(0)
        agree(f"{name} two swapped")
        given[name] = torch.full_like(w, 0.5)
        agree(f"{name} replaced")
        given[name].neg_()
        agree(f"{name} signs of equals")
        given[name].copy_(torch.randn_like(w))


def test_weights_are_packed_only_when_they_differ() -> None:
    p, inputs = every_product()
    executor = Executor(p)
    given = given_as(p, inputs)
    execute(p, given, 50, 1, executor=executor)
    before = executor._packed.clone()
    executor._packed.fill_(0.0)  # what nobody packs again stays
    execute(p, given, 50, 1, executor=executor)
    assert not executor._packed.any()
    given["c"][3, 4] += 1.0
    execute(p, given, 50, 1, executor=executor)
    changed = executor._packed.nonzero().view(-1)
    assert len(changed) == given["c"].numel()
    at = changed[0], changed[-1] + 1
    assert (executor._packed[at[0] : at[1]] != before[at[0] : at[1]]).sum() == 1


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_weights(isa: int) -> None:
    """Products of rounded weights: biases and norms stay as they are."""
    p, inputs = every_product()
    rounded = {n: t.bfloat16().float() if n in "acde" else t for n, t in inputs.items()}
    want = interpret(p, rounded, 1)
    executor = Executor(p, isa=isa, bf16=True)
    assert executor.packed_bytes() < 0.6 * Executor(p).packed_bytes()
    for _ in range(2):
        ran = execute(p, inputs, 50, 1, executor=executor)
        assert_ran(ran, want, rtol=1e-5)
    special = torch.tensor([NAN, INF, -INF, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    inputs["a"].view(-1)[: len(special)] = special
    rounded["a"] = inputs["a"].bfloat16().float()
    inputs["x"] = rounded["x"] = torch.eye(50, 40)
    want = interpret(p, rounded, 1)
    ran = execute(p, inputs, 50, 1, executor=executor)
    assert ran.outputs["y"].isnan().equal(want.outputs["y"].isnan())
    assert_ran(ran, want, rtol=1e-5)


def test_bfloat16_is_for_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        Executor(Program(dtype=torch.float64), bf16=True)


# ---------------------------------------------------------------- programs that are wrong


def test_values_of_no_elements_are_refused() -> None:
    p = Program()
    p.outputs["y"] = p.emit("exp", p.input("x", "carry", (0,)))
    with pytest.raises(ProgramError, match="no elements"):
        encode(p)
    p = Program()
    p.outputs["y"] = p.emit("index", p.input("x", "step", (3,)), map=(), shape=(0,))
    with pytest.raises(ProgramError, match="no elements"):
        encode(p)
    p = Program()
    w = p.input("w", "uniform", (0, 3))
    p.outputs["y"] = p.emit("linear", p.input("x", "step", (3,)), w, None, layout="nk")
    with pytest.raises(ProgramError, match="no elements"):
        encode(p)


def test_an_empty_part_of_a_concat_is_refused() -> None:
    p = Program()
    x, e = p.input("x", "step", (3,)), p.input("e", "step", (0,))
    p.outputs["y"] = p.emit("concat", x, e)
    with pytest.raises(ProgramError, match="no elements"):
        encode(p)


def test_unknown_ops_are_refused() -> None:
    p, x, _ = _small()
    p.outputs["y"] = p.emit("exp", x)
    p.instrs[0] = type(p.instrs[0])("cumsum", (x,), {}, p.outputs["y"])
    with pytest.raises(ProgramError, match="cumsum"):
        encode(p)


def test_uniforms_are_no_row_values() -> None:
    p, x, _ = _small()
    p.outputs["y"] = p.input("u", "uniform", (5,))
    with pytest.raises(ProgramError):
        encode(p)
    p, x, _ = _small()
    p.carries["x"] = p.input("u", "uniform", (5,))
    p.outputs["x"] = x
    with pytest.raises(ProgramError):
        encode(p)
    p, x, _ = _small()
    p.checks = [p.input("u", "uniform", (5,), "bool")]
    with pytest.raises(ProgramError):
        encode(p)


def test_a_carry_of_another_width_is_refused() -> None:
    p, x, _ = _small()
    p.carries["x"] = p.emit("sum", x)
    p.outputs["x"] = x
    with pytest.raises(ProgramError, match="x"):
        encode(p)


def test_sums_of_another_shape_are_refused() -> None:
    p, x, s = _small()
    p.add_sum("w", (25,))
    p.emit("outer", x, s, layout="nk", target="w")
    with pytest.raises(ProgramError, match="shape"):
        encode(p)
    p, x, _ = _small()
    p.add_sum("m", (10,))
    p.emit("member_row_sum", x, p.input("i", "step", (), "int"), target="m", members=2)
    with pytest.raises(ProgramError, match="width"):
        encode(p)


def test_only_steps_are_time_major() -> None:
    p, x, s = _small()
    p.outputs["y"] = p.emit("add", x, s)
    for wrong in ("x",):
        with pytest.raises(ProgramError, match=wrong):
            encode(p, time_major=[wrong])
