"""Running row programs as Triton kernels: in the interpreter, or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.envs.utils import set_exploration_type
from torchrl.modules import TanhNormal

import fastwm
from fastwm.bench.providers.env_rollout import environment
from fastwm.bench.suites import Parts
from fastwm.kernels.row_program import Tile, TritonExecutor
from fastwm.row_program import Program
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.noise import Noise, numbers
from fastwm.row_program.ops import PRODUCTS, REFERENCES
from fastwm.row_program.reference import interpret
from tests.row_program.backward_inputs import gather
from tests.row_program.executing import Ran, assert_ran, run_on
from tests.row_program.test_noise import LAWS

SMALL = Tile(rows=16, columns=32, depth=16)
BOTH = (torch.float32, torch.float64)


def execute(
    program: Program,
    inputs: Mapping[Any, torch.Tensor],
    rows: int,
    steps: int,
    *,
    reverse: bool = False,
    time_major: Collection[Any] = (),
    kinds: Mapping[Any, str] | None = None,
    tile: Tile | None = SMALL,
    device: str = "cpu",
    bf16: bool = False,
    noise: Mapping[Any, Noise] | None = None,
    key: torch.Tensor | None = None,
) -> Ran:
    """Run a program, its results into buffers full of NaN; they come back to the CPU.

    In the interpreter it is also watched for accesses that no barrier parts. ``noise`` is drawn by the
    kernels, by that ``key``.
    """
    noise = noise or {}
    time_major = [name for name in time_major if name not in noise]
    executor = TritonExecutor(
        program, device, time_major=time_major, kinds=kinds, tile=tile, bf16=bf16, noise=noise
    )
    with races_found() if device == "cpu" else nullcontext([]) as races:
        ran = run_on(
            executor, inputs, rows, steps, reverse=reverse, time_major=time_major, device=device,
            keys=dict.fromkeys(noise, key),
        )  # fmt: skip
    assert not races, f"{races[:5]}\n{executor.source(rows, reverse=reverse).text}"
    return ran


def check(
    program: Program, inputs: Mapping[Any, torch.Tensor], rows: int, steps: int, *,
    dtypes: Iterable[torch.dtype] = BOTH, reverse: bool = False, rtol: float = 3e-5, **kwargs: Any,
) -> None:  # fmt: skip
    with torch.no_grad():
        want = interpret(replace(program, dtype=torch.float64), inputs, steps, reverse=reverse)
    for dtype in dtypes:
        ran = execute(replace(program, dtype=dtype), inputs, rows, steps, reverse=reverse, **kwargs)
        single = dtype is torch.float32
        try:
            assert_ran(ran, want, rtol=rtol if single else 1e-10, atol=1e-6 if single else 1e-13)
        except AssertionError as error:
            raise AssertionError(
                f"{dtype}, rows {rows}, steps {steps}: {error}\n{program}"
            ) from error


KEY = torch.tensor([0x2545F4914F6CDD1D])
NOISE = {name: Noise(law, number) for number, (name, (law, *_)) in enumerate(LAWS.items())}
# A logarithm and a cosine are off by a few units in the last place, here and there.
CLOSE = {torch.float32: 3e-6, torch.float64: 1e-14}


def drawing(dtype: torch.dtype) -> Program:
    """Three draws, given back as they are."""
    p = Program(dtype=dtype)
    for name, shape in zip(NOISE, [(5,), (), (2, 3)], strict=True):
        p.outputs[name] = p.input(name, "step", shape)
    return p


def twins(p: Program, noise: Mapping[Any, Noise], rows: int, steps: int) -> dict[Any, torch.Tensor]:
    """What the kernels are to draw, by torch."""
    shapes = {name: p.type(p.inputs[name].val).shape for name in noise}
    return {n: numbers(d, KEY, rows, steps, shapes[n], p.dtype) for n, d in noise.items()}


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within it the reference interpreter's products have both factors rounded."""

    def rounded(op: str) -> Callable[..., torch.Tensor]:
        def product(x: torch.Tensor, w: torch.Tensor, *rest: Any, **attrs: Any) -> torch.Tensor:
            x, w = (t.bfloat16().to(t.dtype) for t in (x, w))
            return plain[op](x, w, *rest, **attrs)

        return product

    plain = dict(REFERENCES)
    REFERENCES.update({op: rounded(op) for op in PRODUCTS})
    try:
        yield
    finally:
        REFERENCES.update(plain)


