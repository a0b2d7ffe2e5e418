"""Which engine is asked for: per env or loss, per block of code, per process.

``"fused"`` runs the step as a row program, the whole horizon in one call of the C++ library or, on CUDA, of a
Triton kernel (float32 or float64). ``"captured"`` loops the traced step without TensorDict. ``"eager"`` is
``EnvBase.rollout`` itself, the definition. ``"auto"`` is the first of them that takes the rollout and is not
known to be the slower (``fastwm/engines/choice.py``; on CUDA it passes over ``"fused"``).
"""

from __future__ import annotations

import os
from contextvars import ContextVar

__all__ = ["BACKENDS", "backend", "check_name", "requested"]

BACKENDS = ("auto", "fused", "captured", "eager")

# The names of the blocks entered, innermost last.
_blocks: ContextVar[tuple[str, ...]] = ContextVar("fastwm_backend", default=())


def check_name(name: str) -> str:
    """Return ``name``; raise ValueError when it is no backend's."""
    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return name


class backend:
    """Ask for an engine within a block: ``with fastwm.backend("eager"): ...``.

    The innermost block wins, then the ``backend=`` of the env or loss when it is not ``"auto"``, then
    the environment variable ``FASTWM_BACKEND``, then ``"auto"``: the fastest engine that can run. One asked
    for by name that cannot run raises, saying why.

    Args:
        name: ``"auto"``, ``"fused"``, ``"captured"`` or ``"eager"``.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import fastwm
        >>> with fastwm.backend("eager"):
        ...     print(fastwm.requested_backend("captured"))
        eager
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name)

    def __enter__(self) -> backend:
        _blocks.set((*_blocks.get(), self.name))
        return self

    def __exit__(self, *exc: object) -> None:
        _blocks.set(_blocks.get()[:-1])


def requested(own: str = "auto") -> str:
    """The backend in force for an object whose own setting is ``own``.

    Raises:
        ValueError: ``FASTWM_BACKEND`` holds an unknown name.
    """
    blocks = _blocks.get()
    if blocks:
        return blocks[-1]
    if own != "auto":
        return own
    named = os.environ.get("FASTWM_BACKEND")
    if named is None:
        return "auto"
    if named not in BACKENDS:
        raise ValueError(f"FASTWM_BACKEND={named!r}; choose one of {', '.join(BACKENDS)}.")
    return named
