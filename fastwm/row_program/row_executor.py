"""What every executor of row programs has: the order of what it takes and gives, and fresh memory for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastwm.row_program.fresh import Fresh
from fastwm.row_program.kinds import dtype_of
from fastwm.row_program.program import Program

__all__ = ["RowExecutor"]


class RowExecutor(ABC):
    """A row program that can be run: in C++ (``fastwm.row_program.executor``), or as a Triton kernel
    (``fastwm.kernels.row_program``).

    Attributes:
        program: what it runs.
        kinds: by output name, what its tensor holds, where that is not the value's own kind.
        inputs: names in the order in which tensors are given: of rows, then uniforms.
        results: names of outputs, finals and sums, in the order in which they are returned.
        empty: fresh tensors for the results of ``rows`` rows and ``steps`` steps.
    """

    def __init__(
        self, program: Program, kinds: Mapping[Any, str] | None, device: torch.device | str = "cpu"
    ) -> None:
        self.program = program
        self.kinds = dict(kinds or {})
        items = program.inputs.items()
        self.inputs = [n for n, i in items if i.role != "uniform"]
        self.inputs += [n for n, i in items if i.role == "uniform"]
        self.results = [*program.outputs, *program.finals, *program.sums]
        self.empty = Fresh(self._sizes, device)

    def _sizes(self, rows: int, steps: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        p = self.program
        types = {name: p.type(val) for name, val in p.outputs.items()}
        made = [
            ((rows, steps, *type.shape), dtype_of(self.kinds.get(name, type.kind), p.dtype))
            for name, type in types.items()
        ]
        made += [((rows, *p.type(p.inputs[n].val).shape), p.dtype) for n in p.finals]
        return made + [(total.shape, p.dtype) for total in p.sums.values()]

    def __call__(
        self, inputs: Mapping[Any, torch.Tensor], rows: int, steps: int, *, reverse: bool = False
    ) -> dict[Any, torch.Tensor]:
        """Run it: see :meth:`run`, with tensors by name."""
        outputs, _ = self.run([inputs[name] for name in self.inputs], rows, steps, reverse=reverse)
        return dict(zip(self.results, outputs, strict=True))

    @abstractmethod
    def run(
        self,
        inputs: Sequence[torch.Tensor],
        rows: int,
        steps: int,
        *,
        reverse: bool = False,
        outputs: list[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], int]:
        """Run ``steps`` steps.

        Args:
            inputs: in the order of :attr:`inputs`, contiguous, of the program's dtype (bool and int values as
                bool and int64). carry and context ``[rows, *shape]``, step ``[rows, steps, *shape]`` (time
                major: ``[steps, rows, *shape]``), uniforms ``shape``.
            reverse: from the last step to the first.
            outputs: to write into, in the order of what is returned; default: fresh ones.

        Returns:
            Outputs ``[rows, steps, *shape]``, finals ``[rows, *shape]`` and sums; and 0 if every check held,
            else 1 + the first step at which one did not.
        """
