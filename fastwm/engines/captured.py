"""The captured engine: the traced step looped over the horizon, no TensorDict and no modules inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        dim: where the time dim goes.
        grad: whether gradients are wanted.
        compiler: for the body of the step; see :mod:`fastwm.engines.inductor`.
    """

    def __init__(
        self,
        graph: StepGraph,
        carried: Sequence[Any],
        fed: Sequence[Any],
        flags: Sequence[Any],
        dim: int,
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
        self._loops: dict[tuple[bool, bool, bool], tuple[LoopSource, Callable[..., Any]]] = {}

    def source(self, *, stop: bool = False, write: bool = False) -> str:
        """The generated Python of the loop, for reading."""
        return self._loop(stop, write, False)[0].text

    def _loop(self, stop: bool, write: bool, exact: bool) -> tuple[LoopSource, Callable[..., Any]]:
        key = (stop, write, exact)
        if key not in self._loops:
            # What a carried input was at each step follows from what the steps wrote.
            derived = {self.graph.inputs[path] for path in self.carried}
            wanted = [o for o in self.outputs if self.graph.outputs[o] not in derived]
            wanted += [o for o in self.carried.values() if o in self.graph.outputs]
            source = loop_source(
                self.graph, self.carried, self.fed, wanted, self.flags if stop else [],
                grad=self.grad, write=write, exact=exact, compiler=self.compiler,
            )  # fmt: skip
            self._loops[key] = source, source.compile()
        return self._loops[key]

    def _step_bytes(self, source: LoopSource) -> int:
        metas = (self.graph.metas[i] for i in source.collected)
        return sum(m.shape.numel() * m.dtype.itemsize for m in metas)

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
        source, run = self._loop(stop, False, exact)
        write = (
            not self.grad
            and not torch.is_inference_mode_enabled()
            and self._step_bytes(source) >= _WRITE_BYTES
        )
        if write:
            source, run = self._loop(stop, True, exact)
        start = [inputs[path] if path in inputs else None for path in self.inputs]
        if self.grad or torch.is_inference_mode_enabled() or self.compiler is not None:
            return self._collect(source, run, horizon, inputs, start, constants, feed, write)
        # Nothing here wants gradients: skip autograd's layer of the dispatcher altogether.
        with torch._C._AutoDispatchBelowAutograd():
            return self._collect(source, run, horizon, inputs, start, constants, feed, write)

    def _collect(
        self, source: LoopSource, run: Callable[..., Any], horizon: int, inputs: Tensors,
        start: list[torch.Tensor | None], constants: Sequence[torch.Tensor], feed: FeedStep | None,
        write: bool,
    ) -> tuple[int, Tensors, list[torch.Tensor]]:  # fmt: skip
        dim = self.dim
        stacked: dict[int, torch.Tensor] = {}
        if write:
            for index in source.collected:
                shape, dtype, device = self.graph.metas[index]
                size = [*shape[:dim], horizon, *shape[dim:]]
                stacked[index] = torch.empty(size, dtype=dtype, device=device)
            sinks: list[Any] = [stacked[i].unbind(dim) for i in source.collected]
        else:
            lists: list[list[torch.Tensor]] = [[] for _ in source.collected]
            sinks = [steps.append for steps in lists]
        with annotate("fastwm.loop"):
            steps, fixed_values, checks = run(horizon, start, constants, feed, sinks)
        if write and steps < horizon:
            stacked = {i: t.narrow(dim, 0, steps).clone() for i, t in stacked.items()}
        each = None if write else dict(zip(source.collected, lists, strict=True))
        fixed = dict(zip(source.fixed, fixed_values, strict=True))
        with annotate("fastwm.stack"):
            return steps, self._results(source, inputs, steps, each, stacked, fixed), checks

    def _results(
        self, source: LoopSource, inputs: Tensors, steps: int, each: Steps | None,
        stacked: dict[int, torch.Tensor], fixed: dict[int, torch.Tensor],
    ) -> Tensors:  # fmt: skip
        """Give every output its own memory: stack, shift by one step, or repeat."""
        dim = self.dim
        graph = self.graph
        by_input = {v.index: path for path, v in graph.inputs.items()}
        results: dict[Any, torch.Tensor] = {}
        taken: set[int] = set()
        canonical = source.canonical
        for key in self.outputs:
            value = graph.outputs[key]
            path = by_input.get(value.index)
            if path is not None and path in self.carried:
                later = canonical(graph.outputs[self.carried[path]])
                results[key[1]] = self._shifted(later, inputs[path], steps, each, stacked, fixed)
                continue
            index = canonical(value)
            if index in fixed:
                results[key[1]] = _repeat(fixed[index], steps, dim)
            elif each is not None:
                results[key[1]] = torch.stack(each[index], dim)
            else:
                # The first to ask gets the buffer itself, any other a copy.
                results[key[1]] = stacked[index] if index not in taken else stacked[index].clone()
                taken.add(index)
        return results

    def _shifted(
        self, index: int, start: torch.Tensor, steps: int, each: Steps | None,
        stacked: dict[int, torch.Tensor], fixed: dict[int, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """What a carried input was at each step: the start, then the steps' own results but the last."""
        dim = self.dim
        if index in fixed:
            later = [fixed[index]] * (steps - 1)
            return torch.stack([start, *later], dim)
        if each is not None:
            return torch.stack([start, *each[index][: steps - 1]], dim)
        shape = list(start.shape)
        out = start.new_empty([*shape[:dim], steps, *shape[dim:]])
        out.select(dim, 0).copy_(start)
        if steps > 1:
            out.narrow(dim, 1, steps - 1).copy_(stacked[index].narrow(dim, 0, steps - 1))
        return out


def _repeat(value: torch.Tensor, steps: int, dim: int) -> torch.Tensor:
    shape = list(value.shape)
    repeated = value.unsqueeze(dim).expand([*shape[:dim], steps, *shape[dim:]])
    return repeated.clone(memory_format=torch.contiguous_format)
