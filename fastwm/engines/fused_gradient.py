"""The fused engine with gradients: a rollout as one node of autograd's graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastwm.row_program.fresh import Fresh
from fastwm.row_program.gradient import Gradient, differentiate
from fastwm.row_program.kinds import dtype_of
from fastwm.row_program.noise import numbers
from fastwm.row_program.reference import interpret
from fastwm.row_program.row_executor import RowExecutor

if TYPE_CHECKING:
    from fastwm.engines.fused import FusedLoop

__all__ = ["GradientMode"]


@dataclass
class BackwardPlan:
    """A backward program for gradients of certain outputs.

    Attributes:
        plan: for each of the executor's inputs, where it comes from and which one it is: a forward ``input``
            or ``output``, the ``tape``, the ``grad`` of an output, or ``zero`` of a shape; and its dtype.
        inputs, outputs: those of the forward run that it reads, by position.
        results: for each forward input, which of the executor's results is its gradient; -1: none.
    """

    gradient: Gradient
    executor: RowExecutor
    plan: list[tuple[str, Any, torch.dtype]]
    inputs: list[int]
    outputs: list[int]
    results: list[int]


class GradientMode:
    """A way of going forward and back: what is saved, what is worked out again."""

    def __init__(self, loop: FusedLoop, budget: float | None, *, pooled: bool) -> None:
        self.loop = loop
        program = loop.program
        self.floats = loop.requiring(2)
        first = set(loop.requiring(1))  # those that require gradients after one step, too
        self.full = differentiate(program, loop.wrt, self.floats, budget=budget)
        self.forward = loop.executor(self.full.forward)
        self.tape_width = self.full.tape_width
        self.backwards: dict[frozenset[int], BackwardPlan] = {}
        self.inputs = list(self.forward.inputs)
        self.names = list(self.full.forward.outputs)
        self.count = len(program.outputs)
        saved = list(self.full.forward.outputs.values())[self.count :]
        self.tape = [self.full.forward.type(v) for v in saved]
        kept = {n for kind, n in self.full.sources() if kind == "input"}
        #: Inputs that the gradients of all outputs need, by position, and the others.
        self.kept = [i for i, n in enumerate(self.inputs) if n in kept]
        self.others = [i for i, n in enumerate(self.inputs) if n not in kept]
        names = self.names[: self.count]
        self.fixed = [i for i, n in enumerate(names) if n not in set(self.floats)]
        self.fixed_first = [i for i, n in enumerate(names) if n not in first]
        self.major = {i for i, n in enumerate(self.inputs) if n in loop.time_major}
        self.pool: list[Tape] | None = [] if pooled else None
        dtypes = [dtype_of(type.kind, program.dtype) for type in self.tape]
        self.fresh_tape = Fresh(
            lambda steps: [
                ((loop.rows, steps, *type.shape), dtype)
                for type, dtype in zip(self.tape, dtypes, strict=True)
            ],
            loop.device,
        )

    def run(self, tensors: Sequence[torch.Tensor], steps: int) -> tuple[list[torch.Tensor], int]:
        """The outputs, and as :meth:`Executor.run` when a check failed."""
        failed: list[int] = []
        outputs = Rollout.apply(self, steps, failed, *tensors)
        return list(outputs), failed[0]

    def fresh(self, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """Memory for the outputs, for the tape, and what gives the tape's back when it goes."""
        loop = self.loop
        if loop.as_written:
            outputs = loop.fresh(steps)
        else:
            outputs = self.forward.empty(loop.rows, steps)[: self.count]
        if self.pool is None or any(type.kind != "float" for type in self.tape):
            return outputs, self.fresh_tape(steps), None
        shapes = [type.shape for type in self.tape]
        lease = Lease(self.pool, loop.rows, steps, shapes, loop.program.dtype)
        return outputs, lease.tape.values, lease

    def backward(self, given: frozenset[int]) -> BackwardPlan:
        """The backward program for gradients of these outputs alone."""
        if given not in self.backwards:
            gradient = self.full
            names = {self.names[i] for i in given}
            if names != set(self.floats):
                # Of the forward program as it ran, so that what it saved is there; nothing more can be.
                gradient = differentiate(self.full.forward, self.loop.wrt, names, budget=0)
            self.backwards[given] = self._backward(gradient)
        return self.backwards[given]

    def _backward(self, gradient: Gradient) -> BackwardPlan:
        program, major = gradient.backward, set()
        noise = self.loop.drawing.again(gradient)
        for name, source in gradient.saved.items():
            if source.kind == "input" and source.name in self.loop.time_major:
                major.add(name)
        executor = self.loop.executor_of(program, major, bf16=self.loop.bf16, noise=noise)
        position = {n: i for i, n in enumerate(self.inputs)}
        produced = {n: i for i, n in enumerate(self.names)}
        plan: list[tuple[str, Any, torch.dtype]] = []
        for name in executor.inputs:
            item = program.inputs[name]
            type = program.type(item.val)
            dtype = torch.int64 if name in noise else dtype_of(type.kind, program.dtype)
            if name in gradient.saved:
                source = gradient.saved[name]
                if source.kind == "input":
                    plan.append(("input", position[source.name], dtype))
                elif (at := produced[source.name]) < self.count:
                    plan.append(("output", at, dtype))
                else:
                    plan.append(("tape", at - self.count, dtype))
            elif item.role in ("context", "uniform"):
                plan.append(("input", position[name], dtype))
            elif item.role == "step":
                plan.append(("grad", produced[name[1]], dtype))
            else:
                plan.append(("zero", (self.loop.rows, *type.shape), dtype))
        made = {name: i for i, name in enumerate(executor.results)}
        results = [made.get(("grad", n), made.get(("adjoint", n), -1)) for n in self.inputs]
        return BackwardPlan(
            gradient, executor, plan,
            [at for what, at, _ in plan if what == "input"],
            [at for what, at, _ in plan if what == "output"],
            results,
        )  # fmt: skip


