"""What a step computes from constants alone: done once per rollout, in torch, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastwm.row_program.kinds import dtype_of
from fastwm.step_graph import map_values

__all__ = ["Leaf", "Nodes", "Uniform"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Leaf:
    """A node as it is read: ``node.reshape(view).permute(perm).reshape(shape).expand(expand)``."""

    node: int
    view: tuple[int, ...] | None = None
    perm: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    expand: tuple[int, ...] | None = None
    frozen: bool = False

    def read(self, value: Tensor) -> Tensor:
        if self.frozen:
            value = value.detach()
        if self.perm is not None:
            value = value.reshape(self.view or value.shape).permute(self.perm)
        if self.shape is not None and tuple(value.shape) != self.shape:
            value = value.reshape(self.shape)
        return value if self.expand is None else value.expand(self.expand)


@dataclass(frozen=True)
class Uniform:
    """One uniform of the program.

    Attributes:
        name: of the program's input.
        shape: as the program takes it.
        constant: position among the graph's constants where the uniform is that constant's elements, in
            their order; None where the prologue computes it.
        frozen: gradients must not reach the constant.
        kind: what the program takes it as.
    """

    name: Any
    shape: tuple[int, ...]
    constant: int | None
    frozen: bool
    leaf: Leaf
    kind: str = "float"


@dataclass
class _Node:
    run: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    pick: int | None  # which of several results
    frozen: bool


class Nodes:
    """The prologue's values, by number: constants first, then what is computed from them."""

    def __init__(self, constants: Sequence[Tensor]) -> None:
        self.count = len(constants)
        self.shapes: dict[int, tuple[int, ...]] = {
            i: tuple(t.shape) for i, t in enumerate(constants)
        }
        self.literals: dict[int, Tensor] = {}  # known now and for ever
        self.computed: dict[int, _Node] = {}

    def literal(self, value: Tensor) -> int:
        number = len(self.shapes)
        self.shapes[number] = tuple(value.shape)
        self.literals[number] = value.detach().contiguous()
        return number

    def compute(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        *,
        pick: int | None = None,
        frozen: bool = False,
    ) -> int:
        leaves = list(_leaves((args, kwargs)))
        if all(leaf.node in self.literals for leaf in leaves):
            found = _run(_Node(run, args, kwargs, pick, frozen), self.literals)
            return self.literal(found)
        number = len(self.shapes)
        self.shapes[number] = shape
        self.computed[number] = _Node(run, args, kwargs, pick, frozen)
        return number

    def program(
        self, uniforms: Sequence[Uniform], dtype: torch.dtype
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """``constants -> uniforms``, running no more than these need."""
        wanted = {u.leaf.node for u in uniforms}
        for number in reversed(self.computed):
            if number in wanted:
                node = self.computed[number]
                wanted.update(leaf.node for leaf in _leaves((node.args, node.kwargs)))
        steps = [(n, node) for n, node in self.computed.items() if n in wanted]
        literals = {n: t for n, t in self.literals.items() if n in wanted}
        leaves = [(u.leaf, u.shape, dtype_of(u.kind, dtype)) for u in uniforms]

        def prologue(constants: Sequence[Tensor]) -> list[Tensor]:
            values: dict[int, Tensor] = {**dict(enumerate(constants)), **literals}
            for number, node in steps:
                values[number] = _run(node, values)
            out = []
            for leaf, shape, wanted_dtype in leaves:
                value = leaf.read(values[leaf.node])
                value = value if value.dtype is wanted_dtype else value.to(wanted_dtype)
                out.append(value if value.shape == shape else value.reshape(shape))
            return out

        return prologue


def _run(node: _Node, values: dict[int, Tensor]) -> Tensor:
    args = _with(node.args, values)
    kwargs = {k: _with(v, values) for k, v in node.kwargs.items()}
    found = node.run(*args, **kwargs)
    found = found if node.pick is None else found[node.pick]
    return found.detach() if node.frozen else found


def _with(tree: Any, values: dict[int, Tensor]) -> Any:
    if isinstance(tree, Leaf):
        return tree.read(values[tree.node])
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return type(tree)(_with(item, values) for item in tree)
    return map_values(tree, lambda v: v)


def _leaves(tree: Any) -> list[Leaf]:
    if isinstance(tree, Leaf):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in _leaves(item)]
    return []
