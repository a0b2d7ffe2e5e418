"""Layers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Concat", "GaussianHead", "SimNorm", "TwoHot", "mlp"]


def mlp(
    sizes: Sequence[int],
    activation: type[nn.Module],
    *,
    norm: Callable[[int], nn.Module] | None = None,
    last: float = 1.0,
) -> nn.Sequential:
    """Linear layers; all but the last are followed by a norm, if given, and by an activation.

    Args:
        sizes: widths, inputs first: ``[*B, sizes[0]] -> [*B, sizes[-1]]``.
        activation: e.g. ``nn.SiLU``.
        norm: makes the norm of a width, e.g. ``nn.LayerNorm``.
        last: factor on the last layer's initial weights and bias: heads that begin near zero (TD-MPC2,
            DreamerV3: 0).

    Example:
        >>> from torch import nn
        >>> from fastwm.models.layers import mlp
        >>> [type(layer).__name__ for layer in mlp((3, 8, 2), nn.SiLU, norm=nn.LayerNorm)]
        ['Linear', 'LayerNorm', 'SiLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if i < len(sizes) - 2:
            layers += [activation()] if norm is None else [norm(outputs), activation()]
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.mul_(last)
    return nn.Sequential(*layers)


class Concat(nn.Module):
    """A network on concatenated inputs: ``[*B, a], [*B, b], ... -> net([*B, a + b + ...])``.

    Args:
        net: the network.
        last: applied to what it says.
    """

    def __init__(self, net: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.net(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))
        return x if self.last is None else self.last(x)


class GaussianHead(nn.Module):
    """Concatenated inputs to the loc and scale of a Gaussian, ``[*B, n]`` each.

    Args:
        net: its last width is ``2 * n``.
        scale: from what the net says to a positive number.
    """

    def __init__(self, net: nn.Module, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.scale = scale

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        loc, scale = self.net(x).chunk(2, -1)
        return loc, self.scale(scale)


class SimNorm(nn.Module):
    """Softmax within groups: each group of the latent lies on a simplex, ``[*B, n] -> [*B, n]``.

    Args:
        group: numbers per group; 8 in TD-MPC2.

    Source: Hansen et al. 2024, "TD-MPC2", equation 4; Lavoie et al. 2023, "Simplicial embeddings".
    """

    def __init__(self, group: int = 8) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.group)).softmax(-1).flatten(-2)


class TwoHot(nn.Module):
    """Logits over bins of symlog values to the value that they expect, ``[*B, bins] -> [*B, 1]``.

    Args:
        bins, low, high: number and range of the bins, in symlog units; TD-MPC2 has 101 from -10 to 10.

    Source: Hafner et al. 2023, "DreamerV3", section "Robust predictions", as TD-MPC2 has it: evenly
    spaced in symlog, the mean taken there. Its loss is :func:`fastwm.two_hot_cross_entropy` with
    ``bins=(low, high)``.
    """

    bins: Tensor

    def __init__(self, bins: int = 101, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("bins", torch.linspace(low, high, bins))

    def forward(self, logits: Tensor) -> Tensor:
        x = (logits.softmax(-1) * self.bins).sum(-1, keepdim=True)
        return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)
