"""The env's step, traced: from a start and a policy to a graph that any engine can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torchrl.modules.tensordict_module.common import _forward_hook_safe_action

from fastwm.assemble import Template, leaves
from fastwm.request import Feed, NotCapturable
from fastwm.step_graph import StepGraph
from fastwm.tracing import InvalidArguments, Untraceable, preserved_random_state, trace
from fastwm.watch import Location, TooLarge, Watch

if TYPE_CHECKING:
    from fastwm.env import WorldModelEnv

__all__ = ["BadCall", "StateChanges", "TracedStep", "trace_step", "watch_step"]

Path = tuple[str, ...]
Results = dict[Any, torch.Tensor]  # a step's tensordict, as ("td", path) -> tensor
_MAX_READ = 4096  # elements; compared before every rollout


class BadCall(NotCapturable):
    """The step raises. That may be this call's data, so it is no verdict on the next."""


class StateChanges(NotCapturable):
    """The step writes Python attributes: a counter, a schedule, or a cache filled at its first call."""


@dataclass
class TracedStep:
    """What is known of an env's step under one policy, for one kind of start.

    Attributes:
        graph: inputs named by path (or ``("feed", path)``), outputs ``("td", path)`` and ``("state", path)``.
        carried: paths that change from step to step.
        fed: the graph's ``("feed", path)`` inputs.
        flags: ``("td", path)`` names of the done flags that may stop a rollout.
        template: structure of one step's tensordict.
        watch: everything the trace took for granted.
        sources: for each constant of the graph, where to fetch it (or the tensor itself).
        read: tensors whose values Python looked at: where they are, and a copy.
        dim: where the time dim goes.
    """

    graph: StepGraph
    carried: tuple[Path, ...]
    fed: tuple[Any, ...]
    flags: tuple[Any, ...]
    template: Template
    watch: Watch
    sources: list[Location | torch.Tensor]
    read: list[tuple[Location, torch.Tensor]]
    dim: int

    def __post_init__(self) -> None:
        self.generators = self.graph.generators()

    def constants(self) -> list[torch.Tensor]:
        return [s.fetch() if isinstance(s, Location) else s for s in self.sources]


def trace_step(
    env: WorldModelEnv, policy: Any, feed: Feed | None, start: TensorDictBase, original: Any
) -> tuple[TracedStep, list[Results]]:
    """Trace ``policy`` then ``env.step``, twice: a first step and one that follows it must be the same.

    Returns:
        The traced step; and what it computed from ``start`` and, unless it draws, from what follows.

    Raises:
        NotCapturable: with the one thing that rules it out.
    """
    if feed is not None:
        policy = original = None
    try:
        watch = watch_step(env, policy, original)
    except TooLarge as error:
        raise NotCapturable(str(error)) from error
    except Exception as error:
        raise NotCapturable(
            f"reading the attributes of the policy or model raises: {error}"
        ) from error
    try:
        _refuse_modules(watch)
        restore = watch.snapshot()
        try:
            traced = _trace_twice(env, policy, feed, start, watch)
        finally:
            # Asking the step must leave no trace: the rollout to come asks it again.
            changed = not watch.unchanged()
            same, what = watch.reconcile(tensors=False) if changed else (True, None)
            restore()
        if not same:
            raise StateChanges(f"the step changes Python state: {what}")
        return traced
    except StateChanges:
        raise
    except InvalidArguments as error:
        raise BadCall(str(error)) from error
    except Untraceable as error:
        raise NotCapturable(str(error)) from error
    except Exception as error:
        # The eager path will raise the same, at the right place.
        raise BadCall(f"the eager step raises {type(error).__name__}: {error}") from error


def watch_step(env: WorldModelEnv, policy: Any, original: Any) -> Watch:
    """Everything that one step of ``policy`` and ``env`` can depend on."""
    # Where starts come from is asked anew at each rollout, as is what torchrl's own cache holds.
    opaque = [env.initial_state, env._cache, env.__dict__.get("_plans")]
    libraries = ("fastwm", "torchrl")
    if all(type(o).__module__.partition(".")[0] in libraries for o in (env, env._world_model)):
        # Its encoder and decoder; the step is in env.world_model. That of a class of the user's may refer
        # back to the whole: be a bound method of it, or the very same object.
        opaque.append(env._world_model)
    return Watch([env, policy, original], [o for o in opaque if o is not None])


def _kept(read: list[torch.Tensor], watch: Watch) -> list[tuple[Location, torch.Tensor]]:
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


def _refuse_modules(watch: Watch) -> None:
    if watch.unwatchable:
        raise Untraceable(
            f"the policy or the model holds a {watch.unwatchable[0]}, whose state is hidden"
        )
    for module in watch.modules:
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


