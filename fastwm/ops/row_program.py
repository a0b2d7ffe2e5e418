"""``fastwm::row_program``: a row program for a whole horizon, in one call of the C++ library.

Called through :class:`fastwm.row_program.executor.Executor`, which knows the encoding. It writes only into
the tensors it is given, so its fake does nothing.
"""

from __future__ import annotations

from typing import Any

from fastwm.ops.library import LIBRARY, cpu_library

__all__ = ["row_program_op"]

LIBRARY.define(
    "row_program(Tensor code, Tensor immediates, Tensor maps, Tensor(a!) packed, Tensor(b!) prints, "
    "Tensor[] inputs, Tensor(c!)[] outputs, int rows, int steps, bool reverse, bool bf16, int isa) -> int"
)


def row_program_op() -> Any:
    """The op.

    Raises:
        RuntimeError: the C++ library is not there; the message says why.
    """
    import torch

    library = cpu_library()
    if not library.loaded:
        raise RuntimeError(f"row programs need the C++ library: {library.reason}")
    return torch.ops.fastwm.row_program.default
