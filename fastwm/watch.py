"""Watching Python objects for change: what makes a plan stale.

A trace bakes in everything that Python decided: module attributes, the training flag, which submodule
is called, what a closure holds, a constant at the top of the user's file. :class:`Watch` walks all that a
set of roots can reach and remembers it by identity. Asking whether anything changed is a handful of
C-level passes over flat lists, since it is asked before every rollout: the garbage collector's own walk
lists what the containers hold, and the addresses of that are compared as bytes.
"""

from __future__ import annotations

import array
import ctypes
import functools
import gc
import io
import logging
import mmap
import os
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch

__all__ = ["Location", "TooLarge", "Watch", "function_of"]

_LIMIT = 20_000  # watched entries; beyond that looking would cost more than it saves
_ARRAY_BYTES = 1 << 16  # arrays are compared by content
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)
# Memory that others may write, such as that of a multiprocessing.Value.
_RAW = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union, memoryview, mmap.mmap)
_CONSTANTS = (
    bool, int, float, complex, str, bytes, range, slice, np.generic, type(None), type(Ellipsis),
    types.BuiltinFunctionType, types.CodeType, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.Generator,
)  # fmt: skip
_OPAQUE = (logging.Logger, logging.Handler, io.IOBase, types.FrameType)
# Libraries whose code does not change under way. Their objects' attributes are watched all the same.
_LIBRARIES = sys.stdlib_module_names | {
    "fastwm", "functorch", "kernels", "numpy", "tensordict", "torch", "torchrl", "triton",
}  # fmt: skip
_NOT_CALLED = {"__init__", "__new__", "__del__", "__repr__", "__str__", "__reduce__", "__reduce_ex__",
               "__getstate__", "__setstate__", "__deepcopy__", "__init_subclass__"}  # fmt: skip


class TooLarge(Exception):
    """More state is reachable than can be watched cheaply."""


class Location:
    """Where a tensor is held, so that it can be fetched again: ``holder[key]``."""

    __slots__ = ("holder", "key")

    def __init__(self, holder: Any, key: Any) -> None:
        self.holder = holder
        self.key = key

    def fetch(self) -> Any:
        return self.holder[self.key]


