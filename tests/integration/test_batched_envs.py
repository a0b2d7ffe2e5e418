"""Several imagined envs side by side: `SerialEnv` and `ParallelEnv`."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import check_env_specs

from tests.integration.envs import counting_env, linear_env
from tests.models import ACTION, LATENT, linear_policy

T = 4


def unbatched_env() -> object:
    return linear_env(())


@pytest.mark.parametrize(("make", "shape"), [(linear_env, (3, 2)), (unbatched_env, (3,))])
def test_serial_env(make: object, shape: tuple[int, ...]) -> None:
    env = SerialEnv(3, make)
    check_env_specs(env)
    out = env.rollout(T, linear_policy())
    assert out.shape == (*shape, T)
    assert out["latent"].shape == (*shape, T, LATENT)
    starts = out["latent"].select(len(shape), 0)
    assert not torch.equal(starts[0], starts[1])


def test_serial_env_restarts_finished_rows() -> None:
    out = SerialEnv(2, counting_env).rollout(5, linear_policy(1), break_when_any_done=False)
    assert out["latent"][1, 0, :, 0].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.slow
def test_parallel_env() -> None:
    env = ParallelEnv(2, linear_env)
    try:
        env.set_seed(0)
        out = env.rollout(T, linear_policy())
        assert out.shape == (2, 2, T)
        assert out["action"].shape == (2, 2, T, ACTION)
        assert out["next", "reward"].shape == (2, 2, T, 1)
        assert torch.equal(out["latent"][:, :, 1:], out["next", "latent"][:, :, :-1])
        assert not torch.equal(out["latent"][0], out["latent"][1])
        env.set_seed(0)
        assert torch.equal(env.rollout(1)["latent"], out["latent"][:, :, :1])
    finally:
        env.close()
