"""One CUDA graph per plan and horizon: the whole loop, stacking included, replayed in one launch.

The graph owns its inputs and outputs. A call copies the start in, replays, and copies the results out into
fresh memory, so that nothing a caller holds is ever written again. Parameters are read where they are: an
optimizer's in-place step is seen by the next replay, and a parameter that moved makes a new graph.

With gradients there are two graphs, forward and backward, inside one ``autograd.Function``. What the
backward needs lives in the forward graph's memory; if another forward was replayed in between, the
backward replays its own forward first, from the start and generator state it kept. Gradients that the
recorded backward does not give (those of gradients, and those of single losses) come from the loop, run
again without a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastwm.engines.captured import CapturedLoop, ChecksFailed, FeedStep, Tensors
from fastwm.nvtx import annotate

__all__ = ["CaptureFailed", "CudaRecorder", "GraphedLoop", "Recorder", "Replay", "graphed_loop",
           "graphs_apply"]  # fmt: skip

_WARMUPS = 3  # as torch.cuda.make_graphed_callables: lazy library handles, autotuned kernels
_PER_PLAN = 8  # graphs kept per plan, one per horizon

Fed = Sequence[Sequence[torch.Tensor]]  # fed inputs of every step


class CaptureFailed(Exception):
    """The loop could not be captured; the uncaptured loop runs instead."""


class Replay(Protocol):
    """A recorded piece of work that can be run again on the memory it was recorded with."""

    def __call__(self) -> None: ...


class Recorder(Protocol):
    """Records work for replay. :class:`CudaRecorder` is the real one; tests bring one for the CPU."""

    def record(self, work: Callable[[], Any], warmups: int) -> tuple[Any, Replay]:
        """Run ``work`` under capture: its result (static memory) and what runs it again."""

    def random_state(self) -> Any: ...

    def set_random_state(self, state: Any) -> None: ...

    def advance(self, before: Any, taken: int, of: int) -> None:
        """Leave the generator where ``taken`` of ``of`` equal steps after ``before`` leave it."""


class CudaRecorder:
    """CUDA graphs on one device, sharing a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.generator = torch.cuda.default_generators[index]
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Any], warmups: int) -> tuple[Any, Replay]:
        with torch.cuda.device(self.device):
            state = self.generator.get_state()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmups):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            self.generator.set_state(state)
            # Capture registers the device's default generator, so samples follow torch.manual_seed.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = work()
            # Capturing draws nothing; only a replay moves the generator.
            self.generator.set_state(state)
        return result, graph.replay

    def random_state(self) -> Any:
        return self.generator.get_offset(), self.generator.initial_seed()

    def set_random_state(self, state: Any) -> None:
        offset, seed = state
        self.generator.manual_seed(seed)
        self.generator.set_offset(offset)

    def advance(self, before: Any, taken: int, of: int) -> None:
        offset, _ = before
        step = (self.generator.get_offset() - offset) // of
        self.generator.set_offset(offset + step * taken)


_shared: dict[torch.device, CudaRecorder] = {}


def graphed_loop(
    loop: CapturedLoop, device: torch.device, *, separate: bool = False
) -> GraphedLoop | None:
    """The loop behind CUDA graphs, or None where they do not apply. ``separate``: see the class."""
    if device.type != "cuda" or any(
        op.kwargs.get("generator") is not None for op in loop.graph.ops
    ):
        return None
    if loop.grad:
        # What its backward needs stays in the graph's memory between calls: a pool of its own.
        return GraphedLoop(loop, CudaRecorder(device), separate=separate)
    return GraphedLoop(loop, _shared.setdefault(device, CudaRecorder(device)))


