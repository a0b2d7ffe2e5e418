"""Noise drawn within the whole-horizon kernels, against its twin in torch; run by ``test_interpreter.py``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import set_exploration_type

import fastwm
from fastwm.engines.drawing import Drawing
from fastwm.engines.fused import FusedLoop
from fastwm.row_program import Program
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.noise import Law, Noise, numbers
from fastwm.row_program.reference import interpret
from tests.models import linear_world_model, make_case, spec_env
from tests.row_program.backward_inputs import gather
from tests.row_program.executing import assert_near, assert_ran
from tests.row_program.random_programs import random_program
from tests.row_program.test_noise import LAWS, distance

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set; test_interpreter.py sets it", allow_module_level=True)

from fastwm.kernels.row_program import Tile, TritonExecutor  # noqa: E402
from tests.kernels.on_triton import (  # noqa: E402
    CLOSE,
    KEY,
    NOISE,
    SMALL,
    drawing,
    execute,
    sampled_env,
    twins,
)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_kernel_draws_what_its_twin_does_whatever_the_tile(dtype: torch.dtype) -> None:
    p = drawing(dtype)
    want = twins(p, NOISE, 20, 4)
    found = [
        execute(p, {}, 20, 4, tile=tile, noise=NOISE, key=KEY, reverse=reverse).outputs
        for tile, reverse in ((SMALL, False), (Tile(16, 16, 16), True), (Tile(64, 256, 32), False))
    ]
    for name, value in found[0].items():
        assert_near(value, want[name], CLOSE[dtype], name=name)
        assert all(torch.equal(other[name], value) for other in found[1:]), name


def test_what_a_kernel_draws_is_distributed_by_its_law() -> None:
    found = execute(drawing(torch.float32), {}, 250, 8, tile=Tile(64), noise=NOISE, key=KEY)
    for name, (_, cdf, mean, std) in LAWS.items():
        drawn = found.outputs[name]
        few = std / drawn.numel() ** 0.5
        assert distance(drawn, cdf) < 1.95
        assert abs(drawn.mean().item() - mean) < 4 * few
        assert abs(drawn.std().item() - std) < 8 * few


def test_another_key_gives_other_numbers() -> None:
    p = drawing(torch.float32)
    one, other = (execute(p, {}, 20, 3, noise=NOISE, key=key).outputs for key in (KEY, KEY + 1))
    assert all(not torch.isclose(one[name], other[name]).any() for name in NOISE)


def random_noise(program: Program, rng: random.Random) -> dict[Any, Noise]:
    laws = [Law("normal", 0.0, 1.0), Law("uniform", -1.0, 1.0), Law("exponential", 2.0)]
    floats = [
        n
        for n, i in program.inputs.items()
        if i.role == "step" and program.type(i.val).kind == "float"
    ]
    return {name: Noise(rng.choice(laws), number) for number, name in enumerate(floats)}


def test_random_programs_forward_and_back() -> None:
    """Against the interpreter on the twin's numbers; sums of noise among them, in slices of rows."""
    drawn = 0
    for seed in range(3):
        rng = random.Random(seed)
        made = random_program(seed, depth=rng.randint(2, 12), max_width=12)
        program = replace(made.program, dtype=torch.float64)
        noise = random_noise(program, rng)
        drawn += len(noise)
        rows, steps = rng.choice([(1, 2), (18, 3)])
        inputs = {n: t.double() for n, t in made.inputs(rows, steps, seed=seed).items()}
        inputs |= twins(program, noise, rows, steps)
        left = {n: torch.full_like(t, torch.nan) if n in noise else t for n, t in inputs.items()}
        with torch.no_grad():
            want = interpret(program, inputs, steps)
        ran = execute(program, left, rows, steps, noise=noise, key=KEY)
        assert_ran(ran, want, rtol=1e-10, atol=1e-12)
        floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
        grads = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
        gradient = differentiate(program, [n for n in floats if n not in noise], grads, budget=0.0)
        again = {
            name: noise[source.name]
            for name, source in gradient.saved.items()
            if source.kind == "input" and source.name in noise
        }
        with torch.no_grad():
            forward = interpret(gradient.forward, inputs, steps)
        given = {n: torch.randn(forward.outputs[n].shape, dtype=torch.float64) for n in grads}
        back = gather(gradient, inputs, forward.outputs, given)
        with torch.no_grad():
            want = interpret(gradient.backward, back, steps, reverse=True)
        back |= {n: torch.full_like(back[n], torch.nan) for n in again}
        ran = execute(gradient.backward, back, rows, steps, reverse=True, noise=again, key=KEY)
        assert_ran(ran, want, rtol=1e-9, atol=1e-11)
    assert drawn > 2


