"""A plan's step, cut down to what a planner reads of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from fastwm.engines.captured import CapturedLoop, ChecksFailed, Tensors
from fastwm.engines.cuda_graph import CaptureFailed, graphs_apply
from fastwm.engines.fused import FusedLoop
from fastwm.plan import Plan
from fastwm.step_graph import StepGraph

__all__ = ["Piece", "cut"]


def cut(graph: StepGraph, wanted: Collection[Any], carried: Collection[Any]) -> StepGraph:
    """The part of a step that computes these outputs: ``("td", path)`` of one step, and what it carries on.

    With nothing carried, the step ends where they are known: numbers that it would draw later are not drawn.
    """
    outputs = {
        name: value
        for name, value in graph.outputs.items()
        if name in wanted or (name[0] == "state" and name[1] in carried)
    }
    ops, checks = list(graph.ops), list(graph.checks)
    if not carried:
        unread = [replace(op, draws=False) for op in ops]
        needed = graph.part(unread, outputs)
        made = {op.outputs for op in needed.ops}
        ops = ops[: max((i + 1 for i, op in enumerate(ops) if op.outputs in made), default=0)]
        known = {o for op in ops for o in op.outputs}
        checks = [check for check in checks if check in known]
    return graph.part(ops, outputs, checks)


class Piece:
    """So many steps of a plan, on one engine, for a few of their results.

    Args:
        plan: holds the traced step; its watch is its caller's to ask.
        graph: the part of the step that is run, its constants some of the plan's; None for the whole step, by
            the plan's own loops.
        carried: paths that a step hands on to the next; none where there is one step alone.
        steps: how many.
        fused: on the fused engine, else the captured one.
        compiler: of the captured engine's step.
        unfused: why it is not on the fused engine, to be told.

    Raises:
        NotFusible: the fused engine does not take it.
    """

    def __init__(
        self,
        plan: Plan,
        graph: StepGraph | None,
        carried: Sequence[Any],
        steps: int,
        *,
        fused: bool,
        compiler: Any = None,
        unfused: str = "",
    ) -> None:
        traced = plan.traced
        self.plan = plan
        self.steps = steps
        self.unfused = unfused
        self.graph = traced.graph if graph is None else graph
        self.fused: FusedLoop | None = None
        self.loop: CapturedLoop = plan.loop
        self._kept: list[int] | None = None
        if graph is None:
            self.fused = plan.fused if fused else None
            return
        kept = {value.index for value, _ in graph.constants}
        self._kept = [i for i, (v, _) in enumerate(traced.graph.constants) if v.index in kept]
        if fused:
            self.fused = FusedLoop(
                graph, carried, traced.fed, (), traced.dim,
                constants=self.constants(), wanting=None, bf16=_rounds(plan),
            )  # fmt: skip
        else:
            self.loop = CapturedLoop(
                graph, carried, traced.fed, (), traced.dim, grad=False, compiler=compiler
            )

    @property
    def engine(self) -> str:
        return "captured" if self.fused is None else "fused"

    @property
    def unrecorded(self) -> bool:
        """Whether a CUDA graph cannot hold it: another engine, a compiled step, a generator of its own."""
        own = any(op.kwargs.get("generator") is not None for op in self.graph.ops)
        return self.fused is not None or self.loop.compiler is not None or own

    def constants(self) -> list[torch.Tensor]:
        """Parameters and buffers, as they are now."""
        every = self.plan.constants
        return every if self._kept is None else [every[i] for i in self._kept]

    def prepared(self, inputs: Tensors, count: int) -> Tensors:
        """What :meth:`run` takes, from the start's leaves, each row of which stands ``count`` times."""
        return inputs

    def run(
        self,
        inputs: Tensors,
        actions: torch.Tensor | None,
        checks: list[torch.Tensor] | None = None,
    ) -> Tensors:
        """Run the steps.

        Args:
            inputs: the start's leaves by path, ``[rows, ...]``, contiguous; see :meth:`prepared`.
            actions: ``[rows, steps, *A]``, where the step is given them.
            checks: takes the checks that the step makes, instead of their being looked at here: nothing then
                waits for the device.

        Returns:
            By path, ``[rows, steps, ...]``.

        Raises:
            ChecksFailed: the eager path would have raised.
        """
        feed = None if actions is None else _feed(actions)
        graphed = self.plan.graphed if self._kept is None and self.fused is None else None
        if graphed is not None and graphs_apply() and not self.unrecorded:
            with suppress(CaptureFailed):
                _, results = graphed.run(
                    self.steps, inputs, self.constants(), feed, stop=False, exact=self.plan.exact
                )
                return results
            feed = None if actions is None else _feed(actions)
        if self.fused is not None:
            _, results = self.fused.run(self.steps, inputs, self.constants(), feed, stop=False)
            return results
        _, results, found = self.loop.record(
            self.steps, inputs, self.constants(), feed, stop=False, exact=self.plan.exact
        )
        if checks is not None:
            checks += found
        elif found and not bool(torch.stack(found).all()):
            raise ChecksFailed
        return results

    def __str__(self) -> str:
        if self.fused is not None:
            return str(self.fused)
        return self.loop.source()


def _feed(actions: torch.Tensor) -> Callable[[], Sequence[torch.Tensor]]:
    source = iter(actions.unbind(1))
    return lambda: (next(source),)


def _rounds(plan: Plan) -> bool:
    return plan.fused is not None and plan.fused.bf16
