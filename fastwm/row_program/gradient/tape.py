"""Which forward values the backward program finds saved, and which it works out again.

Without a budget everything is saved that the adjoint instructions need, except what a movement (slice,
reshape) of values at hand gives back. With one, the values are saved that spare the most multiply-adds per
float; what spares little (elementwise ops, small matrices) is cheaper to do again than to write and read.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Set

from fastwm.row_program.ops import MOVEMENT, PRODUCTS
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["WORTH", "choose", "cost", "recomputed"]

#: Multiply-adds that saving one float must spare, where the budget is not the limit.
WORTH = 16.0

_DEAR = {
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), 20.0),
    **dict.fromkeys(("exp", "log", "log1p", "expm1", "sin", "cos", "erf", "tanh"), 12.0),
    **dict.fromkeys(("safe_tanh", "sigmoid"), 12.0),
    **dict.fromkeys(("log_sigmoid", "silu", "mish", "gelu", "gelu_tanh", "softplus", "elu"), 14.0),
    "pow": 14.0,
    "layer_norm": 10.0,
}


def cost(program: Program, instr: Instr) -> float:
    """About how many multiply-adds an instruction takes for one row.

    Example:
        >>> from fastwm.row_program import Program
        >>> p = Program()
        >>> x, w = p.input("x", "carry", (8,)), p.input("w", "uniform", (4, 8))
        >>> y = p.emit("linear", x, w, None, layout="nk")
        >>> cost(p, p.instrs[0])
        32.0
    """
    width = max((program.type(v).width for v in (*instr.values(), instr.out) if v), default=0)
    if instr.op in PRODUCTS:
        assert instr.out is not None
        assert isinstance(instr.args[0], Val)
        return float(program.type(instr.out).width * program.type(instr.args[0]).shape[-1])
    return width * _DEAR.get(instr.op, 1.0)


def recomputed(program: Program, needs: Iterable[int], at_hand: Set[int]) -> list[Instr]:
    """The instructions that give ``needs`` from the values at hand, in order."""
    wanted = set(needs) - at_hand
    found = []
    for instr in reversed(program.instrs):
        if instr.out is not None and instr.out.index in wanted:
            found.append(instr)
            wanted |= {v.index for v in instr.values()} - at_hand
    return found[::-1]


def choose(
    program: Program, needs: Set[int], at_hand: Set[int], budget: float | None
) -> tuple[list[int], list[Instr]]:
    """Which values to save beside those at hand, and what to work out again.

    Args:
        needs: numbers of the forward values that the adjoint instructions refer to.
        at_hand: those that cost nothing: inputs, outputs.
        budget: floats per row and step; None saves all.
    """
    if budget is None:
        saved = _all(program, needs, at_hand)
    else:
        saved = _best(program, needs, at_hand, budget)
    return sorted(saved), recomputed(program, needs, at_hand | saved)


def _all(program: Program, needs: Set[int], at_hand: Set[int]) -> set[int]:
    saved: set[int] = set()
    have = set(at_hand)
    for instr in program.instrs:
        if instr.out is None or instr.out.index not in needs or instr.out.index in have:
            continue
        if instr.op not in MOVEMENT or any(v.index not in have for v in instr.values()):
            saved.add(instr.out.index)
        have.add(instr.out.index)
    return saved


def _best(program: Program, needs: Set[int], at_hand: Set[int], budget: float) -> set[int]:
    """Greedy. What saving a value spares changes with each choice: it is worked out again when its turn
    comes."""
    saved: set[int] = set()
    left = budget
    costs = {i.out.index: cost(program, i) for i in program.instrs if i.out is not None}

    def total(extra: Set[int]) -> float:
        again = recomputed(program, needs, at_hand | saved | extra)
        return sum(costs[i.out.index] for i in again if i.out is not None)

    now = total(set())
    queue = [
        (-math.inf, i.out.index)
        for i in recomputed(program, needs, at_hand)
        if i.out is not None and i.op not in MOVEMENT
    ]
    while queue:
        _, index = heapq.heappop(queue)
        width = max(1, program.types[index].width)
        if width > left:
            continue
        gain = (now - total({index})) / width
        if gain < WORTH:
            continue
        if queue and gain < -queue[0][0]:
            heapq.heappush(queue, (-gain, index))
            continue
        saved.add(index)
        left -= width
        now = total(set())
    return saved
