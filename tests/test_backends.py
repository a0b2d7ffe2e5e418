"""Choosing an engine: by name, by block, by env, by process; and what a name that cannot run says."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import fastwm
from fastwm.backends import BACKENDS, requested
from fastwm.plan import cache_of
from tests.models import make_case, module

B, T = 3, 4


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTWM_BACKEND", raising=False)


def ran_captured(env: Any, case: Any) -> bool:
    """Whether a rollout went to the captured engine, which is the only one to make plans."""
    before = cache_of(env).calls
    env.rollout(2, case.policy, tensordict=case.start(B))
    return cache_of(env).calls > before


# ---------------------------------------------------------------- precedence


def test_the_default_is_auto() -> None:
    assert requested() == "auto"
    assert fastwm.requested_backend("auto") == "auto"


def test_block_over_object_over_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTWM_BACKEND", "captured")
    assert requested() == "captured"
    assert requested("eager") == "eager"
    with fastwm.backend("fused"):
        assert requested("eager") == "fused"
        with fastwm.backend("auto"):
            assert requested("eager") == "auto"
        assert requested("eager") == "fused"
    assert requested("eager") == "eager"


def test_a_block_that_raises_ends_all_the_same() -> None:
    with pytest.raises(KeyError), fastwm.backend("eager"):
        raise KeyError
    assert requested() == "auto"


def test_one_object_serves_several_blocks() -> None:
    eager = fastwm.backend("eager")
    with eager, fastwm.backend("captured"):
        with eager:
            assert requested() == "eager"
        assert requested() == "captured"
    assert requested() == "auto"


def test_blocks_are_per_thread() -> None:
    inside, checked = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        inside.wait(10)
        seen.append(requested())
        with fastwm.backend("captured"):
            seen.append(requested())
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastwm.backend("eager"):
        inside.set()
        assert checked.wait(10)
        assert requested() == "eager"
    thread.join()
    assert seen == ["auto", "captured"]


# ---------------------------------------------------------------- what runs


@pytest.mark.parametrize("how", ["block", "env", "variable"])
@pytest.mark.parametrize(
    ("name", "captured"), [("auto", True), ("captured", True), ("eager", False)]
)
def test_the_engine_asked_for_runs(
    how: str, name: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("linear")
    env = case.env([B], backend=name if how == "env" else "auto")
    if how == "variable":
        monkeypatch.setenv("FASTWM_BACKEND", name)
    if how == "block":
        with fastwm.backend(name):
            assert ran_captured(env, case) is captured
    else:
        assert ran_captured(env, case) is captured


def test_the_backend_of_an_env_may_be_set_later() -> None:
    case = make_case("linear")
    env = case.env([B])
    assert ran_captured(env, case)
    env.backend = "eager"
    assert not ran_captured(env, case)


def test_captured_says_why_it_cannot() -> None:
    case = make_case("linear")
    env = case.env([B])
    with (
        fastwm.backend("captured"),
        pytest.raises(
            RuntimeError, match=r"backend='captured' cannot run this rollout: a callback, called at"
        ),
    ):
        env.rollout(T, case.policy, lambda *_: None, tensordict=case.start(B))
    assert env.rollout(T, case.policy, tensordict=case.start(B)).shape == (B, T)


def test_fused_says_why_it_cannot() -> None:
    case = make_case("linear")
    env = case.env([B])
    case.policy.register_forward_hook(lambda *_: None)
    said = r"backend='fused' cannot run this rollout: a hook on TensorDictModule"
    with fastwm.backend("fused"), pytest.raises(RuntimeError, match=said):
        env.rollout(T, case.policy, tensordict=case.start(B))
    policy = module(lambda z: z.sort(-1).values[..., :2], ["latent"], ["action"])
    said = r"backend='fused' cannot run this rollout: aten.sort: no row-wise form\."
    with fastwm.backend("fused"), pytest.raises(RuntimeError, match=said):
        env.rollout(T, policy, tensordict=case.start(B))
    assert env.rollout(T, policy, tensordict=case.start(B)).shape == (B, T)


def test_an_engine_that_cannot_run_changes_nothing() -> None:
    """The generator, the start and a planner's place are as before the call that failed."""
    from torchrl.modules.planners import cem

    case = make_case("linear")
    start, setter = case.start(B), cem._PrecomputedActionsSequentialSetter(torch.zeros(B, T, 2))
    kept, state = start.clone(), torch.get_rng_state()
    with fastwm.backend("captured"):
        with pytest.raises(RuntimeError, match="shorter than the horizon"):
            case.env([B]).rollout(T + 1, setter, tensordict=start)
        with pytest.raises(RuntimeError, match="break_when_all_done"):
            case.env([B]).rollout(T, None, tensordict=start, break_when_all_done=True)
    assert setter.cmpt == 0
    assert (start == kept).all()
    assert list(start.keys()) == list(kept.keys())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- bad names


def test_names_are_checked_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'cuda'; choose one of auto, fused"):
        fastwm.backend("cuda")
    with pytest.raises(ValueError, match="Unknown backend 'Eager'"):
        make_case("linear").env([B], backend="Eager")


def test_the_variable_is_checked_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTWM_BACKEND", "quick")
    case = make_case("linear")
    with pytest.raises(ValueError, match="FASTWM_BACKEND='quick'; choose one of"):
        case.env([B]).rollout(T, case.policy, tensordict=case.start(B))
    with fastwm.backend("eager"):  # which does not read it
        case.env([B]).rollout(T, case.policy, tensordict=case.start(B))


def test_every_name_is_known() -> None:
    for name in BACKENDS:
        with fastwm.backend(name):
            assert requested() == name