class Watch:
    """Remembers the state reachable from ``roots`` and says whether it still holds.

    Watched: attributes, parameters, buffers and submodules of modules; items of dicts, lists, tuples, sets
    and small arrays; attributes (and slots) of plain objects; attributes of the user's classes; and of each
    of the user's functions that can be reached: its code, closure, defaults and the globals it names.

    Args:
        roots: modules, functions, any objects.
        opaque: objects not to look into.

    Raises:
        TooLarge: more than can be watched.
    """

    def __init__(self, roots: Iterable[Any], opaque: Iterable[Any] = ()) -> None:
        self.tensors: dict[int, Location] = {}
        self.modules: list[torch.nn.Module] = []
        self.unwatchable: list[str] = []  # iterators and the like: state that cannot be looked at
        self.compiled: list[str] = []
        self.generators: list[torch.Generator] = []
        self._tied: dict[int, list[Location]] = {}  # tensors found in several places
        self._dicts: list[dict] = []
        self._keyed: list[dict] = []  # those whose keys may be renamed
        self._empty: list[dict] = []
        self._bare: list[OrderedDict] = []  # of the empty ones, those with no ``__dict__`` yet
        self._lists: list[list | deque] = []
        self._classes: list[types.MappingProxyType] = []
        self._owners: list[type] = []
        self._forwards: list[types.MappingProxyType] = []  # library classes: only what they run
        self._scopes: list[dict] = []  # globals, each by the name beside it
        self._names: list[str] = []
        self._functions: list[types.FunctionType] = []
        self._cells: list[types.CellType] = []
        self._slots: list[tuple[Any, str]] = []
        self._contexts: list[ContextVar] = []
        self._sets: list[set | frozenset] = []
        self._saved_sets: list[frozenset] = []
        # Object, how to copy it, the copy.
        self._copies: list[tuple[Any, Callable[[Any], Any], Any]] = []
        # Methods are entered once some entered function names them.
        self._named: set[str] = {"forward"}
        self._waiting: dict[str, list[Any]] = {}
        self._scanned: set[tuple[int, types.CodeType]] = set()
        # What was visited is held, so that no id is reused while this object lives. Except for what is
        # opaque: a plan must not keep its env alive.
        self._visited: dict[int, Any] = {id(o): None for o in opaque}
        self._count = 0
        queue = deque(roots)
        self._roots = list(queue)
        self._push = queue.append
        while queue:
            self._visit(queue.popleft())
        if self._named & {"environ", "getenv"}:
            self._watch_dict(os.environ._data)  # type: ignore[attr-defined]
        del self._push, self._waiting, self._scanned
        self._slot_objects = [o for o, _ in self._slots]
        self._slot_names = [n for _, n in self._slots]
        self._sized = [*self._dicts, *self._lists, *self._classes]
        self._reset_containers()
        self.remember()

    # -- walking

    def _visit(self, obj: Any) -> None:
        if id(obj) in self._visited:
            return
        if isinstance(obj, torch.Generator):
            self.generators.append(obj)
        if isinstance(obj, _CONSTANTS):
            return
        self._visited[id(obj)] = obj
        if isinstance(obj, torch.Tensor):
            if obj.__dict__:
                self._watch_dict(obj.__dict__)
        elif isinstance(obj, type):
            self._watch_class(obj)
        elif isinstance(obj, types.ModuleType):
            # Held as an attribute or in a closure; of one that is a global, only what is named is watched.
            if not _is_library(obj.__name__):
                scope = {k: v for k, v in vars(obj).items() if not k.startswith("__")}
                self._scopes += [vars(obj)] * len(scope)
                self._names += scope
                self._enter(vars(obj), scope.items())
        elif isinstance(obj, _OPAQUE):
            return
        elif isinstance(obj, types.FunctionType):
            self._watch_function(obj)
        elif isinstance(obj, types.MethodType):
            self._push(obj.__self__)
            self._push(obj.__func__)
        elif isinstance(obj, functools.partial):
            self._push(obj.func)
            self._enter(obj.args, enumerate(obj.args))
            self._watch_dict(obj.keywords)
        elif isinstance(obj, torch.jit.ScriptFunction):
            self.compiled.append(str(obj.name))
        elif isinstance(obj, weakref.ref):
            self._push(obj())
        elif isinstance(obj, ContextVar):
            self._contexts.append(obj)
            self._push(obj.get(None))
        else:
            self._watch_items(obj)
            self._watch_attributes(obj)

    def _watch_items(self, obj: Any) -> None:
        if isinstance(obj, dict):
            self._watch_dict(obj)
            if obj and isinstance(obj, OrderedDict):  # its order is not that of the dict inside
                self._watch_copy(obj, tuple)
        elif isinstance(obj, (list, deque)):
            self._lists.append(obj)
            self._enter(obj, enumerate(obj))
        elif isinstance(obj, tuple):
            self._enter(obj, enumerate(obj))
        elif isinstance(obj, (set, frozenset)):
            self._sets.append(obj)
            self._saved_sets.append(frozenset(obj))
            for item in obj:
                self._push(item)
        elif isinstance(obj, types.MappingProxyType):
            self._classes.append(obj)
            self._enter(obj, obj.items())
        elif isinstance(obj, (np.ndarray, bytearray, array.array)):
            size = (
                obj.nbytes
                if isinstance(obj, np.ndarray)
                else len(obj) * getattr(obj, "itemsize", 1)
            )
            if size > _ARRAY_BYTES:
                self.unwatchable.append(f"{type(obj).__name__} of {size} bytes")
            else:
                self._watch_copy(obj, bytes if isinstance(obj, bytearray) else _to_bytes)
        elif hasattr(type(obj), "__next__") or isinstance(obj, (*_RANDOM, *_RAW)):
            self.unwatchable.append(type(obj).__name__)

    def _watch_attributes(self, obj: Any) -> None:
        if type(obj) is OrderedDict and not gc.get_referents(obj):
            # A module has a dozen of these, for its hooks. Asking for the ``__dict__`` would make one, to
            # be watched from then on; without one, what tells of an item tells of an attribute as well.
            self._bare.append(obj)
            self._visit(OrderedDict)
            return
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict):
            library = _is_library(type(obj).__module__)
            if library:
                # torchrl's MLP and ConvNet keep the iterators that they were built with.
                left = [v for v in attributes.values() if hasattr(type(v), "__next__")]
                self._visited.update((id(v), v) for v in left)
            # A module's attributes are many, and libraries do not rename theirs.
            self._watch_dict(attributes, keys=not (library and isinstance(obj, torch.nn.Module)))
        if isinstance(obj, torch.nn.Module):
            self.modules.append(obj)
        self._visit(type(obj))
        for cls in type(obj).__mro__:
            names = cls.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else tuple(names):
                if name in ("__dict__", "__weakref__") or _is_library(cls.__module__):
                    continue
                if name.startswith("__") and not name.endswith("__"):
                    name = f"_{cls.__name__.lstrip('_')}{name}"
                self._slots.append((obj, name))
                self._enter(_Slots(obj), [(name, getattr(obj, name, None))])

    def _watch_copy(self, obj: Any, copy: Callable[[Any], Any]) -> None:
        self._copies.append((obj, copy, copy(obj)))

    def _watch_dict(self, mapping: dict, *, keys: bool = True) -> None:
        (self._dicts if mapping else self._empty).append(mapping)
        if keys and mapping:
            self._keyed.append(mapping)
        self._enter(mapping, mapping.items())

    def _enter(self, holder: Any, items: Iterable[tuple[Any, Any]]) -> None:
        for key, item in items:
            self._count += 1
            if isinstance(item, torch.Tensor):
                location = Location(holder, key)
                if id(item) in self.tensors:
                    self._tied.setdefault(id(item), [self.tensors[id(item)]]).append(location)
                else:
                    self.tensors[id(item)] = location
            self._push(item)
        if self._count > _LIMIT:
            raise TooLarge(f"more than {_LIMIT} attributes are reachable from the policy and model")

    def _watch_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base is not cls and id(base) in self._visited:
                continue
            self._visited[id(base)] = base
            if _is_library(base.__module__):
                if "forward" in vars(base):
                    self._forwards.append(vars(base))
                continue
            members = vars(base)
            self._classes.append(members)
            self._owners.append(base)
            for name, member in members.items():
                function = function_of(member)
                if function is None:
                    if not (name.startswith("__") and name.endswith("__")):
                        self._enter(members, [(name, member)])
                elif name in self._named or (name.startswith("__") and name not in _NOT_CALLED):
                    self._push(function)
                else:
                    self._waiting.setdefault(name, []).append(function)

    def _watch_function(self, fn: types.FunctionType) -> None:
        if "_torchdynamo_orig_callable" in fn.__dict__:
            self.compiled.append(fn.__name__)
        self._watch_dict(fn.__dict__)
        self._enter(fn.__defaults__, enumerate(fn.__defaults__ or ()))
        if fn.__kwdefaults__:
            self._watch_dict(fn.__kwdefaults__)
        for cell in fn.__closure__ or ():
            if id(cell) in self._visited:
                continue
            self._visited[id(cell)] = cell
            try:
                content = cell.cell_contents
            except ValueError:  # still empty
                continue
            self._cells.append(cell)
            self._enter(_Cell(cell), [(0, content)])
        if _is_library(fn.__globals__.get("__name__")):
            return
        self._functions.append(fn)
        names = _names(fn.__code__)
        for name in names - self._named:
            for function in self._waiting.pop(name, ()):
                self._push(function)
        self._named |= names
        self._watch_names(fn.__globals__, fn.__code__, names)

    def _watch_names(self, scope: dict, code: types.CodeType, names: frozenset[str]) -> None:
        """The globals that code names and, where one of them is a module, what it names of that."""
        if (id(scope), code) in self._scanned:
            return
        self._scanned.add((id(scope), code))
        for name in names:
            if name in scope:
                value = scope[name]
                self._scopes.append(scope)
                self._names.append(name)
            else:  # imported inside the function
                value = sys.modules.get(name)
            if isinstance(value, types.ModuleType):
                if not _is_library(value.__name__):
                    self._watch_names(vars(value), code, names)
            elif name in scope:
                self._enter(scope, [(name, value)])

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor can be fetched again from where it was found."""
        location = self.tensors.get(id(tensor))
        return location is not None and location.fetch() is tensor

    # -- asking

    def _keys(self) -> Iterator[Any]:
        return chain.from_iterable(self._with_keys)

    def _values(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(map(dict.values, self._dicts)),
            chain.from_iterable(self._lists),
            chain.from_iterable(map(types.MappingProxyType.values, self._classes)),
            map(types.MappingProxyType.get, self._forwards, repeat("forward")),
            map(dict.get, self._scopes, self._names),
            map(_CODE, self._functions),
            map(_DEFAULTS, self._functions),
            map(_CONTENTS, self._cells),
            map(getattr, self._slot_objects, self._slot_names, repeat(None)),
            map(ContextVar.get, self._contexts, repeat(None)),
        )

    def _reset_containers(self) -> None:
        # An edge after each, so that nothing passes from the end of one to the start of the next.
        apart = (*self._dicts, *self._lists, *self._cells)
        self._containers = (*chain.from_iterable(zip(apart, repeat(_EDGE))), *self._empty)
        self._with_keys = (*self._keyed, *self._classes)

    def _look(self) -> tuple[Any, ...]:
        """All that is watched by identity, and some more that goes with it (keys that are no strings)."""
        seen = gc.get_referents(*self._containers)
        if self._classes:
            seen += chain.from_iterable(map(types.MappingProxyType.values, self._classes))
        if self._forwards:
            seen += map(types.MappingProxyType.get, self._forwards, _FORWARD)
        if self._functions:
            seen += map(_CODE, self._functions)
            seen += map(_DEFAULTS, self._functions)
        if self._scopes:
            seen += map(dict.get, self._scopes, self._names)
        if self._slots:
            seen += map(getattr, self._slot_objects, self._slot_names, _NONE)
        if self._contexts:
            seen += map(ContextVar.get, self._contexts, _NONE)
        return tuple(seen)

    def remember(self) -> None:
        """Take the present state as the one to hold."""
        self._lengths = list(map(len, self._sized))
        self._class_lengths = list(map(len, self._classes))
        self._saved_keys = list(self._keys())
        self._saved = list(self._values())
        self._remember_addresses()

    def _remember_addresses(self) -> None:
        # Held, so that no address is used again.
        self._seen = self._look()
        self._addresses = _addresses(self._seen)

    def unchanged(self) -> bool:
        """Whether every watched entry is still the very same object."""
        try:
            if _addresses(self._look()) != self._addresses:
                if not self._same_entries():
                    return False
                # Something beside: a library asked for an attribute dict that had not been made yet.
                self._remember_addresses()
            return (
                (not self._classes or list(map(len, self._classes)) == self._class_lengths)
                and list(self._keys()) == self._saved_keys
                and self._sets == self._saved_sets
                and (
                    not self._copies or all(copy(obj) == saved for obj, copy, saved in self._copies)
                )
            )
        except ValueError:  # a closure was emptied
            return False

    def _same_entries(self) -> bool:
        """One by one, what :meth:`_look` tells at once."""
        return not self._grown() and all(map(is_, self._values(), self._saved))

    def _grown(self) -> bool:
        """Whether a container got larger or smaller."""
        if list(map(len, self._sized)) != self._lengths or any(self._empty):
            return True
        made = gc.get_referents(*self._bare)
        if any(made):
            return True
        if made:  # still empty: from now on they are watched by themselves
            self._empty += made
            self._bare = [o for o in self._bare if not gc.get_referents(o)]
            self._reset_containers()
        return False

    def reconcile(self, *, tensors: bool = True) -> tuple[bool, str | None]:
        """After a change by identity: is it one that a trace does not notice?

        Args:
            tensors: whether a tensor may give way to another of its kind.

        Returns:
            ``(True, None)`` when all that changed are values equal to what they replace and tensors of
            the same shape, dtype, device and gradient flag (then remembered anew), else ``(False, what)``.
        """
        if self._grown():
            return False, "an attribute, item, submodule or hook was added or removed"
        for obj, copy, saved in self._copies:
            if copy(obj) != saved:
                return False, f"the contents of a {type(obj).__name__} changed"
        if self._sets != self._saved_sets:
            return False, "a set changed"
        for key, kept in zip(self._keys(), self._saved_keys, strict=True):
            if key != kept:
                return False, f"the key {_short(kept)} became {_short(key)}"
        replaced = False
        try:
            for value, saved in zip(self._values(), self._saved, strict=True):
                if value is saved:
                    continue
                if isinstance(value, torch.Tensor) and isinstance(saved, torch.Tensor):
                    if not tensors:
                        return False, f"a tensor of shape {tuple(saved.shape)} was replaced"
                    if not _same_kind(value, saved):
                        return False, f"a tensor of shape {tuple(saved.shape)} became another kind"
                    replaced = True
                elif not _equal_constants(value, saved):
                    return False, f"{_short(saved)} became {_short(value)}"
        except ValueError:
            return False, "a closure was emptied"
        for first, *others in self._tied.values() if replaced else ():
            if any(other.fetch() is not first.fetch() for other in others):
                return False, "a tensor that two places shared was replaced in one of them"
        self.remember()
        return True, None

    # -- putting back

    def snapshot(self) -> Callable[[], None]:
        """Remember the contents of everything watched; the function returned puts them back."""
        dicts = [(d, dict(d)) for d in (*self._dicts, *self._empty)]
        bare = list(self._bare)
        lists = [(items, list(items)) for items in self._lists]
        classes = [(owner, dict(vars(owner))) for owner in self._owners]
        globals_ = zip(self._scopes, self._names, strict=True)
        names = [(scope, name, scope.get(name)) for scope, name in globals_]
        cells = [(cell, cell.cell_contents) for cell in self._cells]
        slots = [(obj, name, getattr(obj, name)) for obj, name in self._slots if hasattr(obj, name)]
        contexts = [(var, var.get(None)) for var in self._contexts]

        def restore() -> None:
            for mapping, saved in dicts:
                if list(mapping) != list(saved) or not all(
                    map(is_, mapping.values(), saved.values())
                ):
                    mapping.clear()
                    mapping.update(saved)
            for mapping in bare:
                if gc.get_referents(mapping):
                    vars(mapping).clear()
            for items, kept in lists:
                if len(items) != len(kept) or not all(map(is_, items, kept)):
                    items.clear()
                    items.extend(kept)
            for owner, members in classes:
                now = dict(vars(owner))
                for name in now.keys() - members.keys():
                    delattr(owner, name)
                for name, member in members.items():
                    if now.get(name) is not member:
                        setattr(owner, name, member)
            for scope, name, value in names:
                if scope.get(name) is not value:
                    scope[name] = value
            for cell, value in cells:
                cell.cell_contents = value
            for obj, name, value in slots:
                if getattr(obj, name, None) is not value:
                    object.__setattr__(obj, name, value)
            for var, value in contexts:
                if var.get(None) is not value:
                    var.set(value)
            for current, before in zip(self._sets, self._saved_sets, strict=True):
                if current != before and isinstance(current, set):
                    current.clear()
                    current.update(before)
            for obj, copy, saved in self._copies:
                if copy(obj) != saved:
                    _put_back(obj, saved)

        return restore


_CODE, _DEFAULTS = attrgetter("__code__"), attrgetter("__defaults__")
_CONTENTS = attrgetter("cell_contents")
_EDGE = (object(),)  # nobody else's, so found nowhere else
_NONE, _FORWARD = repeat(None), repeat("forward")


def _addresses(items: tuple[Any, ...]) -> bytes:
    """The addresses of the items: equal for tuples of the very same objects.

    ``all(map(is_, ...))`` says the same at ten times the cost, and ``==`` calls ``__eq__`` where it must not.
    A tuple is its fixed part and then an address per item; both sizes are the class's own.
    """
    return ctypes.string_at(id(items) + tuple.__basicsize__, len(items) * tuple.__itemsize__)


if _addresses((None, _EDGE)) != b"".join(
    id(o).to_bytes(tuple.__itemsize__, sys.byteorder) for o in (None, _EDGE)
):  # pragma: no cover

    def _addresses(items: tuple[Any, ...]) -> bytes:
        return array.array("Q", map(id, items)).tobytes()


class _Cell:
    """A closure cell that can be read as ``box[0]``."""

    __slots__ = ("cell",)

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, _: int) -> Any:
        return self.cell.cell_contents


class _Slots:
    """An object's slots, read as ``box[name]``."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __getitem__(self, name: str) -> Any:
        return getattr(self.obj, name)


@functools.cache
def _is_library(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _LIBRARIES


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Every global, attribute and method that a function and those defined inside it name."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def function_of(member: Any) -> Any:
    """The function that a class attribute runs, or None where it is data."""
    if isinstance(member, types.FunctionType):
        return member
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    if isinstance(member, functools.cached_property):
        return member.func
    return None


def _to_bytes(numbers: np.ndarray | array.array) -> bytes:
    return numbers.tobytes()


def _put_back(obj: Any, saved: Any) -> None:
    if isinstance(obj, np.ndarray):
        obj[...] = np.frombuffer(saved, obj.dtype).reshape(obj.shape)
    elif isinstance(obj, bytearray):
        obj[:] = saved
    elif isinstance(obj, array.array):
        obj[:] = array.array(obj.typecode, saved)
    elif isinstance(obj, OrderedDict):
        for key in saved:
            obj.move_to_end(key)


def _equal_constants(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or not isinstance(a, _CONSTANTS):
        return False
    # The text tells 0.0 from -0.0, and lets NaN equal itself.
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        type(a) is type(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.requires_grad == b.requires_grad
        and a.stride() == b.stride()
    )


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, _CONSTANTS) else f"a {type(value).__name__}"
    return text if len(text) < 60 else text[:57] + "..."
