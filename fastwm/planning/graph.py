"""A whole decision as one CUDA graph: every iteration, its candidates, and the fit in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from fastwm.assemble import leaves
from fastwm.engines.captured import ChecksFailed
from fastwm.engines.cuda_graph import CaptureFailed, CudaRecorder, Recorder
from fastwm.nvtx import annotate

if TYPE_CHECKING:
    from fastwm.planning.traced import TracedImagination

__all__ = ["GraphedDecision", "Recorded", "recorder_for"]

_WARMUPS = 3  # as fastwm.engines.cuda_graph
_KEPT = 4  # decisions recorded, per planner
_recorders: dict[torch.device, CudaRecorder] = {}

Search = Callable[["TracedImagination", dict[str, Tensor]], dict[str, Tensor]]


def recorder_for(device: torch.device) -> Recorder | None:
    """What records decisions on a device; None where there are no graphs."""
    if device.type != "cuda":
        return None
    if device not in _recorders:
        _recorders[device] = CudaRecorder(device)
    return _recorders[device]


class GraphedDecision:
    """A decision, recorded; the graph owns its inputs and outputs, and reads parameters where they are.

    Args:
        search: the decision, from an imagination and the memory to results; waits for nothing.
        imagine: bound to pieces of the captured engine.
        memory: what the planner carries from decision to decision.
        recorder: what records and replays.

    Raises:
        CaptureFailed: it could not be recorded; nothing was changed.
    """

    def __init__(
        self,
        search: Search,
        imagine: TracedImagination,
        memory: dict[str, Tensor],
        recorder: Recorder,
    ) -> None:
        self.start = imagine.start.clone()
        self.memory = {name: value.clone() for name, value in memory.items()}
        self.pieces = imagine.pieces  # held, as their addresses tell graphs apart
        self.addresses = addresses(imagine)

        def work() -> tuple[dict[str, Tensor], Tensor | None]:
            own = imagine.starting_from(self.start)
            own.checks = []
            results = search(own, self.memory)
            return results, torch.stack(own.checks).all() if own.checks else None

        try:
            with annotate("fastwm.capture"):
                (self.results, self.checks), self.replay = recorder.record(work, _WARMUPS)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            reason = f"CUDA graph capture failed: {str(error).splitlines()[0]}"
            raise CaptureFailed(reason) from error

    def __call__(self, start: TensorDictBase, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """The decision for another start of the same kind.

        Raises:
            ChecksFailed: the eager path would have raised.
        """
        _copy(list(leaves(self.start).values()), list(leaves(start).values()))
        _copy(list(self.memory.values()), [memory[name] for name in self.memory])
        with annotate("fastwm.replay"):
            self.replay()
        if self.checks is not None and not bool(self.checks):
            raise ChecksFailed
        return {name: value.clone() for name, value in self.results.items()}


class Recorded:
    """The decisions of one planner that were recorded, least recently used first."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[Any, GraphedDecision] = OrderedDict()
        self.failed: dict[Any, str] = {}

    def decide(
        self,
        search: Search,
        imagine: TracedImagination,
        memory: dict[str, Tensor],
        kind: Any,
        recorder: Recorder,
    ) -> dict[str, Tensor]:
        """A decision by replay, recorded first where it was not.

        Args:
            kind: whatever else Python looks at in the course of a search.

        Raises:
            CaptureFailed: it cannot be recorded.
            ChecksFailed: the eager path would have raised.
        """
        name = (
            kind, tuple(id(piece) for piece in imagine.pieces.values()),
            tuple((k, v.shape) for k, v in memory.items()),
            tuple((path, t.shape, t.dtype) for path, t in leaves(imagine.start).items()),
        )  # fmt: skip
        if name in self.failed:
            raise CaptureFailed(self.failed[name])
        graph = self.graphs.get(name)
        if graph is None or graph.addresses != addresses(imagine):
            try:
                graph = GraphedDecision(search, imagine, memory, recorder)
            except CaptureFailed as reason:
                if len(self.failed) >= _KEPT:
                    self.failed.clear()
                self.failed[name] = str(reason)
                raise
            self.graphs[name] = graph
            while len(self.graphs) > _KEPT:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(name)
        return graph(imagine.start, memory)


def addresses(imagine: TracedImagination) -> tuple[int, ...]:
    """Of all that a graph of these pieces would read where it lies."""
    return tuple(c.data_ptr() for piece in imagine.pieces.values() for c in piece.constants())


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
