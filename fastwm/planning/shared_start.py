"""Candidates of one state begin in one latent: what their first step makes of it is made once.

A first layer on latent and action is a product with the latent, the same for all candidates and in all
iterations, and one with the action. The first is taken out of the step and added back as an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from fastwm.engines.captured import Tensors
from fastwm.engines.codegen import step_varying
from fastwm.plan import Plan
from fastwm.planning.pieces import Piece
from fastwm.row_program.lowering.elementwise import ELEMENTWISE
from fastwm.step_graph import Meta, Op, StepGraph, Value, map_values

__all__ = ["Divided", "SharedStart", "divide"]

aten = torch.ops.aten
_PRODUCTS = (aten.addmm.default, aten.mm.default)
# Ops that do to fewer rows what they do to many.
_ROWWISE = ELEMENTWISE | {"addmm", "mm", "t", "slice", "detach", "alias", "native_layer_norm"}


class Divided(NamedTuple):
    """A first step in two parts.

    Attributes:
        before: from the start alone; outputs ``("shared", "0")`` and so on.
        after: the rest, which takes those as further inputs.
        saved: multiply-adds per row that ``after`` is spared.
    """

    before: StepGraph
    after: StepGraph
    saved: int


def divide(graph: StepGraph, fed: Collection[Any]) -> Divided | None:
    """The products of a step that depend on its start alone, and the rest; None where there are none.

    Args:
        graph: the step.
        fed: inputs that differ between candidates of one start.
    """
    graph = _products_apart(graph, step_varying(graph, set(fed)))
    varying = step_varying(graph, set(fed))
    known = {v.index for name, v in graph.inputs.items() if name not in fed}
    heavy: dict[int, int] = {}  # multiply-adds behind a value, where there are any
    for op in graph.ops:
        inputs = [v.index for v in op.inputs()]
        shared = any(i in known for i in inputs) and op.name.partition(".")[0] in _ROWWISE
        if not shared or any(i in varying for i in inputs):
            continue
        work = sum(heavy.get(i, 0) for i in set(inputs))
        if op.target in _PRODUCTS:
            work += math.prod(graph.metas[op.args[-1].index].shape)
        for out in op.outputs:
            if out is not None:
                known.add(out.index)
                if work:
                    heavy[out.index] = work
    made = {o.index for op in graph.ops for o in op.outputs if o is not None and o.index in heavy}
    read = {v.index for op in graph.ops for v in op.inputs() if not _all_in(op.outputs, known)}
    read |= {v.index for v in graph.outputs.values()}
    edge = [Value(i) for i in sorted(made & read)]
    if not edge:
        return None
    names = [("shared", str(i)) for i in range(len(edge))]
    still = [op for op in graph.ops if not op.draws]  # pruning would keep those that draw
    before = graph.part(still, dict(zip(names, edge, strict=True)))
    ops = [op for op in graph.ops if not any(o in edge for o in op.outputs)]
    inputs_after = {**graph.inputs, **dict(zip(names, edge, strict=True))}
    after = graph.part(ops, graph.outputs, graph.checks, inputs_after)
    defined = {v.index for v in after.inputs.values()} | {v.index for v, _ in after.constants}
    defined |= {o.index for op in after.ops for o in op.outputs if o is not None}
    if any(v.index not in defined for op in after.ops for v in op.inputs()):
        return None  # another result of an op that went is read
    return Divided(before, after, sum(heavy[v.index] for v in edge))


def _all_in(outputs: Sequence[Value | None], known: set[int]) -> bool:
    return all(o is None or o.index in known for o in outputs)


def _products_apart(graph: StepGraph, varying: set[int]) -> StepGraph:
    """``cat([z, a]) @ W + b`` as ``(z @ W[:k] + b) + a @ W[k:]``, where ``a`` varies and ``z`` does not.

    A product without ``a`` that is written in place later on is made apart from its copy for that.
    """
    metas, storage, ops = dict(graph.metas), dict(graph.storage), []
    cats = {
        op.outputs[0]: op
        for op in graph.ops
        if op.target is aten.cat.default and op.outputs[0] is not None
    }

    written = {storage[m.index] for op in graph.ops for m in op.mutates}

    def emit(
        target: Any, *args: Any, shape: Sequence[int], like: Value, memory: int | None
    ) -> Value:
        value = Value(max(metas) + 1)
        metas[value.index] = Meta(
            torch.Size(shape), metas[like.index].dtype, metas[like.index].device
        )
        storage[value.index] = max(storage.values()) + 1 if memory is None else memory
        ops.append(Op(target, args, {}, (value,), True))
        return value

    for op in graph.ops:
        *bias, x, matrix = op.args if op.target in _PRODUCTS else (None, None)
        if op.target in _PRODUCTS and not any(v.index in varying for v in op.inputs()):
            (made,) = op.outputs
            assert made is not None
            if storage[made.index] in written:
                product = emit(
                    op.target, *op.args, shape=metas[made.index].shape, like=made, memory=None
                )
                ops.append(Op(aten.clone.default, (product,), {}, (made,), True))
                continue
        cat = cats.get(x) if isinstance(x, Value) else None
        parts = _parts(cat, metas) if cat is not None and not op.kwargs else []
        mixed = {part.index in varying for part in parts} == {True, False}
        if not mixed or not isinstance(matrix, Value):
            ops.append(op)
            continue
        out = op.outputs[0]
        assert out is not None
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + metas[part.index].shape[1])
        total: Value | None = bias[0] if bias else None
        order = sorted(range(len(parts)), key=lambda i: parts[i].index in varying)
        for step, i in enumerate(order):
            width, columns = ends[i + 1] - ends[i], metas[matrix.index].shape[1]
            rows = emit(
                aten.slice.Tensor, matrix, 0, ends[i], ends[i + 1],
                shape=(width, columns), like=matrix, memory=storage[matrix.index],
            )  # fmt: skip
            args = (parts[i], rows) if total is None else (total, parts[i], rows)
            target = aten.mm.default if total is None else aten.addmm.default
            if step == len(order) - 1:
                ops.append(Op(target, args, {}, (out,), True))
            else:
                shape = metas[out.index].shape
                total = emit(target, *args, shape=shape, like=out, memory=None)
    return StepGraph(
        graph.inputs, graph.constants, ops, graph.outputs, graph.checks, storage, metas, graph.fresh
    )


def _parts(cat: Op, metas: dict[int, Meta]) -> list[Value]:
    """What is put side by side, if these are matrices."""
    parts, dim = cat.args[0], (cat.args[1] if len(cat.args) > 1 else 0)
    plain = all(isinstance(p, Value) and len(metas[p.index].shape) == 2 for p in parts)
    return list(parts) if plain and dim in (-1, 1) else []


class SharedStart(Piece):
    """A piece of the fused engine whose first step is divided.

    Args:
        plan, steps: as for :class:`Piece`.
        graph, carried: of every step.
        divided: the first step.
    """

    def __init__(
        self, plan: Plan, graph: StepGraph, carried: Sequence[Any], steps: int, divided: Divided
    ) -> None:
        super().__init__(plan, graph, carried, steps - 1 or 1, fused=True)
        self.before = divided.before
        after = divided.after
        # What the second step starts from, as results of the first.
        self._handed = {
            path: ("state", *path) for path in carried if ("state", path) in after.outputs
        }
        after.outputs = {
            ("td", self._handed[name[1]]) if name[0] == "state" else name: value
            for name, value in after.outputs.items()
        }
        self.first = Piece(plan, after, (), 1, fused=True)
        self.all_steps = steps
        kept = {v.index: i for i, (v, _) in enumerate(plan.traced.graph.constants)}
        self._before_constants = [(v.index, kept[v.index]) for v, _ in self.before.constants]

    def prepared(self, inputs: Tensors, count: int) -> Tensors:
        values = {v.index: inputs[n][::count] for n, v in self.before.inputs.items() if n in inputs}
        values |= {index: self.plan.constants[i] for index, i in self._before_constants}
        read: Callable[[Value], torch.Tensor] = lambda v: values[v.index]  # noqa: E731
        for op in self.before.ops:
            found = op.target(*map_values(op.args, read), **map_values(op.kwargs, read))
            for out, value in zip(op.outputs, (found,) if op.single else found, strict=True):
                if out is not None:
                    values[out.index] = value
        shared = {
            name: values[v.index].repeat_interleave(count, 0)
            for name, v in self.before.outputs.items()
        }
        return {**inputs, **shared}

    def run(
        self,
        inputs: Tensors,
        actions: torch.Tensor | None,
        checks: list[torch.Tensor] | None = None,
    ) -> Tensors:
        head = None if actions is None else actions[:, :1]
        first = self.first.run(inputs, head, checks)
        handed = {path: first.pop(name)[:, 0].contiguous() for path, name in self._handed.items()}
        if self.all_steps == 1:
            return first
        rest = {path: value for path, value in inputs.items() if path[0] != "shared"}
        tail = None if actions is None else actions[:, 1:]
        later = super().run({**rest, **handed}, tail, checks)
        return {path: torch.cat([value, later[path]], 1) for path, value in first.items()}

    def __str__(self) -> str:
        return f"once:\n{self.before}\n\nfirst step:\n{self.first}\n\nsteps after it:\n{super().__str__()}"
