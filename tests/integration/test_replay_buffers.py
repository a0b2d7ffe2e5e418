"""Imagined rollouts in replay buffers, and real observations out of one."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP

import fastwm
from tests.integration.envs import linear_env
from tests.models import linear_policy, make_case, spec_env

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 5, 7


@torch.no_grad()
def imagined(**kwargs: object) -> TensorDict:
    case = make_case("linear")
    env = fastwm.WorldModelEnv(
        case.world_model, spec_env(done=("done", "terminated", "truncated")), batch_size=[B]
    )
    return env.rollout(T, case.policy, tensordict=case.start(B), **kwargs)


def test_flat_transitions() -> None:
    rollout = imagined()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(B * T), batch_size=64)
    buffer.extend(rollout.reshape(-1))
    assert len(buffer) == B * T
    sample = buffer.sample()
    # Each row is one of the rollout's, whole.
    row = sample["index"]
    for key in ("latent", "action", ("next", "latent"), ("next", "reward"), ("next", "done")):
        assert torch.equal(sample[key], rollout.reshape(-1)[key][row])


def test_trajectories_as_rows() -> None:
    rollout = imagined()
    buffer = ReplayBuffer(storage=LazyTensorStorage(2 * B), batch_size=3)
    buffer.extend(rollout)
    assert len(buffer) == B
    assert buffer.sample().shape == (3, T)
    assert torch.equal(buffer[:]["latent"], rollout["latent"])


def test_two_dimensional_storage() -> None:
    rollout = imagined()
    buffer = ReplayBuffer(storage=LazyTensorStorage(B * T, ndim=2), batch_size=16)
    buffer.extend(rollout.transpose(0, 1))
    assert len(buffer) == B * T
    assert buffer.sample().shape == (16,)


@pytest.mark.parametrize("length", [2, 3])
def test_slice_sampler_cuts_within_imagined_trajectories(length: int) -> None:
    rollout = imagined(set_truncated=True)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(B * T),
        sampler=SliceSampler(slice_len=length, end_key=("next", "done")),
        batch_size=20 * length,
    )
    buffer.extend(rollout.reshape(-1))
    slices = buffer.sample().reshape(20, length)
    # Within a slice each state is the one before advanced: no slice spans two trajectories.
    assert torch.equal(slices["latent"][:, 1:], slices["next", "latent"][:, :-1])


def test_what_is_stored_outlives_later_rollouts() -> None:
    env, policy = linear_env((B,)), linear_policy()
    with torch.no_grad():
        first = env.rollout(T, policy)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(B * T))
        buffer.extend(first.reshape(-1))
        kept = buffer[:].clone()
        for _ in range(3):
            env.rollout(T, policy)
    assert (buffer[:] == kept).all()
    assert (first.reshape(-1) == kept.exclude("index")).all()


def test_a_buffer_of_real_observations_starts_imagination() -> None:
    torch.manual_seed(0)
    real = GymEnv("Pendulum-v1")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=32)
    buffer.extend(real.rollout(60))
    wm = fastwm.WorldModel(
        TensorDictModule(nn.Linear(3, 8), ["observation"], ["latent"]),
        TensorDictModule(
            MLP(in_features=9, out_features=8, num_cells=[16]),
            ["latent", "action"],
            [("next", "latent")],
        ),
        TensorDictModule(nn.Linear(8, 1), [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(wm, real, batch_size=[B], initial_state=buffer)
    out = env.rollout(T)
    assert out.shape == (B, T)
    assert out["action"].abs().max() <= 2  # Pendulum's bounds
    known = wm.encoder.module(buffer[:]["observation"])
    first = out["latent"][:, 0]
    assert (first.unsqueeze(1) - known).abs().amax(-1).amin(-1).max() < 1e-6
