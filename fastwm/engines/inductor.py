"""Inductor for the body of the step: compiled once, looped over any horizon from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fastwm.step_graph import Op, Value, map_values

__all__ = ["body_module", "inductor"]


def body_module(
    ops: list[Op], arguments: list[int], results: list[int], canonical: Callable[[Value], int]
) -> GraphModule:
    """The ops as an FX module ``(*arguments) -> results``; values go by number."""
    graph = Graph()
    nodes: dict[int, Any] = {i: graph.placeholder(f"v{i}") for i in arguments}

    def node(value: Value) -> Any:
        return nodes[canonical(value)]

    for op in ops:
        args, kwargs = map_values((op.args, op.kwargs), node)
        out = graph.call_function(_callable(op.target), args, kwargs)
        if op.detached and op.single:
            out = graph.call_function(torch.ops.aten.detach.default, (out,))
        if op.single:
            if op.outputs[0] is not None:
                nodes.setdefault(op.outputs[0].index, out)
            continue
        for position, value in enumerate(op.outputs):
            if value is not None:
                nodes[value.index] = graph.call_function(_item, (out, position))
    graph.output(tuple(nodes[i] for i in results))
    return GraphModule(torch.nn.Module(), graph)


def _callable(target: Any) -> Callable[..., Any]:
    """A function of ours for a custom ``autograd.Function``, whose ``apply`` FX cannot name."""
    if isinstance(target, torch._ops.OpOverload):
        return target
    cls = target.__self__

    def apply(*args: Any) -> Any:
        return cls.apply(*args)

    return apply


def _item(sequence: Any, position: int) -> Any:
    return sequence[position]


def inductor(**options: Any) -> Callable[..., Callable[..., Any]]:
    """A compiler for :func:`fastwm.engines.codegen.loop_source` that goes through ``torch.compile``.

    Args:
        options: keywords of ``torch.compile``. Random numbers come from torch's own kernels, so that a
            seed gives what it gives eagerly.
    """
    options = dict(options)
    extra = {"fallback_random": True, **options.pop("options", {})}

    def compiler(
        ops: list[Op], arguments: list[int], results: list[int], canonical: Callable
    ) -> Any:
        module = body_module(ops, arguments, results, canonical)
        if "mode" in options:  # torch.compile takes mode or options, not both
            torch._inductor.config.fallback_random = True
            return torch.compile(module, **options)
        return torch.compile(module, options=extra, **options)

    return compiler
