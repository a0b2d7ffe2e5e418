"""Env makers that worker processes can import."""

from __future__ import annotations

import torch
from tensordict import TensorDict

import fastwm
from tests.models import LATENT, counting_world_model, make_case, spec_env


class RandomStart:
    """A picklable ``initial_state``: normal latents of the width asked for."""

    def __init__(self, width: int = LATENT) -> None:
        self.width = width

    def __call__(self, shape: torch.Size) -> TensorDict:
        return TensorDict({"latent": torch.randn(*shape, self.width)}, shape)


def linear_env(batch: tuple[int, ...] = (2,)) -> fastwm.WorldModelEnv:
    """A linear world model with fixed weights; starts drawn at random."""
    return make_case("linear").env(batch, initial_state=RandomStart())


def counting_env(batch: tuple[int, ...] = (2,), done_at: float = 3) -> fastwm.WorldModelEnv:
    """Starts at latent 0, one up a step, done (and restarted) at ``done_at``."""
    return fastwm.WorldModelEnv(
        counting_world_model(done_at=done_at),
        spec_env(done=("done", "terminated", "truncated")),
        batch_size=batch,
        initial_state=TensorDict({"latent": torch.zeros(1)}, []),
    )
