"""The reference interpreter: a row program in plain torch, step by step. Slow, differentiable, right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastwm.row_program.ops import BINARY, REFERENCES
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["Result", "interpret"]


@dataclass
class Result:
    """What a run gave.

    Attributes:
        outputs: by name, ``[rows, steps, *shape]`` in the program's dtype.
        finals: by name of the carry, its value after the last step, ``[rows, *shape]``.
        sums: by name.
        ok: whether every check held.
    """

    outputs: dict[Any, torch.Tensor] = field(default_factory=dict)
    finals: dict[Any, torch.Tensor] = field(default_factory=dict)
    sums: dict[Any, torch.Tensor] = field(default_factory=dict)
    ok: bool = True


def interpret(
    program: Program, inputs: Mapping[Any, torch.Tensor], steps: int, *, reverse: bool = False
) -> Result:
    """Run ``program`` for ``steps`` steps.

    Args:
        inputs: by name. carry and context ``[rows, *shape]``, step ``[rows, steps, *shape]``, uniform
            ``shape``; any dtype, computed in the program's.
        reverse: from the last step to the first, as a backward program runs. Outputs keep their places.

    Example:
        >>> import torch
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.reference import interpret
        >>> p = Program()
        >>> x = p.input("x", "carry", (1,))
        >>> p.carries["x"] = p.outputs["doubled"] = p.emit("add", x, x)
        >>> interpret(p, {"x": torch.ones(2, 1)}, 3).outputs["doubled"][0, :, 0].tolist()
        [2.0, 4.0, 8.0]
    """
    given = {name: inputs[name].to(program.dtype) for name in program.inputs}
    device = next((t.device for t in given.values()), torch.device("cpu"))
    rows = [t.shape[0] for n, t in given.items() if program.inputs[n].role != "uniform"]
    carried = {n: given[n] for n, i in program.inputs.items() if i.role == "carry"}
    result = Result()
    each: dict[int, list[torch.Tensor | None]] = {
        v.index: [None] * steps for v in program.outputs.values()
    }
    for name, total in program.sums.items():
        result.sums[name] = torch.zeros(total.shape, dtype=program.dtype, device=device)
    for step in reversed(range(steps)) if reverse else range(steps):
        env: dict[int, torch.Tensor] = {}
        for name, item in program.inputs.items():
            value = carried[name] if item.role == "carry" else given[name]
            env[item.val.index] = value[:, step] if item.role == "step" else value
        for instr in program.instrs:
            out = REFERENCES[instr.op](*_operands(program, instr, env), **instr.attrs)
            if instr.op in ("fill", "row"):
                out = out.to(device, program.dtype).expand(rows[0], *out.shape[1:])
            if instr.out is None:
                total = program.sums[instr.attrs["target"]]
                result.sums[total.name] = result.sums[total.name] + out.reshape(total.shape)
            else:
                env[instr.out.index] = out
        for index, steps_of in each.items():
            steps_of[step] = env[index]
        for check in program.checks:
            result.ok = result.ok and bool((env[check.index] != 0).all())
        carried = {n: env[v.index] for n, v in program.carries.items()} | {
            n: v for n, v in carried.items() if n not in program.carries
        }
    for name, val in program.outputs.items():
        if steps:
            result.outputs[name] = torch.stack(each[val.index], 1)  # type: ignore[arg-type]
        else:
            shape = program.type(val).shape
            size = (rows[0], 0, *shape)
            result.outputs[name] = torch.empty(size, dtype=program.dtype, device=device)
    result.finals = {name: carried[name] for name in program.finals}
    return result


def _operands(program: Program, instr: Instr, env: dict[int, torch.Tensor]) -> list[Any]:
    """Operands as the references take them: single elements of elementwise ops spread over the row."""
    given = [env[a.index] if isinstance(a, Val) else a for a in instr.args]
    if instr.op not in BINARY and instr.op != "where":
        return given
    rank = max(len(program.type(a).shape) for a in instr.values())
    uniform = program.uniforms()
    for position, arg in enumerate(instr.args):
        if isinstance(arg, Val) and program.type(arg).width == 1:
            given[position] = env[arg.index].reshape(
                () if arg.index in uniform else (-1, *(1,) * rank)
            )
    return given
