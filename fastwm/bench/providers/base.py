"""What a provider is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastwm.bench.problem import Case, Problem

__all__ = ["Built", "Provider", "Unavailable"]


class Unavailable(Exception):
    """This provider cannot run here; the message says why. Anything else raised is a failure."""


@dataclass(frozen=True)
class Built:
    """One provider on one problem: ``run`` is timed, ``read`` names what it returned.

    Where ``run`` draws numbers of its own, ``check`` is the same program on given ones, and parity
    is looked at there.
    """

    run: Callable[[], Any]
    read: Callable[[Any], dict[str, Tensor]]
    check: Callable[[], Any] | None = None

    @property
    def checked(self) -> Callable[[], Any]:
        """What to call for the parity check."""
        return self.check or self.run


def _never(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """A way of doing the rollout.

    Args:
        name: as printed and recorded.
        build: from a problem to something that runs; raises :class:`Unavailable` with the reason.
        ours: one of fastwm's engines, not a peer.
        devices: where it makes sense.
        refuses: the reason why a configuration is not worth its time, or None.
    """

    name: str
    build: Callable[[Problem], Built]
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    refuses: Callable[[Case], str | None] = _never