class Tape:
    """Memory for what a forward run saves, and the saved values' places in it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(size, dtype=dtype, device="cpu")
        self.steps = -1
        self.values: list[torch.Tensor] = []

    def lay(self, rows: int, steps: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Places for values ``[rows, steps, *shape]``, one after the other."""
        if steps != self.steps:
            sizes = [rows * steps * math.prod(shape) for shape in shapes]
            pieces = self.memory[: sum(sizes)].split(sizes)
            laid = zip(pieces, shapes, strict=True)
            self.values = [piece.view(rows, steps, *shape) for piece, shape in laid]
            self.steps = steps


class Lease:
    """A tape, given back when the graph that holds it goes: fresh memory costs page faults."""

    def __init__(
        self, pool: list[Tape], rows: int, steps: int, shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        size = rows * steps * sum(map(math.prod, shapes))
        self.pool = pool
        tape = None
        while tape is None or tape.memory.numel() < size:  # other threads take from it, too
            try:
                tape = pool.pop()
            except IndexError:
                tape = Tape(size, dtype)
        self.tape = tape
        tape.lay(rows, steps, shapes)

    def __del__(self) -> None:
        if len(self.pool) < 2:
            self.pool.append(self.tape)


class Rollout(torch.autograd.Function):
    """The rollout as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, mode: GradientMode, steps: int, failures: list[int], *tensors: torch.Tensor
    ) -> Any:
        outputs, tape, lease = mode.fresh(steps)
        _, failed = mode.forward.run(tensors, mode.loop.rows, steps, outputs=[*outputs, *tape])
        failures.append(failed)
        ctx.mode, ctx.steps, ctx.lease = mode, steps, lease
        ctx.set_materialize_grads(False)
        fixed = mode.fixed_first if steps == 1 else mode.fixed
        ctx.mark_non_differentiable(*(outputs[i] for i in fixed))
        # Eager's graph holds no more than this either: the caller may write into anything else.
        ctx.leased = tape if lease is not None else []
        ctx.save_for_backward(
            *(tensors[i] for i in mode.kept), *(() if lease is not None else tape)
        )
        ctx.others = [(tensors[i], tensors[i]._version) for i in mode.others]
        # What the caller gets may be written into, too: aliases that tell when it was.
        ctx.given_out = [(t.detach(), t._version) for t in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        mode: GradientMode = ctx.mode
        saved = ctx.saved_tensors
        if ctx.given_out is None:  # what was kept elsewhere is gone as well
            raise RuntimeError(
                "Trying to backward through the graph a second time, after the values that it kept have been "
                "freed. Specify retain_graph=True if you need to backward through the graph a second time."
            )
        inputs: list[Any] = [None] * len(mode.inputs)
        for i, tensor in zip(mode.kept, saved, strict=False):
            inputs[i] = tensor
        for i, (tensor, _) in zip(mode.others, ctx.others, strict=True):
            inputs[i] = tensor
        tape = ctx.leased or saved[len(mode.kept) :]
        given = frozenset(i for i, g in enumerate(grads) if g is not None)
        wanted = ctx.needs_input_grad[3:]
        found: list[torch.Tensor | None] = [None] * len(inputs)
        if given and torch.is_grad_enabled():
            _refuse_changed(ctx, range(len(inputs)))
            found = _differentiable(mode, ctx.steps, inputs, grads, wanted)
        elif given:
            found = _gradients(ctx, given, inputs, tape, grads)
        back: list[torch.Tensor | None] = []
        for i, gradient in enumerate(found):
            if not wanted[i] or gradient is None:
                back.append(None)
                continue
            if i in mode.major and not torch.is_grad_enabled():
                gradient = gradient.transpose(0, 1)
            shape = inputs[i].shape
            back.append(gradient if gradient.shape == shape else gradient.reshape(shape))
        if not _graph_is_kept():
            ctx.lease = ctx.given_out = None
            ctx.leased, ctx.others = [], []
        return None, None, None, *back


def _gradients(
    ctx: Any, given: frozenset[int], inputs: Sequence[torch.Tensor], tape: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients of the inputs, by the backward program for gradients of the given outputs."""
    mode: GradientMode = ctx.mode
    how = mode.backward(given)
    if not how.gradient.reached:
        return [None] * len(inputs)
    outputs: list[Any] = [t if t._version == version else None for t, version in ctx.given_out]
    again = any(outputs[i] is None for i in how.outputs)
    _refuse_changed(ctx, range(len(inputs)) if again else how.inputs)
    if again:  # the caller wrote into what we gave out
        outputs, tape, _ = mode.fresh(ctx.steps)
        mode.forward.run(inputs, mode.loop.rows, ctx.steps, outputs=[*outputs, *tape])
    lists: dict[str, Any] = {"input": inputs, "output": outputs, "tape": tape, "grad": grads}
    order = []
    for what, at, dtype in how.plan:
        if what == "zero":
            order.append(torch.zeros(at, dtype=dtype, device=mode.loop.device))
            continue
        tensor = lists[what][at]
        # An output may be of another kind than the value it is made of: a one-hot, as integers.
        tensor = tensor if tensor.dtype is dtype else tensor.to(dtype)
        order.append(tensor if tensor.is_contiguous() else tensor.contiguous())
    results, _ = how.executor.run(order, mode.loop.rows, ctx.steps, reverse=True)
    return [None if at < 0 else results[at] for at in how.results]


def _graph_is_kept() -> bool:
    """Whether the backward pass that is under way was asked to keep the graph (if torch tells)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def _refuse_changed(ctx: Any, needed: Iterable[int]) -> None:
    changed = {
        i for i, (t, version) in zip(ctx.mode.others, ctx.others, strict=True)
        if t._version != version
    }  # fmt: skip
    for i in needed:
        if i in changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: input {ctx.mode.inputs[i]} of this rollout, after it ran on the fused engine"
            )


def _differentiable(
    mode: GradientMode, steps: int, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients that have gradients themselves, by torch's autograd over the reference interpreter."""
    program, rows = mode.loop.program, mode.loop.rows
    wrt, drawn = set(mode.loop.wrt), mode.loop.drawing.noise
    ends = [i for i, wants in enumerate(wanted) if wants and mode.inputs[i] in wrt]
    inputs = dict(zip(mode.inputs, tensors, strict=True))
    # Inputs may hang on one another: these here do not.
    fresh = {i: tensors[i].view_as(tensors[i]) for i in ends}
    inputs.update((mode.inputs[i], t) for i, t in fresh.items())
    laid: dict[Any, torch.Tensor] = {}
    for name, item in program.inputs.items():
        value = inputs[name]
        shape = program.type(item.val).shape
        if name in drawn:
            laid[name] = numbers(drawn[name], value, rows, steps, shape, program.dtype)
        elif item.role == "step":
            laid[name] = value.reshape(steps, rows, *shape).transpose(0, 1)
        else:
            laid[name] = value if item.role == "uniform" else value.reshape(rows, *shape)
    outputs = interpret(program, laid, steps).outputs
    named = zip(mode.names, grads, strict=False)
    given = {n: g for n, g in named if g is not None and outputs[n].requires_grad}
    back: list[torch.Tensor | None] = [None] * len(wanted)
    if not given or not ends:
        return back
    found = torch.autograd.grad(
        [outputs[n] for n in given], list(fresh.values()),
        [g.reshape(outputs[n].shape) for n, g in given.items()],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    for i, gradient in zip(ends, found, strict=True):
        back[i] = gradient
    return back
