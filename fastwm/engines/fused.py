"""The fused engine: the step as a row program, the whole horizon in one call of the C++ library."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastwm.engines.captured import ChecksFailed, FeedStep, Tensors
from fastwm.engines.choice import prefers_captured
from fastwm.nvtx import annotate
from fastwm.ops.library import cpu_library
from fastwm.row_program.executor import Executor
from fastwm.row_program.gradient import Gradient, differentiate
from fastwm.row_program.kinds import dtype_name, dtype_of, kind_of
from fastwm.row_program.lowering import Lowered, NotLowerable, lower
from fastwm.row_program.passes import fuse_act
from fastwm.row_program.program import ProgramError
from fastwm.row_program.reference import interpret
from fastwm.step_graph import StepGraph

__all__ = ["FusedLoop", "NotFusible"]

# Steps that run before the flags are looked at, where a flag may end the rollout.
_BLOCK = 64
# Up to this many bytes everything that the backward pass needs is saved. Beyond, at most this share of what
# eager keeps for autograd: with outputs and gradients it stays under a quarter.
_TAPE_BYTES = 32 << 20
_TAPE_SHARE = 1 / 6
# The budget below that size: whatever spares more work than it costs to write and read. (None: everything.)
_PLENTY: float | None = math.inf


class NotFusible(Exception):
    """The step is not for this engine; the message names what rules it out."""


class FusedLoop:
    """A traced step, ready to run for any horizon.

    Args:
        graph: the step; inputs named by path or ``("feed", path)``, outputs ``("td", path)``,
            ``("state", path)``.
        carried, fed, flags, dim: as for :class:`fastwm.engines.captured.CapturedLoop`.
        constants: the graph's, in its order.
        wanting: names of the graph's inputs that require gradients; None where none are wanted at all.
        bf16: products with weights rounded to bfloat16 (without gradients).

    Raises:
        NotFusible: with the one thing that rules it out.
    """

    def __init__(
        self,
        graph: StepGraph,
        carried: Sequence[Any],
        fed: Sequence[Any],
        flags: Sequence[Any],
        dim: int,
        *,
        constants: Sequence[torch.Tensor],
        wanting: Collection[Any] | None,
        bf16: bool = False,
    ) -> None:
        for meta in graph.metas.values():
            if meta.device.type != "cpu":
                raise NotFusible(f"tensors on {meta.device.type}")
        library = cpu_library()
        if not library.loaded:
            raise NotFusible(library.reason)
        try:
            self.lowered = lowered = lower(graph, carried, fed, dim)
            program = fuse_act(lowered.program)
        except (NotLowerable, ProgramError) as reason:
            raise NotFusible(str(reason)) from reason
        if bf16 and program.dtype is not torch.float32:
            raise NotFusible(f"bfloat16 weights in a step of {dtype_name(program.dtype)}")
        self.program = program
        self.dim = dim
        self.fed = list(fed)
        self.flags = list(flags)
        self.bf16 = bf16
        self.rows = lowered.rows
        first = next(iter(graph.inputs.values()))
        self.batch = tuple(graph.metas[first.index].shape[:dim])
        self.wanted = _floats_kept(graph) / max(1, self.rows)
        self.generators = graph.generators()
        self.time_major = {n for n in program.inputs if n[0] in ("draw", "feed")}
        #: Flags that may be true; those that are False by construction end nothing.
        self.live = [f for f in self.flags if not _never(lowered, f)]
        self._kinds = {n: kind_of(dtype) for n, (_, dtype) in lowered.casts.items()}
        # In the program's order of uniforms: constants as they are, or what the prologue makes of them.
        self._direct: list[tuple[int, bool]] | None = None
        if lowered.plain and all(
            constants[u.constant].is_contiguous()
            and constants[u.constant].dtype is dtype_of(u.kind, program.dtype)
            for u in lowered.uniforms
            if u.constant is not None
        ):
            self._direct = [
                (u.constant, u.frozen) for u in lowered.uniforms if u.constant is not None
            ]
        self.wrt = self._wrt(constants, wanting) if wanting is not None else []
        self._modes: dict[Any, _Mode] = {}
        try:
            self._plain = self._executor(program, finals=()) if not self.wrt else None
        except ProgramError as reason:
            raise NotFusible(str(reason)) from reason
        if self.wrt:
            if bf16:
                raise NotFusible("bfloat16 weights have no gradients")
            try:
                self._mode(save_all=True)
            except ProgramError as reason:
                raise NotFusible(str(reason)) from reason
        self._blocks: Executor | None = None
        elements = sum(
            program.types[item.val.index].width
            for name, item in program.inputs.items()
            if item.role == "uniform" and len(program.types[item.val.index].shape) > 1
        )
        #: Why "auto" leaves this to the captured engine, if it does.
        self.slower = prefers_captured(elements, self.rows, gradients=bool(self.wrt))
        # What every call needs, worked out once.
        self._rows_in = [n for n, i in program.inputs.items() if i.role != "uniform"]
        self._paths = [n[1] for n in lowered.casts]
        self._as_written = all(
            dtype is dtype_of(kind_of(dtype), program.dtype) for _, dtype in lowered.casts.values()
        )
        self._sizes: dict[int, list[tuple[tuple[int, ...], torch.dtype]]] = {}

    # -- making executors

    def _wrt(self, constants: Sequence[torch.Tensor], wanting: Collection[Any]) -> list[Any]:
        with torch.enable_grad():
            uniforms = dict(zip(self._uniform_names(), self._uniforms(constants), strict=True))
        found = []
        for name, given in self.program.inputs.items():
            if given.role == "uniform":
                if uniforms[name].requires_grad and name not in self.lowered.frozen:
                    found.append(name)
            elif name in wanting or (name[0] == "in" and name[1] in wanting):
                found.append(name)
        return found

    def _executor(self, program: Any, *, finals: Collection[Any]) -> Executor:
        if finals:
            program = _copied(program, finals)
        return Executor(program, time_major=self.time_major, kinds=self._kinds, bf16=self.bf16)

    def _mode(self, *, save_all: bool) -> _Mode:
        """Forward and backward programs that save everything, or that save little and work it out again."""
        if save_all not in self._modes:
            budget = _PLENTY if save_all else self.wanted * _TAPE_SHARE
            self._modes[save_all] = _Mode(self, budget, pooled=save_all)
        return self._modes[save_all]

    def requiring(self, steps: int) -> list[Any]:
        """Outputs that require gradients, as eager's do after that many steps."""
        program = self.program
        depends = {program.inputs[n].val.index for n in self.wrt}
        for _ in range(steps if steps == 1 else len(program.carries) + 1):
            for instr in program.instrs:
                if instr.out is None or instr.op == "detach":
                    continue
                if program.type(instr.out).kind == "float" and any(
                    v.index in depends and program.type(v).kind == "float" for v in instr.values()
                ):
                    depends.add(instr.out.index)
            if steps > 1:
                depends |= {
                    program.inputs[n].val.index
                    for n, v in program.carries.items()
                    if v.index in depends
                }
        return [
            n
            for n, v in program.outputs.items()
            if v.index in depends and self._kinds.get(n, "float") == "float"
        ]

    # -- running

    def run(
        self,
        horizon: int,
        inputs: Tensors,
        constants: Sequence[torch.Tensor],
        feed: FeedStep | None,
        *,
        stop: bool,
        draws_feed: bool = False,
    ) -> tuple[int, Tensors]:
        """Run up to ``horizon`` steps: see :meth:`fastwm.engines.captured.CapturedLoop.run`.

        Args:
            draws_feed: ``feed`` takes numbers from the random generator.
        """
        stop = stop and bool(self.live)
        grad = bool(self.wrt) and torch.is_grad_enabled()
        if not stop or grad or horizon <= _BLOCK:
            steps, values, _ = self._block(
                horizon, inputs, constants, feed, stop, draws_feed, grad, finals=False
            )
            return steps, values
        done, pieces = 0, []
        while done < horizon:
            block = min(_BLOCK, horizon - done)
            steps, values, finals = self._block(
                block, inputs, constants, feed, stop, draws_feed, grad, finals=True
            )
            pieces.append(values)
            done += steps
            if steps < block or self._ended(values, steps):
                break
            inputs = {**inputs, **finals}
        if len(pieces) == 1:
            return done, pieces[0]
        return done, {k: torch.cat([p[k] for p in pieces], self.dim) for k in pieces[0]}

    def _block(
        self, horizon: int, inputs: Tensors, constants: Sequence[torch.Tensor], feed: FeedStep | None,
        stop: bool, draws_feed: bool, grad: bool, *, finals: bool,
    ) -> tuple[int, Tensors, Tensors]:  # fmt: skip
        random = bool(self.lowered.draws) or draws_feed
        states = [(g, g.get_state()) for g in self._generators()] if stop and random else []
        given = self._drawn(horizon, feed)
        uniforms = self._uniforms(constants)
        steps, failed = horizon, 0
        tensors = [given[n] if n in given else inputs[n[1]].contiguous() for n in self._rows_in]
        tensors += uniforms
        if grad and not torch.is_inference_mode_enabled():
            # Flags that the env made under inference mode, for one: autograd would not save them.
            tensors = [t.clone() if t.is_inference() else t for t in tensors]
        after: Tensors = {}
        with annotate("fastwm.loop"):
            if grad:
                mode = self._mode(save_all=self._save_all(horizon))
                results, failed = mode.run(tensors, horizon)
            elif finals:
                if self._blocks is None:
                    self._blocks = self._executor(self.program, finals=self._states())
                outputs, failed = self._blocks.run(tensors, self.rows, horizon)
                count = len(self.program.outputs)
                results = outputs[:count]
                after = {
                    name[1]: t.reshape(inputs[name[1]].shape).to(inputs[name[1]].dtype)
                    for name, t in zip(self._states(), outputs[count:], strict=True)
                }
            else:
                executor = self._plain or self._no_grad()
                fresh = self._fresh(horizon) if self._as_written else None
                results, failed = executor.run(tensors, self.rows, horizon, outputs=fresh)
        values = self._values(results, inputs, horizon, reshape=finals)
        if stop:
            steps = self._stopped(values, horizon)
        if 0 < failed <= steps:  # beyond the last step nobody would have looked
            raise ChecksFailed
        if steps < horizon:
            for generator, state in states:
                generator.set_state(state)
            if states:
                self._drawn(steps, feed if draws_feed else None)
            if grad:
                # Steps past the end may hold what turns a gradient of 0 into NaN: they are no part of the
                # graph.
                del results, values
                for i, name in enumerate(self._rows_in):
                    if name in self.time_major:
                        tensors[i] = tensors[i][:steps].clone()
                with annotate("fastwm.loop"):
                    mode = self._mode(save_all=self._save_all(steps))
                    results, failed = mode.run(tensors, steps)
                if failed:
                    raise ChecksFailed
                values = self._values(results, inputs, steps, reshape=False)
            else:
                values = {k: t.narrow(self.dim, 0, steps).clone() for k, t in values.items()}
        return steps, values, after

    def _values(
        self, results: Sequence[torch.Tensor], inputs: Tensors, steps: int, *, reshape: bool
    ) -> Tensors:
        if reshape or not self._as_written or self.lowered.passed:
            return self._named(results, inputs, steps)
        return dict(zip(self._paths, results, strict=True))

    def _fresh(self, steps: int) -> list[torch.Tensor]:
        """Tensors for the results, in the shapes that the caller gets."""
        sizes = self._sizes.get(steps)
        if sizes is None:
            if len(self._sizes) > 64:
                self._sizes.clear()
            casts = self.lowered.casts.values()
            sizes = [((*self.batch, steps, *inner), dtype) for inner, dtype in casts]
            self._sizes[steps] = sizes
        return [torch.empty(size, dtype=dtype) for size, dtype in sizes]

    def _no_grad(self) -> Executor:
        self._plain = self._executor(self.program, finals=())
        return self._plain

    def _save_all(self, horizon: int) -> bool:
        width = self._mode(save_all=True).tape_width
        return width * horizon * self.rows * self.program.dtype.itemsize <= _TAPE_BYTES

    def _states(self) -> list[Any]:
        return list(self.program.carries)

    def _generators(self) -> list[torch.Generator]:
        return [torch.default_generator, *self.generators]

    def _uniform_names(self) -> list[Any]:
        return [n for n, i in self.program.inputs.items() if i.role == "uniform"]

    def _uniforms(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._direct is not None:
            return [constants[i].detach() if frozen else constants[i] for i, frozen in self._direct]
        return [t.contiguous() for t in self.lowered.prologue(constants)]

    def _drawn(self, horizon: int, feed: FeedStep | None) -> dict[Any, torch.Tensor]:
        """Noise and fed actions of all steps, drawn as the steps would have, by input name."""
        draws = self.lowered.draws
        if not draws and feed is None:
            return {}
        found: dict[Any, torch.Tensor] = {}
        steps: dict[Any, list[torch.Tensor]] = {}
        calls: list[tuple[Any, Any]] = []  # how each op draws, and where to
        for draw in draws:
            if draw.name is None:
                calls.append((draw, None))
            elif draw.fill is not None and draw.dtype is self.program.dtype:
                noise = found[draw.name] = torch.empty((horizon, *draw.shape), dtype=draw.dtype)
                calls.append((draw.fill, noise.unbind(0)))
            else:
                steps[draw.name] = []
                calls.append((draw, steps[draw.name]))
        if feed is None and not steps and all(to is not None for _, to in calls):
            if len(calls) == 1:
                fill, to = calls[0]
                for noise in to:
                    fill(noise)
            else:
                fills = [fill for fill, _ in calls]
                for step_noise in zip(*(to for _, to in calls), strict=True):
                    for fill, noise in zip(fills, step_noise, strict=True):
                        fill(noise)
            return found
        fed: list[Sequence[torch.Tensor]] = []
        for step in range(horizon):
            if feed is not None:
                fed.append(feed())
            for call, to in calls:
                if isinstance(to, tuple):
                    call(to[step])
                    continue
                noise = call.sample()
                if to is not None:
                    to.append(noise if call.plain else call.rows(noise))
        found.update({name: torch.stack(noise) for name, noise in steps.items()})
        for position, name in enumerate(self.fed if feed is not None else ()):
            if name in self.program.inputs:
                found[name] = torch.stack([f[position] for f in fed])
        return found

    def _named(self, results: Sequence[torch.Tensor], inputs: Tensors, steps: int) -> Tensors:
        values: Tensors = {}
        for (name, (inner, dtype)), tensor in zip(self.lowered.casts.items(), results, strict=True):
            if self.dim != 1 or tensor.shape[2:] != inner:
                tensor = tensor.reshape(*self.batch, steps, *inner)
            values[name[1]] = tensor if tensor.dtype is dtype else tensor.to(dtype)
        for name, source in self.lowered.passed.items():
            value = inputs[source[1]]
            shape = (*value.shape[: self.dim], steps, *value.shape[self.dim :])
            values[name[1]] = (
                value.unsqueeze(self.dim).expand(shape).clone(memory_format=torch.contiguous_format)
            )
        return values

    def _stopped(self, values: Tensors, horizon: int) -> int:
        """Steps up to and with the first in which a flag is true."""
        ended = None
        for _, path in self.live:
            flag = values[path].detach().movedim(self.dim, 0).reshape(horizon, -1).any(1)
            ended = flag if ended is None else ended | flag
        assert ended is not None
        return int(ended.int().argmax()) + 1 if bool(ended.any()) else horizon

    def _ended(self, values: Tensors, steps: int) -> bool:
        return any(bool(values[path].select(self.dim, steps - 1).any()) for _, path in self.live)

    def __str__(self) -> str:
        return str(self.program)


@dataclass
class _Backward:
    """A backward program for gradients of certain outputs.

    Attributes:
        plan: for each of the executor's inputs, where it comes from and which one it is: a forward ``input``
            or ``output``, the ``tape``, the ``grad`` of an output, or ``zero`` of a shape; and its dtype.
        inputs, outputs: those of the forward run that it reads, by position.
        results: for each forward input, which of the executor's results is its gradient; -1: none.
    """

    gradient: Gradient
    executor: Executor
    plan: list[tuple[str, Any, torch.dtype]]
    inputs: list[int]
    outputs: list[int]
    results: list[int]


class _Mode:
    """A way of going forward and back: what is saved, what is worked out again."""

    def __init__(self, loop: FusedLoop, budget: float | None, *, pooled: bool) -> None:
        self.loop = loop
        program = loop.program
        self.floats = loop.requiring(2)
        first = set(loop.requiring(1))  # those that require gradients after one step, too
        self.full = differentiate(program, loop.wrt, self.floats, budget=budget)
        self.forward = loop._executor(self.full.forward, finals=())
        self.tape_width = self.full.tape_width
        self.backwards: dict[frozenset[int], _Backward] = {}
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
        self.pool: list[torch.Tensor] | None = [] if pooled else None

    def run(self, tensors: Sequence[torch.Tensor], steps: int) -> tuple[list[torch.Tensor], int]:
        """The outputs, and as :meth:`Executor.run` when a check failed."""
        failed: list[int] = []
        outputs = _Rollout.apply(self, steps, failed, *tensors)
        return list(outputs), failed[0]

    def fresh(self, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """Memory for the outputs, for the tape, and what gives the tape's back when it goes."""
        loop = self.loop
        if loop._as_written:
            outputs = loop._fresh(steps)
        else:
            outputs = self.forward.empty(loop.rows, steps)[: self.count]
        dtype, rows = loop.program.dtype, loop.rows
        sizes = [(rows, steps, *type.shape) for type in self.tape]
        if self.pool is None or any(type.kind != "float" for type in self.tape):
            tape = self.forward.empty(rows, steps)[self.count :]
            return outputs, tape, None
        total = sum(type.width for type in self.tape) * rows * steps
        lease = _Lease(self.pool, total, dtype)
        pieces = lease.memory[:total].split([type.width * rows * steps for type in self.tape])
        return outputs, [t.view(size) for t, size in zip(pieces, sizes, strict=True)], lease

    def backward(self, given: frozenset[int]) -> _Backward:
        """The backward program for gradients of these outputs alone."""
        if given not in self.backwards:
            gradient = self.full
            names = {self.names[i] for i in given}
            if names != set(self.floats):
                # Of the forward program as it ran, so that what it saved is there; nothing more can be.
                gradient = differentiate(self.full.forward, self.loop.wrt, names, budget=0)
            self.backwards[given] = self._backward(gradient)
        return self.backwards[given]

    def _backward(self, gradient: Gradient) -> _Backward:
        program, major = gradient.backward, set()
        for name, source in gradient.saved.items():
            if source.kind == "input" and source.name in self.loop.time_major:
                major.add(name)
        executor = Executor(program, time_major=major)
        position = {n: i for i, n in enumerate(self.inputs)}
        produced = {n: i for i, n in enumerate(self.names)}
        plan: list[tuple[str, Any, torch.dtype]] = []
        for name in executor.inputs:
            item = program.inputs[name]
            type = program.type(item.val)
            dtype = dtype_of(type.kind, program.dtype)
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
        made = {m[0]: i for i, m in enumerate(executor._made)}
        results = [made.get(("grad", n), made.get(("adjoint", n), -1)) for n in self.inputs]
        return _Backward(
            gradient, executor, plan,
            [at for what, at, _ in plan if what == "input"],
            [at for what, at, _ in plan if what == "output"],
            results,
        )  # fmt: skip


class _Lease:
    """Memory for a tape, given back when the graph that holds it goes: fresh memory costs page faults."""

    def __init__(self, pool: list[torch.Tensor], size: int, dtype: torch.dtype) -> None:
        self.pool = pool
        self.memory = torch.empty(0, dtype=dtype)
        while True:  # other threads take from it, too
            try:
                self.memory = pool.pop()
            except IndexError:
                break
            if self.memory.numel() >= size:
                return
        self.memory = torch.empty(size, dtype=dtype)

    def __del__(self) -> None:
        if len(self.pool) < 2:
            self.pool.append(self.memory)


class _Rollout(torch.autograd.Function):
    """The rollout as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, mode: _Mode, steps: int, failures: list[int], *tensors: torch.Tensor
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
        mode: _Mode = ctx.mode
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
            how = mode.backward(given)
            if how.gradient.reached:
                outputs: list[Any] = [
                    t if t._version == version else None for t, version in ctx.given_out
                ]
                again = any(outputs[i] is None for i in how.outputs)
                _refuse_changed(ctx, range(len(inputs)) if again else how.inputs)
                if again:  # the caller wrote into what we gave out
                    outputs, tape, _ = mode.fresh(ctx.steps)
                    mode.forward.run(inputs, mode.loop.rows, ctx.steps, outputs=[*outputs, *tape])
                lists: dict[str, Any] = {
                    "input": inputs,
                    "output": outputs,
                    "tape": tape,
                    "grad": grads,
                }
                order = []
                for what, at, dtype in how.plan:
                    if what == "zero":
                        order.append(torch.zeros(at, dtype=dtype))
                        continue
                    tensor = lists[what][at]
                    # An output may be of another kind than the value it is made of: a one-hot, as integers.
                    tensor = tensor if tensor.dtype is dtype else tensor.to(dtype)
                    order.append(tensor if tensor.is_contiguous() else tensor.contiguous())
                results, _ = how.executor.run(order, mode.loop.rows, ctx.steps, reverse=True)
                found = [None if at < 0 else results[at] for at in how.results]
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
    mode: _Mode, steps: int, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients that have gradients themselves, by torch's autograd over the reference interpreter."""
    program, rows = mode.loop.program, mode.loop.rows
    wrt = set(mode.loop.wrt)
    ends = [i for i, wants in enumerate(wanted) if wants and mode.inputs[i] in wrt]
    inputs = dict(zip(mode.inputs, tensors, strict=True))
    # Inputs may hang on one another: these here do not.
    fresh = {i: tensors[i].view_as(tensors[i]) for i in ends}
    inputs.update((mode.inputs[i], t) for i, t in fresh.items())
    laid: dict[Any, torch.Tensor] = {}
    for name, item in program.inputs.items():
        value = inputs[name]
        shape = program.type(item.val).shape
        if item.role == "step":
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


def _copied(program: Any, finals: Collection[Any]) -> Any:
    return replace(program, finals=list(finals))


def _never(lowered: Lowered, flag: Any) -> bool:
    """Whether a flag is False by construction."""
    val = lowered.program.outputs.get(flag)
    while val is not None:
        maker = next((i for i in lowered.program.instrs if i.out == val), None)
        if maker is None:
            return False
        if maker.op == "fill":
            return not maker.attrs["value"]
        if maker.op not in ("reshape", "index", "cast"):
            return False
        val = next(maker.values(), None)
    return False


def _floats_kept(graph: StepGraph) -> float:
    """Elements per step of what eager keeps for its backward pass: every float that the step computes."""
    sizes: dict[int, int] = {}
    for op in graph.ops:
        for out in op.outputs:
            if out is None:
                continue
            meta = graph.metas[out.index]
            if meta.dtype.is_floating_point:
                memory = graph.storage[out.index]
                sizes[memory] = max(sizes.get(memory, 0), math.prod(meta.shape))
    return float(sum(sizes.values()))
