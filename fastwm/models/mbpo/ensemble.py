"""The networks of PETS and MBPO: an ensemble with one batched product per layer, and its elites."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Elites", "Ensemble", "EnsembleLinear"]


class EnsembleLinear(nn.Module):
    """One linear layer per member: ``[B, I]`` for all of them or ``[M, B, I]`` to ``[M, B, O]``.

    With ``index``, int64 ``[E]``, only these members compute: ``[B, I]`` or ``[E, B, I]`` to ``[E, B, O]``.

    Weights are drawn from a normal distribution of standard deviation ``1 / (2 sqrt(I))``, cut off at two of
    them; biases are zero.

    Source: the initialiser is that of the official PETS and MBPO code (``fc.py``).
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        std = 0.5 * inputs**-0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        weight = self.weight if index is None else self.weight.index_select(0, index)
        bias = self.bias if index is None else self.bias.index_select(0, index)
        return torch.baddbmm(bias, x.expand(weight.shape[0], *x.shape[-2:]), weight)

    def extra_repr(self) -> str:
        members, inputs, outputs = self.weight.shape
        return f"members={members}, in_features={inputs}, out_features={outputs}"


class Elites(nn.Module):
    """Which members imagination draws from.

    Args:
        members: size of the ensemble.
        elites: how many are elites.

    Attributes:
        index: the elites, int64 ``[elites]``: the first ones until :meth:`choose` has ranked them.

    Raises:
        ValueError: more elites than members, or none.
    """

    index: Tensor

    def __init__(self, members: int, elites: int) -> None:
        super().__init__()
        if not 1 <= elites <= members:
            raise ValueError(
                f"elites={elites} of members={members}: choose between 1 and the number of members."
            )
        self.register_buffer("index", torch.arange(elites))

    def __len__(self) -> int:
        return self.index.shape[0]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Elites drawn uniformly, by their place in :attr:`index`: int64 of that shape."""
        return torch.randint(len(self), tuple(shape), device=self.index.device)

    def choose(self, error: Tensor) -> Tensor:
        """Take the members of the smallest errors.

        Args:
            error: of each member, ``[members]``.

        Returns:
            The elites, best first, int64 ``[elites]``.

        Raises:
            ValueError: fewer members with a finite error than elites.
        """
        finite = int(error.isfinite().sum())
        if finite < len(self):
            raise ValueError(
                f"{len(self)} elites are wanted, but only {finite} of {error.shape[0]} members have a "
                "finite error: the ensemble has diverged."
            )
        # In place: an engine reads this buffer anew in every rollout.
        return self.index.copy_(error.where(error.isfinite(), torch.inf).argsort()[: len(self)])


class Ensemble(nn.Module):
    """Networks side by side, each from an input to the Gaussian of a target.

    Inputs are normalised by the mean and standard deviation that :meth:`fit_normalizer` found. The
    log-variance that comes out is raw; :meth:`bounded` holds it between two learned bounds.

    Args:
        inputs, targets: widths.
        members: how many networks.
        hidden: widths of the hidden layers.
        activation: between the layers.
        deterministic: members give a point and no log-variance.

    Attributes:
        max_logvar, min_logvar: the bounds, parameters ``[targets]``, from 0.5 and -10; None where
            ``deterministic``.

    Source: Chua et al., "Deep Reinforcement Learning in a Handful of Trials" (PETS), section 4 and appendix
    A.1; start values of the bounds from its official code (``BNN.py``).
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        inputs: int,
        targets: int,
        *,
        members: int = 7,
        hidden: Sequence[int] = (200,) * 4,
        activation: type[nn.Module] = nn.SiLU,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.members = members
        self.targets = targets
        self.deterministic = deterministic
        self.register_buffer("input_mean", torch.zeros(inputs))
        self.register_buffer("input_std", torch.ones(inputs))
        widths = (inputs, *hidden, targets if deterministic else 2 * targets)
        self.layers = nn.ModuleList(
            EnsembleLinear(members, wide, narrow) for wide, narrow in pairwise(widths)
        )
        self.activation = activation()
        if deterministic:
            self.max_logvar = self.min_logvar = None
        else:
            self.max_logvar = nn.Parameter(torch.full((targets,), 0.5))
            self.min_logvar = nn.Parameter(torch.full((targets,), -10.0))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Means and raw log-variances of every member; means alone where ``deterministic``.

        Args:
            x: inputs, ``[B, I]`` for all members or ``[M, B, I]``.
            index: the members that compute, int64 ``[E]``; default: all.

        Returns:
            ``[M, B, 2 T]``, or ``[M, B, T]``; ``E`` in place of ``M`` with ``index``.
        """
        x = (x - self.input_mean) / self.input_std
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.activation(x), index)
        return x

    def bounded(self, logvar: Tensor) -> Tensor:
        """The log-variance between its bounds, ``[*B, T] -> [*B, T]``."""
        assert self.max_logvar is not None
        assert self.min_logvar is not None
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return self.min_logvar + F.softplus(logvar - self.min_logvar)

    @torch.no_grad()
    def fit_normalizer(self, x: Tensor) -> None:
        """Take mean and standard deviation of the inputs ``[*B, I]``; what does not vary is only shifted.

        Raises:
            ValueError: no rows.
        """
        x = x.flatten(0, -2)
        if not x.shape[0]:
            raise ValueError("No data to fit the normalizer on: 0 rows.")
        std = x.std(0, correction=0)
        self.input_mean.copy_(x.mean(0))
        self.input_std.copy_(std.where(std > 1e-12, 1.0))
