"""Specs of an imagined env, derived from a reference env and from what the step reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

__all__ = [
    "StepKeys",
    "has_lazy",
    "nested_groups",
    "next_key",
    "probe_encoder",
    "rebatch",
    "step_keys",
    "unbounded",
]


@dataclass(frozen=True)
class StepKeys:
    """What a step module does with its keys.

    Attributes:
        carried: read at the root and written under ``"next"``: the recurrent latents.
        context: read at the root, never written under ``"next"``, not an action: constant inputs.
    """

    carried: tuple[NestedKey, ...]
    context: tuple[NestedKey, ...]

    @property
    def required(self) -> tuple[NestedKey, ...]:
        return self.carried + self.context


def next_key(key: NestedKey) -> tuple[str, ...]:
    """``"latent" -> ("next", "latent")``."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def step_keys(step_module: torch.nn.Module, action_keys: list[NestedKey]) -> StepKeys:
    """Split the keys that a step reads into carried latents and constant context."""
    written = {unravel_key(k) for k in cast(list[NestedKey], step_module.out_keys)}
    actions = {unravel_key(k) for k in action_keys}
    carried, context = [], []
    for key in map(unravel_key, cast(list[NestedKey], step_module.in_keys)):
        if next_key(key) in written:
            carried.append(key)
        elif key not in actions and not (isinstance(key, tuple) and key[0] == "next"):
            context.append(key)
    return StepKeys(tuple(carried), tuple(context))


def rebatch(spec: TensorSpec, batch_dims: int, batch_size: torch.Size) -> TensorSpec:
    """Replace the leading ``batch_dims`` of a spec by ``batch_size``; trailing dims stay.

    A batch that is the spec's own stays as it is, even if it is empty or its rows differ.
    """
    if spec.shape[:batch_dims] == batch_size and batch_dims == len(batch_size):
        return spec.clone()
    if batch_dims:
        spec = spec[(0,) * batch_dims]
    return spec.expand(torch.Size([*batch_size, *spec.shape])).clone()


def unbounded(
    value: torch.Tensor, batch_dims: int, batch_size: torch.Size, device: torch.device | None
) -> Unbounded:
    """The spec of a latent whose one known value is ``value``, ``[*any batch, *event]``."""
    shape = torch.Size([*batch_size, *value.shape[batch_dims:]])
    return Unbounded(shape=shape, dtype=value.dtype, device=device)


def has_lazy(module: object) -> bool:
    """Whether some parameter or buffer still waits for its shape."""
    return isinstance(module, torch.nn.Module) and any(
        is_lazy(p) for p in [*module.parameters(), *module.buffers()]
    )


def probe_encoder(
    world_model: object, base_env: EnvBase, device: torch.device | None
) -> TensorDictBase | None:
    """Shapes of what ``world_model.encode`` writes, on fake tensors: nothing real is computed.

    Returns None where that cannot be known: no ``encode``, lazy parameters (a probe would be the
    one to initialise them), or an encoder that needs more than an observation.
    """
    encode = getattr(world_model, "encode", None)
    if encode is None:
        return None
    if has_lazy(world_model):
        return None
    try:
        observation = rebatch(base_env.full_observation_spec, base_env.batch_dims, torch.Size([]))
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            values = {
                key: torch.zeros((1, *leaf.shape), dtype=leaf.dtype, device=device)
                for key, leaf in observation.items(True, True)
            }
            return encode(TensorDict(values, batch_size=[1], device=device))
    except Exception:  # any failure only means that the shape has to come from data
        return None


def nested_groups(batch_dims: int, *specs: Composite) -> dict[NestedKey, torch.Size]:
    """Groups with batch dims beyond the specs' own, ``agents: [*batch, N]`` as ``{"agents": [N]}``.

    Outer groups come before those inside them.
    """
    found = {
        unravel_key(path): group.shape[batch_dims:]
        for spec in specs
        for path, group in spec.items(True, False)
        if isinstance(group, Composite) and len(group.shape) > batch_dims
    }
    outer_first = sorted(found, key=lambda path: 1 if isinstance(path, str) else len(path))
    return {path: found[path] for path in outer_first}


def with_leaf(
    spec: Composite, key: NestedKey, leaf: TensorSpec, groups: Mapping[NestedKey, torch.Size]
) -> None:
    """Set a possibly nested leaf; composites on the way are made in the shapes of ``groups``."""
    path = (key,) if isinstance(key, str) else key
    batch = spec.shape
    for depth in range(1, len(path)):
        name = path[depth - 1]
        if name not in spec:
            shape = torch.Size([*batch, *groups.get(unravel_key(path[:depth]), ())])
            # A leaf without the group's extra dims keeps the group to the dims it has.
            shape = shape if leaf.shape[: len(shape)] == shape else spec.shape
            spec[name] = Composite(shape=shape, device=spec.device)
        spec = spec[name]
    spec[path[-1]] = leaf