def _trace_twice(
    env: WorldModelEnv, policy: Any, feed: Feed | None, start: TensorDictBase, watch: Watch
) -> tuple[TracedStep, list[Results]]:
    first, td, state, read = _trace_once(env, policy, feed, start, watch)
    second, td2, _, _ = _trace_once(env, policy, feed, state, watch)
    if set(leaves(td)) != set(leaves(td2)):
        odd = set(leaves(td)) ^ set(leaves(td2))
        raise Untraceable(f"the keys {sorted(odd)} are not there at every step")
    start_leaves, state_leaves = leaves(start), leaves(state)
    for path, value in start_leaves.items():
        later = state_leaves.get(path)
        if later is None:
            raise Untraceable(f"the start's {path} is gone after the first step")
        if (later.shape, later.dtype, later.device) != (value.shape, value.dtype, value.device):
            raise Untraceable(
                f"{path} is {value.dtype}{list(value.shape)} at the start and "
                f"{later.dtype}{list(later.shape)} after a step"
            )
    names = set(first.inputs)
    if first.signature() != _only(second, names).signature():
        raise Untraceable("the first step and the second compute different things")

    carried = tuple(
        path for path in start_leaves if first.outputs["state", path] != first.inputs[path]
    )
    results = {("td", path): value for path, value in leaves(td).items()}
    first.outputs = {
        key: v for key, v in first.outputs.items() if key[0] == "td" or key[1] in carried
    }
    first.prune()
    flags = _stop_flags(env)
    sources = []
    for constant, tensor in first.constants:
        held = constant.index in first.fresh
        sources.append(tensor if held else watch.tensors[id(tensor)])
    step = TracedStep(
        graph=first,
        carried=carried,
        fed=tuple(k for k in first.inputs if k[0] == "feed"),
        flags=tuple(("td", path) for path in flags),
        template=Template.of(td),
        watch=watch,
        sources=sources,
        read=_kept(read, watch),
        dim=len(start.batch_size),
    )
    # Both steps were traced from the same generator state, so a second draw is not the loop's second.
    following = {("td", path): value for path, value in leaves(td2).items()}
    return step, [results] if first.draws else [results, following]


def _trace_once(
    env: WorldModelEnv, policy: Any, feed: Feed | None, start: TensorDictBase, watch: Watch
) -> tuple[StepGraph, TensorDictBase, TensorDictBase, list[torch.Tensor]]:
    structure = start.copy()
    # Own leaves, cut from whatever graph the caller's start hangs on.
    inputs: dict[Any, torch.Tensor] = {
        path: value.detach().requires_grad_(value.requires_grad)
        for path, value in leaves(start).items()
    }
    if feed is not None:
        for path, value in zip(feed.paths, feed.template, strict=True):
            inputs["feed", path] = value.detach().requires_grad_(value.requires_grad)
    kept: dict[str, TensorDictBase] = {}

    def step(values: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        td = structure
        for path, value in values.items():
            if path[0] != "feed":
                td.set(path, value)
        if feed is None:
            td.update(policy(td))
        else:
            for path in feed.paths:
                td.set(path, values["feed", path])
        td = env.step(td)
        state = env._step_mdp(td)
        kept["td"], kept["state"] = td, state
        return {
            **{("td", path): value for path, value in leaves(td).items()},
            **{("state", path): value for path, value in leaves(state).items()},
        }

    with preserved_random_state(env.device):
        graph, _, read = trace(step, inputs, watch.holds, watch.generators)
    return graph, kept["td"], kept["state"], read


def _only(graph: StepGraph, names: set[Any]) -> StepGraph:
    """The graph as seen from the first step's inputs: entries that only later steps have go unused."""
    used = {v.index for op in graph.ops for v in op.inputs()}
    used |= {v.index for key, v in graph.outputs.items() if key[0] == "td"}
    for name, value in graph.inputs.items():
        if name not in names and value.index in used:
            raise Untraceable(f"the step reads {name}, which is not there at the first step")
    return StepGraph(
        {k: v for k, v in graph.inputs.items() if k in names}, graph.constants, graph.ops,
        graph.outputs, graph.checks, graph.storage, graph.metas, graph.fresh,
    )  # fmt: skip


def _stop_flags(env: WorldModelEnv) -> list[Path]:
    """The flags that end a rollout: those of the outermost done group, as torchrl reads them."""
    keys = [k if isinstance(k, tuple) else (k,) for k in env.full_done_spec.keys(True, True)]
    # "The done signals in a root td prevail over done in the leaves."
    prefixes = {k[:-1] for k in keys}
    outer = [
        k for k in keys
        if not any(len(p) < len(k) - 1 and k[: len(p)] == p for p in prefixes)
    ]  # fmt: skip
    return [("next", *k) for k in outer]
