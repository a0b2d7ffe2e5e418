"""`EnsembleLoss`: how an ensemble of PETS or MBPO learns from real transitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.objectives.common import LossModule

from fastwm.models.mbpo.dynamics import EnsembleDynamics
from fastwm.ops import gaussian_nll
from fastwm.specs import next_key

__all__ = ["EnsembleLoss"]

REDUCTIONS = ("mean", "sum", "none")


class EnsembleLoss(LossModule):
    """Negative log-likelihood of real transitions under each member, and the pull on the variances'
    bounds.

    =================  ===========================================================================
    ``loss_nll``       of each member, averaged over rows and features and summed over members (twice
                       the log-likelihood, without its constant)
    ``loss_bounds``    ``bound_weight * (max_logvar.sum() - min_logvar.sum())``
    ``loss_mse``       instead of both, where members are deterministic: the squared error, likewise
    =================  ===========================================================================

    Args:
        dynamics: whose ensemble is trained. Its parameters are those of the loss.

    Keyword Args:
        bound_weight: 0.01, as in the official PETS and MBPO code.
        reduction: ``"mean"`` (default) is as above, ``"sum"`` sums over the rows instead, ``"none"`` gives
            the loss of each member and row, ``[members, B]``.

    Attributes:
        in_keys: ``"observation"``, ``"action"``, ``("next", "observation")``, ``("next", "reward")``, or what
            :meth:`set_keys` made of them.
        out_keys: the losses of the table.

    Raises:
        KeyError: the batch lacks a key; names it.
        ValueError: a shape does not fit (both are named), or an unknown reduction.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import mbpo
        >>> family = mbpo(GymEnv("Pendulum-v1"), hidden=(32, 32))
        >>> batch = TensorDict({
        ...     "observation": torch.randn(64, 3),
        ...     "action": torch.randn(64, 1),
        ...     "next": {"observation": torch.randn(64, 3), "reward": torch.randn(64, 1)},
        ... }, [64])
        >>> sorted(family.loss(batch).keys())
        ['loss_bounds', 'loss_nll']
        >>> own = batch[torch.randint(64, (7, 16))]  # each of the 7 members its own 16 rows
        >>> family.loss(own)["loss_nll"].shape
        torch.Size([])

    Source: Chua et al. 2018 (PETS), equation 1 and appendix A.1; Janner et al. 2019 (MBPO), section 4.1, and
    its official code for what is averaged and what is summed (``bnn.py``).
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` accepts, and their defaults.

        Attributes:
            observation: also found under ``"next"``. Default ``"observation"``.
            action: Default ``"action"``.
            reward: under ``"next"``. Default ``"reward"``.
        """

        observation: NestedKey = "observation"
        action: NestedKey = "action"
        reward: NestedKey = "reward"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def __init__(
        self, dynamics: EnsembleDynamics, *, bound_weight: float = 0.01, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"Unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}."
            )
        self.dynamics = dynamics
        self.bound_weight = bound_weight
        self.reduction = reduction
        deterministic = dynamics.ensemble.deterministic
        self.out_keys = ["loss_mse"] if deterministic else ["loss_nll", "loss_bounds"]
        self._set_in_keys()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        # There is no value estimator; set_keys() calls this after a change.
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        self.in_keys = [
            unravel_key(keys.observation), unravel_key(keys.action),
            next_key(unravel_key(keys.observation)), next_key(unravel_key(keys.reward)),
        ]  # fmt: skip

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses of a batch.

        Args:
            tensordict: ``[B]``, the same rows for every member, or ``[members, B]``, each its own. Flatten
                trajectories first: ``batch.reshape(-1)``.

        Returns:
            A TensorDict of :attr:`out_keys`.
        """
        x, target = self.inputs_and_targets(tensordict)
        members = self.dynamics.ensemble.members
        batch = x.shape[:-1]
        if not (len(batch) == 1 or (len(batch) == 2 and batch[0] == members)):
            raise ValueError(
                f"The batch must be [B], the same for every member, or [{members}, B], each member its "
                f"own; it is {list(batch)}."
            )
        return self._losses(x, target)

    def _losses(self, x: Tensor, target: Tensor) -> TensorDictBase:
        ensemble = self.dynamics.ensemble
        predicted = ensemble(x)
        target = target.expand(*predicted.shape[:-1], ensemble.targets)
        if ensemble.deterministic:
            error = (predicted - target).square().mean(-1)
            return TensorDict({"loss_mse": self._reduced(error)})
        mean, logvar = predicted.chunk(2, -1)
        high, low = ensemble.max_logvar, ensemble.min_logvar
        assert high is not None
        assert low is not None
        nll = gaussian_nll(mean, logvar, target, high, low) / ensemble.targets
        bounds = self.bound_weight * (high.sum() - low.sum())
        return TensorDict({"loss_nll": self._reduced(nll), "loss_bounds": bounds})

    def _reduced(self, loss: Tensor) -> Tensor:
        if self.reduction == "none":
            return loss
        return loss.mean(-1).sum() if self.reduction == "mean" else loss.sum()

    def inputs_and_targets(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """What the ensemble reads and should say, ``[*B, O + A]`` and ``[*B, O + 1]``.

        Raises:
            KeyError, ValueError: see the class.
        """
        found = []
        for key in self.in_keys:
            value = tensordict.get(key, None)
            if value is None:
                there = sorted(map(str, tensordict.keys(True, True)))
                raise KeyError(
                    f"The batch has no {key!r}, which EnsembleLoss reads; it has {there}."
                )
            found.append(value)
        observation, action, following, reward = found
        ensemble = self.dynamics.ensemble
        batch, wide = observation.shape[:-1], ensemble.targets - 1
        narrow = ensemble.input_mean.shape[0] - wide
        for key, value, width in zip(self.in_keys, found, (wide, narrow, wide, 1), strict=True):
            if value.shape != (*batch, width):
                raise ValueError(
                    f"{key!r} must have shape {(*batch, width)}, its shape is {tuple(value.shape)}."
                )
        return (
            torch.cat((observation, action), -1),
            torch.cat((following - observation, reward), -1),
        )

    @torch.no_grad()
    def errors(self, tensordict: TensorDictBase) -> Tensor:
        """Mean squared error of each member's mean, over rows and features, ``[*B] -> [members]``."""
        x, target = (t.flatten(0, -2) for t in self.inputs_and_targets(tensordict))
        ensemble = self.dynamics.ensemble
        mean = ensemble(x)[..., : ensemble.targets]
        return (mean - target).square().mean((-2, -1))

    @torch.no_grad()
    def select_elites(self, holdout: TensorDictBase) -> Tensor:
        """Rank the members on held-out transitions; imagination then draws from the best.

        Args:
            holdout: ``[*B]``, at least one transition.

        Returns:
            The error of each member, ``[members]``, as :meth:`errors`.

        Raises:
            ValueError: no transitions, or fewer members with a finite error than elites.
            KeyError: see the class.
        """
        if not holdout.batch_size.numel():  # numel() of a TensorDict is never 0
            raise ValueError("No data to rank the members on: the hold-out has 0 transitions.")
        error = self.errors(holdout)
        self.dynamics.elites.choose(error)
        return error
