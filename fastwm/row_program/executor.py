"""Running a row program in C++: the whole horizon in one call."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastwm.ops.row_program import row_program_op
from fastwm.row_program.encode import encode
from fastwm.row_program.program import Program
from fastwm.row_program.row_executor import RowExecutor

__all__ = ["Executor"]


# From so many rows on the products of one step are large enough, and values are not kept for several steps.
_TALL = 128


class Executor(RowExecutor):
    """A row program, encoded, with the room for its packed matrices.

    Matrices are packed when their contents differ from the last call's, so one executor can be called with
    other weights, or with the same ones after any kind of write.

    Args:
        program: what to run.
        time_major: step inputs given as ``[steps, rows, *shape]``.
        kinds: by output name, what its tensor holds: ``"float"``, ``"bool"`` or ``"int"``.
        bf16: hold matrices in bfloat16: half the memory to read, products of rounded weights (float32 only).
        isa: at most this instruction set (0 portable, 1 AVX2, 2 AVX-512); None: the best there is.

    Raises:
        ProgramError: something that the executor has no code for.
        RuntimeError: the C++ library is not there.

    Example:
        >>> import torch
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.executor import Executor
        >>> p = Program()
        >>> x = p.input("x", "carry", (1,))
        >>> p.carries["x"] = p.outputs["doubled"] = p.emit("add", x, x)
        >>> Executor(p)({"x": torch.ones(2, 1)}, 2, 3)["doubled"][0, :, 0].tolist()  # doctest: +SKIP
        [2.0, 4.0, 8.0]
    """

    def __init__(
        self,
        program: Program,
        *,
        time_major: Collection[Any] = (),
        kinds: Mapping[Any, str] | None = None,
        bf16: bool = False,
        isa: int | None = None,
    ) -> None:
        super().__init__(program, kinds)
        self._op = row_program_op()
        self.encoded = encoded = encode(program, time_major=time_major, kinds=kinds)
        self._stepwise = encode(program, time_major=time_major, kinds=kinds, stepwise=True)
        self.bf16 = bf16
        self._isa = -1 if isa is None else isa
        element = torch.bfloat16 if bf16 else program.dtype
        # The executor tells float64 programs by this tensor's dtype, and its panels by bf16.
        size = encoded.packed + 32
        if bf16:
            if program.dtype is not torch.float32:
                raise ValueError("bfloat16 weights go with float32 programs")
            self._packed = torch.empty(size, dtype=element).view(torch.int16)
        else:
            self._packed = torch.empty(size, dtype=element)
        self._prints = torch.zeros(encoded.matrices + 1, dtype=torch.int64)
        self._lock = threading.Lock()  # packed room is written at the start of a call

    def packed_bytes(self) -> int:
        """Memory held for packed matrices."""
        return self._packed.numel() * self._packed.element_size()

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        rows: int,
        steps: int,
        *,
        reverse: bool = False,
        outputs: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], int]:
        if outputs is None:
            outputs = self.empty(rows, steps)
        encoded = self._stepwise if rows >= _TALL else self.encoded
        with self._lock:
            failed = self._op(
                encoded.code, encoded.immediates, encoded.maps, self._packed, self._prints,
                list(inputs), outputs, rows, steps, reverse, self.bf16, self._isa,
            )  # fmt: skip
        return outputs, failed
