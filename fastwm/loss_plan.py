"""Losses as one captured call: what a loss module computes from a batch, traced, guarded and replayed.

A loss is a rollout of one step that carries nothing on: its trace runs on the engines that loop a step over a
horizon, on CUDA as one graph forward and one backward.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from fastwm.engines.captured import CapturedLoop, ChecksFailed
from fastwm.engines.cuda_graph import CaptureFailed, GraphedLoop, graphed_loop, graphs_apply
from fastwm.guarded_trace import (
    BadCall,
    Guard,
    kept_reads,
    sources_of,
    state_holds,
    traced_under,
    watched,
)
from fastwm.nvtx import annotate
from fastwm.plan_cache import Holds, PlanCache, usable
from fastwm.process_modes import NotCapturable, process_modes, refuse_modes
from fastwm.step_graph import StepGraph
from fastwm.tracing import kept_random_state, preserved_random_state, trace
from fastwm.watch import Watch, function_of

__all__ = ["Compute", "LossCache", "LossPlan", "cache_of", "plan_for"]

Path = tuple[str, ...]
# Of a batch: whatever tells what its values stand for, and the values.
Compute = Callable[[TensorDictBase], tuple[Any, list[torch.Tensor]]]

_GRAPHS = 8  # plans of one loss that keep their CUDA graphs, each with activations of its own
_LIBRARIES = {"abc", "builtins", "fastwm", "tensordict", "torch", "torchrl"}


@dataclass
class LossPlan:
    """The trace of a loss for one kind of batch, with what runs it.

    Attributes:
        loop: the trace, as a loop of one step.
        guard: what it takes for granted.
        structure: what the values stand for.
        device: of the values.
        exact: every op has to be bound to its very overload.
        graphed: the loop behind CUDA graphs, where they apply.
    """

    loop: CapturedLoop
    guard: Guard
    structure: Any
    device: torch.device
    exact: bool = False
    graphed: GraphedLoop | None = None

    def __post_init__(self) -> None:
        self.draws = self.loop.graph.draws
        self.generators = self.loop.graph.generators()

    def holds(self) -> tuple[bool, str | None]:
        return self.guard.holds()

    def uncaptured(self) -> str:
        """Why the trace runs without a CUDA graph, on CUDA; "" where nothing stands against one."""
        if self.device.type != "cuda":
            return ""
        if self.graphed is None:
            return "it draws from a generator of its own"
        return self.graphed.failed.get(1, "")

    def run(self, leaves: dict[Path, torch.Tensor]) -> list[torch.Tensor]:
        """The values for a batch of this kind, in memory of their own.

        Raises:
            BadCall: the eager path raises for these values; random generators stand where they stood.
        """
        inputs = {path: leaves[path].contiguous() for path in self.loop.inputs}
        restore = kept_random_state(self.device, self.generators) if self.draws else _nothing
        try:
            with annotate("fastwm.replay"):
                results = self._replay(inputs, restore)
        except ChecksFailed:
            restore()
            raise BadCall("a check of its arguments fails") from None
        return [results[i] for i in range(len(results))]

    def _replay(
        self, inputs: dict[Any, torch.Tensor], restore: Callable[[], None]
    ) -> dict[Any, torch.Tensor]:
        constants, exact = self.guard.constants, self.exact
        if self.graphed is not None and graphs_apply():
            try:
                return self.graphed.run(1, inputs, constants, None, stop=False, exact=exact)[1]
            except CaptureFailed:
                restore()
        return self.loop.run(1, inputs, constants, None, stop=False, exact=exact)[1]


def _nothing() -> None: ...


@dataclass
class LossCache(PlanCache):
    """The plans of one loss.

    Attributes:
        graphed: those that have CUDA graphs, latest used last.
    """

    graphed: OrderedDict[int, LossPlan] = field(default_factory=OrderedDict)

    def used(self, plan: LossPlan) -> None:
        """Let go of the graphs that were used longest ago, where there are many."""
        if plan.graphed is None:
            return
        self.graphed[id(plan)] = plan
        self.graphed.move_to_end(id(plan))
        while len(self.graphed) > _GRAPHS:
            _, oldest = self.graphed.popitem(last=False)
            assert oldest.graphed is not None
            oldest.graphed.graphs.clear()


def cache_of(loss: torch.nn.Module) -> LossCache:
    cache = loss.__dict__.get("_plans")
    if cache is None or cache.owner is not loss:
        cache = loss.__dict__["_plans"] = LossCache(owner=loss)
    return cache


def plan_for(
    loss: torch.nn.Module,
    compute: Compute,
    tensordict: TensorDictBase,
    variant: Any,
    *,
    patient: bool = False,
) -> tuple[LossPlan, dict[Path, torch.Tensor]]:
    """The plan for a call of ``loss`` with this batch, made anew where none holds, and the batch's tensors.

    Args:
        loss: the module. All that it can reach is watched.
        compute: what is to be captured; of ``loss`` and the batch alone, but for ``variant``.
        tensordict: the batch.
        variant: what else ``compute`` goes by.
        patient: make a plan even if plans for this loss have not been of use for long.

    Raises:
        NotCapturable: with the reason.
        BadCall: ``compute`` raises; that is the cause of this, unless a check was ahead of it.
    """
    leaves: dict[Path, torch.Tensor] = {}
    kind = _kind_of(tensordict, (), leaves)
    refuse_modes(next((t.device.type for t in leaves.values() if not t.is_cpu), "cuda"))
    cache = cache_of(loss)
    with cache.lock:
        key = (variant, kind, *process_modes())
        found = cache.find(key)
        if found is None:
            if not patient:
                cache.refuse_if_in_vain("loss", "the model, a setting or the kind of batch")
            found = cache.make(
                key,
                functools.partial(_make, loss, compute, tensordict, leaves),
                functools.partial(_rests_on, loss),
            )
        plan = usable(found)
        cache.used(plan)
    return plan, leaves


def _kind_of(node: Any, path: Path, leaves: dict[Path, torch.Tensor]) -> tuple[Any, ...]:
    """Equal for tensordicts that differ in the values of their tensors alone; these go to ``leaves``."""
    if type(node) is not TensorDict:
        raise NotCapturable(
            f"the batch {f'has at {path}' if path else 'is'} a {type(node).__name__}"
        )
    names = node._td_dim_names
    kind: list[Any] = [node._batch_size, node._device, names and tuple(names)]
    for key, item in node._tensordict.items():
        if isinstance(item, torch.Tensor):
            leaves[(*path, key)] = item
            kind += key, item.shape, item.dtype, item.device, item.requires_grad
        else:
            kind += key, _kind_of(item, (*path, key), leaves)
    return tuple(kind)


def _watch(loss: torch.nn.Module) -> Watch:
    return Watch([loss, *_own_functions(type(loss))], [cache_of(loss)])


def _own_functions(cls: type) -> Iterator[Any]:
    """Methods of the user's subclasses: it is the library that calls them, which is not looked into."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in _LIBRARIES:
            yield from filter(None, map(function_of, vars(base).values()))