def check_gradient(
    program: Program, inputs: Mapping[Any, torch.Tensor], rows: int, steps: int, rng: random.Random,
    **kwargs: Any,
) -> None:  # fmt: skip
    """The backward program, with its sums, against the interpreter on the same numbers."""
    inputs = {n: t.double() for n, t in inputs.items()}
    floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
    grads = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
    gradient = differentiate(program, floats, grads, budget=rng.choice([None, 0.0, 30.0]))
    with torch.no_grad():
        forward = interpret(gradient.forward, inputs, steps)
    given = {n: torch.randn(forward.outputs[n].shape, dtype=torch.float64) for n in grads}
    back = gather(gradient, inputs, forward.outputs, given)
    with torch.no_grad():
        want = interpret(gradient.backward, back, steps, reverse=True)
    ran = execute(gradient.backward, back, rows, steps, reverse=True, **kwargs)
    assert_ran(ran, want, rtol=1e-9, atol=1e-11)


class Step(torch.nn.Module):
    """A recurrent step with a product, a norm and a gate; its action is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = torch.nn.Linear(8, 12), torch.nn.LayerNorm(12)
        self.outer = torch.nn.Linear(12, 6)

    def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.norm(self.inner(torch.cat((latent, action), -1))))
        return torch.tanh(self.outer(hidden)) + 0.5 * latent


def sampled_env(
    device: str, *, rows: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[fastwm.WorldModelEnv, ProbabilisticTensorDictSequential]:
    """A recurrent model, and a policy that samples."""
    torch.manual_seed(0)
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Linear(6, 4), ["latent"], ["params"]),
        TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=TanhNormal),
    )
    reward = TensorDictModule(torch.nn.Linear(6, 1), [("next", "latent")], [("next", "reward")])
    dynamics = TensorDictModule(Step(), ["latent", "action"], [("next", "latent")])
    parts = Parts(*(module.to(device, dtype) for module in (dynamics, reward, policy)))
    env = environment(
        parts, {"latent": 6}, 2, rows, device, fastwm.WorldModel, fastwm.WorldModelEnv
    )
    return env, policy


def assert_rollouts_are_eager_ones(
    device: str, *, grad: bool, rows: int = 5, tolerance: float = 2e-5,
    dtype: torch.dtype = torch.float32, fused_weights: torch.dtype | None = None,
) -> None:  # fmt: skip
    """A sampled policy on a recurrent model: every entry and every gradient, from the same seed."""
    env, policy = sampled_env(device, rows=rows, dtype=dtype)
    env.fused_weights = fused_weights
    latent = torch.randn(rows, 6, device=device).to(dtype).requires_grad_(grad)
    start = TensorDict({"latent": latent}, [rows])
    found = {}
    for backend in ("eager", "fused"):
        torch.manual_seed(1)
        with fastwm.backend(backend), torch.set_grad_enabled(grad), set_exploration_type("random"):
            out = env.rollout(4, policy, tensordict=start)
        results = {str(k): v for k, v in out.items(True, True)}
        if grad:
            leaves = [start["latent"], *env.world_model.parameters(), *policy.parameters()]
            loss = out["next", "reward"].square().sum() + out["latent"].sum()
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            results |= {f"grad {i}": g for i, g in enumerate(grads) if g is not None}
        found[backend] = results
    assert found["eager"].keys() == found["fused"].keys()
    for name, value in found["eager"].items():
        torch.testing.assert_close(
            found["fused"][name], value, rtol=tolerance, atol=tolerance, msg=name
        )


@contextmanager
def races_found() -> Iterator[list[str]]:
    """In the interpreter, which runs a program's accesses one after the other: those that no barrier parts.

    Threads of a program do not wait for one another but at barriers. So between two of them nothing may be
    read that was written, nor written what was read or written.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[str] = []
    read: set[int] = set()
    written: set[int] = set()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    barrier = InterpreterBuilder.create_barrier

    def addresses(pointers: Any, mask: Any) -> set[int]:
        return set(pointers.data[mask.data].ravel().tolist())

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        these = addresses(ptrs, mask)
        if these & written:
            found.append("read after write")
        read.update(these)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        these = addresses(ptrs, mask)
        if these & read:
            found.append("write after read")
        if these & written:
            found.append("write after write")
        written.update(these)
        return store(self, ptrs, value, mask, *rest)

    def create_barrier(self: Any) -> Any:
        read.clear()
        written.clear()
        return barrier(self)

    changed = {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_barrier": create_barrier,
    }
    before = {name: getattr(InterpreterBuilder, name) for name in changed}
    for name, function in changed.items():
        setattr(InterpreterBuilder, name, function)
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)
