"""`Watch`: what it sees change, what it lets pass, what it cannot look at, and putting things back."""

from __future__ import annotations

import array
import gc
import itertools
import logging
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastwm.watch import TooLarge, Watch


class Thing:
    """A plain object with whatever attributes it is given."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


# ---------------------------------------------------------------- changes that count

CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "attribute": (lambda: Thing(a=1), lambda o: setattr(o, "a", 2)),
    "attribute-added": (lambda: Thing(a=1), lambda o: setattr(o, "b", 2)),
    "attribute-removed": (lambda: Thing(a=1), lambda o: delattr(o, "a")),
    "attribute-renamed": (
        lambda: types.SimpleNamespace(a=1),
        lambda o: o.__dict__.update(b=o.__dict__.pop("a")),
    ),
    "attribute-of-an-attribute": (lambda: Thing(a=Thing(b=1)), lambda o: setattr(o.a, "b", 2)),
    "list-in-a-tuple": (lambda: Thing(a=([1],)), lambda o: o.a[0].append(2)),
    "dict": (lambda: {"a": 1}, lambda o: o.update(a=2)),
    "empty-dict": (dict, lambda o: o.update(a=2)),
    "empty-list": (list, lambda o: o.append(2)),
    "list": (lambda: [1, 2], lambda o: o.reverse()),
    "deque": (lambda: deque([1, 2]), lambda o: o.rotate(1)),
    "set": (lambda: {1}, lambda o: o.add(2)),
    "empty-set": (set, lambda o: o.add(2)),
    "object-in-a-set": (lambda: {Thing(a=1)}, lambda o: setattr(next(iter(o)), "a", 2)),
    "array": (lambda: np.zeros(3), lambda o: o.__setitem__(1, 1.0)),
    "bytearray": (lambda: bytearray(2), lambda o: o.__setitem__(1, 1)),
    "array.array": (lambda: array.array("d", [1.0]), lambda o: o.__setitem__(0, 2.0)),
    "slot": (lambda: Slots(1), lambda o: setattr(o, "value", 2)),
    "slot-deleted": (lambda: Slots(1), lambda o: delattr(o, "value")),
    "module-training": (nn.Tanh, lambda o: o.eval()),
    "module-parameter": (
        lambda: nn.Linear(2, 2),
        lambda o: setattr(o, "weight", nn.Parameter(torch.ones(3, 2))),
    ),
    "module-hook": (nn.Tanh, lambda o: o.register_forward_hook(print)),
    "frozen-parameter": (
        lambda: nn.Linear(2, 2),
        lambda o: setattr(o, "weight", nn.Parameter(torch.ones(2, 2), requires_grad=False)),
    ),
    "tensor-for-a-parameter": (
        lambda: Thing(a=torch.ones(2)),
        lambda o: setattr(o, "a", nn.Parameter(torch.ones(2))),
    ),
    "weak-reference": (
        lambda: Thing(a=(b := Thing(c=1)), w=weakref.ref(b)),
        lambda o: setattr(o.w(), "c", 2),
    ),
    "method": (lambda: Thing(a=Thing(b=1).__init__), lambda o: setattr(o.a.__self__, "b", 2)),
    "dict-in-a-mapping-proxy": (
        lambda: Thing(inner=(d := {"a": 1}), proxy=types.MappingProxyType(d)),
        lambda o: o.inner.update(a=2),
    ),
    "attribute-of-a-tensor": (lambda: Thing(a=tagged()), lambda o: setattr(o.a, "tag", 2)),
}  # fmt: skip


def tagged() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.tag = 1  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    make, change = CHANGES[name]
    watched = make()
    watch = Watch([watched])
    assert watch.unchanged()
    change(watched)
    assert not watch.unchanged()
    same, what = watch.reconcile()
    assert not same
    assert what
    # And it stays seen.
    assert not watch.unchanged()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_put_back(name: str) -> None:
    make, change = CHANGES[name]
    watched = make()
    watch = Watch([watched])
    restore = watch.snapshot()
    change(watched)
    restore()
    assert watch.unchanged(), watch.reconcile()


def test_putting_back_keeps_the_order_of_dicts() -> None:
    watched = {"a": 1, "b": 2}
    ordered = OrderedDict(a=1, b=2)
    restore = Watch([watched, ordered]).snapshot()
    watched["a"] = watched.pop("a")
    ordered.move_to_end("a")
    restore()
    assert list(watched) == list(ordered) == ["a", "b"]


def test_putting_back_what_functions_hold() -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        step.calls += 1  # type: ignore[attr-defined]
        Counted.number += 1

    class Counted:
        number = 0

    step.calls = 0  # type: ignore[attr-defined]
    watch = Watch([step])
    restore = watch.snapshot()
    step()
    assert not watch.unchanged()
    restore()
    assert (count, step.calls, Counted.number) == (0, 0, 0)  # type: ignore[attr-defined]
    assert watch.unchanged()


# ---------------------------------------------------------------- changes that do not count


def test_an_equal_value_is_no_change() -> None:
    thing = Thing(a=1.5, b="x", c=(1, 2))
    watch = Watch([thing])
    thing.a, thing.b = float("1.5"), "".join(["x"])
    assert watch.reconcile() == (True, None)
    assert watch.unchanged()


@pytest.mark.parametrize(
    ("old", "new"), [(1, True), (1, 1.0), (0.0, -0.0), ((1, 2), (1, 3)), ([1], [2]), (None, 0)]
)
def test_values_that_only_look_equal(old: Any, new: Any) -> None:
    thing = Thing(a=old)
    watch = Watch([thing])
    thing.a = new
    assert not watch.reconcile()[0]


def test_nan_equals_itself_here() -> None:
    thing = Thing(a=float("nan"))
    watch = Watch([thing])
    thing.a = float("nan")
    assert watch.reconcile()[0]


def test_a_tensor_of_the_same_kind_is_taken_up() -> None:
    linear = nn.Linear(2, 2)
    watch = Watch([linear])
    old = linear.weight
    assert watch.holds(old)
    linear.weight = nn.Parameter(torch.ones(2, 2))
    assert not watch.unchanged()
    assert not watch.holds(old)
    assert watch.reconcile() == (True, None)
    assert watch.unchanged()
    assert watch.tensors[id(old)].fetch() is linear.weight


def test_after_a_reconcile_everything_is_still_watched() -> None:
    linear = nn.Linear(2, 2)
    watch = Watch([linear])
    linear.weight = nn.Parameter(torch.ones(2, 2))
    assert watch.reconcile()[0]
    linear.register_forward_pre_hook(lambda *_: None)
    assert not watch.unchanged()


def test_shared_tensors_must_stay_shared() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    watch = Watch([one, two])
    new = nn.Parameter(torch.ones(2, 2))
    two.weight = new
    same, what = watch.reconcile()
    assert not same
    assert what is not None
    assert "shared" in what
    one.weight = new
    assert watch.reconcile()[0]


# ---------------------------------------------------------------- functions

LIMIT = 1
TABLE = {"a": 1}


def leaf() -> int:
    return LIMIT


def through() -> int:
    return leaf() + TABLE["a"]


def nested_code() -> list[int]:
    return [(lambda: LIMIT)() for _ in range(2)]


class Uses:
    constant = 1

    def forward(self) -> int:
        return self.used()

    def used(self) -> int:
        return through()

    def unused(self) -> int:
        return UNUSED


UNUSED = 1


@pytest.mark.parametrize("root", [through, nested_code, Uses(), Uses, Uses().forward])
def test_globals_are_followed_through_the_functions_that_name_them(
    root: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch([root])
    assert watch.unchanged()
    monkeypatch.setitem(globals(), "LIMIT", 2)
    assert not watch.unchanged()
    monkeypatch.undo()
    assert watch.unchanged()


def test_what_no_entered_function_names_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch([Uses()])
    monkeypatch.setitem(globals(), "UNUSED", 2)
    assert watch.unchanged()


def test_a_function_replaced_in_the_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch([through])
    monkeypatch.setitem(globals(), "leaf", lambda: 5)
    assert not watch.unchanged()


def test_an_emptied_closure_is_a_change_and_no_error() -> None:
    value = 1

    def fn() -> int:
        return value

    watch = Watch([fn])
    del fn.__closure__[0].cell_contents  # type: ignore[index]
    assert not watch.unchanged()
    assert watch.reconcile() == (False, "a closure was emptied")


# ---------------------------------------------------------------- what cannot be looked at


@pytest.mark.parametrize(
    "hidden",
    [
        iter([1, 2]), itertools.count(), (i for i in range(3)), zip([1], [2], strict=True), map(abs, [1]),
        random.Random(0), np.random.default_rng(0), np.random.RandomState(0), np.zeros(1 << 14),
    ],
    ids=lambda h: type(h).__name__,
)  # fmt: skip
def test_hidden_state_is_named(hidden: Any) -> None:
    assert type(hidden).__name__ in Watch([Thing(a=[hidden])]).unwatchable[0]


def test_what_is_compiled_is_named() -> None:
    compiled = torch.compile(lambda x: x, backend="eager")
    assert Watch([Thing(a=compiled)]).compiled
    assert not Watch([leaf]).compiled


def test_too_much_state_is_an_error() -> None:
    with pytest.raises(TooLarge, match="attributes are reachable"):
        Watch([[[i] for i in range(30_000)]])


def test_loggers_are_left_alone() -> None:
    """They reach every other logger, and cache what they are asked."""
    logger = logging.getLogger(__name__)
    watch = Watch([Thing(log=logger)])
    logger.isEnabledFor(logging.DEBUG)
    logging.getLogger(__name__ + ".more")
    assert watch.unchanged()


def test_opaque_objects_are_not_looked_into_nor_kept_alive() -> None:
    inner = Thing(a=1)
    outer = Thing(items=[1])
    watch = Watch([outer], opaque=[inner])
    outer_watch = Watch([Thing(inner=inner)], opaque=[inner])
    inner.a = 2
    assert outer_watch.unchanged()
    reference = weakref.ref(inner)
    del inner, outer_watch
    gc.collect()
    assert reference() is None
    assert watch.unchanged()


def test_cycles_end() -> None:
    one, two = Thing(), Thing()
    one.other, two.other = two, one
    watch = Watch([one])
    two.value = 1
    assert not watch.unchanged()


def test_roots_are_kept_alive_so_that_no_id_is_reused() -> None:
    thing = Thing(a=1)
    reference = weakref.ref(thing)
    watch = Watch([thing])
    del thing
    assert reference() is not None
    assert watch.unchanged()
