"""Peak memory of one call, in physical pages: nothing hides from it, whoever allocates.

On Linux the process resets its own high-water mark (``/proc/self/clear_refs``), runs the call, and
reads the mark again. The C library keeps freed memory in its heap, which would blur this; the
worker process that measures is therefore started with ``MALLOC_MMAP_THRESHOLD_`` set
(:func:`environment`), so that every larger block is mapped on its own and given back when it is
freed. On CUDA the allocator's own peak counter is read.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Peak", "environment", "held_bytes", "peak_of", "unmeasurable"]

#: Blocks of this size and more are mapped on their own.
THRESHOLD = 64 * 1024

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def environment() -> dict[str, str]:
    """Variables that the measuring process must be started with."""
    return {"MALLOC_MMAP_THRESHOLD_": str(THRESHOLD), "MALLOC_MMAP_MAX_": str(1 << 20)}


def unmeasurable(device: str) -> str | None:
    """Why peaks cannot be measured in this process, or None."""
    if device.startswith("cuda"):
        return None
    if not (_CLEAR.exists() and os.access(_CLEAR, os.W_OK)):
        return "this system has no writable /proc/self/clear_refs"
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != str(THRESHOLD):
        return "the process was not started with MALLOC_MMAP_THRESHOLD_"
    return None


@dataclass(frozen=True)
class Peak:
    """Memory of one call.

    Args:
        peak_bytes: at the worst moment, beyond what is held without the provider.
        output_bytes: behind what it returned.
        kept_bytes: what the provider holds between calls (workspaces), found by letting go of it.
        how: the method.
        torch_bytes: most that torch's own allocator held at once in one call, by its own record;
            None where that is what ``peak_bytes`` is.
    """

    peak_bytes: int
    output_bytes: int
    kept_bytes: int
    how: str
    torch_bytes: int | None = None


def held_bytes(value: Any) -> int:
    """Bytes of the storages behind a result, each counted once however many views it has."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, TensorDictBase):
            for leaf in item.values(True, True):
                visit(leaf)
        elif isinstance(item, dict):
            for leaf in item.values():
                visit(leaf)
        elif isinstance(item, list | tuple):
            for leaf in item:
                visit(leaf)
        elif hasattr(item, "nbytes"):  # an array of another library
            storages[id(item)] = int(item.nbytes)

    visit(value)
    return sum(storages.values())


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _give_back() -> None:
    """Return what the C library holds in reserve, so that it does not count as held before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _torch_bytes(run: Callable[[], Any]) -> int:
    """Most that torch's allocator held at once above what it held before, from its record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    results = record.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    del result
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_of(make: Callable[[], Callable[[], Any]], device: str = "cpu") -> Peak:
    """Make it, run it once to warm up, measure one more call, let go of it.

    Args:
        make: returns what to run, which returns everything that it means to keep. Nothing else may
        hold on
            to what ``make`` returned.
        device: where its tensors are.

    Raises:
        RuntimeError: peaks cannot be measured here; see :func:`unmeasurable`.
    """
    reason = unmeasurable(device)
    if reason:
        raise RuntimeError(f"Peak memory cannot be measured: {reason}.")
    on_cuda = device.startswith("cuda")

    def held() -> int:
        _give_back()
        if not on_cuda:
            return _status("VmRSS")
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)

    run = make()
    run()
    torch_bytes = None if on_cuda else _torch_bytes(run)
    before = held()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize()
        worst = torch.cuda.max_memory_allocated(device)
    else:
        _CLEAR.write_text("5")
        result = run()
        worst = _status("VmHWM")
    output = held_bytes(result)
    del run, result
    # What becomes free with the provider was its own, not the process's.
    kept = max(0, before - held())
    how = (
        "torch.cuda.max_memory_allocated"
        if on_cuda
        else "resident high-water mark (VmHWM), large blocks mapped"
    )
    return Peak(worst - before + kept, output, kept, how, torch_bytes)
