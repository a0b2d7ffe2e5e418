"""Sums over rows and steps, taken after the sweep: from values kept of every step, by whole products.

Where many tiles run at once, each would need sums of its own, or add to the same ones in no certain order. So
a program without sums keeps what they are sums of, and one product per sum follows: the same numbers at every
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastwm.row_program.ops import SUMS
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["DeferredSums", "defer_sums"]


@dataclass(frozen=True)
class DeferredSums:
    """A program without sums, and the sums.

    Attributes:
        program: with one more output for each value that is summed and not given anyway.
        kept: name of such an output -> the value.
        given: value that is summed -> name of the step or context input that it is.
        terms: what adds to sums.
    """

    program: Program
    kept: dict[Any, Val]
    given: dict[int, Any]
    terms: list[Instr]

    def add(self, values: Mapping[int, torch.Tensor], sums: Mapping[Any, torch.Tensor]) -> None:
        """Add the contributions of some rows to ``sums``.

        Args:
            values: by value number, ``[rows, steps, *shape]``.
        """
        for term in self.terms:
            operands = [values[v.index] for v in term.values()]
            total = sums[term.attrs["target"]]
            total += _TERMS[term.op](*operands, **term.attrs).reshape(total.shape)


def defer_sums(program: Program, drawn: Collection[Any] = ()) -> DeferredSums:
    """Split a program into what goes step by step and its sums.

    Args:
        drawn: step inputs that are there in no tensor, because they are drawn as they are read.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.deferred_sums import defer_sums
        >>> p = Program()
        >>> x, g = p.input("x", "step", (3,)), p.input("g", "carry", (2,))
        >>> p.add_sum("weight", (2, 3))
        >>> p.emit("outer", x, p.emit("tanh", g), layout="nk", target="weight")
        >>> deferred = defer_sums(p)
        >>> print(deferred.program)
        row program (float32)
          step    %0 x: f[3]
          carry   %1 g: f[2]
          %2: f[2] = tanh(%1)
          output summed.2 = %2
        >>> deferred.given, deferred.kept
        ({0: 'x'}, {('summed', 2): %2})
    """
    terms = [i for i in program.instrs if i.op in SUMS]
    summed = {v.index: v for term in terms for v in term.values()}
    given = {
        i.val.index: name
        for name, i in program.inputs.items()
        if i.role in ("step", "context") and i.val.index in summed and name not in drawn
    }
    kept = {("summed", index): val for index, val in summed.items() if index not in given}
    without = replace(
        program,
        instrs=[i for i in program.instrs if i.op not in SUMS],
        outputs={**program.outputs, **kept},
        sums={},
    )
    return DeferredSums(without, kept, given, terms)


def _rows(x: torch.Tensor, dims: int) -> torch.Tensor:
    """``[rows, steps, *lead, *dims]`` as ``[all of them, *dims]``."""
    tail = x.shape[x.ndim - dims :]
    return x.reshape(math.prod(x.shape[: x.ndim - dims]), *tail)


def _outer(x: torch.Tensor, g: torch.Tensor, layout: str, target: Any) -> torch.Tensor:
    x, g = _rows(x, 1), _rows(g, 1)
    return g.T @ x if layout == "nk" else x.T @ g


def _grouped_outer(x: torch.Tensor, g: torch.Tensor, layout: str, target: Any) -> torch.Tensor:
    groups = g.shape[2]
    x = x if x.ndim == 4 else x.unsqueeze(2).expand(-1, -1, groups, -1)
    x, g = (_rows(t, 2).transpose(0, 1) for t in (x, g))  # [G, rows, K or N]
    return g.mT @ x if layout == "nk" else x.mT @ g


def _mine(i: torch.Tensor, member: int) -> torch.Tensor:
    return i.reshape(-1, 1) == member


def _member_outer(
    x: torch.Tensor, g: torch.Tensor, i: torch.Tensor, layout: str, target: Any, members: int
) -> torch.Tensor:
    x, g = _rows(x, 1), _rows(g, 1)
    # Chosen, not multiplied: 0 times another member's infinity would be NaN.
    parts = [torch.where(_mine(i, m), g, 0) for m in range(members)]
    chosen = [torch.where(_mine(i, m), x, 0) for m in range(members)]
    return torch.stack(
        [p.T @ c if layout == "nk" else c.T @ p for p, c in zip(parts, chosen, strict=True)]
    )


def _member_row_sum(g: torch.Tensor, i: torch.Tensor, target: Any, members: int) -> torch.Tensor:
    g = _rows(g, g.ndim - 2)
    rows = g.reshape(len(g), -1)
    return torch.stack([torch.where(_mine(i, m), rows, 0).sum(0) for m in range(members)])


_TERMS: dict[str, Callable[..., torch.Tensor]] = {
    "outer": _outer,
    "grouped_outer": _grouped_outer,
    "member_outer": _member_outer,
    "row_sum": lambda g, target: g.sum((0, 1)),
    "member_row_sum": _member_row_sum,
}
