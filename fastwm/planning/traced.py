"""Imagination on raw tensors: the env's step under each policy, traced once, on the engines of rollouts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from fastwm.assemble import leaves
from fastwm.engines.fused import NotFusible
from fastwm.fast_env import FastEnv
from fastwm.plan import fuse_now, plan_for
from fastwm.planning.ensemble import Members, members_of
from fastwm.planning.imagination import (
    Imagination,
    Imagined,
    Keys,
    Path,
    mean_of_pair,
    members,
    rows_of,
)
from fastwm.planning.pieces import Piece
from fastwm.request import Feed, NotCapturable, Request
from fastwm.specs import next_key

__all__ = ["Ask", "TracedImagination"]

Ask = tuple[
    str, int
]  # "candidates", "rollout", "policy" or "value"; for how many of each environment

_KEPT = 32  # pieces kept per planner


class _Known:
    """What a planner's decisions leave for the next one.

    Attributes:
        pieces: by plan and use, least recently used first.
        members: see :func:`fastwm.planning.ensemble.members_of`.
        bootstraps: policy and pair of values, by the latter.
        graphs: whole decisions, by what they were recorded for.
        failed: why some could not be recorded, by the same.
    """

    def __init__(self) -> None:
        self.pieces: OrderedDict[Any, Piece] = OrderedDict()
        self.members: dict[Any, Any] = {}
        self.bootstraps: dict[Members, TensorDictSequential] = {}
        self.graphs: OrderedDict[Any, Any] = OrderedDict()
        self.failed: dict[Any, str] = {}


# Beside the planners and not in them: a planner is walked, copied and pickled like any module.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


class TracedImagination(Imagination):
    """Rollouts without TensorDict.

    Args:
        owner: the planner, whose pieces are kept for its next decision.
        env: traced.
        asks: all that will be asked in this decision.
        engine: ``"auto"``, ``"fused"`` or ``"captured"``.
        action: one action, ``[*A]``, for its dtype.

    Raises:
        NotCapturable: with the one thing that rules it out.
    """

    def __init__(
        self,
        owner: nn.Module,
        env: FastEnv,
        start: TensorDictBase,
        keys: Keys,
        horizon: int,
        asks: Sequence[Ask],
        engine: str,
        action: Tensor,
        policy: TensorDictModuleBase | None = None,
        bootstrap: TensorDictSequential | None = None,
    ) -> None:
        super().__init__(start, keys, horizon)
        self.owner = owner
        self.env = env
        self.engine = engine
        self.action = action
        self.known = _known.setdefault(owner, _Known())
        self._members: Members | None = None
        if bootstrap is not None:
            bootstrap = self._paired(bootstrap)
        self._policies = {"policy": policy, "value": bootstrap}
        self.pieces: dict[Ask, Piece] = {}
        self._leaves: dict[int, dict[Path, Tensor]] = {}
        #: The checks of all pieces, where they are not to be looked at.
        self.checks: list[Tensor] | None = None
        for kind, count in asks:
            self.pieces[kind, count] = self._bind(kind, count)

    # -- binding

    def _paired(self, bootstrap: TensorDictSequential) -> TensorDictSequential:
        """With a pair of the value's members in the ensemble's place, where that goes."""
        action, value = bootstrap.module
        assert self.keys.value is not None
        td = rows_of(self.start, 1)
        td.set(self.keys.action, self.action.expand(self.batch, *self.action.shape))
        self._members = members_of(value, self.keys.value, td, self.known.members)
        if self._members is None:
            return bootstrap
        known = self.known.bootstraps
        if self._members not in known:
            known.clear()
            known[self._members] = TensorDictSequential(action, self._members)
        return known[self._members]

    def _bind(self, kind: str, count: int) -> Piece:
        env, keys = self.env, self.keys
        follows = kind != "value"
        steps = self.horizon if follows else 1
        policy = self._policies.get(kind)
        td = rows_of(self.start, count)
        request = Request(steps, policy, auto_reset=False, break_when_any_done=False, tensordict=td)
        request.refuse(env)
        feed = None
        if policy is None:
            actions = self.action.expand(td.batch_size[0], *self.action.shape)
            feed = Feed((keys.action,), lambda: (actions,), (actions,))
        plan, inputs = plan_for(env, request, td, feed, patient=self.engine != "auto")
        if self.engine == "fused":
            fuse_now(env, plan, inputs, feed)
        self._leaves[count] = _contiguous(inputs)
        known = self.known.pieces
        name = (id(plan), kind, steps, self.engine)
        if name not in known:
            known[name] = self._make(plan, kind, steps)
            while len(known) > _KEPT:
                known.popitem(last=False)
        known.move_to_end(name)
        return known[name]

    def _make(self, plan: Any, kind: str, steps: int) -> Piece:
        keys = self.keys
        wanted: list[Path] | None = None
        if kind == "value":
            assert keys.value is not None
            wanted = [keys.value]
        elif kind != "rollout":
            wanted = [keys.reward, *(next_key(path) for path in keys.carried)]
            if plan.flags_vary():
                wanted += keys.done
            if kind == "policy":
                wanted.append(keys.action)
        for path in wanted or ():
            if ("td", path) not in plan.traced.graph.outputs:
                raise KeyError(f"The planner reads {path}, but no step writes {path}.")
        follows = kind != "value"
        reason = plan.unfused or (plan.fused.slower if plan.fused is not None else "")
        if plan.fused is not None and (self.engine == "fused" or not reason):
            try:
                if self.engine != "captured":
                    return Piece(plan, wanted, steps, fused=True, follows=follows)
            except NotFusible as error:
                reason = str(error)
        if self.engine == "fused":
            raise NotCapturable(f"{kind}: {reason}")
        compiler = self.env.step_compiler()
        return Piece(
            plan, wanted, steps, fused=False, follows=follows, compiler=compiler, unfused=reason
        )

    def starting_from(self, start: TensorDictBase) -> TracedImagination:
        """The same, bound to the same pieces, for another start of the same kind."""
        other = copy.copy(self)
        other.start = start
        other._leaves = {n: _contiguous(leaves(rows_of(start, n))) for n in self._leaves}
        return other

    # -- running

    def candidates(self, actions: Tensor) -> Imagined:
        count = actions.shape[1]
        given = actions.flatten(0, 1)
        results = self.pieces["candidates", count].run(self._leaves[count], given, self.checks)
        return self._taken(count, given, results)

    def rollout(self, actions: Tensor) -> TensorDictBase:
        piece = self.pieces["rollout", actions.shape[1]]
        results = piece.run(self._leaves[actions.shape[1]], actions.flatten(0, 1), self.checks)
        return piece.plan.traced.template.fill(results, self.horizon, 1)

    def policy(self, count: int) -> Imagined:
        results = self.pieces["policy", count].run(self._leaves[count], None, self.checks)
        return self._taken(count, results[self.keys.action], results)

    def value(self, last: dict[Path, Tensor], pair: Tensor) -> Tensor:
        assert self.keys.value is not None
        count = next(iter(last.values())).shape[1]
        if self._members is not None:
            self._members.pair.copy_(members(pair, self._members.count))
        inputs = dict(self._leaves[count])
        inputs.update({path: value.flatten(0, 1).contiguous() for path, value in last.items()})
        results = self.pieces["value", count].run(inputs, None, self.checks)
        values = results[self.keys.value].reshape(self.batch, count, -1)
        return mean_of_pair(values, pair) if self._members is None else values.mean(-1)

    def _taken(self, count: int, actions: Tensor, results: dict[Path, Tensor]) -> Imagined:
        done = tuple(path for path in self.keys.done if path in results)
        return self._imagined(count, results.get, actions, done)


def _contiguous(tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
    return {path: value.contiguous() for path, value in tensors.items() if path[0] != "next"}
