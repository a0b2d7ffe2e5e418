"""The Inductor option: one compilation whatever the horizon, parity, samples by the seed, gradients.

Each compilation takes seconds, so these tests share theirs; ``backend="eager"`` of ``torch.compile`` covers
what does not depend on the generated code.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_parity, assert_same, gradients, run
from tests.engines.test_captured import Dynamics, NoGradBlock, env_of
from tests.models import (
    counting_world_model,
    linear_policy,
    make_case,
    sampled_actor,
    spec_env,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH"
)
B = 3


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------- through Inductor


@needs_compiler
@pytest.mark.slow
def test_one_compilation_serves_every_horizon_and_agrees_with_eager() -> None:
    case = make_case("rssm_sampled")
    plain, env, start = case.env([B]), case.env([B], compile=True), case.start(B)
    with torch.no_grad():
        for horizon in (2, 15, 7):
            want, state = run("eager", plain, horizon, case.policy, start)
            got, after = run("captured", env, horizon, case.policy, start)
            assert_same(got, want)
            assert torch.equal(after, state)
    assert compilations() == 1
    assert cache_of(env).traces == 1
    # Another seed draws other numbers through the same code.
    with torch.no_grad():
        other, _ = run("captured", env, 7, case.policy, start, seed=1)
    assert not torch.equal(other["action"], got["action"])
    # New weights are seen.
    with torch.no_grad():
        for p in case.policy.parameters():
            p.mul_(2)
        assert_same(
            run("captured", env, 7, case.policy, start)[0],
            run("eager", plain, 7, case.policy, start)[0],
        )
    assert compilations() == 1


@needs_compiler
@pytest.mark.slow
def test_gradients_through_inductor() -> None:
    case = make_case("linear")
    plain, env, start = case.env([B]), case.env([B]).compile(), case.start(B, requires_grad=True)
    wrt = [*case.policy.parameters(), *case.world_model.step_module.parameters(), start["latent"]]
    for horizon in (4, 9):
        want, _ = run("eager", plain, horizon, case.policy, start)
        got, _ = run("captured", env, horizon, case.policy, start)
        assert_same(got, want)
        for i, (g, w) in enumerate(zip(gradients(got, wrt), gradients(want, wrt), strict=True)):
            assert (g is None) == (w is None)
            if w is not None and g is not None:
                assert_close(g, w, "rollout.gradient", f"gradient {i}")
    assert compilations() == 1


# ---------------------------------------------------------------- the plumbing, without code generation


def test_compile_at_construction_and_later_and_undone() -> None:
    case = make_case("linear")
    start = case.start(B)
    env = case.env([B], compile={"backend": "eager"})
    with torch.no_grad():
        run("captured", env, 3, case.policy, start)
        assert compilations() == 1
        env.eager()
        run("captured", env, 3, case.policy, start)
        assert compilations() == 1
    assert env.compile(backend="eager", warmup=2) is env
    run("captured", env, 3, case.policy, start)
    # At the first step the latent has no gradient yet, so that one is compiled apart.
    assert compilations() == 3
    run("captured", env, 9, case.policy, start)
    assert compilations() == 3


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize(
    "name", ["linear_done", "rssm_sampled", "multi_agent", "nested", "context"]
)
def test_parity_of_the_compiled_body(name: str, grad: bool) -> None:
    case = make_case(name)
    env = case.env([B]).compile(backend="eager")
    start = case.start(B, requires_grad=grad)
    wrt = [*case.policy.parameters(), *case.world_model.step_module.parameters()] if grad else ()
    with torch.set_grad_enabled(grad):
        for stop in (True, False):
            assert_parity(env, case.policy, start, 4, wrt=wrt, break_when_any_done=stop)


def test_early_stop_and_checks_with_a_compiled_body() -> None:
    env = fastwm.WorldModelEnv(counting_world_model(done_at=2), spec_env(), batch_size=[B])
    env.compile(backend="eager")
    start = zeros(1)
    with torch.no_grad():
        out = assert_parity(env, sampled_actor(1), start, 6)
    assert out.shape == (B, 2)


def zeros(width: int) -> TensorDict:
    return TensorDict({"latent": torch.zeros(B, width)}, [B])


def test_results_of_a_compiled_body_share_no_memory() -> None:
    case = make_case("linear")
    env, start = case.env([B]).compile(backend="eager"), case.start(B)
    seen: set[int] = set()
    for _ in range(2):
        with torch.no_grad():
            out, _ = run("captured", env, 3, case.policy, start)
        pointers = [v.untyped_storage().data_ptr() for v in out.values(True, True)]
        assert len(set(pointers)) == len(pointers)
        seen.update(pointers)
        keep = out  # so that no memory is given out twice
    assert keep is not None


def test_a_step_with_its_own_functions_and_no_grad_blocks_compiles() -> None:
    for body in (NoGradBlock(), lambda x: x.round() + x - x.detach(), nn.LayerNorm(4)):
        env = env_of(Dynamics(body)).compile(backend="eager")
        start = zeros(4)
        start["latent"] = torch.randn(B, 4)
        wrt: list[Tensor] = list(env.world_model.parameters())
        assert_parity(env, linear_policy(), start, 4, wrt=wrt)


def test_a_step_that_does_not_compile_runs_uncompiled_and_says_so() -> None:
    def broken(module: Any, inputs: Any, **kwargs: Any) -> Any:
        raise ValueError("no such instruction\nand more")

    case = make_case("linear")
    env, start = case.env([B]).compile(backend=broken), case.start(B)
    want, _ = run("eager", env, 3, case.policy, start)
    with pytest.warns(
        UserWarning, match="not compiled: compiling the step raises .*no such instruction"
    ):
        got, _ = run("captured", env, 3, case.policy, start)
    assert_same(got, want)
    found = env.explain(3, case.policy, tensordict=start)
    assert found.engine == "captured"
    assert "no such instruction" in found.passed_over["captured + Inductor"]
