"""The captured engine: the traced step looped over the horizon, no TensorDict and no modules inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastwm.engines.codegen import Compiler, LoopSource, loop_source
from fastwm.nvtx import annotate
from fastwm.step_graph import StepGraph

__all__ = ["CapturedLoop", "ChecksFailed", "FeedStep", "Tensors"]

Tensors = dict[Any, torch.Tensor]  # by path
Steps = dict[int, list[torch.Tensor]]  # a value's tensor at each step
FeedStep = Callable[[], Sequence[torch.Tensor]]  # this step's fed inputs

# From this many bytes a step on, results are copied straight into the stacked output: the steps' own
# tensors never pile up, and the copy is no longer dominated by the cost of a call.
_WRITE_BYTES = 1 << 18
# What no later step needs is put off until after the loop while its widest intermediate stays this small:
# in a core's cache on a CPU; on CUDA, where launches are what is saved, far from filling the memory. With
# gradients every intermediate is kept anyway, and one product for all steps spares adding up their gradients.
_DEFER_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
_DEFER_BYTES_GRAD = {"cpu": 1 << 24, "cuda": 1 << 26}


class ChecksFailed(Exception):
    """A check that the traced step makes (a distribution validating its arguments) came out false."""


class CapturedLoop:
    """A traced step, ready to run for any horizon.

    Args:
        graph: the step. Inputs are named by path, or ``("feed", ...)``; outputs ``("td", path)`` for the
            step's own results and ``("state", path)`` for what the next step starts from.
        carried: input paths that the step changes.
        fed: inputs given anew each step (precomputed or random actions).
        flags: paths, under ``("td", ...)``, of the flags that may end a rollout early.
        dim: where the time dim goes; None where there is one step and no time, such as a loss.
        grad: whether gradients are wanted.
        compiler: for the body of the step; see :mod:`fastwm.engines.inductor`.
    """

    def __init__(
        self,
        graph: StepGraph,
        carried: Sequence[Any],
        fed: Sequence[Any],
        flags: Sequence[Any],
        dim: int | None,
        *,
        grad: bool,
        compiler: Compiler | None = None,
    ) -> None:
        self.graph = graph
        self.carried = {path: ("state", path) for path in carried}
        self.fed = list(fed)
        self.flags = list(flags)
        self.dim = dim
        self.grad = grad
        self.compiler = compiler
        self.inputs = list(graph.inputs)
        self.outputs = [key for key in graph.outputs if key[0] == "td"]
        # Memory that is the caller's.
        given = (*graph.inputs.values(), *(value for value, _ in graph.constants))
        self.given = {graph.storage[value.index] for value in given}
        self._loops: dict[tuple[bool, ...], _Loop] = {}

    def source(self, *, stop: bool = False, write: bool = False, defer: bool = False) -> str:
        """The generated Python of the loop, for reading."""
        return self._loop(stop=stop, write=write, defer=defer).source.text

    def _loop(
        self, *, stop: bool, write: bool = False, defer: bool = False, exact: bool = False
    ) -> _Loop:
        key = (stop, write, defer, exact)
        if key not in self._loops:
            # What a carried input was at each step follows from what the steps wrote.
            derived = {self.graph.inputs[path] for path in self.carried}
            wanted = [o for o in self.outputs if self.graph.outputs[o] not in derived]
            wanted += [o for o in self.carried.values() if o in self.graph.outputs]
            source = loop_source(
                self.graph, self.carried, self.fed, wanted, self.flags if stop else [],
                grad=self.grad, write=write, exact=exact, defer=defer, once=self.dim is None,
                compiler=self.compiler,
            )  # fmt: skip
            self._loops[key] = _Loop(source, *source.compile())
        return self._loops[key]

    def _choose(self, horizon: int, *, stop: bool, exact: bool) -> tuple[_Loop, bool]:
        """The loop for this size, and whether it writes straight into the stacked outputs."""
        plain = self._loop(stop=stop, exact=exact)
        if self.dim is None:
            return plain, False
        large = sum(self._bytes(i) for i in plain.source.collected) >= _WRITE_BYTES
        if not self.grad and not torch.is_inference_mode_enabled() and large:
            return self._loop(stop=stop, write=True, exact=exact), True
        if self.dim == 1 and self.compiler is None:
            put_off = self._loop(stop=stop, defer=True, exact=exact)
            device = next(iter(self.graph.metas.values())).device.type
            limits = _DEFER_BYTES_GRAD if self.grad else _DEFER_BYTES
            if horizon * put_off.widest(self._bytes) <= limits.get(device, 0):
                return put_off, False
        return plain, False

    def _bytes(self, index: int) -> int:
        shape, dtype, _ = self.graph.metas[index]
        return shape.numel() * dtype.itemsize

    def run(
        self,
        horizon: int,
        inputs: Tensors,
        constants: Sequence[torch.Tensor],
        feed: FeedStep | None,
        *,
        stop: bool,
        exact: bool = False,
    ) -> tuple[int, Tensors]:
        """Run up to ``horizon`` steps.

        Args:
            inputs: start values by path.
            constants: in the graph's order.
            feed: gives the fed inputs of each step, in order.
            stop: end after the first step in which a flag is true.

        Returns:
            The number of steps run and, by path, the stacked results.

        Raises:
            ChecksFailed: the eager path would have raised.
        """
        steps, results, checks = self.record(
            horizon, inputs, constants, feed, stop=stop, exact=exact
        )
        if checks and not bool(torch.stack(checks).all()):
            raise ChecksFailed
        return steps, results

    def record(
        self,
        horizon: int,
        inputs: Tensors,
        constants: Sequence[torch.Tensor],
        feed: FeedStep | None,
        *,
        stop: bool,
        exact: bool = False,
    ) -> tuple[int, Tensors, list[torch.Tensor]]:
        """As :meth:`run`, with the checks returned and not looked at: nothing here waits for the device
        unless ``stop`` asks for it, so that it can be captured."""
        loop, write = self._choose(horizon, stop=stop, exact=exact)
        call = _Call(self, loop, horizon, inputs, constants, write)
        if self.grad or torch.is_inference_mode_enabled() or self.compiler is not None:
            return call.run(feed)
        # Nothing here wants gradients: skip autograd's layer of the dispatcher altogether.
        with torch._C._AutoDispatchBelowAutograd():
            return call.run(feed)


@dataclass
class _Loop:
    """A generated loop, compiled."""

    source: LoopSource
    run: Callable[..., Any]
    after: Callable[..., Any] | None

    def widest(self, size: Callable[[int], int]) -> int:
        """Bytes per step of the largest tensor that was put off; with nothing put off, too many."""
        return max(map(size, self.source.put_off), default=1 << 62)


class _Call:
    """One run of a loop: collects what the steps give and gives every output its own memory."""

    def __init__(
        self, owner: CapturedLoop, loop: _Loop, horizon: int, inputs: Tensors,
        constants: Sequence[torch.Tensor], write: bool,
    ) -> None:  # fmt: skip
        self.owner = owner
        self.loop = loop
        self.horizon = horizon
        self.inputs = inputs
        self.constants = constants
        self.write = write
        self.dim = owner.dim
        self.each: Steps = {}  # a value at every step, where steps are collected
        self.stacked: dict[int, torch.Tensor] = {}  # the same, stacked
        self.fixed: dict[int, torch.Tensor] = {}

    def run(self, feed: FeedStep | None) -> tuple[int, Tensors, list[torch.Tensor]]:
        source, metas = self.loop.source, self.owner.graph.metas
        dim = 0 if self.dim is None else self.dim
        sinks: list[Any] = []
        for index in source.collected:
            if self.write:
                shape, dtype, device = metas[index]
                size = [*shape[:dim], self.horizon, *shape[dim:]]
                self.stacked[index] = torch.empty(size, dtype=dtype, device=device)
                sinks.append(self.stacked[index].unbind(dim))
            else:
                self.each[index] = []
                sinks.append(self.each[index].append)
        start = [self.inputs.get(path) for path in self.owner.inputs]
        with annotate("fastwm.loop"):
            self.steps, fixed, checks = self.loop.run(
                self.horizon, start, self.constants, feed, sinks
            )
        if self.write and self.steps < self.horizon:
            cut = {i: t.narrow(dim, 0, self.steps).clone() for i, t in self.stacked.items()}
            self.stacked = cut
        self.fixed = dict(zip(source.fixed, fixed, strict=True))
        if self.loop.after is not None:
            with annotate("fastwm.after"):
                self._run_after(start)
        if self.dim is None:
            return self.steps, self._results_of_one(), checks
        with annotate("fastwm.stack"):
            return self.steps, self._results(self.dim), checks

    def _run_after(self, start: list[torch.Tensor | None]) -> None:
        """Do what was put off, for all steps at once."""
        graph, source = self.owner.graph, self.loop.source
        paths = {graph.inputs[path].index: path for path in self.owner.carried}
        rows = []
        for index in source.rows:
            if index in paths:
                value = self._shifted(paths[index], 1)
            else:
                value = self.stacked[index] = torch.stack(self.each[index], 1)
            rows.append(value.flatten(0, 1))
        assert self.loop.after is not None
        for index, value in zip(
            source.after, self.loop.after(start, self.constants, rows), strict=True
        ):
            self.stacked[index] = value.unflatten(0, (-1, self.steps))

    def _results_of_one(self) -> Tensors:
        """The results of the only step, each in memory that is nobody else's."""
        graph, canonical = self.owner.graph, self.loop.source.canonical
        taken = set(self.owner.given)
        results: Tensors = {}
        for key in self.owner.outputs:
            index = canonical(graph.outputs[key])
            found = self.each[index][0]
            memory = graph.storage[index]
            results[key[1]] = found.clone() if memory in taken else found
            taken.add(memory)
        return results

    def _results(self, dim: int) -> Tensors:
        graph, canonical = self.owner.graph, self.loop.source.canonical
        carried = {graph.inputs[path].index: path for path in self.owner.carried}
        results: Tensors = {}
        taken: set[int] = set()
        for key in self.owner.outputs:
            value = graph.outputs[key]
            index = canonical(value)
            if value.index in carried:
                results[key[1]] = self._shifted(carried[value.index], dim)
            elif index in self.fixed:
                results[key[1]] = _repeat(self.fixed[index], self.steps, dim)
            elif index in self.stacked:
                # The first to ask gets the stack itself, any other, also for a view of it, a copy.
                stack, memory = self.stacked[index], graph.storage[index]
                results[key[1]] = stack.clone() if memory in taken else stack.contiguous()
                taken.add(memory)
            else:
                results[key[1]] = torch.stack(self.each[index], dim)
        return results

    def _shifted(self, path: Any, dim: int) -> torch.Tensor:
        """What a carried input was at each step: the start, then the steps' own results but the last."""
        owner, steps = self.owner, self.steps
        index = self.loop.source.canonical(owner.graph.outputs[owner.carried[path]])
        start = self.inputs[path]
        if index in self.fixed:
            return torch.stack([start, *[self.fixed[index]] * (steps - 1)], dim)
        if index in self.each:
            return torch.stack([start, *self.each[index][: steps - 1]], dim)
        shape = list(start.shape)
        out = start.new_empty([*shape[:dim], steps, *shape[dim:]])
        out.select(dim, 0).copy_(start)
        if steps > 1:
            out.narrow(dim, 1, steps - 1).copy_(self.stacked[index].narrow(dim, 0, steps - 1))
        return out


def _repeat(value: torch.Tensor, steps: int, dim: int) -> torch.Tensor:
    shape = list(value.shape)
    repeated = value.unsqueeze(dim).expand([*shape[:dim], steps, *shape[dim:]])
    return repeated.clone(memory_format=torch.contiguous_format)
