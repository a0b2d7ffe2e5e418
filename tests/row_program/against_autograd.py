"""Hold the backward program of a row program against autograd through the reference interpreter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastwm.row_program import Program
from fastwm.row_program.gradient import Gradient, differentiate
from fastwm.row_program.reference import interpret
from tests.row_program.backward_inputs import gather


def check(
    program: Program,
    inputs: Mapping[Any, torch.Tensor],
    steps: int,
    *,
    wrt: Collection[Any],
    output_grads: Collection[Any],
    final_grads: Collection[Any] = (),
    carry_outputs: Mapping[Any, Any] | None = None,
    budget: float | None = None,
    rtol: float = 1e-9,
) -> Gradient:
    """Differentiate, run both passes in float64, and compare every gradient with autograd's."""
    program = replace(program, dtype=torch.float64)
    gradient = differentiate(
        program,
        wrt,
        output_grads,
        final_grads=final_grads,
        carry_outputs=carry_outputs,
        budget=budget,
    )
    inputs = {n: t.double() for n, t in inputs.items()}
    leaves = {n: t.clone().requires_grad_(n in wrt) for n, t in inputs.items()}
    with_finals = replace(program, finals=list(final_grads))
    result = interpret(with_finals, leaves, steps)
    generator = torch.Generator().manual_seed(1)
    given = {n: _like(result.outputs[n], generator) for n in output_grads}
    given_finals = {n: _like(result.finals[n], generator) for n in final_grads}
    total = sum(
        (result.outputs[n] * g).sum() for n, g in given.items()
    ) + sum((result.finals[n] * g).sum() for n, g in given_finals.items())  # fmt: skip
    expected = dict.fromkeys(wrt)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        wanted = [leaves[n] for n in wrt]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        expected = dict(zip(wrt, found, strict=True))

    with torch.no_grad():
        forward = interpret(gradient.forward, inputs, steps)
        for name in program.outputs:
            torch.testing.assert_close(forward.outputs[name], result.outputs[name].detach())
        backward = interpret(
            gradient.backward,
            gather(gradient, inputs, forward.outputs, given, given_finals),
            steps,
            reverse=True,
        )
    for name in wrt:
        role = program.inputs[name].role
        want = expected[name]
        want = torch.zeros_like(inputs[name]) if want is None else want
        if name not in gradient.reached:
            assert not want.any(), f"{name} was taken for unreached"
            continue
        if role == "uniform":
            got = backward.sums["grad", name]
        elif role == "step":
            got = backward.outputs["grad", name]
        else:
            got = backward.finals["adjoint", name]
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023
    return gradient


def _like(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(t.shape, generator=generator, dtype=t.dtype)
