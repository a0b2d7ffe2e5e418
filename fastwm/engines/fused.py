"""The fused engine: the step as a row program, the whole horizon in one call.

On the CPU that is a call of the C++ library, on CUDA the launch of a Triton kernel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastwm.engines.captured import ChecksFailed, FeedStep, Tensors
from fastwm.engines.choice import OTHER_ROUNDINGS, prefers_captured
from fastwm.engines.drawing import Drawing
from fastwm.engines.fused_gradient import GradientMode
from fastwm.nvtx import annotate
from fastwm.ops.library import cpu_library, has_triton
from fastwm.row_program.executor import Executor
from fastwm.row_program.fresh import Fresh
from fastwm.row_program.kinds import dtype_name, dtype_of, kind_of
from fastwm.row_program.lowering import Lowered, NotLowerable, lower
from fastwm.row_program.noise import Noise
from fastwm.row_program.passes import fuse_act
from fastwm.row_program.program import Program, ProgramError
from fastwm.row_program.row_executor import RowExecutor
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
        bf16: products with weights rounded to bfloat16 (without gradients); on CUDA what they are multiplied
            with is rounded too.
        noise: who draws: ``"torch"``, as eager does, or on CUDA the ``"kernel"``.

    Attributes:
        note: how it runs, where that is not as usual.
        ignored: what was asked for and has no effect here, with the reason; else "".

    A step of bfloat16 is a program of float32: its weights are the same numbers, its values and its carry are
    not rounded until they are given back. On CUDA its products round both factors, as eager's do.

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
        noise: str = "torch",
    ) -> None:
        self.device = device = _device_of(graph)
        _refuse_device(device)
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
        half = lowered.floats is torch.bfloat16
        self.rounds = bf16 and not half  # to less than the step itself has
        self.bf16 = bf16 or half
        self.rows = lowered.rows
        first = next(iter(graph.inputs.values()))
        self.batch = tuple(graph.metas[first.index].shape[:dim])
        self.wanted = _floats_kept(graph) / max(1, self.rows)
        self.generators = graph.generators()
        asked = noise == "kernel"
        self.drawing = Drawing(
            lowered, self.fed, device, in_kernel=asked and self.draws_in_kernel(device)
        )
        self.ignored = self._ignored() if asked else ""
        notes = ["values held in float32"] if half else ["bfloat16 weights"] if bf16 else []
        if self.drawing.noise:
            notes.append("noise drawn in the kernel")
        elif self.ignored:
            notes.append(f"noise drawn by torch: {self.ignored}")
        self.note = ", ".join(notes)
        self.time_major = lowered.time_major
        #: Flags that may be true; those that are False by construction end nothing.
        self.live = [f for f in self.flags if not _never(lowered, f)]
        self._kinds = lowered.kinds
        # In the program's order of uniforms: constants as they are, or what the prologue makes of them.
        self._direct: list[tuple[int, bool]] | None = None
        self.wrt = self._wrt(constants, wanting) if wanting is not None else []
        # The Triton kernel's executor reads bfloat16 as well; gradients go through the prologue's casts.
        floats = {program.dtype}
        if half and device.type == "cuda" and not self.wrt:
            floats.add(torch.bfloat16)
        if lowered.plain and all(
            constants[u.constant].is_contiguous()
            and constants[u.constant].device == device
            and constants[u.constant].dtype in {dtype_of(u.kind, dtype) for dtype in floats}
            for u in lowered.uniforms
            if u.constant is not None
        ):
            self._direct = [
                (u.constant, u.frozen) for u in lowered.uniforms if u.constant is not None
            ]
        self._modes: dict[Any, GradientMode] = {}
        if self.rounds and self.wrt:
            raise NotFusible("bfloat16 weights have no gradients")
        self._plain: RowExecutor | None = None
        self._blocks: RowExecutor | None = None
        try:
            if self.wrt:
                self._mode(save_all=True)
            else:
                self._plain = self.executor(program)
        except ProgramError as reason:
            raise NotFusible(str(reason)) from reason
        elements = sum(
            program.types[item.val.index].width
            for name, item in program.inputs.items()
            if item.role == "uniform" and len(program.types[item.val.index].shape) > 1
        )
        #: Why "auto" leaves this to the captured engine, if it does.
        self.slower = prefers_captured(elements, self.rows, device.type, gradients=bool(self.wrt))
        if half:
            self.slower = self.slower or OTHER_ROUNDINGS
        # What every call needs, worked out once.
        self._rows_in = [n for n, i in program.inputs.items() if i.role != "uniform"]
        self._paths = [n[1] for n in lowered.casts]
        self.as_written = all(
            dtype is dtype_of(kind_of(dtype), program.dtype) for _, dtype in lowered.casts.values()
        )
        casts = list(lowered.casts.values())
        #: Fresh tensors for the results of so many steps, in the shapes that the caller gets.
        self.fresh = Fresh(
            lambda steps: [((*self.batch, steps, *inner), dtype) for inner, dtype in casts], device
        )

    # -- making executors

    @staticmethod
    def draws_in_kernel(device: torch.device) -> bool:
        """Whether the executors there can draw noise themselves."""
        return device.type == "cuda"

    def _ignored(self) -> str:
        if self.drawing.noise or not self.lowered.draws:
            return ""
        if not self.draws_in_kernel(self.device):
            return "fused_noise='kernel' is for CUDA"
        return "fused_noise='kernel', and the kernel knows the law of none of the step's draws"

    def _wrt(self, constants: Sequence[torch.Tensor], wanting: Collection[Any]) -> list[Any]:
        with torch.enable_grad():
            names = (n for n, i in self.program.inputs.items() if i.role == "uniform")
            uniforms = dict(zip(names, self._uniforms(constants), strict=True))
        found = []
        for name, given in self.program.inputs.items():
            if given.role == "uniform":
                if uniforms[name].requires_grad and name not in self.lowered.frozen:
                    found.append(name)
            elif name in wanting or (name[0] == "in" and name[1] in wanting):
                found.append(name)
        return found

    def executor(self, program: Program) -> RowExecutor:
        """For this program, or for the same with more outputs."""
        return self.executor_of(
            program, self.time_major, self._kinds, bf16=self.bf16, noise=self.drawing.noise
        )

    def executor_of(
        self, program: Program, time_major: Collection[Any], kinds: Mapping[Any, str] | None = None,
        *, bf16: bool = False, noise: Mapping[Any, Noise] | None = None,
    ) -> RowExecutor:  # fmt: skip
        """For any program, on the step's device."""
        if self.device.type == "cpu":
            return Executor(program, time_major=time_major, kinds=kinds, bf16=bf16)
        from fastwm.kernels.row_program import TritonExecutor  # triton is imported on first use

        return TritonExecutor(
            program, self.device, time_major=time_major, kinds=kinds, bf16=bf16, noise=noise
        )

    def _mode(self, *, save_all: bool) -> GradientMode:
        """Forward and backward programs that save everything, or that save little and work it out again."""
        if save_all not in self._modes:
            budget = _PLENTY if save_all else self.wanted * _TAPE_SHARE
            # On CUDA torch's own allocator keeps memory, and knows of streams.
            pooled = save_all and self.device.type == "cpu"
            self._modes[save_all] = GradientMode(self, budget, pooled=pooled)
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
        given = self.drawing(horizon, feed)
        uniforms = self._uniforms(constants)
        steps, failed = horizon, 0
        tensors = [given[n] if n in given else inputs[n[1]].contiguous() for n in self._rows_in]
        if self.lowered.floats is not self.program.dtype:
            tensors = [t.to(self.program.dtype) if t.is_floating_point() else t for t in tensors]
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
                carries = list(self.program.carries)
                if self._blocks is None:
                    self._blocks = self.executor(replace(self.program, finals=carries))
                outputs, failed = self._blocks.run(tensors, self.rows, horizon)
                count = len(self.program.outputs)
                results = outputs[:count]
                after = {}
                for name, t in zip(carries, outputs[count:], strict=True):
                    was = inputs[name[1]]
                    t = t.reshape(was.shape)
                    # Floats of the next block start as they ended here, of whatever dtype eager has them.
                    after[name[1]] = t if was.is_floating_point() else t.to(was.dtype)
            else:
                if self._plain is None:
                    self._plain = self.executor(self.program)
                fresh = self.fresh(horizon) if self.as_written else None
                results, failed = self._plain.run(tensors, self.rows, horizon, outputs=fresh)
        values = self._values(results, inputs, horizon, reshape=finals)
        if stop:
            steps = self._stopped(values, horizon)
        if 0 < failed <= steps:  # beyond the last step nobody would have looked
            raise ChecksFailed
        if steps < horizon:
            for generator, state in states:
                generator.set_state(state)
            if states:
                self.drawing(steps, feed if draws_feed else None)
            if grad:
                # Steps past the end may hold what turns a gradient of 0 into NaN: they are no part of the
                # graph.
                del results, values
                for i, name in enumerate(self._rows_in):
                    if name in self.time_major and name not in self.drawing.noise:
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
        if reshape or not self.as_written or self.lowered.passed:
            return self._named(results, inputs, steps)
        return dict(zip(self._paths, results, strict=True))

    def _save_all(self, horizon: int) -> bool:
        width = self._mode(save_all=True).tape_width
        return width * horizon * self.rows * self.program.dtype.itemsize <= _TAPE_BYTES

    def _generators(self) -> list[torch.Generator]:
        own = [torch.default_generator, *self.generators]
        if self.device.type == "cuda":
            own.append(torch.cuda.default_generators[self.device.index or 0])
        return own

    def _uniforms(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._direct is not None:
            return [constants[i].detach() if frozen else constants[i] for i, frozen in self._direct]
        return [t.to(self.device).contiguous() for t in self.lowered.prologue(constants)]

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
        if self.device.type == "cpu":
            return str(self.program)
        executor: Any = self._plain or self.executor(self.program)
        return f"{self.program}\n\n{executor.source(self.rows).text}"


def _device_of(graph: StepGraph) -> torch.device:
    """The device of the step; single numbers may lie on the CPU all the same, as in eager.

    Raises:
        NotFusible: tensors on several.
    """
    found = {m.device for m in graph.metas.values() if m.shape}
    found = found or {m.device for m in graph.metas.values()}
    if len(found) > 1:
        raise NotFusible(f"tensors on {' and '.join(sorted(map(str, found)))}")
    return next(iter(found))


def _refuse_device(device: torch.device) -> None:
    if device.type == "cpu":
        library = cpu_library()
        if not library.loaded:
            raise NotFusible(library.reason)
    elif device.type != "cuda":
        raise NotFusible(f"tensors on {device.type}")
    elif torch.version.hip is not None:
        raise NotFusible("the kernels for CUDA are written for NVIDIA's chips")
    elif not has_triton():
        raise NotFusible("triton is not installed, which the kernels for CUDA need")


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
