"""`TransformedEnv` around an imagined env, and rollouts through it."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs import (
    Compose,
    InitTracker,
    RewardScaling,
    RewardSum,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from tests.integration.envs import counting_env, linear_env
from tests.models import LATENT, linear_policy, make_case

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 2, 6


def test_step_counter() -> None:
    env = TransformedEnv(linear_env(), StepCounter())
    check_env_specs(env)
    out = env.rollout(T, linear_policy())
    assert out["step_count"][0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert out["next", "step_count"][0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_step_counter_truncates_and_the_rows_restart() -> None:
    env = TransformedEnv(linear_env(), StepCounter(max_steps=3))
    assert env.rollout(T, linear_policy()).shape == (B, 3)
    out = env.rollout(T, linear_policy(), break_when_any_done=False)
    assert out["next", "truncated"][..., 0].tolist() == [[False, False, True] * 2] * B
    assert torch.equal(out["latent"][:, 1:3], out["next", "latent"][:, :2])
    assert not torch.equal(out["latent"][:, 3], out["next", "latent"][:, 2])


def test_reward_sum() -> None:
    env = TransformedEnv(linear_env(), RewardSum())
    check_env_specs(env)
    out = env.rollout(T, linear_policy())
    torch.testing.assert_close(out["next", "episode_reward"], out["next", "reward"].cumsum(1))


def test_reward_sum_starts_anew_with_the_row() -> None:
    env = TransformedEnv(counting_env(), RewardSum())
    out = env.rollout(T, linear_policy(1), break_when_any_done=False)
    assert out["next", "reward"][0, :, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert out["next", "episode_reward"][0, :, 0].tolist() == [1, 3, 6, 1, 3, 6]


def test_several_transforms_together() -> None:
    env = TransformedEnv(
        linear_env(), Compose(InitTracker(), StepCounter(), RewardScaling(0.0, 10.0), RewardSum())
    )
    check_env_specs(env)
    torch.manual_seed(0)
    out = env.rollout(T, linear_policy())
    assert out["is_init"][0, :, 0].tolist() == [True] + [False] * 5
    plain = make_case("linear").env([B])
    want = plain.rollout(
        T, actions=list(out["action"].unbind(1)), tensordict=out[:, 0].select("latent")
    )
    torch.testing.assert_close(out["next", "reward"], 10 * want["next", "reward"])


@pytest.mark.parametrize("name", ["rssm", "context", "multi_agent"])
def test_the_specs_of_a_transformed_env(name: str) -> None:
    case = make_case(name)
    env = TransformedEnv(
        case.env([B], initial_state=lambda shape: case.start(*shape)), StepCounter()
    )
    check_env_specs(env)


def test_a_start_given_to_the_transformed_env() -> None:
    case = make_case("linear")
    env = TransformedEnv(case.env([B]), StepCounter())
    begin = case.start(B)
    out = env.rollout(T, case.policy, tensordict=begin.clone())
    want = case.env([B]).rollout(T, case.policy, tensordict=begin.clone())
    torch.testing.assert_close(out["next", "reward"], want["next", "reward"])
    assert out["latent"].shape == (B, T, LATENT)


def test_gradients_pass_through_transforms() -> None:
    case = make_case("linear")
    env = TransformedEnv(case.env([B]), RewardSum())
    out = env.rollout(T, case.policy, tensordict=case.start(B))
    out["next", "episode_reward"][:, -1].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in case.policy.parameters())


def test_restarting_without_an_initial_state_says_what_is_missing() -> None:
    """A transform that truncates makes rows restart, and the bare env has nothing to restart from."""
    case = make_case("linear")
    env = TransformedEnv(case.env([B]), StepCounter(max_steps=3))
    with pytest.raises(RuntimeError, match=r"initial_state="):
        env.rollout(T, case.policy, tensordict=case.start(B), break_when_any_done=False)
