"""Keys that a module reads and nothing writes: found, and named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrl.data import Composite

from fastwm.specs import has_lazy

__all__ = ["MissingKeyError", "Unprovided", "check_step_wiring", "unprovided"]


class MissingKeyError(KeyError):
    """A key that a module reads is not there; the message names it, and the keys that are."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows its message quoted, as if it were the key


@dataclass(frozen=True)
class Unprovided:
    """A key that a module reads although nothing before it has written it.

    Attributes:
        reader: the module.
        key: the key.
        written: what the modules before it write.
    """

    reader: TensorDictModuleBase
    key: NestedKey
    written: tuple[NestedKey, ...]

    def certain(self) -> bool:
        """Whether the module must fail without it; else it may have a default for it."""
        if not isinstance(self.reader, TensorDictModule):
            return isinstance(self.reader, ProbabilisticTensorDictModule)
        return self.reader.strict or _has_no_default(self.reader, self.key)


def unprovided(
    module: torch.nn.Module, given: Callable[[NestedKey], bool] | Iterable[NestedKey]
) -> list[Unprovided]:
    """The keys that parts of ``module`` read, that are not given and that no part before writes.

    Args:
        module: a TensorDict module; sequences are looked into, in their order.
        given: the keys there are at the start, or a function that says of a key whether it is there.
    """
    if callable(given):
        there = given
    else:
        at_start = [unravel_key(key) for key in given]

        def there(key: NestedKey) -> bool:
            return any(_overlap(key, other) for other in at_start)

    found: list[Unprovided] = []
    written: list[NestedKey] = []
    for part in _parts(module):
        for key in map(unravel_key, part.in_keys):
            if not there(key) and not any(_overlap(key, other) for other in written):
                found.append(Unprovided(part, key, tuple(written)))
        written += [unravel_key(key) for key in part.out_keys if key != "_"]
    return found


def check_step_wiring(
    step_module: torch.nn.Module, world_model: object, state: Composite, action: Composite
) -> None:
    """Hold a world model's step to its own wiring: all that it reads under ``"next"``, it wrote before.

    Nothing is there under ``"next"`` when a step begins; what is read at the root comes with the start.

    Args:
        step_module: the step.
        world_model: its owner, whose attributes name the parts in the message.
        state, action: specs of what the step reads at the root.

    Raises:
        ValueError: naming the part, the key that no part before it writes, and those that are written.
    """
    missing = unprovided(step_module, lambda key: not _under_next(key))
    if not missing:
        return
    ran, cause = _dry_run(step_module, state, action)
    if ran:
        if cause is None:
            return  # it works without
        first = missing[0]
    else:
        certain = [m for m in missing if m.certain()]
        if not certain:
            return
        first = certain[0]
    written = [key for part in _parts(step_module) for key in map(unravel_key, part.out_keys)]
    later = any(_overlap(first.key, key) for key in written)
    before = [key for key in first.written if _under_next(key)]
    raise ValueError(
        f"{_name_in(world_model, first.reader)} reads {first.key!r}, which "
        + ("only a later module writes" if later else "no module writes")
        + f": before it, the step writes {before}, and nothing else is there under 'next'."
    ) from cause


def missing_of(policy: Any, there: Iterable[NestedKey]) -> Unprovided | None:
    """The first key that a policy reads and that is not there, if it is sure to need it."""
    if not isinstance(policy, TensorDictModuleBase):
        return None
    return next((m for m in unprovided(policy, there) if m.certain()), None)


def _parts(module: torch.nn.Module) -> Iterator[TensorDictModuleBase]:
    """The modules of nested sequences, in order; none of a sequence that skips what it lacks keys for."""
    if isinstance(module, TensorDictSequential):
        if not module.partial_tolerant:
            for part in module._module_iter():
                yield from _parts(part)
    elif isinstance(module, TensorDictModuleBase):
        yield module


def _under_next(key: NestedKey) -> bool:
    return key == "next" or (isinstance(key, tuple) and key[0] == "next")


def _overlap(key: NestedKey, other: NestedKey) -> bool:
    """Whether one is the other, or a group that holds it."""
    one = (key,) if isinstance(key, str) else key
    two = (other,) if isinstance(other, str) else other
    shared = min(len(one), len(two))
    return one[:shared] == two[:shared]


def _has_no_default(reader: TensorDictModule, key: NestedKey) -> bool:
    """Whether the function that gets the key's value as an argument cannot do without."""
    function: Any = (
        reader.module if reader.method is None else getattr(reader.module, reader.method)
    )
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return True
    index = [unravel_key(k) for k in reader.in_keys].index(key)
    if reader._kwargs is not None:
        named = [p for p in parameters if p.name == reader._kwargs[index]]
    else:
        named = parameters[index : index + 1]
    return not named or named[0].default is inspect.Parameter.empty


def _name_in(world_model: object, reader: torch.nn.Module) -> str:
    for name, part in vars(world_model).get("_modules", {}).items():
        inside = isinstance(part, torch.nn.Module) and any(m is reader for m in part.modules())
        if inside and not name.startswith("_"):
            return f"The world model's {name}"
    return f"A {type(reader).__name__} of the world model"


def _dry_run(
    step_module: torch.nn.Module, state: Composite, action: Composite
) -> tuple[bool, Exception | None]:
    """Whether the step could be run on fake tensors, of which nothing is computed, and what it raised."""
    leaves = {**dict(state.items(True, True)), **dict(action.items(True, True))}
    if has_lazy(step_module) or any(-1 in leaf.shape for leaf in leaves.values()):
        return False, None
    known = [unravel_key(key) for key in leaves]
    if unprovided(
        step_module, lambda key: _under_next(key) or any(_overlap(key, k) for k in known)
    ):
        return False, None  # a key without a spec
    batch = state.shape
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs: TensorDictBase = TensorDict({}, batch_size=batch, device=state.device)
            for key, leaf in leaves.items():
                inputs.set(key, torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device))
            step_module(inputs)
    except Exception as error:
        return True, error
    return True, None
