"""pickle, torch.save and deepcopy of an env, before and after it has run."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from tests.integration.envs import linear_env
from tests.models import CASES, make_case

T = 4


def by_torch_save(env: Any) -> Any:
    file = io.BytesIO()
    torch.save(env, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "torch.save": by_torch_save,
    "deepcopy": copy.deepcopy,
}


def same(a: Any, b: Any) -> None:
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_copied_env_imagines_the_same(name: str, way: str, used: bool, each_backend: str) -> None:
    case = make_case(name)
    env = case.env([2])
    begin = case.start(2)

    def rollout(which: Any) -> Any:
        torch.manual_seed(3)
        return which.rollout(T, case.policy, tensordict=begin.clone(), break_when_any_done=False)

    if used:  # plans and graphs must not travel, nor be in the way
        rollout(env)
    copied = WAYS[way](env)
    want = rollout(env)
    same(rollout(copied), want)
    # Weights of its own.
    with torch.no_grad():
        for p in copied.world_model.parameters():
            p.add_(1)
    same(rollout(env), want)


@pytest.mark.parametrize("way", WAYS)
def test_settings_and_initial_state_travel(way: str) -> None:
    env = linear_env()
    env.backend, env.done_threshold = "eager", 0.25
    copied = WAYS[way](env)
    assert copied.backend == "eager"
    assert copied.done_threshold == 0.25
    assert copied.rollout(T).shape == (2, T)
    assert copied.specs == env.specs


def test_a_checkpoint_of_the_env_loads(each_backend: str) -> None:
    one, two = make_case("linear", seed=0), make_case("linear", seed=1)
    env, other = one.env([2]), two.env([2])
    begin = one.start(2)
    want = env.rollout(T, one.policy, tensordict=begin.clone())
    before = other.rollout(T, one.policy, tensordict=begin.clone())
    assert not torch.equal(before["next", "reward"], want["next", "reward"])
    other.load_state_dict(env.state_dict())
    same(other.rollout(T, one.policy, tensordict=begin.clone()), want)
