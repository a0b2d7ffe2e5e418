"""What of a step need not wait for its turn: ops that feed no later step, done once for all steps.

A reward head reads the next latent and nobody reads the reward. Inside the loop it costs its calls at
every step; after the loop, one call on ``[batch * time, features]`` does the work of all steps, in larger
products. This holds for ops that treat each row by itself, and only those are put off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastwm.step_graph import Op, StepGraph, Value, values_in

__all__ = ["split"]

aten = torch.ops.aten
# Functions of single elements; other arguments are Python numbers.
_UNARY = {
    aten.silu, aten.relu, aten.tanh, aten.sigmoid, aten.elu, aten.gelu, aten.leaky_relu, aten.softplus,
    aten.mish, aten.exp, aten.log, aten.log1p, aten.expm1, aten.neg, aten.abs, aten.sqrt, aten.rsqrt,
    aten.square, aten.sign, aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh,
    aten.logical_not, aten.bitwise_not, aten.detach, aten.alias, aten.clone, aten.isfinite, aten.isnan,
}  # fmt: skip
_BINARY = {
    aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.maximum, aten.minimum, aten.gt, aten.ge,
    aten.lt, aten.le, aten.eq, aten.ne, aten.logical_and, aten.logical_or, aten.bitwise_and,
    aten.bitwise_or, aten.rsub,
}  # fmt: skip


def split(
    body: list[Op],
    graph: StepGraph,
    root: Callable[[Value], int],
    varying: set[int],
    needed: Iterable[int],
) -> tuple[list[Op], list[Op]]:
    """Part a step's ops into those of the loop and those for after it, each in order.

    Args:
        body: ops that depend on the step.
        needed: values that the next step, a flag or a check needs.
    """
    wanted = set(needed)
    written = {graph.storage[m.index] for op in body for m in op.mutates}
    keep: list[Op] = []
    later: list[Op] = []
    for op in reversed(body):
        outs = [o for o in op.outputs if o is not None]
        touched = any(graph.storage.get(v.index) in written for v in (*op.inputs(), *outs))
        if (
            op.draws
            or touched
            or op.detached
            or any(root(o) in wanted for o in outs)
            or not _by_rows(op, graph, varying)
        ):
            keep.append(op)
            wanted.update(root(v) for v in op.inputs())
        else:
            later.append(op)
    return keep[::-1], later[::-1]


def _by_rows(op: Op, graph: StepGraph, varying: set[int]) -> bool:
    """Whether the op maps ``[rows, features]`` to ``[rows, features]``, each row on its own."""
    moving = [v for v in op.inputs() if v.index in varying]
    outs = [o for o in op.outputs if o is not None]
    shapes = [graph.metas[v.index].shape for v in (*moving, *outs)]
    if not op.single or not moving or any(len(s) != 2 or s[0] != shapes[0][0] for s in shapes):
        return False
    packet = getattr(op.target, "overloadpacket", None)

    def fixed(item: Any, dims: tuple[int, ...]) -> bool:
        return (
            isinstance(item, Value)
            and item.index not in varying
            and len(graph.metas[item.index].shape) in dims
        )

    def moves(item: Any) -> bool:
        return isinstance(item, Value) and item.index in varying

    args = op.args
    if packet is aten.addmm:
        return fixed(args[0], (1,)) and moves(args[1]) and fixed(args[2], (2,))
    if packet is aten.mm:
        return moves(args[0]) and fixed(args[1], (2,))
    if packet is aten.cat:
        dim = args[1] if len(args) > 1 else 0
        return dim in (1, -1) and all(map(moves, args[0]))
    if packet is aten.slice:
        return len(args) > 1 and args[1] in (1, -1)
    if packet in _UNARY:
        return moves(args[0]) and not any(True for _ in values_in(args[1:]))
    if packet in _BINARY:
        # A fixed operand of two dims would hold one row per row of the batch, not of the stack.
        operands = [a for a in args[:2] if isinstance(a, Value)]
        same = {graph.metas[v.index].shape for v in operands if moves(v)}
        return len(same) == 1 and all(moves(v) or fixed(v, (0, 1)) for v in operands)
    return False
