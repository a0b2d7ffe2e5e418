"""Imagination on raw tensors: the env's step under each policy, traced once, on the engines of rollouts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from fastwm.assemble import leaves
from fastwm.engines.fused import NotFusible
from fastwm.fast_env import FastEnv
from fastwm.plan import Plan, fuse_now, plan_for
from fastwm.planning.ensemble import Found, Members, members_of
from fastwm.planning.graph import Recorded
from fastwm.planning.imagination import (
    Imagination,
    Imagined,
    Keys,
    Path,
    mean_of_pair,
    members,
    rows_of,
)
from fastwm.planning.pieces import Piece, cut
from fastwm.planning.shared_start import SharedStart, divide
from fastwm.request import Feed, NotCapturable, Request
from fastwm.specs import next_key
from fastwm.tracing import preserved_random_state

__all__ = ["Ask", "TracedImagination"]

Ask = tuple[
    str, int
]  # "candidates", "rollout", "policy" or "value"; for how many of each environment

_KEPT = 32  # pieces kept per planner
# Multiply-adds that a divided first step must spare in each iteration, for a call more and inputs to write.
_WORTH = 10_000_000


class _Known:
    """What a planner's decisions leave for the next one.

    Attributes:
        pieces: by plan and use, least recently used first.
        found: see :func:`fastwm.planning.ensemble.members_of`.
        paired: the bootstrap with a pair of values in the ensemble's place, and what it was made from.
        recorded: whole decisions, as CUDA graphs.
    """

    def __init__(self) -> None:
        self.pieces: OrderedDict[Any, Piece] = OrderedDict()
        self.found: Found | None = None
        self.paired: tuple[TensorDictSequential, Members, TensorDictSequential] | None = None
        self.recorded = Recorded()


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
        self._inputs: dict[Ask, dict[Path, Tensor]] = {}
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
        known = self.known
        known.found = members_of(value, self.keys.value, td, known.found)
        self._members = known.found.members
        if self._members is None:
            return bootstrap
        kept = known.paired
        if kept is None or kept[0] is not bootstrap or kept[1] is not self._members:
            joined = TensorDictSequential(action, self._members)
            kept = known.paired = (bootstrap, self._members, joined)
        return kept[2]

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
        inputs = _contiguous(inputs)
        known = self.known.pieces
        name = (id(plan), kind, steps, self.engine)
        if name not in known:
            known[name] = self._make(plan, kind, steps, inputs)
            while len(known) > _KEPT:
                known.popitem(last=False)
        known.move_to_end(name)
        piece = known[name]
        self._inputs[kind, count] = piece.prepared(inputs, count)
        return piece

    def _make(self, plan: Plan, kind: str, steps: int, inputs: dict[Path, Tensor]) -> Piece:
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
        reason = plan.unfused or (plan.fused.slower if plan.fused is not None else "")
        carried = plan.traced.carried if kind != "value" else ()
        graph = None
        if wanted is not None:
            graph = cut(plan.traced.graph, [("td", path) for path in wanted], carried)
        if plan.fused is not None and (self.engine == "fused" or not reason):
            try:
                if self.engine != "captured":
                    piece = Piece(plan, graph, carried, steps, fused=True)
                    return self._sharing(piece, carried, steps, inputs) or piece
            except NotFusible as error:
                reason = str(error)
        if self.engine == "fused":
            raise NotCapturable(f"{kind}: {reason}")
        compiler = self.env.step_compiler()
        return Piece(plan, graph, carried, steps, fused=False, compiler=compiler, unfused=reason)

    def _sharing(
        self, piece: Piece, carried: Sequence[Path], steps: int, inputs: dict[Path, Tensor]
    ) -> Piece | None:
        """The same with its first step divided, where that spares enough and gives the same."""
        plan = piece.plan
        fed = plan.traced.fed
        divided = divide(piece.graph, fed) if fed and piece.graph is not plan.traced.graph else None
        rows = next(iter(inputs.values())).shape[0]
        count = rows // self.batch
        if divided is None or rows * divided.saved < _WORTH or self.action.device.type != "cpu":
            return None
        try:
            shared = SharedStart(plan, piece.graph, carried, steps, divided)
            with preserved_random_state(self.env.device, plan.traced.generators):
                actions = torch.rand(rows, steps, *self.action.shape).to(self.action)
                state = torch.get_rng_state()
                want = piece.run(inputs, actions)
                torch.set_rng_state(state)
                got = shared.run(shared.prepared(inputs, count), actions)
        except Exception:  # a fault of the division is no reason not to plan
            return None
        return shared if all(_close(got[path], value) for path, value in want.items()) else None

    def starting_from(self, start: TensorDictBase) -> TracedImagination:
        """The same, bound to the same pieces, for another start of the same kind."""
        other = copy.copy(self)
        other.start = start
        other._inputs = {
            ask: piece.prepared(_contiguous(leaves(rows_of(start, ask[1]))), ask[1])
            for ask, piece in self.pieces.items()
        }
        return other

    # -- running

    def _run(self, kind: str, count: int, actions: Tensor | None) -> dict[Path, Tensor]:
        return self.pieces[kind, count].run(self._inputs[kind, count], actions, self.checks)

    def candidates(self, actions: Tensor) -> Imagined:
        count = actions.shape[1]
        given = actions.flatten(0, 1)
        results = self._run("candidates", count, given)
        return self._taken(count, given, results)

    def rollout(self, actions: Tensor) -> TensorDictBase:
        count = actions.shape[1]
        results = self._run("rollout", count, actions.flatten(0, 1))
        return self.pieces["rollout", count].plan.traced.template.fill(results, self.horizon, 1)

    def policy(self, count: int) -> Imagined:
        results = self._run("policy", count, None)
        return self._taken(count, results[self.keys.action], results)

    def value(self, last: dict[Path, Tensor], pair: Tensor) -> Tensor:
        assert self.keys.value is not None
        count = next(iter(last.values())).shape[1]
        if self._members is not None:
            self._members.pair.copy_(members(pair, self._members.count))
        inputs = dict(self._inputs["value", count])
        inputs.update({path: value.flatten(0, 1).contiguous() for path, value in last.items()})
        results = self.pieces["value", count].run(inputs, None, self.checks)
        values = results[self.keys.value].reshape(self.batch, count, -1)
        return mean_of_pair(values, pair) if self._members is None else values.mean(-1)

    def _taken(self, count: int, actions: Tensor, results: dict[Path, Tensor]) -> Imagined:
        done = tuple(path for path in self.keys.done if path in results)
        return self._imagined(count, results.get, actions, done)


def _contiguous(tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
    return {path: value.contiguous() for path, value in tensors.items() if path[0] != "next"}


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal but for rounding; of a choice between near equals, a few rows may fall the other way."""
    if not want.is_floating_point():
        return (got != want).sum().item() <= 0.02 * want.numel()
    scale = max(1.0, want.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    bound = (1e-9 if want.dtype is torch.float64 else 1e-4) * scale
    same = torch.isclose(got, want, rtol=0.0, atol=bound, equal_nan=True)
    return (~same).sum().item() <= 0.02 * want.numel()
