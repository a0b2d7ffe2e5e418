"""Ahead, loop, after: what goes where, and what crosses."""

from __future__ import annotations

import pytest
import torch

from fastwm.row_program import Program, Val
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.reference import interpret
from fastwm.row_program.sections import Sections, sections
from tests.row_program.random_programs import random_program


def _ops(found: Sections) -> tuple[list[str], list[str], list[str]]:
    return tuple([i.op for i in s] for s in (found.ahead, found.loop, found.after))  # type: ignore[return-value]


def _program() -> tuple[Program, Val, Val]:
    p = Program()
    return p, p.input("x", "carry", (4,)), p.input("s", "step", (4,))


def test_the_three_sections() -> None:
    p, x, s = _program()
    w = p.input("w", "uniform", (4, 4))
    p.add_sum("total", (4,))
    noise = p.emit("linear", s, w, None, layout="nk")
    p.carries["x"] = p.emit("add", x, noise)
    p.outputs["reward"] = p.emit("sum", p.carries["x"])
    p.emit("row_sum", x, target="total")
    p.emit("row_sum", noise, target="total")
    found = sections(p)
    assert _ops(found) == (["linear", "row_sum"], ["add"], ["sum", "row_sum"])
    assert found.crossing == [x, noise, p.carries["x"]]


def test_outputs_cross_for_nothing() -> None:
    p, x, s = _program()
    p.carries["x"] = p.outputs["next"] = p.emit("add", x, s)
    p.emit("square", p.carries["x"])
    assert sections(p).crossing == []


def test_a_widening_movement_follows_its_only_user() -> None:
    p, x, s = _program()
    small = p.emit("exp", p.emit("sum", s))
    wide = p.emit("index", small, map=(0,) * 4, shape=(2, 2))
    p.carries["x"] = p.emit("mul", x, p.emit("reshape", wide, shape=(4,)))
    found = sections(p)
    assert _ops(found) == (["sum", "exp"], ["index", "reshape", "mul"], [])
    assert found.crossing == [small]


def test_a_movement_of_an_input_follows_its_user() -> None:
    p, x, s = _program()
    p.carries["x"] = p.emit("mul", x, p.emit("index", s, map=(3, 2, 1, 0), shape=(4,)))
    assert _ops(sections(p)) == ([], ["index", "mul"], [])


def test_a_narrowing_movement_stays_ahead() -> None:
    p, x, s = _program()
    part = p.emit("index", p.emit("exp", s), map=(1,), shape=(1,))
    p.carries["x"] = p.emit("mul", x, part)
    found = sections(p)
    assert _ops(found) == (["exp", "index"], ["mul"], [])
    assert found.crossing == [part]


def test_a_part_of_a_loop_value_is_taken_in_the_loop() -> None:
    p, x, _ = _program()
    p.carries["x"] = p.emit("tanh", x)
    part = p.emit("index", p.carries["x"], map=(1,), shape=(1,))
    p.outputs["y"] = p.emit("exp", part)
    found = sections(p)
    assert _ops(found) == ([], ["tanh", "index"], ["exp"])
    assert found.crossing == [part]


def test_a_widening_movement_stays_after() -> None:
    p, x, _ = _program()
    p.carries["x"] = p.emit("tanh", x)
    wide = p.emit("index", p.carries["x"], map=(0, 1, 2, 3) * 2, shape=(8,))
    p.outputs["y"] = p.emit("exp", wide)
    assert _ops(sections(p)) == ([], ["tanh"], ["index", "exp"])


def test_weight_gradients_of_a_backward_program_come_after() -> None:
    p, x, s = _program()
    w = p.input("w", "uniform", (4, 8))
    p.carries["x"] = p.outputs["y"] = p.emit(
        "linear", p.emit("concat", x, s), w, None, layout="nk", act="tanh"
    )
    found = sections(differentiate(p, ["w"], ["y"]).backward)
    assert "outer" in _ops(found)[2]
    assert "outer" not in _ops(found)[1]


@pytest.mark.parametrize("seed", range(12))
def test_a_random_program_runs_in_sections(seed: int) -> None:
    """Section after section, over all steps each: the same outputs, from nothing but what crosses."""
    made = random_program(seed, depth=14, max_width=12, dtype=torch.float64)
    p = made.program
    found = sections(p)
    parts = [found.ahead, found.loop, found.after]
    order = {id(i): n for n, i in enumerate(p.instrs)}
    assert sorted(order[id(i)] for s in parts for i in s) == list(range(len(p.instrs)))
    assert all([order[id(i)] for i in s] == sorted(order[id(i)] for i in s) for s in parts)

    inputs, steps = made.inputs(2, 3, seed), 3
    given = dict(inputs)
    have = {i.val: n for n, i in p.inputs.items() if i.role != "carry"}
    carries = {i.val for i in p.inputs.values() if i.role == "carry"}
    outputs: dict[object, torch.Tensor] = {}
    for k, instrs in enumerate(parts):
        section = Program(dtype=p.dtype, instrs=instrs, types=p.types)
        for val, name in have.items():
            role = p.inputs[name].role if name in p.inputs else "step"
            section.inputs[name] = type(next(iter(p.inputs.values())))(val, name, role)
        made_here = {i.out for i in instrs if i.out is not None}
        if k == 1:
            made_here |= carries
            section.inputs |= {n: i for n, i in p.inputs.items() if i.role == "carry"}
            section.carries = p.carries
        section.inputs |= {n: i for n, i in p.inputs.items() if i.role == "step"}
        free = {*found.crossing, *p.outputs.values()}
        section.outputs = {("value", v.index): v for v in made_here & free}
        result = interpret(section, given, steps)
        for name, tensor in result.outputs.items():
            given[name] = tensor
            have[Val(name[1])] = name
        outputs |= {n: given[have[v]] for n, v in p.outputs.items() if v in made_here}
    expected = interpret(p, inputs, steps).outputs
    for name, want in expected.items():
        torch.testing.assert_close(outputs[name], want)
