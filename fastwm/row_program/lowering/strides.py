"""How eager's tensors lie in memory: noise drawn "like" a tensor is drawn in the order of its memory."""

from __future__ import annotations

from typing import Any

import torch

from fastwm.step_graph import StepGraph, Value, map_values

__all__ = ["row_major", "strides_of"]


def strides_of(graph: StepGraph) -> dict[int, tuple[int, ...] | None]:
    """Strides of every value, for contiguous inputs; None where torch cannot tell without data."""
    values: dict[int, torch.Tensor | None] = {}
    for v in graph.inputs.values():
        meta = graph.metas[v.index]
        values[v.index] = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
    for v, tensor in graph.constants:
        values[v.index] = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    def stand_in(tree: Any) -> Any:
        def value(v: Value) -> Any:
            found = values.get(v.index)
            if found is None:
                raise NotImplementedError
            return found

        tree = map_values(tree, value)
        if isinstance(tree, tuple):
            return tuple(torch.device("meta") if isinstance(i, torch.device) else i for i in tree)
        return tree

    for op in graph.ops:
        try:
            kwargs = {k: stand_in((v,))[0] for k, v in op.kwargs.items() if k != "generator"}
            args = stand_in(tuple(None if isinstance(a, torch.Generator) else a for a in op.args))
            with torch.no_grad():
                found = op.target(*args, **kwargs)
        except Exception:
            found = [None] * len(op.outputs)
        found = found if isinstance(found, (tuple, list)) else [found]
        for result, tensor in zip(op.outputs, found, strict=False):
            if result is not None:
                values[result.index] = tensor if isinstance(tensor, torch.Tensor) else None
    return {i: None if t is None else t.stride() for i, t in values.items()}


def row_major(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> bool:
    """Whether going through memory is going through the entries in order."""
    if stride is None:
        return False
    real = [s for n, s in zip(shape, stride, strict=True) if n > 1]
    return all(s > 0 for s in real) and real == sorted(real, reverse=True)
