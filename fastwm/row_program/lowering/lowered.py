"""``lower``: the step graph as a whole, its inputs, outputs, carries and checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastwm.row_program.kinds import dtype_name, kind_of
from fastwm.row_program.lowering.draws import Draw
from fastwm.row_program.lowering.errors import Misfit, NotLowerable, RowsMix
from fastwm.row_program.lowering.layout import Fill, Fixed, Laid, describe
from fastwm.row_program.lowering.prologue import Uniform
from fastwm.row_program.lowering.step import StepLowering
from fastwm.row_program.passes import dce, optimise, renumbered
from fastwm.row_program.program import Program, Val
from fastwm.step_graph import StepGraph

__all__ = ["Lowered", "lower"]

_TRIES = 64  # combinations of places where the batch may lie in noise


@dataclass
class Lowered:
    """A step as a row program, and how to get what it takes and to read what it gives.

    Attributes:
        program: inputs ``("in", path)``, ``("feed", path)``, ``("draw", i)``, ``("const", i)``; outputs by
            the graph's names ``("td", path)``; carries ``("in", path)``.
        uniforms: where each uniform comes from, in the program's order.
        prologue: the graph's constants, in its order -> the uniforms' tensors, in the program's dtype.
        plain: the prologue computes nothing: every uniform is a constant.
        draws: the step's random ops, in order.
        casts: for each output, its shape within a row and its dtype in eager.
        passed: output names that are an input which no step changes -> the name of that input.
        frozen: uniforms whose gradients must not reach the constants.
        rows: the size of the batch.
        floats: dtype of the step's floats: the program's, or bfloat16, which the program holds in float32.
    """

    program: Program
    uniforms: list[Uniform]
    prologue: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    plain: bool
    draws: list[Draw]
    casts: dict[Any, tuple[tuple[int, ...], torch.dtype]]
    passed: dict[Any, Any] = field(default_factory=dict)
    frozen: set[Any] = field(default_factory=set)
    rows: int = 1
    floats: torch.dtype = torch.float32

    @property
    def time_major(self) -> set[Any]:
        """Inputs that are drawn or fed step by step, and so lie in memory."""
        return {n for n in self.program.inputs if n[0] in ("draw", "feed")}

    @property
    def kinds(self) -> dict[Any, str]:
        """For each output, the kind of its elements in eager."""
        return {name: kind_of(dtype) for name, (_, dtype) in self.casts.items()}


def lower(
    graph: StepGraph,
    carried: Iterable[Any],
    fed: Iterable[Any],
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    optimised: bool = True,
) -> Lowered:
    """The step as a row program.

    Args:
        graph: a traced step; see :class:`fastwm.traced_step.TracedStep`.
        carried: input names whose value the step hands on as ``("state", name)``.
        fed: input names given anew at each step.
        dim: how many leading dims are the batch.
        dtype: of the program's floats; the graph's own by default (of a bfloat16 graph: float32), and no
            other is possible.
        optimised: run the passes.

    Raises:
        NotLowerable: with the one op, dtype or shape that rules it out.

    Example:
        See :mod:`fastwm.row_program.lowering`.
    """
    carried, fed = list(carried), list(fed)
    floats = _floats(graph, dtype)
    if not graph.inputs:
        raise NotLowerable("a step without inputs")
    first = StepLowering(graph, dim, floats)
    error: Misfit | None = None
    for choices in _choices(first):
        step = first if not choices else StepLowering(graph, dim, floats, choices)
        try:
            return _lower(step, graph, carried, fed, optimised)
        except Misfit as mix:
            error = error or mix
    assert error is not None
    raise error


def _choices(first: StepLowering) -> Iterable[tuple[int, ...]]:
    """Which placement for which draw: first the likeliest, then the others."""
    yield ()
    # How many there are is known once the first try has run: that was the first of these.
    combinations = itertools.product(*map(range, first.options))
    yield from itertools.islice(combinations, 1, _TRIES)


def _floats(graph: StepGraph, asked: torch.dtype | None) -> torch.dtype:
    inputs = [graph.metas[v.index].dtype for v in graph.inputs.values()]
    given = [d for d in (*inputs, *(t.dtype for _, t in graph.constants)) if d.is_floating_point]
    complex_ = [m.dtype for m in graph.metas.values() if m.dtype.is_complex]
    if complex_:
        raise NotLowerable(f"{dtype_name(complex_[0])} values")
    found = given[0] if given else asked or torch.get_default_dtype()
    if asked is None and set(given) == {torch.bfloat16}:
        return torch.bfloat16
    for d in given:
        if d not in (torch.float32, torch.float64):
            where = "inputs" if d in inputs else "parameters"
            raise NotLowerable(f"{dtype_name(d)} {where}")
    if asked is not None and asked is not found:
        raise NotLowerable(f"a step of {dtype_name(found)} as a program of {dtype_name(asked)}")
    return found


def _lower(
    step: StepLowering, graph: StepGraph, carried: list[Any], fed: list[Any], optimised: bool
) -> Lowered:
    roles = {
        n: "carry" if n in carried else "step" if n in fed else "context" for n in graph.inputs
    }
    # Copied from the input by the caller, bit for bit.
    unchanged = {v.index: n for n, v in graph.inputs.items() if roles[n] == "context"}
    passed = {
        name: ("in", unchanged[v.index])
        for name, v in graph.outputs.items()
        if name[0] == "td" and v.index in unchanged
    }
    _refuse_batch(step, graph)
    step.start(roles)
    step.run()
    program = step.b.program
    casts = {}
    for name, v in graph.outputs.items():
        if name[0] == "td" and name not in passed:
            meta = graph.metas[v.index]
            casts[name] = (tuple(meta.shape[step.dim :]), meta.dtype)
            program.outputs[name] = _as_output(step, _read(step, v, name), name)
        elif name[0] == "state" and name[1] in carried:
            program.carries["in", name[1]] = _as_output(step, _read(step, v, name), name)
    for v in graph.checks:
        step.check(step.validated[v.index])
    step.settle(carried)
    if optimised:
        program = optimise(program)
    used = _drop_unused(program)
    for draw in step.draws:
        if draw.name not in used:
            draw.name = None
    uniforms = [u for u in step.b.uniforms if u.name in used]
    return Lowered(
        program=renumbered(program),
        uniforms=uniforms,
        prologue=step.b.nodes.program(uniforms, program.dtype),
        plain=all(u.constant is not None for u in uniforms),
        draws=step.draws,
        casts=casts,
        passed=passed,
        frozen={u.name for u in uniforms if u.frozen},
        rows=_rows(step),
        floats=step.floats,
    )


def _rows(step: StepLowering) -> int:
    return math.prod(atom.size for atom in step.b.batch if atom is not None)


def _refuse_batch(step: StepLowering, graph: StepGraph) -> None:
    shapes = {tuple(graph.metas[v.index].shape[: step.dim]) for v in graph.inputs.values()}
    if len(shapes) > 1:
        raise NotLowerable(f"inputs of different batch shapes {sorted(shapes)}")
    if any(n == 0 for shape in shapes for n in shape):
        raise NotLowerable("an empty batch")
    for name, v in graph.inputs.items():
        if 0 in graph.metas[v.index].shape:
            raise NotLowerable(f"input {name} has no elements")


def _read(step: StepLowering, v: Any, name: Any) -> Laid:
    try:
        return step.read(v)
    except NotLowerable as error:
        raise NotLowerable(f"{name}: {error}") from None


def _as_output(step: StepLowering, laid: Laid, name: Any) -> Val:
    """The value in the row's own order and shape."""
    lead = step.b.batch_dims
    for d, want in zip(laid.dims, lead, strict=False):
        alike = d == want or all(a.kind == "repeat" for a in d)
        if not alike:
            raise RowsMix(f"{name}: its batch does not lie in front: {describe(laid)}")
    rest = laid.dims[step.dim :]
    if any(a.kind == "batch" for d in rest for a in d):
        raise RowsMix(f"{name}: its batch does not lie in front: {describe(laid)}")
    shape = tuple(laid.shape[step.dim :])
    if isinstance(laid.ref, Fill):
        return step.b.fill(float(laid.ref.value), shape, laid.kind)
    if isinstance(laid.ref, Fixed):
        laid = step.b.as_row(laid)
    atoms = [a for d in rest for a in d]
    return step.b.ordered(laid, atoms, shape)


def _drop_unused(program: Program) -> set[Any]:
    """Inputs that nobody reads are not asked for; the names of those left."""
    while True:
        read = {v.index for i in program.instrs for v in i.values()}
        read |= {v.index for v in (*program.outputs.values(), *program.checks)}
        own = {n for n, i in program.inputs.items() if i.val.index in read}
        feeds = {v.index for n, v in program.carries.items() if n in own}
        kept = {n: i for n, i in program.inputs.items() if n in own or i.val.index in feeds}
        if len(kept) == len(program.inputs):
            return set(kept)
        program.inputs.clear()
        program.inputs.update(kept)
        carries = {n: v for n, v in program.carries.items() if n in kept}
        program.carries.clear()
        program.carries.update(carries)
        program.instrs[:] = dce(program).instrs
