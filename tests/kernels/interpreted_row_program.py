"""Row programs as Triton kernels against the reference interpreter; run by ``test_interpreter.py``."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastwm.engines.fused import FusedLoop
from fastwm.row_program import Program
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.reference import interpret
from fastwm.tolerances import tolerance
from tests.row_program.backward_inputs import gather
from tests.row_program.executing import assert_near, assert_ran, run_on
from tests.row_program.random_programs import random_program
from tests.row_program.test_executor import (
    CASES,
    INF,
    NAN,
    SPECIAL_CASES,
    Build,
    assert_special_numbers,
    every_product,
)  # fmt: skip

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set; test_interpreter.py sets it", allow_module_level=True)

from fastwm.kernels.row_program import Tile, TritonExecutor  # noqa: E402
from tests.kernels.on_triton import (  # noqa: E402
    SMALL,
    assert_rollouts_are_eager_ones,
    bfloat16_products,
    check,
    check_gradient,
    execute,
)


@pytest.mark.parametrize("name", CASES)
def test_an_op(name: str) -> None:
    position = list(CASES).index(name)
    width = (1, 5, 16, 31, 70)[position % 5]
    b = Build(width)
    p = b.finish(CASES[name], name.partition(":")[0])
    rows, steps = (1, 3, 17, 35)[position % 4], (1, 2, 3)[position % 3]
    dtype = torch.float32 if position % 3 else torch.float64
    inputs = b.inputs(rows, steps, seed=position)
    check(p, inputs, rows, steps, dtypes=[dtype], reverse=bool(position % 2))


@pytest.mark.parametrize("op", SPECIAL_CASES)
def test_special_numbers(op: str) -> None:
    assert_special_numbers(op, torch.float32, execute, rtol=2e-5)


def test_carries_that_swap_stay_and_come_from_inputs() -> None:
    p = Program()
    a, b, c, d = (p.input(n, "carry", (3,)) for n in "abcd")
    s = p.input("s", "step", (3,))
    p.carries = {"a": b, "b": a, "c": s, "d": d}
    p.outputs = {"sum": p.emit("add", p.emit("add", a, c), d), "a": a, "s": s}
    p.finals = ["a", "b", "c", "d"]
    inputs = {n: torch.randn(5, 3) for n in "abcd"} | {"s": torch.randn(5, 4, 3)}
    check(p, inputs, 5, 4)
    check(p, inputs, 5, 4, time_major=["s"], reverse=True)


def test_kinds_of_outputs() -> None:
    p = Program()
    x, i = p.input("x", "step", (4,)), p.input("i", "context", (2,), "int")
    p.outputs = {"positive": p.emit("gt", x, 0.0), "i": i, "floats": p.emit("gt", x, 0.5)}
    x_, i_ = torch.randn(3, 2, 4), torch.tensor([[1, 2], [3, -4], [5, 1 << 20]])
    ran = execute(p, {"x": x_, "i": i_}, 3, 2, kinds={"floats": "float"})
    assert ran.outputs["positive"].dtype is torch.bool
    assert torch.equal(ran.outputs["positive"], x_ > 0)
    assert torch.equal(ran.outputs["i"], i_[:, None].expand(3, 2, 2))
    assert torch.equal(ran.outputs["floats"], (x_ > 0.5).float())


def test_checks_say_at_which_step_the_first_failed() -> None:
    p = Program()
    x = p.input("x", "step", (2,))
    p.outputs["x"] = x
    p.checks = [p.emit("lt", x, 1.0)]
    data = torch.zeros(40, 5, 2)
    assert execute(p, {"x": data}, 40, 5).failed == 0
    data[33, 3, 1] = data[2, 4, 0] = 2.0
    assert execute(p, {"x": data}, 40, 5).failed == 4


def test_no_rows_and_no_steps() -> None:
    p = Program()
    x = p.input("x", "carry", (2,))
    p.carries["x"] = p.outputs["y"] = p.emit("tanh", x)
    p.finals = ["x"]
    assert execute(p, {"x": torch.zeros(0, 2)}, 0, 3).outputs["y"].shape == (0, 3, 2)
    start = torch.randn(3, 2)
    assert torch.equal(execute(p, {"x": start}, 3, 0).finals["x"], start)


def test_sums_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastwm.kernels.row_program import executor

    monkeypatch.setattr(executor, "_KEPT_BYTES", 7 * 3 * 5 * 8)  # of float64: seven rows at a time
    p = Program()
    x, s, c = p.input("x", "carry", (3,)), p.input("s", "step", (2,)), p.input("c", "context", (2,))
    p.add_sum("w", (2, 3)), p.add_sum("v", (2, 3))
    y = p.emit("tanh", x)
    p.emit("outer", y, s, layout="nk", target="w")
    p.emit("outer", y, p.emit("mul", s, c), layout="nk", target="v")
    p.carries["x"] = y
    inputs = {"x": torch.randn(30, 3), "s": torch.randn(30, 3, 2), "c": torch.randn(30, 2)}
    check(p, inputs, 30, 3, time_major=["s"])
    check(p, inputs, 30, 3)


@pytest.mark.parametrize("width", [8, 160])
def test_a_slice_of_a_concatenation_of_inputs(width: int) -> None:
    """Whole only once all its parts are there; and wide enough to be put together in several blocks."""
    p = Program()
    a, b = p.input("a", "carry", (width,)), p.input("b", "step", (width,))
    joined = p.emit("concat", a, b)
    middle = tuple(range(width // 2, width // 2 + width))
    p.outputs["y"] = p.emit("tanh", p.emit("index", joined, map=middle, shape=(width,)))
    p.carries["a"] = p.emit("index", joined, map=tuple(range(0, 2 * width, 2)), shape=(width,))
    check(p, {"a": torch.randn(5, width), "b": torch.randn(5, 3, width)}, 5, 3)


def test_more_rows_than_all_programs_take_at_once() -> None:
    p = Program()
    x = p.input("x", "carry", (3,))
    p.carries["x"] = p.outputs["y"] = p.emit("tanh", x)
    check(p, {"x": torch.randn(100, 3)}, 100, 2)


@pytest.mark.parametrize("tile", [SMALL, Tile(64, 64, 32)], ids=str)
def test_bfloat16_products(tile: Tile) -> None:
    """Both factors rounded, sums and everything else in float32."""
    p, inputs = every_product()
    with bfloat16_products():
        want = interpret(p, inputs, 1)
    exact = interpret(p, inputs, 1)
    ran = execute(p, inputs, 50, 1, tile=tile, bf16=True)
    assert_ran(ran, want, rtol=2e-6)
    for name in "yzmg":  # not the norm
        assert not torch.allclose(ran.outputs[name], exact.outputs[name], rtol=1e-4, atol=1e-4)
    special = torch.tensor([NAN, INF, -INF, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    inputs["a"].view(-1)[: len(special)] = special
    inputs["x"] = torch.eye(50, 40)
    inputs["x"][40:, :2] = torch.tensor([1.00390625, NAN])
    with bfloat16_products():
        want = interpret(p, inputs, 1)
    ran = execute(p, inputs, 50, 1, tile=tile, bf16=True)
    assert ran.outputs["y"].isnan().equal(want.outputs["y"].isnan())
    assert_ran(ran, want, rtol=2e-6)


def test_bfloat16_matrices_are_those_of_the_call() -> None:
    p, inputs = every_product()
    executor = TritonExecutor(p, "cpu", tile=SMALL, bf16=True)
    for name in "acde":
        inputs[name].data.neg_()  # seen by no version
        with bfloat16_products():
            want = interpret(p, inputs, 1)
        assert_ran(run_on(executor, inputs, 50, 1), want, rtol=2e-6)


def test_bfloat16_products_backward() -> None:
    """Gradients of weights are sums of float32, taken after the sweep."""
    p = Program()
    x, s = p.input("x", "carry", (6,)), p.input("s", "step", (5,))
    w, v = p.input("w", "uniform", (20, 11)), p.input("v", "uniform", (20, 6))
    hidden = p.emit("linear", p.emit("concat", x, s), w, None, layout="nk", act="tanh")
    p.carries["x"] = p.outputs["y"] = p.emit("linear", hidden, v, None, layout="kn")
    gradient = differentiate(p, ["x", "s", "w", "v"], ["y"])
    inputs = {"x": torch.randn(20, 6), "s": torch.randn(20, 4, 5)}
    inputs |= {"w": torch.randn(20, 11), "v": torch.randn(20, 6) / 4}
    with bfloat16_products():
        forward = interpret(gradient.forward, inputs, 4)
    back = gather(gradient, inputs, forward.outputs, {"y": torch.randn(20, 4, 6)})
    with bfloat16_products():
        want = interpret(gradient.backward, back, 4, reverse=True)
    ran = execute(gradient.backward, back, 20, 4, reverse=True, bf16=True)
    # A factor near the middle of two bfloat16 numbers may be rounded to either, 2**-8 apart: in a few of
    # the 16 to 80 terms of a sum.
    assert_ran(ran, want, rtol=2.0**-9)


def test_inputs_in_bfloat16_are_read_as_they_are() -> None:
    """Those of a model in bfloat16: nothing is copied that the kernel does not look at."""
    p, inputs = every_product()
    p.outputs["w"] = p.emit("row", p.inputs["f"].val)  # a uniform that is no matrix
    inputs = {
        n: t.bfloat16() if p.type(p.inputs[n].val).kind == "float" else t for n, t in inputs.items()
    }
    with bfloat16_products():
        want = interpret(p, inputs, 1)
    executor = TritonExecutor(p, "cpu", tile=SMALL, bf16=True)
    given = [inputs[n].long() if n == "i" else inputs[n] for n in executor.inputs]
    read = executor._read(given)
    assert all(read[executor.inputs.index(n)] is given[executor.inputs.index(n)] for n in "acde")
    outputs, _ = executor.run(given, 50, 1)
    for name, value in zip(executor.results, outputs, strict=True):
        assert_near(value, want.outputs[name], 2e-6)


def test_bfloat16_is_for_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        TritonExecutor(Program(dtype=torch.float64), "cpu", bf16=True)


@pytest.mark.parametrize("tile", [Tile(16, 16, 16), Tile(16, 256, 64), Tile(64, 64, 32)], ids=str)
def test_every_tile_gives_the_same(tile: Tile) -> None:
    made = random_program(3, depth=12, max_width=40)
    check(made.program, made.inputs(20, 2, seed=1), 20, 2, tile=tile, rtol=2e-3)


def test_random_programs_forward_and_back() -> None:
    """For a fixed time; ``FASTWM_FUZZ_SEED`` starts elsewhere, ``FASTWM_FUZZ_SECONDS`` goes on for longer."""
    seed = int(os.environ.get("FASTWM_FUZZ_SEED", "1"))
    end = time.monotonic() + float(os.environ.get("FASTWM_FUZZ_SECONDS", "15"))
    tried = 0
    while time.monotonic() < end or not tried:
        rng = random.Random(seed)
        made = random_program(seed, depth=rng.randint(1, 14), max_width=rng.choice([4, 12, 40]))
        rows, steps = rng.choice([(1, 2), (3, 1), (18, 2)])
        inputs = made.inputs(rows, steps, seed=seed)
        print(f"FASTWM_FUZZ_SEED={seed}")
        major = [
            n for n, i in made.program.inputs.items() if i.role == "step" and rng.random() < 0.5
        ]
        check(made.program, inputs, rows, steps, dtypes=[torch.float64], time_major=major,
              reverse=rng.random() < 0.3)  # fmt: skip
        check_gradient(replace(made.program, dtype=torch.float64), inputs, rows, steps, rng)
        seed, tried = seed + 1, tried + 1
    print(f"{tried} random programs")


@pytest.mark.parametrize("without", ["tl.debug_barrier()", ""])
def test_a_missing_barrier_is_found(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastwm.kernels.row_program import executor

    def thinned(*args: Any, **kwargs: Any) -> Any:
        made = write(*args, **kwargs)
        if not without:
            return made
        head, *rest = made.text.split(without)
        return replace(made, text=head + without + "pass".join(rest))  # all but the first

    write = executor.write
    monkeypatch.setattr(executor, "write", thinned)
    p = Program()
    x, w = p.input("x", "carry", (5,)), p.input("w", "uniform", (5, 5))
    hidden = p.emit("linear", x, w, None, layout="nk", act="tanh")
    p.carries["x"] = p.outputs["y"] = p.emit("linear", hidden, w, None, layout="nk")
    inputs = {"x": torch.randn(3, 5), "w": torch.randn(5, 5)}
    if not without:
        execute(p, inputs, 3, 3)
    else:
        with pytest.raises(AssertionError, match="read after write"):
            execute(p, inputs, 3, 3)


def test_the_same_bits_at_every_run() -> None:
    made = random_program(5, depth=8, max_width=20)
    gradient = differentiate(
        made.program, [n for n, i in made.program.inputs.items() if i.role == "uniform"],
        [n for n, v in made.program.outputs.items() if made.program.type(v).kind == "float"],
    )  # fmt: skip
    inputs = made.inputs(40, 2, seed=0)
    forward = interpret(gradient.forward, inputs, 2)
    given = {n: torch.ones_like(t) for n, t in forward.outputs.items() if n in made.program.outputs}
    back = gather(gradient, inputs, forward.outputs, given)
    first, second = (execute(gradient.backward, back, 40, 2, reverse=True).sums for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[TritonExecutor]:
    """The fused engine runs on these kernels; those that it made."""
    found: list[TritonExecutor] = []

    def executor_of(
        self: FusedLoop, program: Program, time_major: Any, kinds: Any = None, **how: Any
    ) -> TritonExecutor:
        found.append(
            TritonExecutor(program, "cpu", time_major=time_major, kinds=kinds, tile=SMALL, **how)
        )
        return found[-1]

    monkeypatch.setattr(FusedLoop, "executor_of", executor_of)
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_an_env_on_these_kernels_is_the_eager_one(grad: bool, made: list[TritonExecutor]) -> None:
    """Noise, names, gradients and all: what stands between a rollout and the kernels."""
    assert_rollouts_are_eager_ones("cpu", grad=grad)
    assert made
    assert not any(executor.bf16 for executor in made)


@pytest.mark.parametrize("grad", [False, True])
def test_an_env_in_bfloat16_on_these_kernels(grad: bool, made: list[TritonExecutor]) -> None:
    bound = tolerance("rollout.gradient" if grad else "rollout", torch.bfloat16).rtol
    assert_rollouts_are_eager_ones("cpu", grad=grad, dtype=torch.bfloat16, tolerance=bound)
    assert made
    assert all(executor.bf16 for executor in made)


def test_an_env_with_bfloat16_weights_on_these_kernels(made: list[TritonExecutor]) -> None:
    bound = tolerance("rollout.bf16_weights", torch.float32).rtol
    half = torch.bfloat16
    assert_rollouts_are_eager_ones("cpu", grad=False, fused_weights=half, tolerance=bound)
    assert made
    assert all(executor.bf16 for executor in made)
