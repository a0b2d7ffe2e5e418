"""Training an ensemble until its error on held-out data no longer falls, as MBPO does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from fastwm.models.mbpo.ensemble import EnsembleLinear
from fastwm.models.mbpo.loss import EnsembleLoss

__all__ = ["WEIGHT_DECAY", "Fitted", "fit", "parameter_groups"]

#: Of the five layers of MBPO's ensemble, from its official code (``constructor.py``).
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)


@dataclass(frozen=True)
class Fitted:
    """What :func:`fit` did.

    Attributes:
        epochs, updates: passes over the data, and optimizer steps.
        error: mean squared error of each member on the hold-out, ``[members]``.
        elites: the chosen members, best first, ``[elites]``.
    """

    epochs: int
    updates: int
    error: Tensor
    elites: Tensor


def parameter_groups(
    module: nn.Module, weight_decay: Sequence[float] = WEIGHT_DECAY
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.Adam``: a weight decay per layer, none on all other parameters.

    Args:
        module: an ensemble, or what contains one (the family, its loss).
        weight_decay: one for each layer, inputs first. Adam's kind of decay (added to the gradient, not
            decoupled) is what MBPO does.

    Raises:
        ValueError: another number of layers.

    Example:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import mbpo
        >>> from fastwm.models.mbpo import parameter_groups
        >>> family = mbpo(GymEnv("Pendulum-v1"))
        >>> optimizer = torch.optim.Adam(parameter_groups(family.loss), lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [2.5e-05, 5e-05, 7.5e-05, 7.5e-05, 0.0001, 0.0]
    """
    weights = [layer.weight for layer in module.modules() if isinstance(layer, EnsembleLinear)]
    if len(weights) != len(weight_decay):
        raise ValueError(
            f"{len(weight_decay)} weight decays for {len(weights)} layers of the ensemble."
        )
    decayed = {id(weight) for weight in weights}
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": decay}
        for weight, decay in zip(weights, weight_decay, strict=True)
    ]
    others = [p for p in module.parameters() if id(p) not in decayed]
    return [*groups, {"params": others, "weight_decay": 0.0}]


def fit(
    loss: EnsembleLoss,
    optimizer: torch.optim.Optimizer,
    data: TensorDictBase,
    *,
    holdout: float = 0.2,
    max_holdout: int = 5000,
    batch_size: int = 256,
    patience: int = 5,
    improvement: float = 0.01,
    max_epochs: int | None = None,
    bootstrap: bool = True,
) -> Fitted:
    """Train an ensemble on real transitions, and choose its elites.

    Part of the data is held out and the inputs' normalizer is fitted on the rest. Each member then sees its
    own bootstrap sample in its own order. Training ends once no member's squared error on the hold-out has
    fallen for ``patience`` epochs; each member goes back to its best epoch. Call it again as data comes in:
    it goes on from the weights that are there.

    Args:
        loss: of the ensemble.
        optimizer: over its parameters; see :func:`parameter_groups`. MBPO: Adam at 1e-3.
        data: all transitions so far, any batch.

    Keyword Args:
        holdout, max_holdout: part of the data that is held out, and at most how many transitions.
        batch_size: rows per member and update.
        patience, improvement: when to stop; an error has fallen when it did so by more than this part of
            itself.
        max_epochs: stop then in any case. Default: no limit.
        bootstrap: a sample with replacement for each member (PETS, MBPO); False gives each all of the data.

    Raises:
        ValueError: too few transitions to hold one out and keep one; a hold-out outside (0, 1); fewer
            members with a finite error than elites.
        KeyError: the data lack a key that the loss reads.

    Source: MBPO's official code (``bnn.py``, ``BNN.train``), defaults included.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import mbpo
        >>> from fastwm.models.mbpo import fit
        >>> family = mbpo(GymEnv("Pendulum-v1"), hidden=(32, 32))
        >>> x, u = torch.randn(200, 3), torch.randn(200, 1)
        >>> data = TensorDict(
        ...     {"observation": x, "action": u, "next": {"observation": 0.9 * x, "reward": u}}, [200]
        ... )
        >>> optimizer = torch.optim.Adam(family.loss.parameters(), lr=1e-3)
        >>> fitted = fit(family.loss, optimizer, data, max_epochs=3)
        >>> fitted.epochs, fitted.updates, fitted.elites.shape
        (3, 3, torch.Size([5]))
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout} must be a part of the data, between 0 and 1.")
    count = data.batch_size.numel()  # numel() of a TensorDict is never 0
    held = min(int(holdout * count), max_holdout)
    if not held:
        raise ValueError(
            f"{count} transitions are too few: holdout={holdout} of them leaves none to hold out."
        )
    data = data.select(*loss.in_keys, strict=False).reshape(-1)
    ensemble = loss.dynamics.ensemble
    order = torch.randperm(count, device=ensemble.input_mean.device)
    kept_out, data = data[order[:held]], data[order[held:]]
    ensemble.fit_normalizer(loss.inputs_and_targets(data)[0])
    rows = _Rows(ensemble.members, count - held, bootstrap, order.device)
    best = _Best(loss, improvement)
    epochs, updates, since = 0, 0, 0
    while since < patience and (max_epochs is None or epochs < max_epochs):
        for index in rows.epoch(batch_size):
            optimizer.zero_grad()
            sum(loss(data[index]).values()).backward()
            optimizer.step()
            updates += 1
        epochs += 1
        since = 0 if best.update(loss.errors(kept_out)) else since + 1
    best.restore()
    error = loss.select_elites(kept_out)
    return Fitted(epochs, updates, error, loss.dynamics.elites.index.clone())


class _Rows:
    """Which rows each member sees: its bootstrap sample, in a new order in each epoch."""

    def __init__(self, members: int, count: int, bootstrap: bool, device: torch.device) -> None:
        shape = members, count
        self.index = (
            torch.randint(count, shape, device=device)
            if bootstrap
            else torch.arange(count, device=device).expand(shape)
        )

    def epoch(self, batch_size: int) -> tuple[Tensor, ...]:
        order = torch.rand(self.index.shape, device=self.index.device).argsort(1)
        return self.index.gather(1, order).split(batch_size, 1)


class _Best:
    """The weights of each member at its lowest error."""

    def __init__(self, loss: EnsembleLoss, improvement: float) -> None:
        layers = [m for m in loss.dynamics.ensemble.modules() if isinstance(m, EnsembleLinear)]
        self.parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        self.kept = [p.detach().clone() for p in self.parameters]
        self.error = torch.full((loss.dynamics.ensemble.members,), torch.inf).to(self.kept[0])
        self.improvement = improvement

    @torch.no_grad()
    def update(self, error: Tensor) -> bool:
        """Keep the members that have become better; whether there was one."""
        better = error < self.error * (1 - self.improvement)
        self.error = error.where(better, self.error)
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.copy_(parameter.where(better.view(-1, 1, 1), kept))
        return bool(better.any())

    @torch.no_grad()
    def restore(self) -> None:
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)
