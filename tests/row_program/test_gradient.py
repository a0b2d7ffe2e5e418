"""Each op's gradient, at ties and kinks too; what is left out; what is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastwm.row_program import Program, ProgramError, Val
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.gradient.rules import RULES, ZERO
from fastwm.row_program.ops import BINARY, REFERENCES, UNARY
from fastwm.row_program.reference import interpret
from tests.row_program.against_autograd import check
from tests.row_program.backward_inputs import gather
from tests.row_program.random_programs import PARAMETERS

SUMS = {"outer", "grouped_outer", "member_outer", "row_sum", "member_row_sum"}
FORWARD_OPS = {name for name in REFERENCES if not name.endswith("_grad")} - SUMS
N = 6


@dataclass
class Build:
    """A program around one op: x [6] carried, s [6] a step's, c [6] context, u uniform."""

    p: Program = field(default_factory=lambda: Program(dtype=torch.float64))

    def __post_init__(self) -> None:
        self.x = self.p.input("x", "carry", (N,))
        self.s = self.p.input("s", "step", (N,))
        self.c = self.p.input("c", "context", (N,))
        self.i = self.p.input("i", "step", (), "int")  # below 3

    def __call__(self, op: str, *args: Any, **attrs: Any) -> Val:
        return self.p.emit(op, *args, **attrs)

    def u(self, *shape: int) -> Val:
        return self.p.input(f"u{len(self.p.inputs)}", "uniform", shape)

    def shaped(self, v: Val, *shape: int) -> Val:
        return self("reshape", v, shape=shape)

    def positive(self, v: Val) -> Val:
        return self("add", self("square", v), 0.5)


def _unary(op: str) -> Callable[[Build], Val]:
    def build(b: Build) -> Val:
        x = b("add", b.x, b.s)
        safe = op in ("log", "log1p", "sqrt", "rsqrt", "reciprocal")
        return b(op, b.positive(x) if safe else x, **PARAMETERS.get(op, {}))

    return build


def _linear(op: str, x: tuple[int, ...], layout: str, act: str | None, bias: bool) -> Any:
    lead = {"linear": (), "grouped_linear": (3,), "member_linear": (3,)}[op]
    if op == "grouped_linear" and len(x) == 2:
        lead = x[:1]

    def build(b: Build) -> Val:
        v = b.shaped(b("add", b.x, b.s), *x)
        w = b.u(*lead, *((4, x[-1]) if layout == "nk" else (x[-1], 4)))
        more = (b.i,) if op == "member_linear" else ()
        attrs = {"act": act, "act_params": PARAMETERS.get(act)} if act else {}
        return b(op, v, w, b.u(*lead, 4) if bias else None, *more, layout=layout, **attrs)

    return build


def _along(op: str, *shape: int) -> Callable[[Build], Val]:
    return lambda b: b(op, b.shaped(b("add", b.x, b.s), *shape))


def _by_argmax(b: Build) -> Val:
    return b("argmax", b.shaped(b.s, 2, 3))


