"""Plans remembered by kind of call: those that still hold are used again, refusals included."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastwm.guarded_trace import BadCall, StateChanges, own_saved_tensors
from fastwm.nvtx import annotate
from fastwm.process_modes import NotCapturable

__all__ = ["PlanCache", "Refusal", "usable"]

KEYS = 64  # kinds of call remembered per owner
VARIANTS = 8  # states of the modules (train, eval, ...) remembered per kind of call
PATIENCE = 16  # plans made in a row without one being used again, before auto stops making them
RETRY = 256  # calls after which code that changes Python state is asked again

Holds = Callable[..., tuple[bool, str | None]]


class Remembered(Protocol):
    """A plan or a refusal."""

    def holds(self, *asked: Any) -> tuple[bool, str | None]:
        """Whether nothing it rests on has changed; else what did."""


@dataclass
class Refusal:
    """Why a kind of call is left to the eager path, for as long as nothing changes.

    Attributes:
        reason: what ruled the trace out.
        unchanged: whether what the verdict rests on still holds; None where that changes all the time.
        tries: without it, how many more calls until the question is asked again.
    """

    reason: str
    unchanged: Holds | None
    tries: int = RETRY

    def holds(self, *asked: Any) -> tuple[bool, str | None]:
        if self.unchanged is not None:
            return self.unchanged(*asked)
        self.tries -= 1
        return self.tries > 0, "it is time to ask again"


def usable(found: Any) -> Any:
    """The plan that was found.

    Raises:
        NotCapturable: it is a refusal.
    """
    if isinstance(found, Refusal):
        raise NotCapturable(found.reason)
    return found


@dataclass
class PlanCache:
    """The plans of one env or loss, least recently used first to go."""

    plans: OrderedDict[Any, list[Any]] = field(default_factory=OrderedDict)
    unused: int = 0
    calls: int = 0
    warned: set[str] = field(default_factory=set)
    last_change: str = ""
    traces: int = 0  # how often something was traced
    state_changes: dict[Any, int] = field(default_factory=dict)
    owner: Any = None
    lock: Any = field(default_factory=threading.RLock)  # calls may come from several threads

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the owner, or one sent elsewhere, makes its own plans

    def find(self, key: Any, *asked: Any) -> Any:
        """What is remembered of this kind of call and still holds, else None."""
        self.calls += 1
        variants: list[Remembered] | None = self.plans.get(key)
        if variants is None:
            return None
        self.plans.move_to_end(key)
        for found in variants:
            same, what = found.holds(*asked)
            if same:
                self.unused = 0
                return found
            self.last_change = what or ""
        return None

    def refuse_if_in_vain(self, owner: str, new: str) -> None:
        """Raise :class:`NotCapturable` where plans are made again and again and none is used twice.

        Args:
            owner: what the plans are for, in a word.
            new: what may be new at every call.
        """
        if self.unused >= PATIENCE and self.calls % PATIENCE:
            raise NotCapturable(
                f"plans for this {owner} are never used twice: {new} is new at every call "
                f"{'(' + self.last_change + ')' if self.last_change else ''}"
            )

    def make(self, key: Any, plan: Callable[[], Any], rests_on: Callable[[], Holds]) -> Any:
        """The result of ``plan()``; or a :class:`Refusal`, where that says no. Remembered either way.

        Args:
            key: the kind of call.
            plan: makes the plan.
            rests_on: what a refusal rests on.

        Raises:
            NotCapturable: for this once, and not remembered.
        """
        self.unused += 1
        with annotate("fastwm.plan"), own_saved_tensors():
            found = self._made(key, plan, rests_on)
        variants = self.plans.get(key)
        if variants is None:
            variants = self.plans[key] = []
            while len(self.plans) > KEYS:
                self.plans.popitem(last=False)
        variants.insert(0, found)
        del variants[VARIANTS:]
        return found

    def _made(self, key: Any, plan: Callable[[], Any], rests_on: Callable[[], Holds]) -> Any:
        self.traces += 1
        try:
            return plan()
        except StateChanges as reason:
            # Once may be a cache that fills itself; what does it again is left to the eager path.
            times = self.state_changes.pop(key, 0) + 1
            if times < 2:
                while len(self.state_changes) >= KEYS:
                    del self.state_changes[next(iter(self.state_changes))]
                self.state_changes[key] = times
                raise
            return Refusal(str(reason), None)
        except BadCall:
            raise
        except NotCapturable as reason:
            # Remember the refusal, with what it rests on, so as not to trace again at each call.
            try:
                return Refusal(str(reason), rests_on())
            except Exception:  # too large to watch, or not to be looked at
                self.last_change = str(reason)
                raise reason from None
