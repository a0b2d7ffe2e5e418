"""The fused engine: the step as a row program, the whole horizon in one call of the C++ library."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastwm.engines.captured import ChecksFailed, FeedStep, Tensors
from fastwm.nvtx import annotate
from fastwm.ops.library import cpu_library
from fastwm.row_program.executor import Executor
from fastwm.row_program.gradient import Gradient, differentiate
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
            raise NotFusible(f"bfloat16 weights in a step of {str(program.dtype)[len('torch.') :]}")
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
        self._kinds = {n: _kind(dtype) for n, (_, dtype) in lowered.casts.items()}
        # In the program's order of uniforms: constants as they are, or what the prologue makes of them.
        self._direct: list[int] | None = None
        if lowered.plain and all(
            constants[u.constant].is_contiguous() and constants[u.constant].dtype is program.dtype
            for u in lowered.uniforms
            if u.constant is not None
        ):
            self._direct = [u.constant for u in lowered.uniforms if u.constant is not None]
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
        # What every call needs, worked out once.
        self._rows_in = [n for n, i in program.inputs.items() if i.role != "uniform"]
        self._paths = [n[1] for n in lowered.casts]
        dtypes = (program.dtype, torch.bool, torch.int64)
        self._as_written = all(dtype in dtypes for _, dtype in lowered.casts.values())
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
            budget = None if save_all else self.wanted * _TAPE_SHARE
            self._modes[save_all] = _Mode(self, budget)
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
        tensors = [given[n] if n in given else inputs[n[1]].contiguous() for n in self._rows_in]
        tensors += uniforms
        if grad and not torch.is_inference_mode_enabled():
            # Flags that the env made under inference mode, for one: autograd would not save them.
            tensors = [t.clone() if t.is_inference() else t for t in tensors]
        after: Tensors = {}
        with annotate("fastwm.loop"):
            if grad:
                results, failed = (
                    self._mode(save_all=self._save_all(horizon)).run(tensors, horizon),
                    0,
                )
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
                outputs = self._fresh(horizon) if self._as_written else None
                results, failed = executor.run(tensors, self.rows, horizon, outputs=outputs)
        if failed:
            raise ChecksFailed
        if grad or finals or not self._as_written or self.lowered.passed:
            values = self._named(results, inputs, horizon)
        else:
            values = dict(zip(self._paths, results, strict=True))
        steps = self._stopped(values, horizon) if stop else horizon
        if steps < horizon:
            for generator, state in states:
                generator.set_state(state)
            if states:
                self._drawn(steps, feed if draws_feed else None)
            values = {k: t.narrow(self.dim, 0, steps).clone() for k, t in values.items()}
            if grad and steps == 1:  # what only later steps would have made require gradients
                first = {name[1] for name in self.requiring(1)}
                values = {k: t if k in first else t.detach() for k, t in values.items()}
        return steps, values, after

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
        return width * horizon * self.rows * 4 <= _TAPE_BYTES

    def _states(self) -> list[Any]:
        return list(self.program.carries)

    def _generators(self) -> list[torch.Generator]:
        return [torch.default_generator, *self.generators]

    def _uniform_names(self) -> list[Any]:
        return [n for n, i in self.program.inputs.items() if i.role == "uniform"]

    def _uniforms(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._direct is not None:
            return [constants[i] for i in self._direct]
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
    gradient: Gradient
    executor: Executor
    inputs: list[Any]  # those of the forward run that it reads
    outputs: list[Any]
    dtypes: list[torch.dtype]  # of the executor's inputs


class _Mode:
    """A way of going forward and back: what is saved, what is worked out again."""

    def __init__(self, loop: FusedLoop, budget: float | None) -> None:
        self.loop = loop
        program = loop.program
        self.floats = loop.requiring(2)
        self.first = set(loop.requiring(1))  # those that require gradients after one step, too
        self.full = differentiate(program, loop.wrt, self.floats, budget=budget)
        self.forward = loop._executor(self.full.forward, finals=())
        self.tape_width = self.full.tape_width
        self.backwards: dict[frozenset[Any], _Backward] = {}
        self.inputs = list(self.forward.inputs)
        self.names = list(self.full.forward.outputs)
        #: Inputs that the gradients of all outputs need.
        self.kept = {n for kind, n in self.full.sources() if kind == "input"}

    def run(self, tensors: Sequence[torch.Tensor], steps: int) -> Any:
        results = _Rollout.apply(self, steps, *tensors)
        return list(results)[: len(self.loop.program.outputs)]

    def backward(self, given: frozenset[Any]) -> _Backward:
        """The backward program for gradients of these outputs alone."""
        if given not in self.backwards:
            gradient = self.full
            if given != frozenset(self.floats):
                # Of the forward program as it ran, so that what it saved is there; nothing more can be.
                gradient = differentiate(self.full.forward, self.loop.wrt, given, budget=0)
            major = {
                n for n, s in gradient.saved.items()
                if s.kind == "input" and s.name in self.loop.time_major
            }  # fmt: skip
            backward = gradient.backward
            executor = Executor(backward, time_major=major)
            kinds = [backward.type(backward.inputs[n].val).kind for n in executor.inputs]
            other = {"bool": torch.bool, "int": torch.int64}
            sources = gradient.sources()
            self.backwards[given] = _Backward(
                gradient,
                executor,
                [n for kind, n in sources if kind == "input"],
                [n for kind, n in sources if kind == "output"],
                [other.get(kind, backward.dtype) for kind in kinds],
            )
        return self.backwards[given]


class _Rollout(torch.autograd.Function):
    """The rollout as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, mode: _Mode, steps: int, *tensors: torch.Tensor) -> Any:
        plain = [t.detach() for t in tensors]
        outputs, failed = mode.forward.run(plain, mode.loop.rows, steps)
        if failed:
            raise ChecksFailed
        ctx.mode, ctx.steps = mode, steps
        ctx.set_materialize_grads(False)
        floats = mode.first if steps == 1 else set(mode.floats)
        fixed = [t for n, t in zip(mode.names, outputs, strict=True) if n not in floats]
        ctx.mark_non_differentiable(*fixed)
        # Eager's graph holds no more than this either: the caller may write into anything else.
        ctx.save_for_backward(
            *(t for n, t in zip(mode.inputs, tensors, strict=True) if n in mode.kept),
            *(t for n, t in zip(mode.names, outputs, strict=True) if _on_tape(n)),
        )
        ctx.others = {
            n: (t, t._version)
            for n, t in zip(mode.inputs, tensors, strict=True)
            if n not in mode.kept
        }
        # What the caller gets may be written into, too: aliases that tell when it was.
        ctx.given_out = {
            n: (t.detach(), t._version)
            for n, t in zip(mode.names, outputs, strict=True)
            if not _on_tape(n)
        }
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        mode: _Mode = ctx.mode
        inputs, outputs = _found_again(ctx)
        given = {n: g.contiguous() for n, g in zip(mode.names, grads, strict=True) if g is not None}
        wanted = dict(zip(mode.inputs, ctx.needs_input_grad[2:], strict=True))
        found: dict[Any, torch.Tensor | None] = {}
        if given and torch.is_grad_enabled():
            _refuse_changed(ctx, mode.inputs)
            found = _differentiable(mode, ctx.steps, inputs, given, wanted)
        elif given:
            how = mode.backward(frozenset(given))
            if how.gradient.reached:
                again = any(n not in outputs for n in how.outputs)
                _refuse_changed(ctx, mode.inputs if again else how.inputs)
                if again:
                    outputs = _rerun(mode, ctx.steps, inputs)
                ready = how.gradient.gather(inputs, outputs, given, rows=mode.loop.rows)
                # An output may be of another kind than the value it is made of: a one-hot, as integers.
                order = [
                    ready[n].detach().to(dtype).contiguous()
                    for n, dtype in zip(how.executor.inputs, how.dtypes, strict=True)
                ]
                results, _ = how.executor.run(order, mode.loop.rows, ctx.steps, reverse=True)
                names = [made[0] for made in how.executor._made]
                made = dict(zip(names, results, strict=True))
                found = {n: made.get(("grad", n), made.get(("adjoint", n))) for n in mode.inputs}
        back: list[torch.Tensor | None] = []
        for name in mode.inputs:
            gradient = found.get(name) if wanted[name] else None
            if gradient is not None:
                if name in mode.loop.time_major:
                    gradient = gradient.transpose(0, 1)
                gradient = gradient.reshape(inputs[name].shape)
            back.append(gradient)
        return None, None, *back


