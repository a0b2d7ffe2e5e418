"""Tracing: run a step once on real data and write down the ATen ops it is made of.

The recorder works below autograd and above the kernels, so any module is seen as what it computes.
It runs on real tensors: Python that looks only at constants (a distribution checking its bounds) just
works, and Python that looks at what the step computes is caught and named.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from fastwm.step_graph import Meta, Op, StepGraph, Value

__all__ = ["InvalidArguments", "Untraceable", "cuda_device", "kept_random_state",
           "preserved_random_state", "trace"]  # fmt: skip

aten = torch.ops.aten
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_DYNAMIC_SHAPE = torch.Tag.dynamic_output_shape
_DATA_DEPENDENT = torch.Tag.data_dependent_output
_RANDOM = torch.Tag.nondeterministic_seeded
_MAX_OPS = 5000
one_hot = torch.nn.functional.one_hot


class Untraceable(Exception):
    """The step cannot be written down as a fixed list of ops; the message says why."""


class InvalidArguments(Untraceable):
    """A distribution finds the arguments it is given invalid: a matter of this call's data."""


class _NoEscape(TorchFunctionMode):
    """Refuse the ways around the dispatcher: a tensor read or hooked behind the recorder's back."""

    escapes: ClassVar = {
        torch.Tensor.numpy: "Tensor.numpy()",
        torch.Tensor.tolist: "Tensor.tolist()",
        torch.Tensor.__repr__: "repr() of a tensor",
        torch.Tensor.__array__: "numpy on a tensor",
        torch.Tensor.__dlpack__: "Tensor.__dlpack__()",
        torch.Tensor.data_ptr: "Tensor.data_ptr()",
        torch.Tensor.untyped_storage: "Tensor.untyped_storage()",
        torch.Tensor.register_hook: "a tensor hook",
        torch.Tensor.backward: "Tensor.backward() inside the step",
        torch.autograd.grad: "torch.autograd.grad inside the step",
        torch.Tensor.data.__get__: "Tensor.data",  # type: ignore[attr-defined]
        torch.Tensor.data.__set__: "assignment to Tensor.data",  # type: ignore[attr-defined]
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""  # kept, should the step catch what is raised

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        try:
            escape = self.escapes.get(func)
        except TypeError:  # unhashable: none of ours
            escape = None
        if escape is not None:
            self.seen = f"the step uses {escape}, which a trace cannot see"
            raise Untraceable(self.seen)
        if func is one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(
        self,
        locate: Callable[[torch.Tensor], bool],
        grad: bool,
        generators: Iterable[torch.Generator],
    ) -> None:
        super().__init__()
        self.locate = locate
        self.grad = grad
        self.values: dict[int, Value] = {}
        self.tensors: list[torch.Tensor] = []  # by value number; also keeps ids from being reused
        self.memory: dict[int, int] = {}
        self.constants: list[tuple[Value, torch.Tensor]] = []
        self.fresh: set[int] = set()
        self.ops: list[Op] = []
        self.checks: list[Value] = []
        self.varying: set[int] = set()  # values that depend on inputs or on random draws
        self.own_memory: set[int] = set()  # memory allocated by the step itself
        self.scalar_reads: list[torch.Tensor] = []
        self.reads_from: dict[
            int, set[int]
        ] = {}  # constant value -> constants it was computed from
        self.generators = _Generators(generators)
        self.functions: set[type] = set()  # custom autograd.Functions recorded as one op each
        self.inside: _Inside | None = None  # what such a function does while it runs
        self.refusal: Untraceable | None = None
        self.thread = threading.get_ident()

    # -- values

    def define(self, tensor: torch.Tensor, *, varying: bool) -> Value:
        known = self.values.get(id(tensor))
        if known is not None:
            if varying:
                self.varying.add(known.index)
            return known
        value = Value(len(self.tensors))
        self.tensors.append(tensor)
        self.values[id(tensor)] = value
        self.memory[value.index] = _memory(tensor)
        if varying:
            self.varying.add(value.index)
        return value

    def use(self, tensor: torch.Tensor, target: Any) -> Value:
        if type(tensor) not in _PLAIN:
            raise Untraceable(f"{target}: tensor subclass {type(tensor).__name__}")
        value = self.values.get(id(tensor))
        if value is not None:
            return value
        fresh = target in (aten.lift_fresh.default, aten.lift_fresh_copy.default)
        memory = _memory(tensor)
        if memory in self.own_memory:
            raise Untraceable(f"{target}: a tensor aliased out of sight of the trace")
        if not fresh and not self.locate(tensor):
            raise Untraceable(
                f"{target} reads a tensor of shape {tuple(tensor.shape)} that is neither an input nor "
                "reachable from the policy or the world model"
            )
        value = self.define(tensor, varying=False)
        self.constants.append((value, tensor))
        self.reads_from[value.index] = {value.index}
        if fresh:
            self.fresh.add(value.index)
        return value

    # -- ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        try:
            return self.dispatch(func, args, kwargs or {})
        except Untraceable as reason:
            self.refusal = self.refusal or reason  # kept, should the step catch it
            raise

    def dispatch(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.inside is not None:
            return self.inside.run(func, args, kwargs, self)
        if torch.is_inference_mode_enabled():
            # Ops that autograd would have taken apart: as they come without inference mode.
            with self:
                pieces = func.decompose(*args, **kwargs)
            if pieces is not NotImplemented:
                return pieces
        # Tensors become values before the op may change them.
        ref_args, ref_kwargs = self._refer(args, func), self._refer(kwargs, func)
        inputs = [self.values[id(t)] for t in _tensors((args, kwargs))]
        varying = any(v.index in self.varying for v in inputs)
        if _DATA_DEPENDENT in func.tags:
            return self._read_scalar(func, args, kwargs, inputs, varying)
        if _DYNAMIC_SHAPE in func.tags and _shape_depends_on_data(func, args):
            if varying:
                raise Untraceable(f"{func}: the shape of its result depends on data")
            self._read(inputs)  # Python sees the shape
        if "batch_norm" in func.name() and _training_flag(func, args, kwargs):
            raise Untraceable(f"{func}: batch norm in train mode updates its running statistics")
        mutated = self._mutated(func, args, kwargs)
        draws = _RANDOM in func.tags
        if draws:
            self.generators.check((*args, *kwargs.values()))
        before = {_memory(t) for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        if draws:
            self.generators.keep()
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        refs: list[Value | None] = []
        for out in outputs:
            if not isinstance(out, torch.Tensor):
                refs.append(None)
                continue
            value = self.define(out, varying=varying or draws)
            refs.append(value)
            if self.memory[value.index] not in before:
                self.own_memory.add(self.memory[value.index])
            if not varying and not draws:
                self.reads_from.setdefault(value.index, set()).update(
                    *(self.reads_from.get(v.index, set()) for v in inputs)
                )
        if varying or draws:
            for value in mutated:
                # Everything that shares the written memory now depends on the step.
                shared = self.memory[value.index]
                self.varying.update(i for i, m in self.memory.items() if m == shared)
        if len(self.ops) >= _MAX_OPS:
            raise Untraceable(f"the step takes more than {_MAX_OPS} ops")
        grad_here = torch.is_grad_enabled()
        # Switched on inside a step that has them off, they end with the stacking of the results.
        detached = self.grad and not grad_here
        if detached and mutated:
            raise Untraceable(f"{func}: in-place write under no_grad")
        self.ops.append(
            Op(func, ref_args, ref_kwargs, tuple(refs), not isinstance(result, (tuple, list)),
               tuple(mutated), draws, detached)
        )  # fmt: skip
        return result

    def call_function(self, cls: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Record a custom ``autograd.Function`` as one op, so that its own backward is kept."""
        if self.inside is not None:
            return apply(*args)
        ref_args = self._refer(args, cls.apply)
        known = set(self.memory.values())
        with _disable_current_modes():
            self.generators.check(())
        self.inside = _Inside()
        try:
            result = apply(*args)
        finally:
            inside, self.inside = self.inside, None
        with _disable_current_modes():
            self.generators.keep()
        outputs = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(out, torch.Tensor) for out in outputs):
            raise Untraceable(f"{cls.__name__} returns something else than tensors")
        refs = tuple(self.define(out, varying=True) for out in outputs)
        self.own_memory.update({self.memory[v.index] for v in refs} - known)
        self.functions.add(cls)
        detached = self.grad and not torch.is_grad_enabled()
        self.ops.append(
            Op(
                cls.apply,
                ref_args,
                {},
                refs,
                not isinstance(result, tuple),
                (),
                inside.draws,
                detached,
            )
        )
        return result

    def _refer(self, tree: Any, func: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self.use(tree, func)
        if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
            return type(tree)(self._refer(item, func) for item in tree)
        if isinstance(tree, dict):
            return {k: self._refer(item, func) for k, item in tree.items()}
        return tree

    def _read_scalar(
        self, func: Any, args: tuple, kwargs: dict[str, Any], inputs: list[Value], varying: bool
    ) -> Any:
        result = func(*args, **kwargs)
        if not varying:
            self._read(inputs)
            return result
        # Distributions validate their arguments through _is_all_true: kept as a check to be made.
        if len(inputs) == 1 and inputs[0] in self._validations():
            if not result:
                raise InvalidArguments(
                    "an argument check fails (a distribution's validation, or one_hot's)"
                )
            self.checks.append(inputs[0])
            return result
        raise Untraceable(
            f"{func}: Python reads a value that the step computes (.item(), if, float(), ...)"
        )

    def _read(self, inputs: list[Value]) -> None:
        for value in inputs:
            self.scalar_reads += [self.tensors[i] for i in self.reads_from.get(value.index, set())]

    def _validations(self) -> set[Value | None]:
        return {o for op in self.ops if op.target is aten._is_all_true.default for o in op.outputs}

    def _mutated(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Value]:
        if not func._schema.is_mutable:
            return []
        mutated = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(given):
                if _memory(tensor) not in self.own_memory:
                    raise Untraceable(
                        f"{func} writes in place into a tensor that is not the step's own"
                    )
                mutated.append(self.values[id(tensor)])
        return mutated


class _Generators:
    """Random generators, which only recorded ops may move: a replay does not seed them again."""

    def __init__(self, own: Iterable[torch.Generator]) -> None:
        self.all = [torch.default_generator, *own]
        if torch.cuda.is_initialized():
            self.all += torch.cuda.default_generators
        self.known = {g._cdata for g in self.all}  # type: ignore[attr-defined]
        self.first = [g.get_state() for g in self.all]
        self.states = self.first

    def check(self, arguments: Iterable[Any]) -> None:
        for given in arguments:
            # Python sees another wrapper of the same generator each time.
            if isinstance(given, torch.Generator) and (
                given._cdata not in self.known  # type: ignore[attr-defined]
            ):
                raise Untraceable("the step draws from a generator that it makes")
        if not all(
            torch.equal(g.get_state(), s) for g, s in zip(self.all, self.states, strict=True)
        ):
            raise Untraceable("the step seeds a random generator, or puts back its state")

    def keep(self) -> None:
        self.states = [g.get_state() for g in self.all]

    def restore(self) -> None:
        for generator, state in zip(self.all, self.first, strict=True):
            generator.set_state(state)


class _Inside:
    """Watches a custom function's ops without recording them."""

    def __init__(self) -> None:
        self.draws = False
        self.made: set[int] = set()
        self.kept: list[Any] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict, recorder: _Recorder) -> Any:
        self.draws = self.draws or _RANDOM in func.tags
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                if any(_memory(t) not in self.made for t in _tensors(given)):
                    raise Untraceable(f"{func} writes in place inside a custom autograd.Function")
        before = {_memory(t) for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        self.kept.append(result)
        self.made.update(m for t in _tensors(result) if (m := _memory(t)) not in before)
        return result


@contextmanager
def _functions_as_ops(recorder: _Recorder) -> Iterator[None]:
    """While tracing with gradients, hand every ``autograd.Function`` call to the recorder."""
    if not recorder.grad:
        yield
        return
    base = torch._C._FunctionBase.__dict__["apply"]
    # Function.apply ends in super().apply, and that is looked up here.
    level: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: type, *args: Any) -> Any:
        run = base.__get__(None, cls)
        if threading.get_ident() != recorder.thread:
            return run(*args)
        try:
            return recorder.call_function(cls, run, args)
        except Untraceable as reason:
            recorder.refusal = recorder.refusal or reason
            raise

    level.apply = classmethod(apply)
    try:
        yield
    finally:
        del level.apply


_one_at_a_time = threading.RLock()  # tracing replaces a method of a class that all threads share


# Number of the memory behind a tensor. Not Tensor.untyped_storage(): the recorder refuses that one.
_storage_id = torch._C._storage_id  # type: ignore[attr-defined]


def _memory(tensor: torch.Tensor) -> int:
    try:
        return _storage_id(tensor)
    except NotImplementedError:
        raise Untraceable(f"a tensor of layout {tensor.layout}") from None


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _shape_depends_on_data(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    if func is aten.index.Tensor:  # only boolean masks change the shape
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    return True


def _training_flag(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict) -> bool:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("training", "train"):
            return bool(args[i] if i < len(args) else kwargs.get(argument.name))
    return False


def cuda_device(device: torch.device | None) -> torch.device | None:
    """The CUDA device whose generator a step on ``device`` may draw from, if any.

    An env without a device leaves that to its tensors: then it is the current one, once CUDA is in use.
    """
    if device is None:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        return torch.device("cuda", torch.cuda.current_device()) if used else None
    return device if device.type == "cuda" else None


@contextmanager
def preserved_random_state(
    device: torch.device | None, own: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Leave torch's, numpy's and Python's generators, and those given, as they were found."""
    states = np.random.get_state(), random.getstate()
    restore = kept_random_state(device, own)
    try:
        yield
    finally:
        restore()
        np.random.set_state(states[0])
        random.setstate(states[1])


def kept_random_state(
    device: torch.device | None, own: Iterable[torch.Generator] = ()
) -> Callable[[], None]:
    """What puts torch's generators, and those given, back to where they are now."""
    state = torch.get_rng_state()
    owned = [(generator, generator.get_state()) for generator in own]
    cuda = cuda_device(device)
    cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)

    def restore() -> None:
        torch.set_rng_state(state)
        for generator, kept in owned:
            generator.set_state(kept)
        if cuda is not None and cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, cuda)

    return restore


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """``one_hot`` without the look at the largest class that its own code takes on a CPU."""
    if num_classes <= 0 or tensor.dtype != torch.long:
        return one_hot(tensor, num_classes)
    if not torch._is_all_true((tensor >= 0) & (tensor < num_classes)):
        return one_hot(tensor, num_classes)  # raises
    classes = torch.arange(num_classes, dtype=torch.long, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).to(torch.long)


def is_tracing() -> bool:
    """Whether this is being run by :func:`trace`."""
    return any(isinstance(mode, _Recorder) for mode in _get_current_dispatch_mode_stack())


def _python_draws() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return random.getstate(), kind, keys.tobytes(), tuple(rest)


def trace(
    step: Callable[[dict[Any, torch.Tensor]], Mapping[Any, torch.Tensor]],
    inputs: dict[Any, torch.Tensor],
    locate: Callable[[torch.Tensor], bool],
    generators: Iterable[torch.Generator] = (),
) -> tuple[StepGraph, Mapping[Any, torch.Tensor], list[torch.Tensor]]:
    """Run ``step(inputs)`` once and return what it is made of.

    Args:
        step: a function of named tensors to named tensors. Run once, for real, in the current grad mode.
        inputs: what the step is a function of.
        locate: says whether a tensor that is no input can be found again at the next call (a parameter,
            a buffer, an attribute); only such may be read.
        generators: those besides the devices' own that the step may draw from.

    Returns:
        The graph, the step's own results, and the tensors whose values Python looked at.

    Raises:
        Untraceable: with the one op or act that rules the trace out.
    """
    recorder = _Recorder(locate, torch.is_grad_enabled(), generators)
    named = {key: recorder.define(tensor, varying=True) for key, tensor in inputs.items()}
    if len({v.index for v in named.values()}) != len(named):
        raise Untraceable("two inputs are one and the same tensor")
    before = _python_draws()
    escapes = _NoEscape()
    try:
        with _one_at_a_time, _functions_as_ops(recorder), escapes, recorder:
            results = step(inputs)
        recorder.generators.check(())
    finally:
        recorder.generators.restore()
    if escapes.seen:
        raise Untraceable(escapes.seen)
    if recorder.refusal is not None:
        raise recorder.refusal
    if _python_draws() != before:
        raise Untraceable("the step draws from Python's or numpy's random generator")
    outputs = {}
    for key, tensor in results.items():
        value = recorder.values.get(id(tensor))
        if value is None:
            if not locate(tensor):
                raise Untraceable(f"output {key!r} comes from outside the trace")
            value = recorder.define(tensor, varying=False)
            recorder.constants.append((value, tensor))
        outputs[key] = value
    _refuse_python_backward(results, recorder.functions)
    graph = StepGraph(
        named, recorder.constants, recorder.ops, outputs, recorder.checks,
        dict(recorder.memory), {i: Meta.of(t) for i, t in enumerate(recorder.tensors)},
        recorder.fresh,
    )  # fmt: skip
    graph.prune()
    return graph, results, recorder.scalar_reads


def _refuse_python_backward(results: Mapping[Any, torch.Tensor], recorded: set[type]) -> None:
    """A backward written in Python that was not recorded as such would be lost in the replay."""
    stack: list[Any] = [t.grad_fn for t in results.values() if t.grad_fn is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            function = getattr(type(node), "_forward_cls", type(node))
            if function not in recorded:
                raise Untraceable(f"custom autograd.Function {function.__name__}")
        stack.extend(next_node for next_node, _ in node.next_functions)
