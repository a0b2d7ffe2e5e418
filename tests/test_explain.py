"""`explain`: which engine would run, and the one thing that rules out each that is passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import fastwm
from fastwm.plan import cache_of
from tests.compare import run
from tests.models import (
    ACTION,
    LATENT,
    counting_world_model,
    linear_policy,
    make_case,
    module,
    spec_env,
)

B, T = 3, 4


def test_it_says_what_runs_and_shows_the_program() -> None:
    case = make_case("mlp")
    env, start = case.env([B]), case.start(B)
    found = env.explain(T, case.policy, tensordict=start)
    assert found.engine == "fused"
    assert found.passed_over == {}
    assert str(found) == "fused: runs"
    assert "addmm" in found.program
    assert found.source.startswith("row program (float32)\n  carry ")
    assert "= linear(" in found.source
    with fastwm.backend("captured"):
        found = env.explain(T, case.policy, tensordict=start)
    assert found.engine == "captured"
    assert str(found) == "fused: no, backend='captured' was asked for\ncaptured: runs"
    assert "for step in range(horizon)" in found.source


def test_what_no_row_program_can_do_is_named_and_captured_runs() -> None:
    case = make_case("linear")
    case.policy = module(lambda z: z.sort(-1).values[..., :ACTION], ["latent"], ["action"])
    found = case.env([B]).explain(T, case.policy, tensordict=case.start(B))
    assert found.engine == "captured"
    assert found.passed_over == {"fused": "aten.sort: no row-wise form"}
    assert str(found) == "fused: no, aten.sort: no row-wise form\ncaptured: runs"
    assert "for step in range(horizon)" in found.source


def hooked(case: Any) -> None:
    case.policy.register_forward_hook(lambda *_: None)


def branching(case: Any) -> None:
    case.policy = module(
        lambda z: z[..., :ACTION] if z.sum() > 0 else -z[..., :ACTION], ["latent"], ["action"]
    )


def lazy(case: Any) -> None:
    case.policy = module(nn.LazyLinear(ACTION), ["latent"], ["action"])


def unreachable(case: Any) -> None:
    made = (torch.randn(ACTION) for _ in range(99))
    case.policy = module(lambda z: z[..., :ACTION] + next(made), ["latent"], ["action"])


REASONS: dict[str, tuple[Callable[[Any], None], dict[str, Any], str]] = {
    "callback": (lambda case: None, {"callback": print}, "a callback, called at each step"),
    "out": (lambda case: None, {"out": TensorDict({}, [])}, "out= tensordict"),
    "cast": (lambda case: None, {"auto_cast_to_device": True}, "auto_cast_to_device=True"),
    "all-done": (lambda case: None, {"break_when_all_done": True}, "break_when_all_done=True"),
    "generator": (lambda case: None, {"actions": iter([])}, "actions= is a list_iterator"),
    "hook": (hooked, {}, "a hook on TensorDictModule"),
    "branch": (branching, {}, "aten._local_scalar_dense.default: Python reads a value"),
    "lazy": (lazy, {}, "LazyLinear"),
    "iterator": (unreachable, {}, "holds a generator, whose state is hidden"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    change, arguments, reason = REASONS[name]
    case = make_case("linear")
    change(case)
    policy = None if "actions" in arguments else case.policy
    found = case.env([B]).explain(T, policy, tensordict=case.start(B), **arguments)
    assert found.engine == "eager"
    assert reason in found.passed_over["captured"]
    assert found.passed_over["fused"] == found.passed_over["captured"]
    assert str(found).splitlines()[-1] == "eager: runs"
    assert f"captured: no, {found.passed_over['captured']}" in str(found)
    assert found.program == found.source == ""


def test_the_reason_is_the_one_that_the_rollout_gives() -> None:
    case = make_case("linear")
    branching(case)
    env, start = case.env([B]), case.start(B)
    reason = env.explain(T, case.policy, tensordict=start).passed_over["captured"]
    with pytest.warns(UserWarning, match="eager engine") as caught:
        env.rollout(T, case.policy, tensordict=start)
    assert reason in str(caught[0].message)


@pytest.mark.parametrize("asked", ["eager", "captured", "fused"])
def test_what_was_asked_for_is_respected(asked: str) -> None:
    case = make_case("linear")
    with fastwm.backend(asked):
        found = case.env([B]).explain(T, case.policy, tensordict=case.start(B))
    assert found.asked == asked
    assert found.engine == asked
    if asked == "eager":
        assert found.passed_over["captured"] == "backend='eager' was asked for"
        assert found.passed_over["fused"] == "backend='eager' was asked for"


@pytest.mark.parametrize("asked", ["captured", "fused"])
def test_asked_for_and_impossible(asked: str) -> None:
    case = make_case("linear")
    with fastwm.backend(asked):
        found = case.env([B]).explain(T, case.policy, print, tensordict=case.start(B))
    assert found.engine is None
    assert f"nothing runs: backend={asked!r} was asked for" in str(found)
    assert "a callback" in found.passed_over[asked]


def test_fused_asked_for_where_only_captured_can() -> None:
    case = make_case("linear")
    case.policy = module(lambda z: z.sort(-1).values[..., :ACTION], ["latent"], ["action"])
    with fastwm.backend("fused"):
        found = case.env([B]).explain(T, case.policy, tensordict=case.start(B))
    assert found.engine is None
    assert "nothing runs: backend='fused' was asked for" in str(found)
    assert found.passed_over["fused"] == "aten.sort: no row-wise form"
    assert found.passed_over["captured"] == "backend='fused' was asked for"


def test_nothing_is_rolled_out_and_nothing_drawn() -> None:
    case = make_case("rssm_sampled")
    env, start = case.env([B]), case.start(B)
    state, kept = torch.get_rng_state(), start.clone()
    for _ in range(2):
        env.explain(T, case.policy, tensordict=start)
        env.explain(T, tensordict=start)
    assert torch.equal(torch.get_rng_state(), state)
    assert (start == kept).all()
    assert list(start.keys()) == list(kept.keys())


def test_the_plan_that_it_made_is_the_rollouts() -> None:
    case = make_case("linear")
    env, start = case.env([B]), case.start(B)
    env.explain(T, case.policy, tensordict=start)
    run("captured", env, T, case.policy, start)
    assert cache_of(env).traces == 1


def test_restarts_are_foreseen_only_where_a_row_can_finish() -> None:
    start = TensorDict({"latent": torch.zeros(B, 1)}, [B])
    policy = linear_policy(1)
    for done_at, engine in ((None, "fused"), (3.0, "eager")):
        world_model = counting_world_model(done_at=done_at)
        env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B], initial_state=start)
        found = env.explain(T, policy, tensordict=start, break_when_any_done=False)
        assert found.engine == engine
        assert env.explain(T, policy, tensordict=start).engine == "fused"


def test_errors_of_the_input_are_raised_as_the_rollout_raises_them() -> None:
    case = make_case("linear")
    with pytest.raises(RuntimeError, match="initial latent"):
        case.env([B]).explain(T, case.policy)
    start = TensorDict({"latent": torch.zeros(B, LATENT + 1)}, [B])
    with pytest.raises(RuntimeError, match="latent"):
        case.env([B]).explain(T, case.policy, tensordict=start)
