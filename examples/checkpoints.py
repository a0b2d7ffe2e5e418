"""Checkpoints of a training run: state dicts, plain values and the random states, in one file."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["load", "replace", "save"]


def save(path: Path, run: Mapping[str, Any], parts: Mapping[str, Any], values: Any) -> None:
    """Write a checkpoint.

    Args:
        path: the file.
        run: what a run that goes on from it must share.
        parts: by name, things with a ``state_dict``: modules, optimizers, replay buffers, schedulers.
        values: anything else.
    """
    state = {
        "run": dict(run),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "values": values,
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }
    replace(path, lambda part: torch.save(state, part))


def load(path: Path, run: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """Restore ``parts`` and the random states; returns the values.

    Raises:
        SystemExit: the checkpoint is of another run; names the first difference.
    """
    state = torch.load(path, weights_only=False)
    for name, saved in state["run"].items():
        if saved != run[name]:
            sys.exit(f"{path} is of another run: {name} {saved!r} in it, {run[name]!r} asked for.")
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    of_python, of_numpy, of_torch = state["random"]
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    return state["values"]


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file such that a run killed meanwhile leaves the old one whole."""
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)
