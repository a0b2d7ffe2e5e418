"""The env in which TD-MPC2's losses roll their latents out."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrl.data import Binary, Composite, Unbounded

from fastwm.env import WorldModelEnv
from fastwm.specs_env import SpecsEnv

__all__ = ["HeadsStep", "training_env"]


class HeadsStep(TensorDictModuleBase):
    """A step of the latent, and what each head says of it as it is: logits, under ``"next"``.

    Args:
        parts: run one after the other, dynamics first.
        latent: key of the latent, without ``"next"``.
        heads: by the names under which they come out, keys that the parts write.
    """

    def __init__(
        self, parts: list[TensorDictModuleBase], latent: NestedKey, heads: Mapping[str, NestedKey]
    ) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.kept = [unravel_key(("next", latent))]
        self.heads = {name: unravel_key(key) for name, key in heads.items()}
        written: set[NestedKey] = set()
        reads: list[NestedKey] = []
        for part in parts:
            reads += [unravel_key(key) for key in part.in_keys if unravel_key(key) not in written]
            written |= {unravel_key(key) for key in part.out_keys}
        self.in_keys = list(dict.fromkeys(reads))
        self.out_keys = [*self.kept, *(("next", name) for name in self.heads)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        seen = tensordict.copy()
        for part in self.parts:
            seen = part(seen)
        out = TensorDict({}, batch_size=tensordict.batch_size, device=tensordict.device)
        for key in self.kept:
            out.set(key, seen.get(key))
        for name, key in self.heads.items():
            out.set(("next", name), seen.get(key))
        return out


def training_env(
    step: HeadsStep,
    start: TensorDictBase,
    action_key: NestedKey,
    action: torch.Tensor,
    backend: str,
) -> WorldModelEnv:
    """``step`` as an env of batch ``[]`` whose rewards are the heads' logits.

    Args:
        step: see :class:`HeadsStep`.
        start: a batch ``[B]`` of what the step reads, the action aside; only shapes, dtypes and the
            device are looked at, as of ``action``, ``[B, A]``.
        action_key: the action's.
        action: see ``start``.
        backend: of the env.
    """
    device = action.device
    read = [key for key in step.in_keys if key != action_key]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        probe = TensorDict({}, batch_size=[1], device=device)
        for key, value in [*((key, start.get(key)) for key in read), (action_key, action)]:
            probe.set(key, torch.zeros((1, *value.shape[1:]), dtype=value.dtype, device=device))
        out = step(probe)
        heads = {name: out.get(("next", name)) for name in step.heads}
        state = {key: probe.get(key) for key in read}
    base = _Specs(_spec(state), _spec({action_key: action}), _spec(heads), device)
    model: Any = SimpleNamespace(step_module=step)  # there is no encoder
    return WorldModelEnv(
        model, base, batch_size=[], device=device, latent_key=step.kept[0][1:], backend=backend
    )


def _spec(values: dict[Any, torch.Tensor]) -> Composite:
    spec = Composite()
    for key, value in values.items():
        spec[key] = Unbounded(value.shape[1:], dtype=value.dtype)
    return spec


class _Specs(SpecsEnv):
    """Specs alone."""

    def __init__(
        self, observation: Composite, action: Composite, reward: Composite, device: torch.device
    ) -> None:
        super().__init__(device=device)
        self.observation_spec = observation.to(device)
        self.full_action_spec = action.to(device)
        self.full_reward_spec = reward.to(device)
        self.full_done_spec = Composite(done=Binary(shape=(1,), dtype=torch.bool)).to(device)
