"""The traced step as data: a straight line of ATen ops from a step's inputs to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = ["Meta", "Op", "StepGraph", "Value", "map_values", "values_in"]


class Meta(NamedTuple):
    """What is known of a tensor without its data."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Meta:
        return cls(tensor.shape, tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Value:
    """A tensor of the step, by number. Numbers count up in order of definition."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Op:
    """One call of an ATen operator.

    Attributes:
        target: the operator overload, e.g. ``torch.ops.aten.addmm.default``, or the ``apply`` of a custom
            ``torch.autograd.Function``.
        args, kwargs: as the operator was called, tensors replaced by :class:`Value`.
        outputs: one entry per tensor returned; None for results nobody can refer to.
        single: the operator returns a tensor and not a tuple or list of them.
        mutates: values written in place.
        draws: the operator takes numbers from a random generator.
        detached: the op ran with gradients switched off inside a step that has them on.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value | None, ...]
    single: bool
    mutates: tuple[Value, ...] = ()
    draws: bool = False
    detached: bool = False

    def inputs(self) -> Iterator[Value]:
        yield from values_in(self.args)
        yield from values_in(self.kwargs)

    def __str__(self) -> str:
        args = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        out = ", ".join("_" if o is None else repr(o) for o in self.outputs)
        return f"{out} = {self.name}({', '.join(args)})"

    @property
    def name(self) -> str:
        """``addmm`` or ``silu.out``; for a custom function, ``SafeTanh.apply``."""
        if isinstance(self.target, torch._ops.OpOverload):
            return self.target.name().removeprefix("aten::")
        return getattr(self.target, "__qualname__", repr(self.target))


@dataclass
class StepGraph:
    """A step ``(inputs, constants) -> named outputs`` as a list of ops.

    Attributes:
        inputs: what differs from call to call or step to step, by name.
        constants: tensors that the step reads but does not get as inputs: parameters, buffers, ...
        ops: in order of execution; none whose result is unused.
        outputs: the step's results by name.
        checks: boolean scalars that must be true, else the eager path raises.
        storage: for each value, the number of the memory it lives in (views share one).
        metas: shape, dtype and device of each value.
        fresh: constants made by Python during the trace, such as ``torch.tensor(0.5)``.
    """

    inputs: dict[Any, Value]
    constants: list[tuple[Value, torch.Tensor]]
    ops: list[Op]
    outputs: dict[Any, Value]
    checks: list[Value] = field(default_factory=list)
    storage: dict[int, int] = field(default_factory=dict)
    metas: dict[int, Meta] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)

    @property
    def draws(self) -> bool:
        return any(op.draws for op in self.ops)

    def generators(self) -> list[torch.Generator]:
        """The random generators, other than the device's own, that ops draw from."""
        given = (item for op in self.ops for item in (*op.args, *op.kwargs.values()))
        return list({id(g): g for g in given if isinstance(g, torch.Generator)}.values())

    def prune(self) -> None:
        """Drop ops that no output, check or kept in-place write needs."""
        needed = {v.index for v in [*self.outputs.values(), *self.checks]}
        kept: list[Op] = []
        # In-place writes count as uses of the memory they write, so memory decides there.
        memory = {self.storage.get(i) for i in needed}
        for op in reversed(self.ops):
            wanted = any(o is not None and o.index in needed for o in op.outputs)
            wanted = wanted or any(self.storage.get(m.index) in memory for m in op.mutates)
            # A draw moves the generator even when nobody reads it.
            if wanted or op.draws:
                kept.append(op)
                needed.update(v.index for v in op.inputs())
                memory.update(self.storage.get(v.index) for v in op.inputs())
        self.ops = kept[::-1]
        self.constants = [(v, t) for v, t in self.constants if v.index in needed]

    def part(
        self,
        ops: Iterable[Op],
        outputs: Mapping[Any, Value],
        checks: Iterable[Value] = (),
        inputs: Mapping[Any, Value] | None = None,
    ) -> StepGraph:
        """As much of ``ops`` as these outputs and checks need, as a step of its own.

        Args:
            inputs: default: those of this step.
        """
        part = StepGraph(
            dict(self.inputs if inputs is None else inputs), list(self.constants), list(ops),
            dict(outputs), list(checks), self.storage, self.metas, self.fresh,
        )  # fmt: skip
        part.prune()
        return part

    def signature(self) -> tuple[str, ...]:
        """Equal for two traces that compute the same: values renumbered by first use."""
        names: dict[int, str] = {v.index: f"in:{k}" for k, v in self.inputs.items()}
        for v, t in self.constants:
            names[v.index] = f"const:{t.tolist() if v.index in self.fresh else id(t)}"
        lines = []
        for op in self.ops:

            def name(v: Value) -> str:
                return names.setdefault(v.index, f"v{len(names)}")

            args = map_values((op.args, sorted(op.kwargs.items())), name)
            outs = [None if o is None else name(o) for o in op.outputs]
            lines.append(f"{outs}={op.target}{args}{op.detached}")
        lines += sorted(f"{k}={names.get(v.index)}" for k, v in self.outputs.items())
        lines += [str(names.get(v.index)) for v in self.checks]
        return tuple(lines)

    def __str__(self) -> str:
        ins = ", ".join(
            f"{k}: {v!r}{list(self.metas[v.index].shape)}" for k, v in self.inputs.items()
        )
        consts = ", ".join(f"{v!r}{list(t.shape)}" for v, t in self.constants)
        body = "\n".join(f"  {op}" for op in self.ops)
        outs = ", ".join(f"{k}: {v!r}" for k, v in self.outputs.items())
        return f"step({ins}; {consts}):\n{body}\n  return {outs}"


def values_in(tree: Any) -> Iterator[Value]:
    """Every :class:`Value` in nested tuples, lists and dicts."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from values_in(item)


def map_values(tree: Any, fn: Any) -> Any:
    """The same nesting with ``fn`` applied to every :class:`Value`."""
    if isinstance(tree, Value):
        return fn(tree)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return type(tree)(map_values(item, fn) for item in tree)
    if isinstance(tree, dict):
        return {k: map_values(item, fn) for k, item in tree.items()}
    return tree
