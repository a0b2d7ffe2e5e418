"""Scores of candidates, and what their best tell of the next ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Elites", "elites", "moments", "until_done", "where_rows"]


def until_done(rewards: Tensor, done: Tensor | None) -> Tensor:
    """Rewards up to and with the step that ends the episode; 0 for those that follow it.

    Args:
        rewards: ``[..., T]``.
        done: bool ``[..., T]``; None where nothing ends.

    Example:
        >>> import torch
        >>> from fastwm.planning.returns import until_done
        >>> until_done(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])).tolist()
        [1.0, 2.0, 0.0]
    """
    if done is None:
        return rewards
    flags = done.to(torch.int64)
    return torch.where(flags.cumsum(-1) > flags, torch.zeros_like(rewards), rewards)


class Elites(NamedTuple):
    """The best candidates of each environment, best first.

    Attributes:
        returns: ``[B, K]``; ``-inf`` where ``valid`` is False.
        actions: ``[B, K, T, *A]``; 0 where ``valid`` is False.
        valid: bool ``[B, K]``. False for what had to fill up the number: no candidate with a finite return
            and finite actions was left.
    """

    returns: Tensor
    actions: Tensor
    valid: Tensor

    @property
    def found(self) -> Tensor:
        """Bool ``[B]``: whether there is any elite at all."""
        return self.valid[:, 0]


def elites(returns: Tensor, actions: Tensor, count: int) -> Elites:
    """The ``count`` candidates of the highest return; never one whose return or actions are not finite.

    Args:
        returns: ``[B, N]``.
        actions: ``[B, N, T, *A]``.

    Example:
        >>> import torch
        >>> from fastwm.planning.returns import elites
        >>> best = elites(torch.tensor([[1.0, float("nan"), 3.0]]), torch.zeros(1, 3, 2, 1), 3)
        >>> best.returns.tolist(), best.valid.tolist()
        ([[3.0, 1.0, -inf]], [[True, True, False]])
    """
    finite = torch.isfinite(returns) & torch.isfinite(actions).flatten(2).all(-1)
    best, index = returns.masked_fill(~finite, -math.inf).topk(count, dim=1)
    valid = finite.gather(1, index)
    spread = (*index.shape, *(1,) * (actions.ndim - 2))
    chosen = actions.gather(1, index.reshape(spread).expand(*index.shape, *actions.shape[2:]))
    return Elites(best, chosen.masked_fill(~valid.reshape(spread), 0.0), valid)


def moments(best: Elites, weights: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the elites' actions, ``[B, T, *A]`` each.

    Args:
        weights: ``[B, K]``, not negative; those of elites that are not valid count as 0.
        unbiased: divide by one less than the sum of weights (of 1 each), as ``torch.std``; with one elite
            the deviation is 0.
    """
    weights = weights.masked_fill(~best.valid, 0.0).to(best.actions.dtype)
    weights = weights.reshape(*weights.shape, *(1,) * (best.actions.ndim - 2))
    total = weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
    mean = (weights * best.actions).sum(1) / total
    squares = (weights * (best.actions - mean.unsqueeze(1)).square()).sum(1)
    return mean, (squares / ((total - 1.0).clamp(min=1.0) if unbiased else total)).sqrt()


def where_rows(rows: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Choose by environment: ``rows`` is bool ``[B]``, the others ``[B, ...]``."""
    return tuple(
        torch.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )
