"""What a backward program takes, by hand; the fused engine has a plan for it, worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastwm.row_program.gradient import Gradient


def gather(
    gradient: Gradient,
    inputs: Mapping[Any, torch.Tensor],
    outputs: Mapping[Any, torch.Tensor],
    output_grads: Mapping[Any, torch.Tensor],
    final_grads: Mapping[Any, torch.Tensor] | None = None,
) -> dict[Any, torch.Tensor]:
    """The backward program's inputs, from a forward run's inputs and outputs and the gradients."""
    found: dict[Any, torch.Tensor] = {}
    given = gradient.forward.inputs
    rows = next((len(inputs[n]) for n, i in given.items() if i.role != "uniform"), 1)
    for name, item in gradient.backward.inputs.items():
        if name in gradient.saved:
            source = gradient.saved[name]
            found[name] = (inputs if source.kind == "input" else outputs)[source.name]
        elif item.role in ("context", "uniform"):
            found[name] = inputs[name]
        elif item.role == "step":
            found[name] = output_grads[name[1]]
        else:
            start = (final_grads or {}).get(name[1])
            shape = gradient.backward.type(item.val).shape
            zero = torch.zeros(rows, *shape, dtype=gradient.backward.dtype)
            found[name] = zero if start is None else start
    return found