def test_sums_of_noise_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastwm.kernels.row_program import executor

    monkeypatch.setattr(executor, "_KEPT_BYTES", 7 * 3 * 5 * 8)  # of float64: seven rows at a time
    p = Program(dtype=torch.float64)
    x, s = p.input("x", "carry", (3,)), p.input("s", "step", (2,))
    p.add_sum("w", (2, 3))
    p.emit("outer", x, s, layout="nk", target="w")
    p.carries["x"] = p.emit("tanh", x)
    noise = {"s": Noise(Law("normal", 0.0, 1.0), 0)}
    inputs = {"x": torch.randn(30, 3).double(), **twins(p, noise, 30, 3)}
    want = interpret(p, inputs, 3)
    inputs["s"] = torch.full_like(inputs["s"], torch.nan)
    assert_ran(execute(p, inputs, 30, 3, noise=noise, key=KEY), want, rtol=1e-12)


# ---------------------------------------------------------------- rollouts


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[TritonExecutor]:
    """The fused engine runs on these kernels as on CUDA; those that it made."""
    made: list[TritonExecutor] = []

    def executor_of(
        self: FusedLoop, program: Program, time_major: Any, kinds: Any = None, **how: Any
    ) -> TritonExecutor:
        made.append(
            TritonExecutor(program, "cpu", time_major=time_major, kinds=kinds, tile=SMALL, **how)
        )
        return made[-1]

    monkeypatch.setattr(FusedLoop, "executor_of", executor_of)
    monkeypatch.setattr(FusedLoop, "draws_in_kernel", staticmethod(lambda device: True))
    return made


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, torch draws the kernel's numbers, and the kernel none."""

    def call() -> None:
        draw = Drawing.__call__

        def regenerated(self: Drawing, horizon: int, feed: Any) -> dict[Any, torch.Tensor]:
            own = {d.name: Noise(d.law, i) for i, d in enumerate(self.draws) if d.law and d.name}
            key = torch.empty(1, dtype=torch.int64).random_()
            found = draw(self, horizon, feed)
            for name, noise in own.items():
                rows, dtype = found[name].shape[1], found[name].dtype
                drawn = numbers(noise, key, rows, horizon, found[name].shape[2:], dtype)
                found[name] = drawn.transpose(0, 1).contiguous()
            return found

        monkeypatch.setattr(Drawing, "__call__", regenerated)

    return call


