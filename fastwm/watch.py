"""Watching Python objects for change: what makes a plan stale.

A trace bakes in everything that Python decided: module attributes, the training flag, which submodule
is called, what a closure holds. :class:`Watch` walks all that a set of roots can reach and remembers it
by identity. Asking whether anything changed is a handful of C-level passes over flat lists, since it is
asked before every rollout.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch

__all__ = ["Location", "TooLarge", "Watch"]

_LIMIT = 20_000  # watched entries; beyond that looking would cost more than it saves
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)
_LEAVES = (
    bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.layout, type(None), type(Ellipsis), torch.Generator,
)  # fmt: skip


class TooLarge(Exception):
    """More state is reachable than can be watched cheaply."""


class Location:
    """Where a tensor is held, so that it can be fetched again: ``holder[key]``."""

    __slots__ = ("holder", "key")

    def __init__(self, holder: dict | list | tuple, key: Any) -> None:
        self.holder = holder
        self.key = key

    def fetch(self) -> Any:
        return self.holder[self.key]


class Watch:
    """Remembers the state reachable from ``roots`` and says whether it still holds.

    Watched: attributes, parameters, buffers and submodules of modules; items of dicts, lists, tuples and
    sets; attributes of plain objects; closures, defaults and the globals a function names.

    Args:
        roots: modules, functions, any objects.
        opaque: objects not to look into.

    Raises:
        TooLarge: more than can be watched.
    """

    def __init__(self, roots: Iterable[Any], opaque: Iterable[Any] = ()) -> None:
        self.dicts: list[dict] = []
        self.lists: list[list | deque] = []
        self.sets: list[tuple[set, frozenset]] = []
        self.names: list[tuple[dict, str]] = []
        self.cells: list[_Cell] = []
        self.tensors: dict[int, Location] = {}
        self.modules: list[torch.nn.Module] = []
        self.unwatchable: list[str] = []  # iterators and the like: state that cannot be looked at
        self._visited: dict[int, Any] = {id(o): o for o in opaque}
        self._count = 0
        queue = deque(roots)
        # Roots are held, so that no id is reused while this object lives.
        self._roots = list(queue)
        while queue:
            self._visit(queue.popleft(), queue.append)
        self.remember()

    # -- walking

    def _visit(self, obj: Any, push: Callable[[Any], None]) -> None:
        if isinstance(obj, _LEAVES) or id(obj) in self._visited:
            return
        self._visited[id(obj)] = obj
        if isinstance(obj, torch.Tensor):
            return
        if hasattr(type(obj), "__next__") or isinstance(obj, _RANDOM):
            self.unwatchable.append(type(obj).__name__)
        if isinstance(obj, torch.nn.Module):
            self.modules.append(obj)
        if isinstance(obj, dict):
            self._watch_dict(obj, push)
        elif isinstance(obj, list):
            self.lists.append(obj)
            self._enter(obj, enumerate(obj), push)
        elif isinstance(obj, deque):
            self.lists.append(obj)
            self._enter(obj, enumerate(obj), push)
        elif isinstance(obj, tuple):
            self._enter(obj, enumerate(obj), push)
        elif isinstance(obj, (set, frozenset)):
            self.sets.append((obj, frozenset(obj)))
        elif isinstance(obj, types.FunctionType):
            self._watch_function(obj, push)
        elif isinstance(obj, types.MethodType):
            push(obj.__self__)
            push(obj.__func__)
        elif isinstance(obj, functools.partial):
            push(obj.func)
            self._enter(obj.args, enumerate(obj.args), push)
            self._watch_dict(obj.keywords, push)
        elif isinstance(getattr(obj, "__dict__", None), dict):
            self._watch_dict(obj.__dict__, push)

    def _watch_dict(self, mapping: dict, push: Callable[[Any], None]) -> None:
        self.dicts.append(mapping)
        self._enter(mapping, mapping.items(), push)

    def _enter(self, holder: Any, items: Iterable[tuple[Any, Any]], push: Callable) -> None:
        for key, item in items:
            self._count += 1
            if isinstance(item, torch.Tensor):
                self.tensors.setdefault(id(item), Location(holder, key))
            push(item)
        if self._count > _LIMIT:
            raise TooLarge(f"more than {_LIMIT} attributes are reachable from the policy and model")

    def _watch_function(self, fn: types.FunctionType, push: Callable[[Any], None]) -> None:
        self._watch_dict(fn.__dict__, push)
        for values in (fn.__defaults__ or (), (fn.__kwdefaults__ or {}).values()):
            for value in values:
                push(value)
        for cell in fn.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # still empty
                continue
            box = _Cell(cell)
            self._visited[id(box)] = box
            self.cells.append(box)
            self._enter(box, [(0, content)], push)
        scope = fn.__globals__
        for name in fn.__code__.co_names:
            value = scope.get(name)
            # Functions and classes of a module are code, not state.
            if name in scope and not isinstance(
                value, (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)
            ):
                self.names.append((scope, name))
                self._enter(scope, [(name, value)], push)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor can be fetched again from where it was found."""
        location = self.tensors.get(id(tensor))
        return location is not None and location.fetch() is tensor

    # -- asking

    def _values(self) -> Iterable[Any]:
        return chain(
            chain.from_iterable(map(dict.values, self.dicts)),
            chain.from_iterable(self.lists),
            (scope.get(name) for scope, name in self.names),
            (cell[0] for cell in self.cells),
        )

    def _sizes(self) -> int:
        return sum(map(len, self.dicts)) + sum(map(len, self.lists))

    def remember(self) -> None:
        """Take the present state as the one to hold."""
        # Most dicts of a module are its empty hook tables: those are only asked whether they still are.
        self._empty = [d for d in self.dicts if not d]
        self.dicts = [d for d in self.dicts if d]
        self._size = self._sizes()
        self._saved = list(self._values())

    def unchanged(self) -> bool:
        """Whether every watched entry is still the very same object."""
        return (
            self._sizes() == self._size
            and not any(self._empty)
            and all(map(is_, self._values(), self._saved))
            and all(s == saved for s, saved in self.sets)
        )

    def reconcile(self) -> tuple[bool, str | None]:
        """After a change by identity: is it one that a trace does not notice?

        Returns:
            ``(True, None)`` when all that changed are values equal to what they replace and tensors of
            the same shape, dtype, device and gradient flag (then remembered anew), else ``(False, what)``.
        """
        if self._sizes() != self._size or any(self._empty):
            return False, "an attribute, submodule or hook was added or removed"
        if any(s != saved for s, saved in self.sets):
            return False, "a set changed"
        for value, saved in zip(self._values(), self._saved, strict=True):
            if value is saved:
                continue
            if isinstance(value, torch.Tensor) and isinstance(saved, torch.Tensor):
                if not _same_kind(value, saved):
                    return False, f"a tensor of shape {tuple(saved.shape)} was replaced by another kind"
            elif type(value) is not type(saved) or not isinstance(value, _LEAVES) or value != saved:
                return False, f"{_short(saved)} became {_short(value)}"
        self.remember()
        return True, None

    def snapshot(self) -> Callable[[], None]:
        """Remember the contents of everything watched; the function returned puts them back."""
        dicts = [(d, dict(d)) for d in chain(self.dicts, self._empty)]
        lists = [(items, list(items)) for items in self.lists]
        sets = [(s, saved) for s, saved in self.sets if isinstance(s, set)]
        names = [(scope, name, scope.get(name)) for scope, name in self.names]
        cells = [(box.cell, box[0]) for box in self.cells]

        def restore() -> None:
            for mapping, saved in dicts:
                if len(mapping) != len(saved) or not all(map(is_, mapping.values(), saved.values())):
                    mapping.clear()
                    mapping.update(saved)
            for items, kept in lists:
                if len(items) != len(kept) or not all(map(is_, items, kept)):
                    items.clear()
                    items.extend(kept)
            for current, members in sets:
                if current != members:
                    current.clear()
                    current.update(members)
            for scope, name, value in names:
                scope[name] = value
            for cell, value in cells:
                cell.cell_contents = value

        return restore


class _Cell:
    """A closure cell that can be read as ``box[0]``."""

    __slots__ = ("cell",)

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, _: int) -> Any:
        return self.cell.cell_contents


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.requires_grad == b.requires_grad
        and a.stride() == b.stride()
    )


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, _LEAVES) else f"a {type(value).__name__}"
    return text if len(text) < 60 else text[:57] + "..."
