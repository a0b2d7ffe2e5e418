"""A recorder for the CUDA graph engine that replays on the CPU as a graph does on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CpuRecorder"]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class CpuRecorder:
    """Replays the recorded ops into the memory of the recorded results."""

    def record(self, work, warmups):
        state = torch.get_rng_state()
        for _ in range(warmups):
            work()
        torch.set_rng_state(state)
        with _Tape() as tape:
            result = work()
        torch.set_rng_state(state)

        def replay() -> None:
            with torch.no_grad():
                for func, args, kwargs, outs in tape.calls:
                    again = func(*args, **kwargs)
                    if isinstance(outs, torch.Tensor):
                        outs, again = [outs], [again]
                    for out, new in zip(outs, again, strict=True):
                        if new.data_ptr() != out.data_ptr():
                            torch.ops.aten.copy_(out.detach(), new)

        return result, replay

    def random_state(self):
        return torch.get_rng_state()

    def set_random_state(self, state):
        torch.set_rng_state(state)

    def advance(self, before, taken, of):
        self.advanced = (taken, of)
