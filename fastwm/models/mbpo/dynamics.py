"""One imagined step of an ensemble: which member sends a row on, and what it draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastwm.models.mbpo.ensemble import Elites, Ensemble

__all__ = ["DrawMember", "EnsembleDynamics", "Termination"]


class EnsembleDynamics(nn.Module):
    """Observation and action to the next observation and the reward, of one elite per row.

    The ensemble's targets are the change of the observation and the reward.

    Args:
        ensemble: of ``observation + action`` inputs and ``observation + 1`` targets.
        elites: which members are drawn from.
        sample: draw from the member's Gaussian, or take its mean.
    """

    def __init__(self, ensemble: Ensemble, elites: Elites, *, sample: bool = True) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.elites = elites
        self.sample = sample

    def forward(
        self, observation: Tensor, action: Tensor, member: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            observation, action: ``[*B, O]``, ``[*B, A]``.
            member: the elite of each row by its place among them, int64 ``[*B, 1]``; None draws one.

        Returns:
            Next observation ``[*B, O]`` and reward ``[*B, 1]``.
        """
        x = torch.cat((observation, action), -1)
        batch = x.shape[:-1]
        # Only the elites compute. A fused engine computes only the drawn one, from their weights.
        of_all = self.ensemble(x.reshape(-1, x.shape[-1]), self.elites.index)
        rows, width = of_all.shape[1:]
        if member is None:
            member = self.elites.draw((rows,))
        index = member.reshape(1, rows, 1).expand(1, rows, width)
        chosen = of_all.gather(0, index).reshape(*batch, width)
        target = chosen if self.ensemble.deterministic else self._drawn(chosen)
        delta, reward = target.split((observation.shape[-1], 1), -1)
        return observation + delta, reward

    def _drawn(self, chosen: Tensor) -> Tensor:
        mean, logvar = chosen.chunk(2, -1)
        if not self.sample:
            return mean
        return mean + torch.exp(0.5 * self.ensemble.bounded(logvar)) * torch.randn_like(mean)


class DrawMember(nn.Module):
    """Encoder of TSinf: the observation as it is, and the elite that sends this row on for good, by its
    place among the elites.

    ``[*B, O] -> [*B, O], int64 [*B, 1]``.
    """

    def __init__(self, elites: Elites) -> None:
        super().__init__()
        self.elites = elites

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return observation, self.elites.draw((*observation.shape[:-1], 1))


class Termination(nn.Module):
    """A task's own rule for the end of an episode, as a done head.

    Args:
        rule: ``(observation, action, next_observation) -> terminated``, shapes ``[*B, O], [*B, A],
            [*B, O] -> bool [*B, 1]``.
    """

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """Raises ValueError where the rule returns another shape or dtype."""
        terminated = self.rule(observation, action, following)
        wanted = (*observation.shape[:-1], 1)
        if terminated.shape != wanted or terminated.dtype is not torch.bool:
            raise ValueError(
                f"termination must return torch.bool of shape {wanted}, it returned "
                f"{terminated.dtype} of shape {tuple(terminated.shape)}."
            )
        return terminated
