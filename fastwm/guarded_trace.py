"""Tracing under watch: the Python state that a trace takes for granted, and whether it still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torchrl.modules.tensordict_module.common import _forward_hook_safe_action

from fastwm.process_modes import NotCapturable
from fastwm.step_graph import StepGraph
from fastwm.tracing import InvalidArguments, Untraceable
from fastwm.watch import Location, TooLarge, Watch

__all__ = ["BadCall", "Guard", "StateChanges", "kept_reads", "own_saved_tensors", "sources_of",
           "state_holds", "traced_under", "watched"]  # fmt: skip

T = TypeVar("T")
_MAX_READ = 4096  # elements; compared before every call


class BadCall(NotCapturable):
    """What was traced raises. That may be this call's data, so it is no verdict on the next."""


class StateChanges(NotCapturable):
    """Python attributes are written: a counter, a schedule, or a cache filled at its first call."""


def watched(watch: Callable[[], Watch]) -> Watch:
    """``watch()``, its failures as reasons.

    Raises:
        NotCapturable: too much to watch, or an attribute that raises when it is read.
    """
    try:
        return watch()
    except TooLarge as error:
        raise NotCapturable(str(error)) from error
    except Exception as error:
        raise NotCapturable(
            f"reading the attributes of the policy or model raises: {error}"
        ) from error


def traced_under(
    watch: Watch,
    trace: Callable[[], T],
    *,
    what: str = "step",
    outside: Iterable[torch.nn.Module] = (),
) -> T:
    """``trace()``, and all that is watched left as it was.

    Args:
        what: the name of what is traced, for messages.
        outside: modules whose own call is no part of the trace, so that their hooks run anyway.

    Raises:
        NotCapturable: with the one thing that rules it out.
        BadCall: what is traced raises; that is the cause of this.
        StateChanges: it changes what is watched.
    """
    try:
        _refuse_modules(watch, {id(module) for module in outside})
        restore = watch.snapshot()
        try:
            traced = trace()
        finally:
            # Asking must leave no trace: the call to come asks again.
            changed = not watch.unchanged()
            same, change = watch.reconcile(tensors=False) if changed else (True, None)
            restore()
        if not same:
            raise StateChanges(f"the {what} changes Python state: {change}")
        return traced
    except StateChanges:
        raise
    except InvalidArguments as error:
        raise BadCall(str(error)) from error
    except Untraceable as error:
        raise NotCapturable(str(error)) from error
    except Exception as error:
        # The eager path will raise the same, at the right place.
        raise BadCall(f"the eager {what} raises {type(error).__name__}: {error}") from error


def _refuse_modules(watch: Watch, outside: set[int]) -> None:
    if watch.unwatchable:
        raise Untraceable(
            f"the policy or the model holds a {watch.unwatchable[0]}, whose state is hidden"
        )
    for module in watch.modules:
        if id(module) in outside:
            continue
        name = type(module).__name__
        hooks = [
            *module._forward_hooks.values(), *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(), *module._backward_pre_hooks.values(),
        ]  # fmt: skip
        # torchrl's own projection of actions is a pure function of the tensordict.
        if any(hook is not _forward_hook_safe_action for hook in hooks):
            raise Untraceable(f"a hook on {name}")
        compiled = (torch._dynamo.eval_frame.OptimizedModule, torch.jit.ScriptModule)
        if isinstance(module, compiled) or module._compiled_call_impl is not None:
            raise Untraceable(f"{name} is compiled already")
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                raise Untraceable(f"lazy parameters of {name} are not initialised yet")
    if watch.compiled:
        raise Untraceable(f"{watch.compiled[0]} is compiled already")


def sources_of(graph: StepGraph, watch: Watch) -> list[Location | torch.Tensor]:
    """For each constant of the graph, where to fetch it, or the tensor that Python made for the trace."""
    return [
        tensor if value.index in graph.fresh else watch.tensors[id(tensor)]
        for value, tensor in graph.constants
    ]


def kept_reads(read: list[torch.Tensor], watch: Watch) -> list[tuple[Location, torch.Tensor]]:
    """Copies of what Python read. Not versions: ``tensor.data.fill_()`` leaves those as they were."""
    kept: dict[int, tuple[Location, torch.Tensor]] = {}
    for tensor in read:
        location = watch.tensors.get(id(tensor))
        if location is None or id(tensor) in kept:
            continue  # made by Python during the trace, such as torch.tensor(0.5)
        if tensor.numel() > _MAX_READ:
            raise Untraceable(
                f"Python reads a value computed from a tensor of {tensor.numel()} elements"
            )
        kept[id(tensor)] = location, tensor.detach().clone()
    return list(kept.values())


def own_saved_tensors() -> AbstractContextManager[Any]:
    """What tracing saves for a backward is none of the caller's, such as a checkpoint that counts it."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Guard:
    """Everything that a trace took for granted, asked for before every call that uses it.

    Args:
        watch: the Python state.
        sources: see :func:`sources_of`.
        read: see :func:`kept_reads`.

    Attributes:
        constants: the tensors that the trace reads beside its inputs, as they are now.
    """

    def __init__(
        self,
        watch: Watch,
        sources: list[Location | torch.Tensor],
        read: list[tuple[Location, torch.Tensor]],
    ) -> None:
        self.watch = watch
        self.sources = sources
        self.read = read
        self._fetch()
        self._kinds = _kinds(self.constants)
        self._same_kinds = _same_kinds(self.constants)

    def _fetch(self) -> None:
        self.constants = [s.fetch() if isinstance(s, Location) else s for s in self.sources]

    def holds(self) -> tuple[bool, str | None]:
        """``(True, None)``; ``(True, what)`` after a change that the trace survives; ``(False, what)``."""
        same, what = state_holds(self.watch)
        if not same:
            return False, what
        if what is not None:
            self._fetch()
        for location, value in self.read:
            if not torch.equal(location.fetch(), value):
                return False, "a tensor whose value Python reads was written"
        if not self._same_kinds(*self.constants) and _kinds(self.constants) != self._kinds:
            return False, "a parameter or buffer changed its dtype, shape, device or gradient flag"
        return True, what


def state_holds(watch: Watch) -> tuple[bool, str | None]:
    """As :meth:`Guard.holds`, of the Python state alone."""
    if watch.unchanged():
        return True, None
    same, what = watch.reconcile()
    return same, what or "equal values or tensors of the same kind were put in"


def _kinds(tensors: list[torch.Tensor]) -> list[tuple]:
    return [(t.dtype, t.requires_grad, t.shape, t.device, t.stride()) for t in tensors]


def _same_kinds(tensors: list[torch.Tensor]) -> Callable[..., bool]:
    """Whether tensors are certainly of the same kind as these: Dynamo's own check, in one C++ call."""
    guards: Any = torch._C._dynamo.guards
    try:
        guard = guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        return guard if guard(*tensors) else never
    except Exception:  # no tensors at all, or another torch
        return never


def never(*_: torch.Tensor) -> bool:
    """Says of nothing that it is certainly the same."""
    return False
