"""What :class:`fastwm.models.RSSMRollout` makes of a batch of sequences: the parts of its internal env.

All that a step is given goes side by side into one tensor, which is the "action" of the env.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded

from fastwm.specs_env import SpecsEnv

__all__ = ["Sequence", "SequenceModel", "SequenceSpecs", "SequenceStep", "cleared"]

# The action of the internal env.
ROW = "rssm_row"


@dataclass
class Sequence:
    """What a batch ``[*B, T]`` holds for the rollout.

    Attributes:
        batch: ``[*B, T]``.
        start: the latents to begin with, ``[*B, *event]``.
        given: what is given to each step, ``[*B, T, *event]``.
        missing: what the modules read and the batch lacks.
        reset: ``[*B, T]``, or None.
        action: the key in ``given`` that a reset clears.
    """

    batch: torch.Size
    start: dict[NestedKey, Tensor]
    given: dict[NestedKey, Tensor]
    missing: list[NestedKey]
    reset: Tensor | None
    action: NestedKey | None

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.start.values())).dtype

    @property
    def one_dtype(self) -> bool:
        """Whether what is given to a step goes into one tensor without loss."""
        latents = all(value.dtype is self.dtype for value in self.start.values())
        given = all(value.dtype in (self.dtype, torch.bool) for value in self.given.values())
        return self.dtype.is_floating_point and latents and given

    def kind(self) -> Any:
        """Equal for batches that one env can run."""
        events = [(key, value.shape[len(self.batch) - 1 :]) for key, value in self.start.items()]
        events += [(key, value.shape[len(self.batch) :]) for key, value in self.given.items()]
        return self.device, self.dtype, self.reset is None, tuple(events)

    def rows(self) -> Tensor:
        """All that is given to each step side by side, the reset flag last: ``[T, *B, n]``."""
        parts = [value.reshape(*self.batch, -1) for value in self.given.values()]
        if self.reset is not None:
            parts.append(self.reset.unsqueeze(-1))
        return torch.cat([part.to(self.dtype) for part in parts], -1).movedim(-2, 0)

    def row(self, latents: dict[NestedKey, Tensor], t: int) -> dict[NestedKey, Tensor]:
        """The inputs of one step that begins with ``latents``."""
        dim = len(self.batch) - 1
        given = {key: value.select(dim, t) for key, value in self.given.items()}
        return after_reset(
            latents, given, None if self.reset is None else self.reset.select(dim, t), self.action
        )

    def first_row(self) -> dict[NestedKey, Tensor]:
        """The same for one row alone, ``[1, *event]``."""
        dims = len(self.batch) - 1
        return {
            key: value.detach().reshape(-1, *value.shape[dims:])[:1]
            for key, value in self.row(self.start, 0).items()
        }


class SequenceStep(TensorDictModuleBase):
    """The step of the internal env: takes apart what it is given, then prior and posterior."""

    def __init__(
        self,
        rssm_prior: TensorDictModuleBase,
        rssm_posterior: TensorDictModuleBase,
        out_keys: list[NestedKey],
        sequence: Sequence,
    ) -> None:
        super().__init__()
        self.carried = list(sequence.start)
        self.in_keys = [*self.carried, ROW]
        self.out_keys = out_keys
        self.rssm_prior, self.rssm_posterior = rssm_prior, rssm_posterior
        dims = len(sequence.batch)
        self.events = {key: value.shape[dims:] for key, value in sequence.given.items()}
        self.resets = sequence.reset is not None
        self.action = sequence.action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        batch, row = tensordict.batch_size, tensordict.get(ROW)
        reset = row.select(-1, -1) > 0.5 if self.resets else None
        widths = [event.numel() for event in self.events.values()]
        parts = row[..., : sum(widths)].split(widths, -1)
        given = {
            key: part.reshape(*batch, *event)
            for part, (key, event) in zip(parts, self.events.items(), strict=True)
        }
        latents = {key: tensordict.get(key) for key in self.carried}
        inputs = after_reset(latents, given, reset, self.action)
        out = self.rssm_posterior(self.rssm_prior(TensorDict(inputs, batch)))
        for key in self.out_keys:
            tensordict.set(key, out.get(key))
        return tensordict


class SequenceModel(nn.Module):
    """The world model of the internal env."""

    def __init__(self, step_module: SequenceStep) -> None:
        super().__init__()
        self.step_module = step_module


class SequenceSpecs(SpecsEnv):
    """The specs of the internal env. It is never stepped.

    What a step writes besides the latents is a reward to it: under "next" at each step, and never
    carried.
    """

    def __init__(self, sequence: Sequence, written: dict[NestedKey, Tensor]) -> None:
        super().__init__(device=sequence.device, batch_size=[])
        dims = len(sequence.batch) - 1
        self.observation_spec = self._composite(
            {key: value.shape[dims:] for key, value in sequence.start.items()}, sequence.dtype
        )
        width = sequence.rows().shape[-1]
        self.action_spec = self._composite({ROW: torch.Size([width])}, sequence.dtype)
        self.reward_spec = Composite(
            {key: Unbounded(value.shape, dtype=value.dtype) for key, value in written.items()}
            or {"reward": Unbounded(1)}
        ).to(self.device)

    def _composite(self, shapes: dict[NestedKey, torch.Size], dtype: torch.dtype) -> Composite:
        spec = Composite(device=self.device)
        for key, shape in shapes.items():
            spec.set(key, Unbounded(shape, dtype=dtype, device=self.device))
        return spec


def after_reset(
    latents: dict[NestedKey, Tensor],
    given: dict[NestedKey, Tensor],
    reset: Tensor | None,
    action: NestedKey | None,
) -> dict[NestedKey, Tensor]:
    """The inputs of a step: latents and action of rows to be reset are zero."""
    clear = [*latents, action]
    return {
        key: cleared(value, reset) if key in clear else value
        for key, value in [*latents.items(), *given.items()]
    }


def cleared(value: Tensor, reset: Tensor | None) -> Tensor:
    """``value [*batch, *event]``, zero where ``reset [*batch]``."""
    if reset is None:
        return value
    rows = reset.reshape(reset.shape + (1,) * (value.ndim - reset.ndim))
    return torch.where(rows, 0, value)
