"""What the ops over a trajectory share: their checks, and their input as the kernels take it,
``[*batch, time, feature]`` with one coefficient per step or one float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check", "coefficient", "like", "time_from_end", "time_to_second_last"]


def check(next_value: Tensor, done: Tensor, terminated: Tensor, **others: Tensor) -> None:
    """Raise what a trajectory of wrong shapes, dtypes or devices deserves, naming the argument."""
    if not next_value.dtype.is_floating_point:
        raise TypeError(f"next_state_value must be floating point: got {next_value.dtype}.")
    for name, x in (*others.items(), ("done", done), ("terminated", terminated)):
        if x.shape != next_value.shape:
            raise RuntimeError(
                "All input tensors (value, reward and done states) must share a unique shape: "
                f"{name} is {list(x.shape)}, next_state_value is {list(next_value.shape)}."
            )
        if x.device != next_value.device:
            raise RuntimeError(
                f"All input tensors must be on one device: {name} is on {x.device}, "
                f"next_state_value on {next_value.device}."
            )
        # `~` of an integer flag is not "not": 1 would become -2.
        if name in ("done", "terminated") and x.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor: got {x.dtype}.")


def time_from_end(shape: torch.Size, time_dim: int) -> int:
    """``time_dim`` counted from the end.

    Raises:
        RuntimeError: the shape has no such dimension.
    """
    from_end = time_dim - len(shape) if time_dim >= 0 else time_dim
    if not -len(shape) <= from_end < 0 or (len(shape) == 1 and from_end != -1):
        raise RuntimeError(
            "The tensor shape and the time dimension are not compatible: "
            f"got {shape} and time_dim={time_dim}."
        )
    return from_end


def time_to_second_last(x: Any, from_end: int) -> Any:
    """A view of ``x`` with its time where the kernels want it; what has none is left alone."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    return x.unsqueeze(-1) if x.ndim == 1 else x.transpose(from_end, -2)


def coefficient(x: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """A coefficient as the ops take it: one tensor of the full shape, or None and a float."""
    if not isinstance(x, Tensor):
        return None, float(x)
    if x.shape != like.shape:
        # A view: the kernels read an expanded dimension through its stride of 0.
        x = x.to(like.device).expand(like.shape)
    return x, 0.0


def like(out: Tensor, layout: Tensor) -> Tensor:
    """``out`` in the layout that the kernels and the fakes promise: that of
    ``torch.empty_like(layout)``."""
    return torch.empty_like(layout).copy_(out)
