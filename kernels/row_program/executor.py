"""Running a row program on a GPU: one launch for the whole horizon, and one product for each sum after it."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import triton

from fastwm.kernels.row_program.source import Source, Tile, matrices, scratch_columns, write
from fastwm.kernels.row_program.stages import plan
from fastwm.row_program.deferred_sums import defer_sums
from fastwm.row_program.kinds import matmul_precision
from fastwm.row_program.noise import MOST_ROWS, Noise
from fastwm.row_program.ops import PRODUCTS
from fastwm.row_program.program import Program, Val
from fastwm.row_program.row_executor import RowExecutor

__all__ = ["TritonExecutor", "kernel_of", "programs_for", "tile_for"]

_TALL = 64  # rows of the tallest tile
_SCRATCH_BYTES = 30 << 20  # of all tiles at a time
_KEPT_BYTES = 256 << 20  # what is kept for sums at a time
_ALIGNED = 64  # elements from one rounded matrix to the next


def tile_for(rows: int, processors: int, columns: int, itemsize: int = 4) -> Tile:
    """The tile for so many rows: small ones, as long as there is a multiprocessor for each.

    Args:
        columns: of a row's scratch; what all tiles together have of it is bounded.

    Example:
        >>> from fastwm.kernels.row_program.executor import tile_for  # doctest: +SKIP
        >>> tile_for(64, 132, 736).rows, tile_for(131072, 132, 736).rows  # doctest: +SKIP
        (16, 64)
    """
    tall = 16
    while tall < _TALL and rows > tall * processors * 2:
        if processors * 2 * tall * columns * itemsize > _SCRATCH_BYTES:
            break
        tall *= 2
    return Tile(rows=tall, warps=4 if tall == 16 else 8)


def programs_for(rows: int, processors: int, tile: Tile, columns: int, itemsize: int = 4) -> int:
    """How many program instances share so many rows: those that run at a time, within the bound."""
    at_a_time = processors * (2 if tile.warps == 4 else 1)  # those of 8 warps fill a multiprocessor
    room = _SCRATCH_BYTES // (tile.rows * columns * itemsize)
    return max(1, min(triton.cdiv(rows, tile.rows), at_a_time, room))


def kernel_of(source: Source) -> Any:
    """The kernel, compiled when first launched. Triton reads a kernel's text through its file."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    file = f"<fastwm row program {digest}>"
    linecache.cache[file] = len(source.text), None, source.text.splitlines(True), file
    space: dict[str, Any] = {"__name__": f"fastwm_row_program_{digest}"}
    exec(compile(source.text, file, "exec"), space)
    return space["row_program_kernel"]


