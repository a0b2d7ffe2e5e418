"""NVTX ranges around trace, plan, capture, replay and assemble, for Nsight Systems.

Off unless the variable ``FASTWM_NVTX`` is 1 and the package nvtx is installed. While off, nothing is paid
but a shared do-nothing context.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

__all__ = ["annotate", "enabled"]

_OFF: AbstractContextManager = nullcontext()

try:
    if os.environ.get("FASTWM_NVTX", "0") in ("", "0"):
        raise ImportError
    import nvtx as _nvtx

    enabled = True
except ImportError:
    enabled = False


def annotate(name: str) -> AbstractContextManager:
    """A range named ``name``: ``with annotate("fastwm.trace"): ...``."""
    return _nvtx.annotate(name, domain="fastwm") if enabled else _OFF