def imagined(
    env: Any, policy: Any, grad: bool = False, seed: int = 1, steps: int = 4, width: int = 6
) -> tuple[TensorDictBase, list[torch.Tensor]]:
    """A rollout on the fused engine, and gradients of a sum of it."""
    rows = 5
    latent = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    latent.requires_grad_(grad)
    torch.manual_seed(seed)
    with fastwm.backend("fused"), torch.set_grad_enabled(grad), set_exploration_type("random"):
        out = env.rollout(steps, policy, tensordict=TensorDict({"latent": latent}, [rows]))
    if not grad:
        return out, []
    leaves = [latent, *env.world_model.parameters(), *policy.parameters()]
    loss = out["next", "reward"].square().sum() + out["latent"].sum()
    return out, list(torch.autograd.grad(loss, leaves, allow_unused=True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_rollout_is_torchs_on_the_same_numbers(
    grad: bool, on_kernels: list[TritonExecutor], twin: Callable[[], None]
) -> None:
    env, policy = sampled_env("cpu")
    env.fused_noise = "kernel"
    out, grads = imagined(env, policy, grad)
    last = on_kernels[-2 if grad else -1 :]
    assert all(executor.noise for executor in last)
    env.fused_noise = "torch"
    imagined(env, policy, grad)  # the plan is held to eager's numbers
    twin()
    want, want_grads = imagined(env, policy, grad)
    assert not on_kernels[-1].noise
    for key, value in want.items(True, True):
        assert_near(out[key], value, 2e-5, name=str(key))
    for got, value in zip(grads, want_grads, strict=True):
        assert_near(got, value, 2e-5)


def test_gradients_are_finite_differences(on_kernels: list[TritonExecutor]) -> None:
    """Of the same seed, and so of the same noise."""
    env, policy = sampled_env("cpu", rows=2, dtype=torch.float64)
    env.fused_noise = "kernel"
    start = torch.randn(2, 6, dtype=torch.float64)

    def total(latent: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        with fastwm.backend("fused"), set_exploration_type("random"):
            out = env.rollout(3, policy, tensordict=TensorDict({"latent": latent}, [2]))
        return out["next", "reward"].square().sum()

    latent = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(latent), latent)
    assert on_kernels[-1].noise
    for row, column in ((0, 1), (1, 4)):
        step = torch.zeros_like(start)
        step[row, column] = 1e-5
        with torch.no_grad():
            slope = (total(start + step) - total(start - step)) / 2e-5
        torch.testing.assert_close(grad[row, column], slope, rtol=1e-6, atol=1e-9)


def test_second_derivatives_are_those_of_the_same_numbers(
    on_kernels: list[TritonExecutor], twin: Callable[[], None]
) -> None:
    env, policy = sampled_env("cpu", rows=3, dtype=torch.float64)
    found = []
    for noise in ("kernel", "torch"):
        env.fused_noise = noise
        latent = torch.full((3, 6), 0.3, dtype=torch.float64, requires_grad=True)
        start = TensorDict({"latent": latent}, [3])
        with fastwm.backend("fused"), set_exploration_type("random"):
            if noise == "torch":
                env.rollout(2, policy, tensordict=start)  # the plan is held to eager's numbers
                twin()
            torch.manual_seed(2)
            out = env.rollout(2, policy, tensordict=start)
        loss = out["next", "reward"].square().sum()
        (first,) = torch.autograd.grad(loss, latent, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), latent)[0])
    assert_near(found[0], found[1], 1e-9)


def test_the_seed_repeats_and_rollouts_differ(on_kernels: list[TritonExecutor]) -> None:
    env, policy = sampled_env("cpu")
    env.fused_noise = "kernel"
    first, _ = imagined(env, policy)
    again, _ = imagined(env, policy)
    other, _ = imagined(env, policy, seed=2)
    with fastwm.backend("fused"), torch.no_grad(), set_exploration_type("random"):
        latent = first["latent"][:, 0]
        following = env.rollout(4, policy, tensordict=TensorDict({"latent": latent}, [5]))
    assert torch.equal(first["action"], again["action"])
    assert not torch.isclose(first["action"], other["action"]).any()
    assert not torch.isclose(other["action"], following["action"]).any()
    env.fused_noise = "torch"
    assert not torch.isclose(first["action"], imagined(env, policy)[0]["action"]).any()


@pytest.mark.parametrize("grad", [False, True])
def test_an_early_stop_cuts_the_same_numbers(grad: bool, on_kernels: list[TritonExecutor]) -> None:
    torch.manual_seed(0)
    case, wm = make_case("mlp_sampled"), linear_world_model(done="done", latent=64, action=6)
    base_env = spec_env(latent=64, action=6)
    env = fastwm.WorldModelEnv(wm, base_env, batch_size=[5], fused_noise="kernel")
    env.done_threshold = 1e9
    whole, _ = imagined(env, case.policy, grad, width=64)
    with torch.no_grad():
        flags = wm.done_head.module(whole["next", "latent"])
    env.done_threshold = flags[:, 1].max().item() - 1e-4
    cut, grads = imagined(env, case.policy, grad, width=64)
    assert cut.shape[1] < 4
    for key in ("action", "latent", ("next", "reward")):
        assert_near(cut[key], whole[key][:, : cut.shape[1]], 1e-6)
    if grad:
        env.done_threshold = 1e9
        _, want = imagined(env, case.policy, grad, steps=cut.shape[1], width=64)
        for got, value in zip(grads, want, strict=True):
            assert (got is None) == (value is None)
            if value is not None:
                assert_near(got, value, 1e-5)


def test_what_runs_is_told(on_kernels: list[TritonExecutor]) -> None:
    case = make_case("mlp_sampled")
    env, start = case.env([3], fused_noise="kernel"), case.start(3)
    with torch.no_grad(), fastwm.backend("fused"):
        found = env.explain(3, case.policy, tensordict=start)
    assert str(found) == "fused: runs, with noise drawn in the kernel"