def _in_dtype(given: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors themselves, where they are of this dtype, else copies.

    All by one launch, at each call, into memory of its own: nothing written into them since, however it was
    written, can be missed, and a call on another stream, or inside a capture, meets no other's.
    """
    found = [t.detach() for t in given]
    others = [at for at, t in enumerate(found) if t.dtype is not dtype]
    if not others:
        return found
    sizes = [-(-found[at].numel() // _ALIGNED) * _ALIGNED for at in others]
    room = torch.empty(sum(sizes), dtype=dtype, device=found[0].device).split(sizes)
    copies = [
        part[: found[at].numel()].view(found[at].shape)
        for part, at in zip(room, others, strict=True)
    ]
    torch._foreach_copy_(copies, [found[at] for at in others])
    for at, copy in zip(others, copies, strict=True):
        found[at] = copy
    return found


class TritonExecutor(RowExecutor):
    """A row program as a Triton kernel; see :class:`fastwm.row_program.row_executor.RowExecutor`.

    Args:
        program: what to run.
        device: where. A CPU, for Triton's interpreter alone.
        time_major: step inputs given as ``[steps, rows, *shape]``.
        kinds: by output name, what its tensor holds: ``"float"``, ``"bool"`` or ``"int"``.
        tile: sizes, else chosen by the rows of each call.
        bf16: products of bfloat16 factors, summed in float32: matrices are rounded at the start of each call,
            whatever they hold then, and what they are multiplied with as it is read (float32 only).

        noise: step inputs that the kernel draws itself, each time that it reads them: what is given for them
            is the rollout's key (:func:`fastwm.row_program.noise.new_key`).

    Raises:
        ProgramError: something that there is no kernel for.
        ValueError: ``bf16`` for a float64 program.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device | str,
        *,
        time_major: Collection[Any] = (),
        kinds: Mapping[Any, str] | None = None,
        tile: Tile | None = None,
        bf16: bool = False,
        noise: Mapping[Any, Noise] | None = None,
    ) -> None:
        super().__init__(program, kinds, device)
        self.noise = dict(noise or {})
        if bf16 and program.dtype is not torch.float32:
            raise ValueError("bfloat16 products go with float32 programs")
        self.bf16 = bf16
        rounded = matrices(program) if bf16 else []
        self._rounded_at = [self.inputs.index(name) for name in rounded]
        elsewhere = {
            v.index
            for instr in program.instrs
            for at, v in enumerate(instr.args)
            if isinstance(v, Val) and not (instr.op in PRODUCTS and at == 1)
        }
        elsewhere |= {v.index for v in program.roots()}
        self._products_alone = {
            self.inputs.index(n) for n in rounded if program.inputs[n].val.index not in elsewhere
        }
        self.device = torch.device(device)
        self._deferred = deferred = defer_sums(program, self.noise)
        self._plan = plan(deferred.program)
        self._time_major = set(time_major)
        self._tile = tile
        self._made: dict[Any, tuple[Any, torch.Tensor]] = {}
        self._never = torch.zeros(1, dtype=torch.int32, device=self.device)  # written by no kernel
        self._processors = 1
        if self.device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def inner(self) -> Program:
        """The program that the kernel runs: without sums."""
        return self._deferred.program

    def source(self, rows: int, *, reverse: bool = False, precision: str | None = None) -> Source:
        """What runs for so many rows; its ``text`` is the kernel.

        Args:
            precision: of products, as Triton has it; default: what torch is set to.
        """
        if precision is None:
            precision = self._precision()
        tile = self._tile_of(rows)
        return write(
            self._plan, tile, reverse=reverse, time_major=self._time_major, kinds=self.kinds,
            precision=precision, order=self.inputs, local=self._deferred.kept, noise=self.noise,
        )  # fmt: skip

    def _precision(self) -> str:
        """Of products, as torch's own have it on CUDA; float64 has but one."""
        if self.bf16:
            return "bf16"
        return matmul_precision() if self.program.dtype is torch.float32 else "ieee"

    def _tile_of(self, rows: int) -> Tile:
        columns, item = scratch_columns(self._plan), self.program.dtype.itemsize
        return self._tile or tile_for(rows, self._processors, columns, item)

    def scratch(self, rows: int) -> tuple[int, int]:
        """Program instances for so many rows, and elements of scratch of all of them, which is what a call
        takes beside its results."""
        tile, columns = self._tile_of(rows), scratch_columns(self._plan)
        item = self.program.dtype.itemsize
        programs = programs_for(rows, self._processors, tile, columns, item)
        return programs, programs * tile.rows * columns

    def _kernel(self, rows: int, reverse: bool) -> tuple[Tile, Any, torch.Tensor]:
        tile = self._tile_of(rows)
        key = tile, reverse, self._precision()
        if key not in self._made:
            source = self.source(rows, reverse=reverse)
            maps = torch.tensor(source.maps, dtype=torch.int32, device=self.device)
            self._made[key] = kernel_of(source), maps
        return tile, *self._made[key]

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        rows: int,
        steps: int,
        *,
        reverse: bool = False,
        outputs: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], int]:
        # Where the program has checks, this waits for the device. With ``bf16`` inputs may be in bfloat16.
        if outputs is None:
            outputs = self.empty(rows, steps)
        if self.noise and rows > MOST_ROWS:
            raise RuntimeError(f"noise drawn within a kernel counts to {MOST_ROWS} rows")
        program, kept = self.program, self._deferred.kept
        count = len(program.outputs)
        finals = outputs[count : count + len(program.finals)]
        sums = dict(zip(program.sums, outputs[count + len(finals) :], strict=True))
        for total in sums.values():
            total.zero_()
        read = self._read(inputs)
        failed = self._never
        if program.checks:
            failed = torch.full((1,), steps, dtype=torch.int32, device=self.device)
        width = sum(program.types[v.index].width for v in kept.values())
        bytes_of = max(1, width * steps * program.dtype.itemsize)
        at_once = max(1, min(rows, _KEPT_BYTES // bytes_of)) if kept else max(1, rows)
        for first in range(0, rows, at_once):
            last = min(rows, first + at_once)
            extra = [
                torch.empty(
                    (last - first, steps, *program.type(v).shape), dtype=program.dtype, device=self.device
                )
                for v in kept.values()
            ]  # fmt: skip
            if steps or finals:
                self._launch(
                    read,
                    [*outputs[:count], *extra],
                    finals,
                    failed,
                    first,
                    last,
                    rows,
                    steps,
                    reverse,
                )
            if sums and steps:
                self._add(dict(zip(kept, extra, strict=True)), inputs, sums, first, last, steps)
        if not program.checks or not rows:
            return outputs, 0
        at = int(failed)
        return outputs, at + 1 if at < steps else 0

    def _read(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the kernel reads: inputs in the program's dtype, and matrices in bfloat16."""
        rounded = _in_dtype([inputs[at] for at in self._rounded_at], torch.bfloat16)
        if not self.bf16:
            return [*inputs, *rounded]
        # Of a model in bfloat16. The kernel does not look at matrices that it has in bfloat16.
        others = [
            at
            for at, tensor in enumerate(inputs)
            if tensor.dtype is torch.bfloat16 and at not in self._products_alone
        ]
        wide = _in_dtype([inputs[at] for at in others], self.program.dtype)
        read = list(inputs)
        for at, tensor in zip(others, wide, strict=True):
            read[at] = tensor
        return [*read, *rounded]

    def _launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], finals: Sequence[torch.Tensor],
        failed: torch.Tensor, first: int, last: int, rows: int, steps: int, reverse: bool,
    ) -> None:  # fmt: skip
        tile, kernel, maps = self._kernel(rows, reverse)
        widest = max(
            (self.program.types[v.index].width for v in self.inner.outputs.values()), default=1
        )
        if tile.rows * steps * widest >= 1 << 31:
            raise RuntimeError(f"{steps} steps of {widest} elements are too many for one launch")
        tiles = triton.cdiv(last - first, tile.rows)
        programs, size = self.scratch(last - first)
        scratch = torch.empty(size, dtype=self.program.dtype, device=self.device)
        with torch.cuda.device_of(scratch):
            kernel[(programs,)](
                *inputs, *outputs, *finals, failed, maps, scratch, first, last, rows, steps,
                triton.cdiv(tiles, programs), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

    def _add(
        self, kept: Mapping[Any, torch.Tensor], inputs: Sequence[torch.Tensor],
        sums: Mapping[Any, torch.Tensor], first: int, last: int, steps: int,
    ) -> None:  # fmt: skip
        deferred, program = self._deferred, self.program
        named = dict(zip(self.inputs, inputs, strict=True))
        values = {val.index: kept[name] for name, val in deferred.kept.items()}
        for index, name in deferred.given.items():
            value, shape = named[name], program.types[index].shape
            if program.inputs[name].role == "context":
                value = value[first:last].reshape(-1, 1, *shape).expand(-1, steps, *shape)
            elif name in self._time_major:
                value = value.reshape(steps, -1, *shape)[:, first:last].transpose(0, 1)
            else:
                value = value.reshape(-1, steps, *shape)[first:last]
            values[index] = value.to(program.dtype)
        deferred.add(values, sums)
