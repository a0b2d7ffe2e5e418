"""Layers that several suites share, each beside its JAX twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor, TanhNormal

from fastwm.models.layers import GaussianHead

__all__ = [
    "jax_gru", "jax_mlp", "jax_norm", "jax_softplus_actor",
    "jax_two_hot", "softplus_scale", "tanh_normal", "tanh_normal_policy",
]  # fmt: skip


def jax_mlp(
    weights: Mapping[str, Any],
    prefix: str,
    x: Any,
    layers: int,
    activation: Callable[[Any], Any],
    *,
    norm: bool = False,
) -> Any:
    """`mlp` of so many linear layers."""
    stride = 3 if norm else 2
    for i in range(layers):
        at = stride * i
        x = x @ weights[f"{prefix}.{at}.weight"] + weights[f"{prefix}.{at}.bias"]
        if i == layers - 1:
            break
        x = activation(jax_norm(weights, f"{prefix}.{at + 1}", x) if norm else x)
    return x


def jax_norm(weights: Mapping[str, Any], prefix: str, x: Any) -> Any:
    """`nn.LayerNorm`."""
    import jax

    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + 1e-5)
    return normed * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def jax_gru(weights: Mapping[str, Any], prefix: str, x: Any, hidden: Any) -> Any:
    """`nn.GRUCell`."""
    import jax
    import jax.numpy as jnp

    of_x = x @ weights[f"{prefix}.weight_ih"] + weights[f"{prefix}.bias_ih"]
    of_h = hidden @ weights[f"{prefix}.weight_hh"] + weights[f"{prefix}.bias_hh"]
    (xr, xz, xn), (hr, hz, hn) = jnp.split(of_x, 3, -1), jnp.split(of_h, 3, -1)
    reset, update = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    new = jnp.tanh(xn + reset * hn)
    return new + update * (hidden - new)


def tanh_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """What `TanhNormal` draws, without the clamp that it has beyond 7 standard units."""
    return torch.tanh(loc + scale * torch.randn_like(loc))


def tanh_normal_policy(actor: GaussianHead, keys: Sequence[str]) -> TensorDictModuleBase:
    """The usual sampling actor of torchrl; a rollout then also holds loc and scale."""
    return ProbabilisticActor(
        TensorDictModule(actor, in_keys=list(keys), out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=TanhNormal,
        default_interaction_type="random",
    )


def softplus_scale(raw: Tensor) -> Tensor:
    """At least 0.1, as Dreamer has it."""
    return nn.functional.softplus(raw) + 0.1


def jax_softplus_actor(raw: Any, noise: Any) -> Any:
    """The action out of what the net of a `GaussianHead` with `softplus_scale` says."""
    import jax
    import jax.numpy as jnp

    loc, scale = jnp.split(raw, 2, -1)
    return jnp.tanh(loc + (jax.nn.softplus(scale) + 0.1) * noise)


BINS, LOW, HIGH = 101, -10.0, 10.0


def jax_two_hot(logits: Any) -> Any:
    """`TwoHot`."""
    import jax
    import jax.numpy as jnp

    bins = jnp.asarray(torch.linspace(LOW, HIGH, BINS).numpy())
    x = (jax.nn.softmax(logits, -1) * bins).sum(-1, keepdims=True)
    return jnp.sign(x) * (jnp.exp(jnp.abs(x)) - 1)
