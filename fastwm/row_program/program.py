"""The row program: values, instructions, a builder that checks shapes and kinds, and a printer.

Example:
    >>> from fastwm.row_program import Program
    >>> p = Program()
    >>> latent = p.input("latent", "carry", (4,))
    >>> weight = p.input("weight", "uniform", (4, 4))
    >>> following = p.emit("tanh", p.emit("linear", latent, weight, None, layout="nk"))
    >>> p.carries["latent"] = following
    >>> p.outputs["next"] = following
    >>> print(p)
    row program (float32)
      carry   %0 latent: f[4]
      uniform %1 weight: f[4, 4]
      %2: f[4] = linear(%0, %1, None, layout=nk)
      %3: f[4] = tanh(%2)
      next latent = %3
      output next = %3
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastwm.row_program.kinds import KINDS, dtype_name

__all__ = ["ROLES", "Input", "Instr", "Program", "ProgramError", "RowType", "Sum", "Val"]

#: carry: changes from step to step by the program itself. step: given anew for each step (noise, actions,
#: saved values, gradients of outputs). context: of the row, the same at every step. uniform: the same for
#: every row and step (weights).
ROLES = ("carry", "step", "context", "uniform")


class ProgramError(ValueError):
    """An instruction that the row program does not have, or with operands that do not fit."""


class RowType(NamedTuple):
    """Shape within a row (of a uniform: the whole shape), and kind of the elements.

    Every kind is held as the program's float dtype while the program runs: ints are exact up to 2**24 in
    float32, bools are 0 and 1.
    """

    shape: tuple[int, ...]
    kind: str = "float"

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind[0]}{list(self.shape)}"


@dataclass(frozen=True)
class Val:
    """A value of the program, by number."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


Arg = Val | float | None


@dataclass(frozen=True)
class Instr:
    """One operation. ``out`` is None for those that only add to one of the program's sums."""

    op: str
    args: tuple[Arg, ...]
    attrs: dict[str, Any]
    out: Val | None

    def values(self) -> Iterator[Val]:
        for arg in self.args:
            if isinstance(arg, Val):
                yield arg


@dataclass(frozen=True)
class Input:
    """A value that comes from outside."""

    val: Val
    name: Any
    role: str


@dataclass(frozen=True)
class Sum:
    """A sum over all rows and steps that instructions add to: the gradient of a uniform."""

    name: Any
    shape: tuple[int, ...]


@dataclass
class Program:
    """A step for one row.

    Attributes:
        dtype: of every float in it: float32 or float64.
        inputs: what comes from outside, by name.
        instrs: in order of execution.
        carries: name of a carry input -> its value at the next step.
        outputs: name -> the value wanted of every step.
        finals: names of carries whose value after the last step is wanted.
        sums: by name, what is summed over rows and steps.
        checks: bool values that must hold in every row at every step, else eager would raise.
        types: by value number.
    """

    dtype: torch.dtype = torch.float32
    inputs: dict[Any, Input] = field(default_factory=dict)
    instrs: list[Instr] = field(default_factory=list)
    carries: dict[Any, Val] = field(default_factory=dict)
    outputs: dict[Any, Val] = field(default_factory=dict)
    finals: list[Any] = field(default_factory=list)
    sums: dict[Any, Sum] = field(default_factory=dict)
    checks: list[Val] = field(default_factory=list)
    types: dict[int, RowType] = field(default_factory=dict)
    _next: int = 0

    # -- building

    def new(self, type: RowType) -> Val:
        val = Val(self._next)
        self._next += 1
        self.types[val.index] = type
        return val

    def input(self, name: Any, role: str, shape: tuple[int, ...], kind: str = "float") -> Val:
        """Declare an input.

        Raises:
            ProgramError: unknown role or kind, or a name given twice.
        """
        if role not in ROLES or kind not in KINDS or name in self.inputs:
            raise ProgramError(f"input {name!r}: role {role!r}, kind {kind!r}, or named twice")
        val = self.new(RowType(tuple(shape), kind))
        self.inputs[name] = Input(val, name, role)
        return val

    def emit(self, op: str, *args: Arg, **attrs: Any) -> Val:
        """Append an instruction and return its value.

        Raises:
            ProgramError: no such op, or operands that do not fit it.
        """
        from fastwm.row_program.ops import result_type

        type = result_type(self, op, args, attrs)
        out = None if type is None else self.new(type)
        self.instrs.append(Instr(op, args, attrs, out))
        return out  # type: ignore[return-value]

    def add_sum(self, name: Any, shape: tuple[int, ...]) -> None:
        self.sums.setdefault(name, Sum(name, tuple(shape)))

    # -- asking

    def type(self, val: Val) -> RowType:
        return self.types[val.index]

    def role(self, val: Val) -> str | None:
        """The role of an input value; None for computed ones."""
        for given in self.inputs.values():
            if given.val == val:
                return given.role
        return None

    def uniforms(self) -> set[int]:
        return {i.val.index for i in self.inputs.values() if i.role == "uniform"}

    def roots(self) -> list[Val]:
        """Values wanted by someone outside the list of instructions."""
        return [*self.carries.values(), *self.outputs.values(), *self.checks]

    # -- printing

    def __str__(self) -> str:
        lines = [f"row program ({dtype_name(self.dtype)})"]
        for given in self.inputs.values():
            lines.append(
                f"  {given.role:<7} {given.val} {_name(given.name)}: {self.type(given.val)}"
            )
        for instr in self.instrs:
            words = [_arg(a) for a in instr.args]
            words += [f"{k}={_attr(k, v)}" for k, v in instr.attrs.items() if v is not None]
            call = f"{instr.op}({', '.join(words)})"
            if instr.out is None:
                lines.append(f"  {call}")
            else:
                lines.append(f"  {instr.out}: {self.type(instr.out)} = {call}")
        lines += [f"  next {_name(k)} = {v}" for k, v in self.carries.items()]
        lines += [f"  output {_name(k)} = {v}" for k, v in self.outputs.items()]
        lines += [f"  final {_name(k)}" for k in self.finals]
        lines += [f"  sum {_name(s.name)}: {list(s.shape)}" for s in self.sums.values()]
        lines += [f"  check {v}" for v in self.checks]
        return "\n".join(lines)


def _name(name: Any) -> str:
    if isinstance(name, tuple):
        return ".".join(map(_name, name))
    return str(name)


def _arg(arg: Arg) -> str:
    return f"{arg:g}" if isinstance(arg, float) else repr(arg)


def _attr(key: str, value: Any) -> str:
    if key == "map":
        return _ranges(value)
    if key == "target":
        return _name(value)
    return str(value)


def _ranges(indices: tuple[int, ...]) -> str:
    """``[0, 1, 2, 5]`` as ``0:3,5``; cut when long."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[start], indices[i - 1] + 1
            parts.append(str(first) if last == first + 1 else f"{first}:{last}")
            start = i
    return ",".join(parts[:6]) + (f",...{len(indices)}" if len(parts) > 6 else "")
