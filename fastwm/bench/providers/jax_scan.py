"""JAX: `jit` of `lax.scan` over the same step with the same weights.

Its stacked outputs stay in scan's own layout, time first, and its matrices in the layout that it
multiplies without a transpose: what a JAX program would do. The parity check transposes, outside the
clock.

Where a suite draws numbers, torch's cannot come out of `jax.random`. So the program is built twice
from one function: with torch's noise given, for the parity check, and with each step's noise drawn
inside from `jax.random`, as a JAX program would, which is what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastwm.bench.problem import Problem
from fastwm.bench.providers.base import Built, Unavailable
from fastwm.bench.suites.noise import SEED

__all__ = ["build"]


def _program(problem: Problem, own_noise: bool) -> Callable[..., tuple[Any, ...]]:
    """The jitted rollout, ``(weights, start, noise[, cotangents]) -> outputs[, gradients]``.

    Args:
        own_noise: ``noise`` is one key per step, and the numbers are drawn from it.
    """
    import jax

    suite, batch = problem.suite, problem.batch
    step, drawn = suite.jax_step, suite.jax_draws
    assert step is not None
    count = len(suite.carry)

    def rollout(weights: Any, start: Any, noise: Any) -> tuple[Any, Any]:
        def body(carry: Any, given: Any) -> tuple[Any, tuple[Any, ...]]:
            if own_noise:
                assert drawn is not None
                given = drawn(given, batch)
            action, *following, reward = step(weights, carry, given)
            return tuple(following), (*carry, action, *following, reward)

        _, outputs = jax.lax.scan(body, start, noise, length=problem.horizon)
        # What gets cotangents, the next carry and the reward, then the rest.
        return outputs[count + 1 :], outputs[: count + 1]

    def forward(weights: Any, start: Any, noise: Any) -> tuple[Any, ...]:
        following, before = rollout(weights, start, noise)
        return *before, *following

    def forward_and_backward(
        weights: Any, start: Any, noise: Any, cotangents: Any
    ) -> tuple[Any, ...]:
        def of_leaves(weights: Any, start: Any) -> tuple[Any, Any]:
            return rollout(weights, start, noise)

        heads, pull, before = jax.vjp(of_leaves, weights, start, has_aux=True)
        return *before, *heads, *pull(cotangents)

    return jax.jit(forward_and_backward if problem.backward else forward)


def build(problem: Problem) -> Built:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Unavailable(f"jax is not installed ({error})") from None
    suite = problem.suite
    if suite.jax_step is None:
        raise Unavailable(f"suite {suite.name!r} has no JAX step")
    platform = "gpu" if problem.device.type == "cuda" else "cpu"
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        raise Unavailable(f"jax has no {platform} here ({error})") from None

    def put(tensor: Tensor) -> Any:
        # A copy: jax may otherwise alias memory that torch owns.
        return jax.device_put(jnp.array(tensor.detach().cpu().numpy(), copy=True), device)

    weights = {n: put(p.t() if p.ndim == 2 else p) for n, p in problem.model.named_parameters()}
    start = tuple(put(value) for value in problem.start.values())
    cotangents = tuple(put(value.transpose(0, 1)) for value in problem.cotangents.values())
    last = (cotangents,) if problem.backward else ()

    def runner(noise: Any, own_noise: bool) -> Callable[[], Any]:
        compiled = _program(problem, own_noise)
        return lambda: jax.block_until_ready(compiled(weights, start, noise, *last))

    check = runner(tuple(put(value) for value in problem.noise()), False)
    if suite.jax_draws is None:
        run = check
    else:
        keys = jax.device_put(jax.random.split(jax.random.key(SEED), problem.horizon), device)
        run = runner(keys, True)

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(array).copy()).to(problem.device)

    def read(raw: Any) -> dict[str, Tensor]:
        count = len(suite.outputs)
        named = {
            k: tensor(v).transpose(0, 1) for k, v in zip(suite.outputs, raw[:count], strict=True)
        }
        if problem.backward:
            of_weights, of_start = raw[count:]
            for name, value in of_weights.items():
                named[f"grad/{name}"] = tensor(value).t() if value.ndim == 2 else tensor(value)
            for name, value in zip(problem.start, of_start, strict=True):
                named[f"grad/start.{name}"] = tensor(value)
        return named

    return Built(run, read, check)