def graphs_apply() -> bool:
    """Not inside somebody else's capture, which records the plain loop, nor in inference mode."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not capturing and not torch.is_inference_mode_enabled()


@dataclass
class _Forward:
    """A forward graph with its static memory."""

    inputs: dict[Any, torch.Tensor]
    fed: list[tuple[torch.Tensor, ...]]
    outputs: dict[Any, torch.Tensor]
    checks: torch.Tensor | None
    replay: Replay
    runs: int = 0  # how often it was replayed: whose activations its memory holds


class GraphedLoop:
    """A :class:`CapturedLoop` behind CUDA graphs, one per horizon.

    Args:
        loop: the loop.
        recorder: what records and replays.
        separate: outputs are to act as nodes of the autograd graph each: what only others reach gets no
            gradient, where one node of them all gives it one of zeros (or, if these others are infinite,
            of NaN). A backward from all of them is replayed, one from some runs uncaptured.
    """

    def __init__(self, loop: CapturedLoop, recorder: Recorder, *, separate: bool = False) -> None:
        self.loop = loop
        self.recorder = recorder
        self.separate = separate
        self.graphs: dict[int, tuple[tuple[int, ...], Any]] = {}
        self.failed: dict[int, str] = {}

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
        """As :meth:`CapturedLoop.run`; the whole horizon runs, and is cut where ``stop`` says.

        Raises:
            CaptureFailed: this horizon could not be captured; nothing was changed.
            ChecksFailed: the eager path would have raised.
        """
        if horizon in self.failed:
            raise CaptureFailed(self.failed[horizon])
        fed = [tuple(feed()) for _ in range(horizon)] if feed is not None else []
        addresses = tuple(c.data_ptr() for c in constants)
        known = self.graphs.get(horizon)
        if known is None or known[0] != addresses:
            make: Any = _Plain
            if self.loop.grad:
                make = functools.partial(_Differentiable, separate=self.separate)
            try:
                with annotate("fastwm.capture"):
                    graphed = make(self.loop, self.recorder, horizon, inputs, constants, fed, exact)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self.failed[horizon] = f"CUDA graph capture failed: {str(error).splitlines()[0]}"
                raise CaptureFailed(self.failed[horizon]) from error
            while len(self.graphs) >= _PER_PLAN:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[horizon] = addresses, graphed
        graphed = self.graphs[horizon][1]
        before = self.recorder.random_state() if stop and self.loop.graph.draws else None
        results, checks = graphed(inputs, constants, fed)
        if checks is not None and not bool(checks):
            raise ChecksFailed
        steps = _stopped_at(results, self.loop, horizon) if stop else horizon
        dim = self.loop.dim
        if steps < horizon and dim is not None:
            if before is not None:
                self.recorder.advance(before, steps, horizon)
            results = {path: t.narrow(dim, 0, steps).contiguous() for path, t in results.items()}
        return steps, results


def _stopped_at(results: dict[Any, torch.Tensor], loop: CapturedLoop, horizon: int) -> int:
    """Steps until the first with a flag, from one look at all of them."""
    any_flag = None
    for _, path in loop.flags:
        assert loop.dim is not None
        flag = results[path].movedim(loop.dim, 0).reshape(horizon, -1).any(1)
        any_flag = flag if any_flag is None else any_flag | flag
    if any_flag is None:
        return horizon
    finished = any_flag.tolist()
    return finished.index(True) + 1 if True in finished else horizon


def _record_forward(
    loop: CapturedLoop, recorder: Recorder, horizon: int, inputs: Tensors,
    constants: Sequence[torch.Tensor], fed: Fed, exact: bool, *, grad: bool,
) -> _Forward:  # fmt: skip
    def own(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copy.requires_grad_(grad and tensor.requires_grad)

    start = {path: own(value) for path, value in inputs.items()}
    own_fed = [tuple(own(a) for a in step) for step in fed]

    def work() -> tuple[dict[Any, torch.Tensor], torch.Tensor | None]:
        source = iter(own_fed)
        feed = (lambda: next(source)) if own_fed else None
        _, results, checks = loop.record(horizon, start, constants, feed, stop=False, exact=exact)
        return results, torch.stack(checks).all() if checks else None

    (outputs, checks), replay = recorder.record(work, _WARMUPS)
    return _Forward(start, own_fed, outputs, checks, replay)


def _load(forward: _Forward, inputs: Tensors, fed: Fed) -> None:
    targets = [*forward.inputs.values(), *(a for step in forward.fed for a in step)]
    sources = [*(inputs[path] for path in forward.inputs), *(a for step in fed for a in step)]
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fresh memory for each, filled by as few kernels as the dtypes allow."""
    fresh = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    if fresh:
        torch._foreach_copy_(fresh, [t.detach() for t in tensors])
    return fresh


class _Plain:
    """A graph without gradients."""

    def __init__(
        self, loop: CapturedLoop, recorder: Recorder, horizon: int, inputs: Tensors,
        constants: Sequence[torch.Tensor], fed: Fed, exact: bool,
    ) -> None:  # fmt: skip
        self.forward = _record_forward(
            loop, recorder, horizon, inputs, constants, fed, exact, grad=False
        )

    def __call__(
        self, inputs: Tensors, constants: Sequence[torch.Tensor], fed: Fed
    ) -> tuple[Tensors, torch.Tensor | None]:
        _load(self.forward, inputs, fed)
        self.forward.replay()
        outputs = self.forward.outputs
        return dict(zip(outputs, _copies(list(outputs.values())), strict=True)), self.forward.checks


