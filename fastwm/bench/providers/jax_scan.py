"""JAX: `jit` of `lax.scan` over the same step with the same weights.

Its stacked outputs stay in scan's own layout, time first, and its matrices in the layout that it
multiplies
without a transpose: what a JAX program would do. The parity check transposes, outside the clock.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwm.bench.models import OUTPUTS
from fastwm.bench.problem import Problem
from fastwm.bench.providers.base import Built, Unavailable

__all__ = ["build"]


def build(problem: Problem) -> Built:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Unavailable(f"jax is not installed ({error})") from None
    step = problem.suite.jax_step
    if step is None:
        raise Unavailable(f"suite {problem.suite.name!r} has no JAX step")
    platform = "gpu" if problem.device.type == "cuda" else "cpu"
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        raise Unavailable(f"jax has no {platform} here ({error})") from None

    def put(tensor: Tensor) -> Any:
        # A copy: jax may otherwise alias memory that torch owns.
        return jax.device_put(jnp.array(tensor.detach().cpu().numpy(), copy=True), device)

    weights = {n: put(p.t() if p.ndim == 2 else p) for n, p in problem.model.named_parameters()}
    start = put(problem.start)
    cotangents = [put(problem.cotangents[k].transpose(0, 1)) for k in problem.cotangents]

    def rollout(weights: Any, start: Any) -> tuple[Any, Any]:
        def body(latent: Any, _: None) -> tuple[Any, tuple[Any, ...]]:
            action, following, reward = step(weights, latent)
            return following, (latent, action, following, reward)

        _, (latent, action, following, reward) = jax.lax.scan(
            body, start, None, length=problem.horizon
        )
        # The pair that gets cotangents, then the rest.
        return (following, reward), (latent, action)

    def forward(weights: Any, start: Any) -> tuple[Any, ...]:
        (following, reward), (latent, action) = rollout(weights, start)
        return latent, action, following, reward

    def forward_and_backward(weights: Any, start: Any, cotangents: Any) -> tuple[Any, ...]:
        heads, pull, (latent, action) = jax.vjp(rollout, weights, start, has_aux=True)
        return latent, action, *heads, *pull(cotangents)

    if problem.backward:
        compiled: Any = jax.jit(forward_and_backward)
        arguments: tuple[Any, ...] = (weights, start, tuple(cotangents))
    else:
        compiled, arguments = jax.jit(forward), (weights, start)

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(jax.device_get(array).copy()).to(problem.device)

    def read(raw: Any) -> dict[str, Tensor]:
        named = {
            k: tensor(v).transpose(0, 1) for k, v in zip(OUTPUTS, raw[: len(OUTPUTS)], strict=True)
        }
        if problem.backward:
            of_weights, of_start = raw[len(OUTPUTS) :]
            for name, value in of_weights.items():
                named[f"grad/{name}"] = tensor(value).t() if value.ndim == 2 else tensor(value)
            named["grad/start"] = tensor(of_start)
        return named

    return Built(run, read)
