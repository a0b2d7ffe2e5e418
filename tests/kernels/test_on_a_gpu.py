"""The whole-horizon kernels on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import set_exploration_type

import fastwm
from fastwm.tolerances import tolerance
from tests.row_program.random_programs import random_program

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _true_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    from tests.kernels.on_triton import check, check_gradient

    rng = random.Random(seed)
    made = random_program(seed, depth=rng.randint(1, 10), max_width=rng.choice([4, 40, 200]))
    rows, steps = rng.choice([(1, 3), (17, 2), (300, 2)])
    inputs = made.inputs(rows, steps, seed=seed)
    single = rng.random() < 0.5
    dtypes = [torch.float32 if single else torch.float64]
    check(made.program, inputs, rows, steps, dtypes=dtypes, tile=None, device="cuda", rtol=2e-3)
    check_gradient(
        replace(made.program, dtype=torch.float64), inputs, rows, steps, rng, tile=None, device="cuda"
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 17, 5000])
@pytest.mark.parametrize("grad", [False, True])
def test_rollouts_are_eager_ones(rows: int, grad: bool) -> None:
    from tests.kernels.on_triton import assert_rollouts_are_eager_ones

    assert_rollouts_are_eager_ones("cuda", grad=grad, rows=rows, tolerance=1e-4)


@pytest.mark.parametrize("rows", [1, 17, 5000])
@pytest.mark.parametrize("grad", [False, True])
def test_rollouts_in_bfloat16(rows: int, grad: bool) -> None:
    from tests.kernels.on_triton import assert_rollouts_are_eager_ones

    bound = tolerance("rollout.gradient" if grad else "rollout", torch.bfloat16).rtol
    assert_rollouts_are_eager_ones(
        "cuda", grad=grad, rows=rows, dtype=torch.bfloat16, tolerance=bound
    )


@pytest.mark.parametrize("rows", [1, 17, 5000])
def test_rollouts_with_bfloat16_weights(rows: int) -> None:
    from tests.kernels.on_triton import assert_rollouts_are_eager_ones

    assert_rollouts_are_eager_ones(
        "cuda", grad=False, rows=rows, fused_weights=torch.bfloat16,
        tolerance=tolerance("rollout.bf16_weights", torch.float32).rtol,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_kernel_draws_what_its_twin_does(dtype: torch.dtype) -> None:
    from tests.kernels.on_triton import CLOSE, KEY, NOISE, drawing, execute, twins
    from tests.row_program.executing import assert_near

    p = drawing(dtype)
    ran = execute(p, {}, 5000, 4, tile=None, device="cuda", noise=NOISE, key=KEY)
    for name, value in twins(p, NOISE, 5000, 4).items():
        assert_near(ran.outputs[name], value, CLOSE[dtype], name=name)


def test_rollouts_with_noise_drawn_in_the_kernel() -> None:
    """Repeatable by the seed, other numbers at each rollout, of eager's distribution, with gradients."""
    from tests.kernels.on_triton import sampled_env

    env, policy = sampled_env("cuda", rows=5000)
    env.backend, env.fused_noise = "fused", "kernel"
    latent = torch.randn(5000, 6, device="cuda", requires_grad=True)
    start = TensorDict({"latent": latent}, [5000])
    found = []
    with set_exploration_type("random"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(env.rollout(4, policy, tensordict=start))
        following = env.rollout(4, policy, tensordict=start)
        with fastwm.backend("eager"):
            eager = env.rollout(4, policy, tensordict=start)
    first, again, other = (out["action"] for out in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(other, following["action"])
    few = eager["action"].std() / 5000**0.5
    assert ((first - eager["action"]).mean(0).abs() < 6 * few).all()
    grads = [
        torch.autograd.grad(out["next", "reward"].sum(), latent)[0] for out in (found[0], found[1])
    ]
    assert torch.equal(*grads)


def test_inside_somebody_elses_capture() -> None:
    from fastwm.kernels.row_program import TritonExecutor
    from fastwm.row_program import Program

    p = Program()
    x = p.input("x", "carry", (3,))
    p.carries["x"] = p.outputs["y"] = p.emit("tanh", x)
    executor = TritonExecutor(p, "cuda")
    start = torch.randn(100, 3, device="cuda")
    want, _ = executor.run([start], 100, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = executor.run([start], 100, 4)
    start.copy_(torch.randn(100, 3, device="cuda"))
    graph.replay()
    again, _ = executor.run([start], 100, 4)
    assert torch.equal(got[0], again[0])
    assert not torch.equal(got[0], want[0])


def test_memory_beside_the_results_is_small() -> None:
    """Under 32 MB, at any batch."""
    from fastwm.kernels.row_program.builds import lowered_suite
    from fastwm.kernels.row_program.executor import TritonExecutor

    executor = TritonExecutor(lowered_suite("mlp").program, "cuda")
    assert executor.scratch(131072)[1] * 4 < 32e6


def test_sanitized() -> None:
    """Small, for compute-sanitizer: a product, a norm, a choice, sums, odd sizes."""
    from tests.kernels.on_triton import check, check_gradient

    made = random_program(5, depth=10, max_width=20)
    inputs = made.inputs(19, 2, seed=1)
    check(made.program, inputs, 19, 2, dtypes=[torch.float32], tile=None, device="cuda", rtol=2e-3)
    check_gradient(
        replace(made.program, dtype=torch.float64), inputs, 19, 2, random.Random(0), tile=None, device="cuda"
    )  # fmt: skip