#: name (the op before a colon) -> what builds it
CASES: dict[str, Callable[[Build], Val]] = {
    **{name: _unary(name) for name in UNARY},
    **{name: lambda b, op=name: b(op, b.x, b("add", b.s, b.c)) for name in BINARY if name != "pow"},  # type: ignore[misc]
    **{
        f"{op}:{kind}": lambda b, op=op, get=get: b(op, *get(b))  # type: ignore[misc]
        for op in ("add", "sub", "mul", "div", "maximum", "clamp_min", "clamp_max")
        for kind, get in {
            "number right": lambda b: (b.x, 0.5),
            "number left": lambda b: (0.5, b.positive(b.x)),
            "uniform right": lambda b: (b.x, b.u(N)),
            "uniform left": lambda b: (b.u(N), b.x),
            "single uniform": lambda b: (b.x, b.u()),
            "single uniform left": lambda b: (b.u(1), b.x),
            "single": lambda b: (b.x, b("sum", b.s)),
            "single left": lambda b: (b("index", b.x, map=(2,), shape=(1,)), b.s),
            "both the same": lambda b: (b.x, b.x),
        }.items()
    },
    "pow": lambda b: b("pow", b.positive(b.x), b.s),
    **{
        f"pow:{e}": lambda b, e=e: b("pow", b.positive(b.x), e)  # type: ignore[misc]
        for e in (0.0, 1.0, 2.0, 3.0, -1.5)
    },
    "pow:number base": lambda b: b("pow", 1.7, b.x),
    "pow:uniform exponent": lambda b: b("pow", b.positive(b.x), b.u(N)),
    "pow:uniform base": lambda b: b("pow", b.positive(b("row", b.u())), b("add", b.x, b.s)),
    "where": lambda b: b("where", b("gt", b.s, 0.0), b.x, b.c),
    "where:single": lambda b: b("where", b("gt", b("sum", b.s), 0.0), b("mean", b.x), b.u(N)),
    "where:number": lambda b: b("where", b("gt", b.s, 0.0), 1.0, b.x),
    "cast": lambda b: b("cast", b.x, kind="float"),
    "cast:int": lambda b: b("mul", b("cast", b.x, kind="int"), b.s),
    "cast:bool": lambda b: b("mul", b("cast", b("relu", b.x), kind="bool"), b.x),
    "fill": lambda b: b("mul", b("fill", value=2.0, shape=(N,), kind="float"), b.x),
    "row": lambda b: b("mul", b("row", b.u(N)), b.x),
    "reshape": lambda b: b.shaped(b.x, 2, 3),
    "index": lambda b: b("index", b.x, map=(1, 4, 4, 0), shape=(2, 2)),
    "index:slices": lambda b: b(
        "mul",
        b("index", b.x, map=(3, 4, 5), shape=(3,)),
        b("tanh", b("index", b.x, map=(0, 1, 2), shape=(3,))),
    ),
    "index:spread": lambda b: b("index", b.x, map=tuple(j // 2 for j in range(12)), shape=(N, 2)),
    "index:permute": lambda b: b("index", b.x, map=(0, 3, 1, 4, 2, 5), shape=(3, 2)),
    "index_add": lambda b: b("index_add", b.x, map=(0, 0, 3, 1, 3, 3), shape=(5,)),
    "concat": lambda b: b("concat", b.x, b.shaped(b.s, 2, 3), b.x, b("gt", b.c, 0.0)),
    **{
        f"{op}:{len(shape)}": _along(op, *shape)
        for op in ("sum", "mean", "max", "min", "logsumexp", "softmax", "log_softmax")
        for shape in ((N,), (2, 3), (1, 3, 2), (6, 1))
    },
    "argmax": lambda b: b("mul", b("argmax", b.x), b.s),
    "argmin": lambda b: b("mul", b("argmin", b.x), b.s),
    "layer_norm": lambda b: b("layer_norm", b.x, b.u(N), b.u(N), eps=1e-3),
    "layer_norm:plain": lambda b: b("layer_norm", b.x, None, None, eps=1e-3),
    "layer_norm:groups": lambda b: b(
        "layer_norm", b.shaped(b.x, 2, 3), b.u(3), b.u(3), eps=1e-3
    ),
    "one_hot": lambda b: b("mul", b("one_hot", _by_argmax(b), n=3), b.shaped(b.x, 2, 3)),
    "take": lambda b: b("take", b.shaped(b.x, 3, 2), b.i),
    "take:groups": lambda b: b("take", b.shaped(b("concat", b.x, b.c), 2, 3, 2), _by_argmax(b)),
    "put": lambda b: b("put", b.shaped(b.x, 2, 3), _by_argmax(b), m=3),
    **{
        f"{op}:{len(x)} {layout} {act} {bias}": _linear(op, x, layout, act, bias)
        for op, xs in {
            "linear": ((N,), (2, 3), (1, 2, 3)),
            "grouped_linear": ((N,), (2, 3)),
            "member_linear": ((N,),),
        }.items()
        for x in xs
        for layout in ("nk", "kn")
        for act in (None, "tanh", "silu", "relu", "elu")
        for bias in (True, False)
    },
}  # fmt: skip


def _around(b: Build, y: Val) -> Program:
    """The op's result is an output, and goes round through the carry."""
    p = b.p
    width = p.type(y).width
    flat = b.shaped(y, width)
    back = b("index", flat, map=tuple(j % width for j in range(N)), shape=(N,))
    p.carries["x"] = b("tanh", b("add", b("mul", b.x, 0.5), back))
    p.outputs["y"] = y
    return p


def _inputs(p: Program, rows: int, steps: int, whole: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    for name, item in p.inputs.items():
        lead = {"uniform": (), "step": (rows, steps)}.get(item.role, (rows,))
        shape = (*lead, *p.type(item.val).shape)
        if p.type(item.val).kind == "int":
            found[name] = torch.randint(3, shape).double()
        else:
            found[name] = torch.randn(shape, dtype=torch.float64)
            found[name] = found[name].round().clamp(-1, 1) if whole else found[name]
    return found


def test_every_op_has_a_rule_and_a_case() -> None:
    assert set(RULES) | ZERO == FORWARD_OPS
    assert not set(RULES) & ZERO
    assert {name.partition(":")[0] for name in CASES} == FORWARD_OPS


@pytest.mark.parametrize("name", CASES)
def test_an_op(name: str) -> None:
    b = Build()
    p = _around(b, CASES[name](b))
    wrt = [n for n in p.inputs if n != "i"]
    grads = ["y"] if p.type(p.outputs["y"]).kind == "float" else []
    for rows, steps, budget in ((3, 5, None), (1, 2, 0.0), (2, 1, 10.0)):
        inputs = _inputs(p, rows, steps)
        check(p, inputs, steps, wrt=wrt, output_grads=grads, final_grads=["x"], budget=budget)


def test_ties_and_kinks() -> None:
    """Kinks: where x == 0 or a == b, as torch has it."""
    for op in ("relu", "leaky_relu", "abs", "elu", "sign", "maximum", "minimum", "max", "min",
               "clamp_min", "clamp_max", "pow", "clamp", "safe_tanh", "logsumexp"):  # fmt: skip
        b = Build()
        if op == "clamp":
            y = b("clamp_max", b("clamp_min", b.s, -1.0), b.c)
        elif op == "pow":
            base, power = b("relu", b.s), b("relu", b.c)
            y = b("add", b("pow", base, power), b("pow", base, 2.0))
            y = b("add", y, b("pow", 0.0, power))
        elif op in BINARY:
            y = b("add", b(op, b.s, b.c), b(op, b.s, 1.0))
        elif op in ("max", "min", "logsumexp"):
            y = b(op, b.shaped(b.s, 2, 3))
        else:
            y = b(op, b.s, **PARAMETERS.get(op, {}))
        b.p.outputs["y"] = y
        inputs = _inputs(b.p, 5, 4, whole=True)
        for budget in (None, 0.0):
            check(b.p, inputs, 4, wrt=["s", "c"], output_grads=["y"], budget=budget)


def test_clamp_is_torchs_at_the_bound() -> None:
    b = Build()
    b.p.outputs["y"] = b("clamp_max", b("clamp_min", b.s, -1.0), 1.0)
    found = differentiate(b.p, ["s"], ["y"])
    s = torch.tensor([[[-1.0, 1.0, 0.0, 2.0, -2.0, 0.5]]], dtype=torch.float64)
    inputs = {"x": s[0], "c": s[0], "s": s, "i": torch.zeros(1, 1)}
    outputs = interpret(found.forward, inputs, 1).outputs
    given = gather(found, inputs, outputs, {"y": torch.ones_like(s)})
    got = interpret(found.backward, given, 1, reverse=True).outputs["grad", "s"]
    leaf = s.clone().requires_grad_()
    leaf.clamp(-1, 1).sum().backward()
    assert torch.equal(got, leaf.grad)


# ------------------------------------------------------------------ what is left out


def _model_and_actor() -> Program:
    """latent -> action = tanh(A latent); latent' = silu(W [latent, action] + b); reward of latent'."""
    p = Program(dtype=torch.float64)
    latent = p.input("latent", "carry", (40,))
    a = p.input("actor", "uniform", (4, 40))
    w, b = p.input("w", "uniform", (40, 44)), p.input("b", "uniform", (40,))
    r = p.input("r", "uniform", (1, 40))
    action = p.emit("linear", latent, a, None, layout="nk", act="tanh")
    joined = p.emit("concat", latent, action)
    new = p.emit("linear", joined, w, b, layout="nk", act="silu")
    p.carries["latent"] = new
    p.outputs["latent"], p.outputs["action"] = latent, action
    p.outputs["reward"] = p.emit("linear", new, r, None, layout="nk")
    return p


def _ops(p: Program) -> list[str]:
    return [i.op for i in p.instrs]


def test_a_frozen_model_gets_no_weight_gradients() -> None:
    found = differentiate(_model_and_actor(), ["actor"], ["reward"])
    assert list(found.backward.sums) == [("grad", "actor")]
    assert _ops(found.backward).count("outer") == 1
    assert found.reached == ["actor"]
    # The latent's adjoint goes round all the same, but nobody asked for the start's gradient.
    assert list(found.backward.carries) == [("adjoint", "latent")]
    assert found.backward.finals == []


def test_what_does_not_reach_an_output_is_left_out() -> None:
    found = differentiate(_model_and_actor(), ["r", "actor"], ["action"])
    assert found.reached == ["actor"]
    assert ("grad", "reward") not in found.backward.inputs


def test_detach_cuts_the_way() -> None:
    p = Program()
    x, w = p.input("x", "carry", (3,)), p.input("w", "uniform", (3, 3))
    y = p.emit("linear", p.emit("detach", x), w, None, layout="nk")
    p.carries["x"] = p.outputs["y"] = y
    found = differentiate(p, ["x", "w"], ["y"])
    assert found.reached == ["w"]
    assert _ops(found.backward) == ["outer"]


def test_ints_and_bools_get_none() -> None:
    b = Build()
    b.p.outputs["y"] = b("mul", b("gt", b.x, 0.0), b.s)
    assert differentiate(b.p, ["x", "s"], ["y"]).reached == ["s"]
    with pytest.raises(ProgramError, match="no float"):
        differentiate(b.p, ["i"], ["y"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"wrt": ["nope"], "output_grads": ["y"]}, "no input 'nope'"),
        ({"wrt": ["x"], "output_grads": ["nope"]}, "no output 'nope'"),
        ({"wrt": ["x"], "output_grads": ["y"], "final_grads": ["s"]}, "no carry 's'"),
        ({"wrt": ["x"], "output_grads": ["y"], "carry_outputs": {"x": "z"}}, "no output 'z'"),
    ],
)
def test_names_that_are_not_there(asked: dict[str, Any], words: str) -> None:
    b = Build()
    b.p.outputs["y"] = b("mul", b.x, b.s)
    with pytest.raises(ProgramError, match=words):
        differentiate(b.p, **asked)


def test_no_second_derivative() -> None:
    b = Build()
    b.p.outputs["y"] = b("tanh_grad", b.x, b.s)
    with pytest.raises(ProgramError, match="tanh_grad"):
        differentiate(b.p, ["x"], ["y"])


# ------------------------------------------------------------------ what is saved


def test_outputs_and_carries_that_are_outputs_are_not_saved_again() -> None:
    found = differentiate(_model_and_actor(), ["actor", "w", "b", "r"], ["reward"])
    assert found.saved["saved", "latent"] == ("output", "latent")
    assert found.saved["output", "action"] == ("output", "action")
    # silu's pre-activation and its result; the concat is put together again
    assert found.tape_width == 80
    p = _model_and_actor()
    del p.outputs["latent"]
    assert differentiate(p, ["actor"], ["reward"]).tape_width == 80
    p.outputs["start"] = p.emit("add", p.inputs["latent"].val, 0.0)
    named = differentiate(p, ["actor"], ["reward"], carry_outputs={"latent": "start"})
    assert named.saved["saved", "latent"] == ("output", "start")
    assert named.tape_width == 40


def test_with_a_budget_the_pre_activation_is_saved_and_the_rest_recomputed() -> None:
    found = differentiate(_model_and_actor(), ["actor", "w", "r"], ["reward"], budget=1e9)
    assert found.tape_width == 40
    assert _ops(found.backward)[:2] == ["concat", "silu"]
    assert _ops(found.forward) == ["linear", "concat", "linear", "silu", "linear"]
    none = differentiate(_model_and_actor(), ["actor", "w", "r"], ["reward"], budget=0)
    assert none.tape_width == 0
    assert _ops(none.backward)[:3] == ["concat", "linear", "silu"]


def test_the_forward_program_stays_fused_where_the_result_is_enough() -> None:
    p = Program()
    x, w = p.input("x", "carry", (30,)), p.input("w", "uniform", (30, 30))
    v = x
    for act in ("tanh", "relu", "sigmoid"):
        v = p.emit("linear", v, w, None, layout="nk", act=act)
    p.carries["x"] = p.outputs["y"] = v
    found = differentiate(p, ["x", "w"], ["y"])
    assert [i.attrs["act"] for i in found.forward.instrs] == ["tanh", "relu", "sigmoid"]
    assert str(found.forward).startswith(str(p).split("\n  next")[0])
    assert found.tape_width == 90  # x and two results; the third is an output


def test_slices_come_back_as_one_concat() -> None:
    b = Build()
    parts = [b("index", b.x, map=(k, k + 1), shape=(2,)) for k in (0, 2, 4)]
    b.p.outputs["y"] = b("mul", b("mul", parts[0], parts[1]), parts[2])
    found = differentiate(b.p, ["x"], ["y"])
    assert "index_add" not in _ops(found.backward)
    assert _ops(found.backward).count("concat") == 1