def _rests_on(loss: torch.nn.Module) -> Holds:
    return functools.partial(state_holds, _watch(loss))


def _make(
    loss: torch.nn.Module, compute: Compute, tensordict: TensorDictBase,
    leaves: dict[Path, torch.Tensor],
) -> LossPlan:  # fmt: skip
    cache_of(loss)  # an attribute of the loss, to be there before it is watched
    watch = watched(lambda: _watch(loss))
    # Own leaves, cut from whatever graph the caller's batch hangs on.
    inputs = {
        path: value.contiguous().detach().requires_grad_(value.requires_grad)
        for path, value in leaves.items()
    }
    seen: list[Any] = []

    def run(values: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        batch = tensordict.copy()
        for path, value in values.items():
            batch.set(path, value)
        structure, results = compute(batch)
        seen.append(structure)
        return {("td", i): value for i, value in enumerate(results)}

    device = tensordict.device
    with preserved_random_state(device, watch.generators), annotate("fastwm.trace"):
        graph, results, read = traced_under(
            watch, lambda: trace(run, inputs, watch.holds, watch.generators),
            what="loss", outside=[loss],
        )  # fmt: skip
    if not results:
        raise NotCapturable("there are no losses")
    _drop_unused_inputs(graph)
    guard = Guard(watch, sources_of(graph, watch), kept_reads(read, watch))
    given = [*guard.constants, *(inputs[path] for path in graph.inputs)]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    loop = CapturedLoop(graph, (), (), (), None, grad=wants)
    plan = LossPlan(loop, guard, seen[0], next(iter(results.values())).device)
    with preserved_random_state(device, watch.generators):
        _verify(plan, inputs, [results["td", i] for i in range(len(results))])
    plan.graphed = graphed_loop(loop, plan.device, separate=True)
    return plan


def _drop_unused_inputs(graph: StepGraph) -> None:
    """A batch may hold much that no loss reads."""
    used = {v for op in graph.ops for v in op.inputs()} | {*graph.outputs.values(), *graph.checks}
    graph.inputs = {path: value for path, value in graph.inputs.items() if value in used}


def _verify(plan: LossPlan, inputs: dict[Path, torch.Tensor], expected: list[torch.Tensor]) -> None:
    """A plan is accepted only once replaying its trace gave what was traced."""
    problem = ""
    for exact in (False, True):
        plan.exact = exact
        try:
            with preserved_random_state(plan.device, plan.generators):
                got = plan.run(inputs)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        found = map(_difference, got, expected)
        problem = next(filter(None, found), "")
        if not problem:
            return
    raise NotCapturable(f"replaying the traced loss does not give what the loss gave: {problem}")


def _difference(got: torch.Tensor, want: torch.Tensor) -> str:
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype}{list(got.shape)} for {want.dtype}{list(want.shape)}"
    if got.requires_grad != want.requires_grad:
        return f"requires_grad={got.requires_grad} for {want.requires_grad}"
    got, want = got.detach(), want.detach()
    same = torch.allclose(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    return "" if same else "other values"