class _Differentiable:
    """A forward and a backward graph as one node of the autograd graph."""

    def __init__(
        self, loop: CapturedLoop, recorder: Recorder, horizon: int, inputs: Tensors,
        constants: Sequence[torch.Tensor], fed: Fed, exact: bool, *, separate: bool,
    ) -> None:  # fmt: skip
        self.loop, self.horizon, self.exact = loop, horizon, exact
        self.recorder = recorder
        self.separate = separate
        self.draws = loop.graph.draws
        self.forward = _record_forward(
            loop, recorder, horizon, inputs, constants, fed, exact, grad=True
        )
        forward = self.forward
        self.keys = list(forward.outputs)
        self.differentiable = [k for k in self.keys if forward.outputs[k].requires_grad]
        self.seeds = [torch.zeros_like(forward.outputs[k]) for k in self.differentiable]
        leaves = [*forward.inputs.values(), *(a for step in forward.fed for a in step), *constants]
        self.wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
        outputs = [forward.outputs[k] for k in self.differentiable]
        targets = [leaves[i] for i in self.wanted]

        def work() -> tuple[torch.Tensor | None, ...]:
            return torch.autograd.grad(
                outputs, targets, self.seeds, retain_graph=True, allow_unused=True
            )

        self.gradients, self.backward = recorder.record(work, 1)

    def replay_forward(self, inputs: Tensors, fed: Fed) -> int:
        _load(self.forward, inputs, fed)
        self.forward.replay()
        self.forward.runs += 1
        return self.forward.runs

    def given(self, grads: Sequence[torch.Tensor | None]) -> dict[Any, torch.Tensor]:
        """The gradients that came in, by the key of their output."""
        by_key = dict(zip(self.keys, grads, strict=True))
        return {k: g for k in self.differentiable if (g := by_key[k]) is not None}

    def replay_backward(self, given: dict[Any, torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradients of what is wanted, in memory of their own."""
        for seed, key in zip(self.seeds, self.differentiable, strict=True):
            if key in given:
                seed.copy_(given[key])
            else:
                seed.zero_()
        self.backward()
        fresh = iter(_copies([g for g in self.gradients if g is not None]))
        return [None if g is None else next(fresh) for g in self.gradients]

    def uncaptured_backward(
        self, count: int, widths: list[int], flat: Sequence[torch.Tensor],
        given: dict[Any, torch.Tensor], *, create_graph: bool,
    ) -> Sequence[torch.Tensor | None]:  # fmt: skip
        """The same from the loop, run again, for the outputs that a gradient came in for alone."""
        with torch.enable_grad():
            # Inputs may hang on one another: these here do not.
            flat = [t.view_as(t) if t.requires_grad else t for t in flat]
            inputs, fed = _split(self, count, widths, flat)
            constants = flat[count + sum(widths) :]
            source = iter(fed)
            _, results, _ = self.loop.record(
                self.horizon, inputs, constants, (lambda: next(source)) if fed else None,
                stop=False, exact=self.exact,
            )  # fmt: skip
            return torch.autograd.grad(
                [results[k] for k in given], [flat[i] for i in self.wanted], list(given.values()),
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip

    def __call__(
        self, inputs: Tensors, constants: Sequence[torch.Tensor], fed: Fed
    ) -> tuple[Tensors, torch.Tensor | None]:
        flat = [
            *(inputs[p] for p in self.forward.inputs),
            *(a for step in fed for a in step),
            *constants,
        ]
        results = _Replayed.apply(self, len(self.forward.inputs), [len(s) for s in fed], *flat)
        return dict(zip(self.keys, results, strict=True)), self.forward.checks


def _split(
    graphed: _Differentiable, count: int, widths: list[int], flat: Sequence[torch.Tensor]
) -> tuple[Tensors, Fed]:
    """The start and the fed inputs out of a flat list."""
    inputs = dict(zip(graphed.forward.inputs, flat[:count], strict=True))
    rest = iter(flat[count:])
    return inputs, [[next(rest) for _ in range(width)] for width in widths]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphed: _Differentiable, count: int, widths: list[int], *flat: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        inputs, fed = _split(graphed, count, widths, flat)
        ctx.graphed, ctx.widths = graphed, widths
        ctx.random_state = graphed.recorder.random_state() if graphed.draws else None
        ctx.run = graphed.replay_forward(inputs, fed)
        # Saved tensors carry versions, so a parameter written since is an error and not a wrong gradient.
        ctx.save_for_backward(*flat)
        ctx.count = count
        outputs = _copies([graphed.forward.outputs[k] for k in graphed.keys])
        differentiable = set(graphed.differentiable)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for k, o in zip(graphed.keys, outputs, strict=True) if k not in differentiable)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        graphed, flat = ctx.graphed, ctx.saved_tensors
        given, twice = graphed.given(grads), torch.is_grad_enabled()
        results: list[torch.Tensor | None] = [None] * len(flat)
        if not given:
            return None, None, None, *results
        if twice or (graphed.separate and len(given) < len(graphed.differentiable)):
            with _as_before(ctx):
                found = graphed.uncaptured_backward(
                    ctx.count, ctx.widths, flat, given, create_graph=twice
                )
        else:
            if ctx.run != graphed.forward.runs:
                # Another call's activations are in the graph's memory by now.
                inputs, fed = _split(graphed, ctx.count, ctx.widths, flat)
                with _as_before(ctx):
                    ctx.run = graphed.replay_forward(inputs, fed)
            found = graphed.replay_backward(given)
        for position, gradient in zip(graphed.wanted, found, strict=True):
            results[position] = gradient
        return None, None, None, *results


@contextmanager
def _as_before(ctx: Any) -> Iterator[None]:
    """With the generator where the forward found it; afterwards where it is now."""
    recorder = ctx.graphed.recorder
    if not ctx.graphed.draws:
        yield
        return
    now = recorder.random_state()
    recorder.set_random_state(ctx.random_state)
    try:
        yield
    finally:
        recorder.set_random_state(now)
