"""Specs of an imagined env, derived from a reference env and from what the step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

__all__ = ["StepKeys", "has_lazy", "next_key", "probe_encoder", "rebatch", "step_keys", "unbounded"]


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
    written = {unravel_key(k) for k in step_module.out_keys}
    actions = {unravel_key(k) for k in action_keys}
    carried, context = [], []
    for key in map(unravel_key, step_module.in_keys):
        if next_key(key) in written:
            carried.append(key)
        elif key not in actions and not (isinstance(key, tuple) and key[0] == "next"):
            context.append(key)
    return StepKeys(tuple(carried), tuple(context))


def rebatch(spec: TensorSpec, batch_dims: int, batch_size: torch.Size) -> TensorSpec:
    """Replace the leading ``batch_dims`` of a spec by ``batch_size``; trailing dims stay.

    A batch that is the spec's own stays as it is, also when it is empty or its rows differ in bounds.
    """
    if spec.shape[:batch_dims] == batch_size and batch_dims == len(batch_size):
        return spec.clone()
    if batch_dims:
        spec = spec[(0,) * batch_dims]
    return spec.expand(torch.Size([*batch_size, *spec.shape])).clone()


def unbounded(value: torch.Tensor, batch_dims: int, batch_size: torch.Size, device) -> Unbounded:
    """The spec of a latent whose one known value is ``value``, ``[*any batch, *event]``."""
    shape = torch.Size([*batch_size, *value.shape[batch_dims:]])
    return Unbounded(shape=shape, dtype=value.dtype, device=device)


def has_lazy(module: object) -> bool:
    """Whether some parameter or buffer still waits for its shape."""
    return isinstance(module, torch.nn.Module) and any(
        is_lazy(p) for p in [*module.parameters(), *module.buffers()]
    )


def probe_encoder(world_model: object, base_env: EnvBase, device) -> TensorDictBase | None:
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


def with_leaf(spec: Composite, key: NestedKey, leaf: TensorSpec) -> None:
    """Set a possibly nested leaf, creating the composites on the way."""
    if isinstance(key, tuple) and len(key) > 1:
        if key[0] not in spec.keys():
            spec[key[0]] = Composite(shape=spec.shape, device=spec.device)
        with_leaf(spec[key[0]], key[1] if len(key) == 2 else key[1:], leaf)
    else:
        spec[key if isinstance(key, str) else key[0]] = leaf
