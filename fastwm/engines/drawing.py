"""What a fused rollout needs of random numbers and given actions, for all of its steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastwm.engines.captured import FeedStep
from fastwm.row_program.gradient import Gradient
from fastwm.row_program.lowering import Lowered
from fastwm.row_program.noise import Noise, new_key

__all__ = ["NOISES", "Drawing"]

#: Who draws a rollout's noise: torch, as eager does, or the kernel that reads it.
NOISES = ("torch", "kernel")


class Drawing:
    """Noise and fed actions of a rollout, drawn as the steps would have.

    Args:
        lowered: the step.
        fed: names of the inputs that are given anew at each step, in the order of what a feed gives.
        device: of the step.
        in_kernel: the kernel draws what it has a law for; only the key of its numbers is drawn here.

    Attributes:
        noise: by input, what the kernel draws. For these there is the key, which is the same for all of them.
    """

    def __init__(
        self, lowered: Lowered, fed: Sequence[Any], device: torch.device, *, in_kernel: bool
    ) -> None:
        self.device = device
        self.noise: dict[Any, Noise] = {}
        self.draws = []
        for number, draw in enumerate(lowered.draws):
            if not in_kernel or draw.law is None:
                self.draws.append(draw)
            elif (
                draw.name is not None
            ):  # what nobody reads moves no generator that anybody else reads
                self.noise[draw.name] = Noise(draw.law, number)
        self._floats = {lowered.program.dtype, lowered.floats}
        self._fed = [(at, n) for at, n in enumerate(fed) if n in lowered.program.inputs]

    def again(self, gradient: Gradient) -> dict[Any, Noise]:
        """What the backward program's kernel draws: the same numbers once more."""
        return {
            name: self.noise[source.name]
            for name, source in gradient.saved.items()
            if source.kind == "input" and source.name in self.noise
        }

    def __call__(self, horizon: int, feed: FeedStep | None) -> dict[Any, torch.Tensor]:
        """By input name, ``[horizon, *shape]``; of what the kernel draws, the key."""
        found: dict[Any, torch.Tensor] = {}
        if self.noise:
            found = dict.fromkeys(self.noise, new_key(self.device))
        if not self.draws and feed is None:
            return found
        steps: dict[Any, list[torch.Tensor]] = {}
        calls: list[tuple[Any, Any]] = []  # how each op draws, and where to
        for draw in self.draws:
            if draw.name is None:
                calls.append((draw, None))
            elif draw.fill is not None and draw.dtype in self._floats:
                noise = found[draw.name] = torch.empty(
                    (horizon, *draw.shape), dtype=draw.dtype, device=self.device
                )
                calls.append((draw.fill, noise.unbind(0)))
            else:
                steps[draw.name] = []
                calls.append((draw, steps[draw.name]))
        if feed is None and not steps and all(to is not None for _, to in calls):
            if len(calls) == 1:
                fill, to = calls[0]
                for noise in to:
                    fill(noise)
            else:
                fills = [fill for fill, _ in calls]
                for step_noise in zip(*(to for _, to in calls), strict=True):
                    for fill, noise in zip(fills, step_noise, strict=True):
                        fill(noise)
            return found
        given: list[Sequence[torch.Tensor]] = []
        for step in range(horizon):
            if feed is not None:
                given.append(feed())
            for call, to in calls:
                if isinstance(to, tuple):
                    call(to[step])
                    continue
                noise = call.sample()
                if to is not None:
                    to.append(noise if call.plain else call.rows(noise))
        found.update({name: torch.stack(noise) for name, noise in steps.items()})
        for position, name in self._fed if feed is not None else ():
            found[name] = torch.stack([f[position] for f in given])
        return found
