"""TorchRL's data collectors over an imagined env, in one process and in several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tests.integration.envs import RandomStart, counting_env, linear_env
from tests.models import (
    ACTION,
    LATENT,
    linear_policy,
    make_case,
    real_observations,
    sampled_actor,
)

ROWS = 2  # batch of each env


def collected(collector: Any) -> Iterator[Any]:
    try:
        yield from collector
    finally:
        collector.shutdown()


def check(batch: Any, steps: int) -> None:
    assert batch.shape == (ROWS, steps)
    assert batch["latent"].shape == (ROWS, steps, LATENT)
    assert batch["action"].shape == (ROWS, steps, ACTION)
    assert batch["next", "reward"].shape == (ROWS, steps, 1)
    # A trajectory goes on from step to step, and from one batch to the next.
    assert torch.equal(batch["latent"][:, 1:], batch["next", "latent"][:, :-1])


def test_single_process() -> None:
    batches = list(
        collected(Collector(linear_env, linear_policy(), frames_per_batch=12, total_frames=36))
    )
    assert len(batches) == 3
    for batch in batches:
        check(batch, 6)
    torch.testing.assert_close(batches[1]["latent"][:, 0], batches[0]["next", "latent"][:, -1])
    assert batches[0]["collector", "traj_ids"].unique().numel() == ROWS


@pytest.mark.parametrize("form", ["tensordict", "callable", "replay-buffer"])
def test_every_form_of_initial_state(form: str) -> None:
    case = make_case("linear")
    initial = {
        "tensordict": case.start(ROWS),
        "callable": RandomStart(),
        "replay-buffer": real_observations(),
    }[form]
    env = case.env([ROWS], initial_state=initial)
    batches = list(collected(Collector(env, case.policy, frames_per_batch=12, total_frames=24)))
    assert len(batches) == 2
    check(batches[0], 6)


@pytest.mark.parametrize("name", ["rssm_sampled", "nested", "multi_agent", "context"])
def test_every_form_of_keys(name: str) -> None:
    case = make_case(name)
    env = case.env([ROWS], initial_state=lambda shape: case.start(*shape))
    (batch,) = collected(Collector(env, case.policy, frames_per_batch=8, total_frames=8))
    for key, shape in {**case.latents, **case.context}.items():
        assert batch.get(key).shape == (ROWS, 4, *shape)


def test_without_a_policy_actions_are_random() -> None:
    (batch,) = collected(Collector(linear_env, None, frames_per_batch=12, total_frames=12))
    check(batch, 6)
    assert batch["action"].std() > 0


def test_finished_rows_restart() -> None:
    (batch,) = collected(
        Collector(counting_env, linear_policy(1), frames_per_batch=14, total_frames=14)
    )
    assert batch["latent"][0, :, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert batch["next", "done"][0, :, 0].tolist() == [False, False, True] * 2 + [False]
    assert batch["collector", "traj_ids"].unique().numel() > ROWS


def test_max_frames_per_traj_truncates() -> None:
    (batch,) = collected(
        Collector(
            linear_env,
            linear_policy(),
            frames_per_batch=12,
            total_frames=12,
            max_frames_per_traj=3,
        )
    )
    assert batch["next", "truncated"][0, :, 0].tolist() == [False, False, True] * 2
    # The row restarts after it.
    assert not torch.equal(batch["latent"][:, 3], batch["next", "latent"][:, 2])


def test_into_a_replay_buffer() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16)
    for batch in collected(
        Collector(linear_env, sampled_actor(), frames_per_batch=12, total_frames=36)
    ):
        buffer.extend(batch.reshape(-1))
    assert len(buffer) == 36
    assert buffer.sample()["next", "reward"].shape == (16, 1)


@pytest.mark.slow
def test_two_processes_that_get_new_policy_weights() -> None:
    policy = linear_policy()
    collector = MultiSyncCollector(
        [linear_env, linear_env],
        policy,
        frames_per_batch=16,
        total_frames=64,
        update_at_each_batch=True,
    )
    collector.set_seed(0)
    batches = []
    for batch in collected(collector):
        assert batch.shape == (2, ROWS, 4)
        for worker in batch.unbind(0):
            check(worker, 4)
        batches.append(batch.clone())
        with torch.no_grad():
            for p in policy.parameters():
                p.zero_()
        collector.update_policy_weights_()
    assert len(batches) == 4
    # Workers imagine different starts,
    assert not torch.equal(batches[0][0]["latent"][:, 0], batches[0][1]["latent"][:, 0])
    # and act on the weights that they were sent.
    assert batches[0]["action"].abs().sum() > 0
    assert batches[-1]["action"].abs().sum() == 0
