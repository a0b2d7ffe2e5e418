"""The noise of every run: each begins at the same state of torch's generator."""

from __future__ import annotations

import torch

__all__ = ["SEED", "reseed"]

SEED = 1234


def reseed(device: str = "cpu") -> None:
    """Put the generators that a run on ``device`` draws from where every run begins."""
    # Not torch.manual_seed, which also looks for every other kind of device.
    torch.default_generator.manual_seed(SEED)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(SEED)
