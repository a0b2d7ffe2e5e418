"""Passes: what each takes away, and that what is left computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastwm.row_program import Program, Val
from fastwm.row_program.passes import (
    choose_early,
    cse,
    dce,
    fold,
    fuse_act,
    fuse_bias,
    merge_linears,
    optimise,
    renumbered,
)  # fmt: skip
from fastwm.row_program.reference import interpret

R, T = 3, 2


def same(before: Program, after: Program, extra: Any = None) -> None:
    """Both give the same from the same inputs; ``extra``: inputs of the second from those of the first."""
    generator = torch.Generator().manual_seed(1)
    given: dict[Any, torch.Tensor] = {}
    for name, item in before.inputs.items():
        shape = before.type(item.val).shape
        lead = {"uniform": (), "step": (R, T)}.get(item.role, (R,))
        value = torch.randn(*lead, *shape, generator=generator)
        given[name] = value.abs().round() if before.type(item.val).kind == "int" else value
    more = {n: torch.cat([given[k] for k in keys]) for n, keys in (extra or {}).items()}
    want, got = interpret(before, given, T), interpret(after, {**given, **more}, T)
    assert set(got.outputs) == set(want.outputs)
    for name, value in want.outputs.items():
        torch.testing.assert_close(got.outputs[name], value, equal_nan=True)
    assert got.ok is want.ok


def start() -> tuple[Program, Val, Val, Val]:
    p = Program()
    x = p.input("x", "carry", (4,))
    w, b = p.input("w", "uniform", (4, 4)), p.input("b", "uniform", (4,))
    return p, x, w, b


def names(p: Program) -> list[str]:
    return [i.op for i in p.instrs]


def finish(p: Program, v: Val) -> Program:
    p.carries["x"] = p.outputs["y"] = v
    return p


def test_dce_keeps_checks_and_sums() -> None:
    p, x, _, _ = start()
    p.emit("exp", x)
    p.checks.append(p.emit("isfinite", x))
    p.add_sum("total", (4,))
    p.emit("row_sum", p.emit("square", x), target="total")
    finish(p, p.emit("tanh", x))
    assert names(dce(p)) == ["isfinite", "square", "row_sum", "tanh"]


def test_cse_tells_zero_from_minus_zero() -> None:
    p, x, _, _ = start()
    a, b, c = (p.emit("div", 1.0, p.emit("mul", x, n)) for n in (0.0, -0.0, 0.0))
    finish(p, p.emit("add", p.emit("maximum", a, b), p.emit("neg", c)))
    merged = cse(p)
    assert names(merged).count("div") == 2
    same(p, merged)


def test_fold() -> None:
    p, x, _, _ = start()
    y = p.emit("reshape", p.emit("reshape", x, shape=(2, 2)), shape=(4,))
    y = p.emit("index", y, map=(3, 2, 1, 0), shape=(2, 2))
    y = p.emit("index", p.emit("reshape", y, shape=(4,)), map=(3, 2, 1, 0), shape=(4,))
    y = p.emit("neg", p.emit("neg", p.emit("sub", p.emit("mul", y, 1.0), 0.0)))
    p = finish(p, p.emit("exp", p.emit("concat", y)))
    assert names(fold(p)) == ["exp"]
    same(p, fold(p))


@pytest.mark.parametrize(("op", "number"), [("add", 0.0), ("mul", 0.0), ("add", -0.0)])
def test_fold_keeps_what_is_no_identity(op: str, number: float) -> None:
    """``x + 0`` turns -0 to 0, ``x * 0`` keeps NaN."""
    p, x, _, _ = start()
    assert names(fold(finish(p, p.emit(op, x, number)))) == [op]


def test_fold_drops_detach_without_gradients_alone() -> None:
    p, x, _, _ = start()
    finish(p, p.emit("exp", p.emit("detach", x)))
    assert names(fold(p)) == ["detach", "exp"]
    assert names(fold(p, grad=False)) == ["exp"]


def test_fuse_act_and_bias() -> None:
    p, x, w, b = start()
    y = p.emit("add", p.emit("linear", x, w, None, layout="nk"), b)
    y = p.emit("softplus", y, beta=2.0, threshold=20.0)
    finish(p, p.emit("tanh", p.emit("linear", y, w, b, layout="kn")))
    fused = fuse_act(fuse_bias(p))
    assert [(i.op, i.attrs["act"]) for i in fused.instrs] == [
        ("linear", "softplus"),
        ("linear", "tanh"),
    ]
    same(p, fused)


def test_fuse_act_leaves_a_value_that_others_read() -> None:
    p, x, w, b = start()
    y = p.emit("linear", x, w, b, layout="nk")
    finish(p, p.emit("mul", y, p.emit("tanh", y)))
    assert names(fuse_act(p)) == names(p)
    p.outputs["pre"] = y
    assert names(fuse_act(p)) == names(p)


def test_merge_linears() -> None:
    p, x, w, b = start()
    w2, b2 = p.input("w2", "uniform", (3, 4)), p.input("b2", "uniform", (3,))
    one = p.emit("tanh", p.emit("linear", x, w, b, layout="nk"))
    two = p.emit("sum", p.emit("linear", x, w2, b2, layout="nk"))
    finish(p, p.emit("mul", one, two))
    merged, of = merge_linears(p)
    assert names(merged).count("linear") == 1
    assert set(next(iter(of.values()))) == {"w", "w2"}
    same(p, merged, of)


def ensemble() -> tuple[Program, Val, Val]:
    p = Program()
    x, i = p.input("x", "carry", (4,)), p.input("i", "step", (), "int")
    w, b = p.input("w", "uniform", (5, 4, 6)), p.input("b", "uniform", (5, 6))
    return p, p.emit("grouped_linear", x, w, b, layout="kn"), i


def test_choose_early_through_norms_slices_and_bounds() -> None:
    p, h, i = ensemble()
    low, gain = p.input("low", "uniform", (5, 3)), p.input("gain", "uniform", (6,))
    h = p.emit("layer_norm", h, gain, None, eps=1e-5)
    h = p.emit("silu", p.emit("mul", h, 2.0))
    left = p.emit(
        "index", h, map=tuple(r * 6 + k for r in range(5) for k in range(3)), shape=(5, 3)
    )
    right = p.emit(
        "index", h, map=tuple(r * 6 + k for r in range(5) for k in (5, 4, 3)), shape=(5, 3)
    )
    both = p.emit("mul", p.emit("maximum", left, low), p.emit("softmax", right))
    p.outputs["y"] = p.emit("take", both, i)
    p.carries["x"] = next(iter(p.inputs.values())).val
    found = optimise(p)
    assert names(found).count("member_linear") == 1
    assert "grouped_linear" not in names(found)
    same(p, found)
    same(p, renumbered(found))


def test_choose_early_of_two_choices() -> None:
    p, h, i = ensemble()
    j = p.input("j", "step", (), "int")
    p.outputs["y"] = p.emit("add", p.emit("take", h, i), p.emit("take", h, j))
    found = choose_early(p)
    assert names(found).count("member_linear") == 2
    same(p, found)


def test_choose_early_not_where_all_members_are_read() -> None:
    p, h, i = ensemble()
    p.outputs["y"] = p.emit("take", p.emit("tanh", h), i)
    p.outputs["all"] = h
    assert names(choose_early(p)) == names(p)
