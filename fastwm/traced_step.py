"""The env's step, traced: from a start and a policy to a graph that any engine can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase

from fastwm.assemble import Template, leaves
from fastwm.guarded_trace import kept_reads, sources_of, traced_under, watched
from fastwm.request import Feed
from fastwm.step_graph import StepGraph
from fastwm.tracing import Untraceable, preserved_random_state, trace
from fastwm.watch import Location, Watch

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["TracedStep", "trace_step", "watch_step"]

Path = tuple[str, ...]
Results = dict[Any, torch.Tensor]  # a step's tensordict, as ("td", path) -> tensor


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
    env: FastEnv, policy: Any, feed: Feed | None, start: TensorDictBase, original: Any
) -> tuple[TracedStep, list[Results]]:
    """Trace ``policy`` then ``env.step``, twice: a first step and one that follows it must be the same.

    Returns:
        The traced step; and what it computed from ``start`` and, unless it draws, from what follows.

    Raises:
        NotCapturable: with the one thing that rules it out.
    """
    if feed is not None:
        policy = original = None
    watch = watched(lambda: watch_step(env, policy, original))
    return traced_under(watch, lambda: _trace_twice(env, policy, feed, start, watch))


def watch_step(env: FastEnv, policy: Any, original: Any) -> Watch:
    """Everything that one step of ``policy`` and ``env`` can depend on."""
    opaque = env.unwatched()
    return Watch([env, policy, original], [o for o in opaque if o is not None])


def _trace_twice(
    env: FastEnv, policy: Any, feed: Feed | None, start: TensorDictBase, watch: Watch
) -> tuple[TracedStep, list[Results]]:
    first, td, state, read = _trace_once(env, policy, feed, start, watch)
    second, td2, _, _ = _trace_once(env, policy, feed, state, watch)
    if set(leaves(td)) != set(leaves(td2)):
        odd = set(leaves(td)) ^ set(leaves(td2))
        raise Untraceable(f"the keys {sorted(odd)} are not there at every step")
    _drop_preset(first)
    state_leaves = leaves(state)
    start_leaves = {path: value for path, value in leaves(start).items() if path[0] != "next"}
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
    step = TracedStep(
        graph=first,
        carried=carried,
        fed=tuple(k for k in first.inputs if k[0] == "feed"),
        flags=tuple(("td", path) for path in flags),
        template=Template.of(td),
        watch=watch,
        sources=sources_of(first, watch),
        read=kept_reads(read, watch),
        dim=len(start.batch_size),
    )
    # Both steps were traced from the same generator state, so a second draw is not the loop's second.
    following = {("td", path): value for path, value in leaves(td2).items()}
    return step, [results] if first.draws else [results, following]


def _trace_once(
    env: FastEnv, policy: Any, feed: Feed | None, start: TensorDictBase, watch: Watch
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


def _drop_preset(graph: StepGraph) -> None:
    """Take what the start holds under ``"next"`` from the inputs; the first step must not need it."""
    used = {v.index for op in graph.ops for v in op.inputs()}
    used |= {v.index for v in graph.outputs.values()}
    for name, value in graph.inputs.items():
        if name[0] == "next" and value.index in used:
            raise Untraceable(f"the first step takes {name} from the start")
    graph.inputs = {name: v for name, v in graph.inputs.items() if name[0] != "next"}


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


def _stop_flags(env: FastEnv) -> list[Path]:
    """The flags that end a rollout: those of the outermost done group, as torchrl reads them."""
    keys = [k if isinstance(k, tuple) else (k,) for k in env.full_done_spec.keys(True, True)]
    # "The done signals in a root td prevail over done in the leaves."
    prefixes = {k[:-1] for k in keys}
    outer = [
        k for k in keys
        if not any(len(p) < len(k) - 1 and k[: len(p)] == p for p in prefixes)
    ]  # fmt: skip
    return [("next", *k) for k in outer]