def _on_tape(name: Any) -> bool:
    return bool(name[:1] == ("tape",))


def _found_again(ctx: Any) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """The inputs, and those outputs that are still what the forward pass wrote."""
    mode: _Mode = ctx.mode
    saved = iter(ctx.saved_tensors)
    inputs = {n: next(saved) if n in mode.kept else ctx.others[n][0] for n in mode.inputs}
    outputs = {n: next(saved) for n in mode.names if _on_tape(n)}
    outputs |= {n: t for n, (t, version) in ctx.given_out.items() if t._version == version}
    return inputs, outputs


def _refuse_changed(ctx: Any, needed: Collection[Any]) -> None:
    for name in needed:
        tensor, version = ctx.others.get(name, (None, 0))
        if tensor is not None and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: input {name} of this rollout, after it ran on the fused engine"
            )


def _rerun(mode: _Mode, steps: int, inputs: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """The outputs once more, for a caller who wrote into those that we gave out."""
    plain = [inputs[n].detach() for n in mode.inputs]
    outputs, _ = mode.forward.run(plain, mode.loop.rows, steps)
    return dict(zip(mode.names, outputs, strict=True))


def _differentiable(
    mode: _Mode, steps: int, inputs: dict[Any, torch.Tensor], given: dict[Any, torch.Tensor],
    wanted: dict[Any, bool],
) -> dict[Any, torch.Tensor | None]:  # fmt: skip
    """Gradients that have gradients themselves, by torch's autograd over the reference interpreter."""
    program, rows = mode.loop.program, mode.loop.rows
    laid: dict[Any, torch.Tensor] = {}
    for name, item in program.inputs.items():
        value = inputs[name]
        shape = program.type(item.val).shape
        if item.role == "step":
            laid[name] = value.reshape(steps, rows, *shape).transpose(0, 1)
        else:
            laid[name] = value if item.role == "uniform" else value.reshape(rows, *shape)
    outputs = interpret(program, laid, steps).outputs
    names = [n for n in given if n in outputs and outputs[n].requires_grad]
    ends = [n for n, wants in wanted.items() if wants]
    found = torch.autograd.grad(
        [outputs[n] for n in names], [laid[n] for n in ends], [given[n] for n in names],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    return dict(zip(ends, found, strict=True))


def _copied(program: Any, finals: Collection[Any]) -> Any:
    return replace(program, finals=list(finals))


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


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
