"""The networks of TD-MPC2: encoders, policy prior, Q ensemble and task embedding.

Source: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous Control", ICLR 2024,
arXiv:2310.16828, section 3 and appendix H; names of settings are those of the official repository
(nicklashansen/tdmpc2, ``config.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrl.envs.utils import ExplorationType, exploration_type

from fastwm.models.layers import Concat, SimNorm, TwoHot, mlp

__all__ = [
    "PixelEncoder", "PolicyPrior", "PolicySample", "QEnsemble", "QValues", "TaskEmbedding",
    "init_weights", "network", "simplicial_network",
]  # fmt: skip


def init_weights(module: nn.Module) -> None:
    """Official initial values, for ``module.apply``: weights of linear layers normal with deviation 0.02,
    their biases zero, embeddings uniform in +-0.02."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -0.02, 0.02)


def network(inputs: int, mlp_dim: int, outputs: int, *, zero: bool = False) -> nn.Sequential:
    """Two hidden layers of Linear, LayerNorm and Mish, then a linear one; ``zero``: that one starts at 0."""
    net = mlp((inputs, mlp_dim, mlp_dim, outputs), nn.Mish, norm=nn.LayerNorm).apply(init_weights)
    if zero:
        for parameter in net[-1].parameters():
            nn.init.zeros_(parameter)
    return net


def simplicial_network(sizes: Sequence[int], group: int) -> Concat:
    """Concatenated inputs to a point on simplices of ``group``: every layer but the last ends in Mish, the
    last one in :class:`SimNorm`, and each has a LayerNorm before that."""
    net = mlp(sizes, nn.Mish, norm=nn.LayerNorm).apply(init_weights)
    return Concat(net, nn.Sequential(nn.LayerNorm(sizes[-1]), SimNorm(group)))


class PixelEncoder(nn.Module):
    """Four convolutions on 64 x 64 images, to a point on simplices: ``[*B, C, 64, 64] -> [*B, latent_dim]``.

    In training mode the images are first shifted by up to three pixels, each its own way.

    Args:
        channels: of the image; three frames of RGB are 9.
        latent_dim: a multiple of 16 and of ``group``.
        num_channels: of the hidden layers.
        group: see :class:`fastwm.models.layers.SimNorm`.

    ``uint8`` images count from 0 to 255, floating-point ones from 0 to 1.

    Source: the official ``layers.conv``. Two differences: there the shift is also applied when acting;
    and there the last layer has ``num_channels`` too, which fits a latent of 512 only.
    """

    def __init__(
        self, channels: int, latent_dim: int, *, num_channels: int = 32, group: int = 8
    ) -> None:
        super().__init__()
        if latent_dim % 16:
            raise ValueError(
                f"The pixel encoder's latent_dim must be a multiple of 16: got {latent_dim}."
            )
        n = num_channels
        self.net = nn.Sequential(
            nn.Conv2d(channels, n, 7, stride=2), nn.ReLU(),
            nn.Conv2d(n, n, 5, stride=2), nn.ReLU(),
            nn.Conv2d(n, n, 3, stride=2), nn.ReLU(),
            nn.Conv2d(n, latent_dim // 16, 3), nn.Flatten(), SimNorm(group),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        batch = pixels.shape[:-3]
        x = pixels.reshape(-1, *pixels.shape[-3:])
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.training:
            x = _shifted(x, 3)
        return self.net(x - 0.5).unflatten(0, batch)


def _shifted(x: Tensor, most: int) -> Tensor:
    """Each image moved by up to ``most`` pixels both ways, its border repeated: ``[N, C, S, S]``."""
    n, _, size, _ = x.shape
    padded = functional.pad(x, (most,) * 4, mode="replicate")
    offset = torch.randint(0, 2 * most + 1, (2, n, 1), device=x.device)
    rows, columns = offset + torch.arange(size, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


class TaskEmbedding(nn.Module):
    """Index of a task to its embedding and, with masks, which actions it has.

    Args:
        tasks: how many.
        task_dim: width of an embedding, whose L2 norm is kept at 1 or below.
        action_masks: ``[tasks, A]``, 1 where the task has that action; None: all have all.

    Shapes: ``[*B]`` or ``[*B, 1]`` (integer) to ``[*B, task_dim]`` and ``[*B, A]``.
    """

    action_masks: Tensor | None

    def __init__(self, tasks: int, task_dim: int, action_masks: Tensor | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tasks, task_dim, max_norm=1.0).apply(init_weights)
        self.register_buffer("action_masks", action_masks)

    def forward(self, task: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        task = task.squeeze(-1) if task.ndim and task.shape[-1] == 1 else task
        embedded = self.embedding(task)
        return embedded if self.action_masks is None else (embedded, self.action_masks[task])


class PolicyPrior(nn.Module):
    """Draws actions in (-1, 1) from a Gaussian behind a tanh: latent, if so with the task's embedding and
    action mask after it, to ``[*B, A]``.

    Under ``set_exploration_type(ExplorationType.DETERMINISTIC)`` (or MODE, MEAN) the Gaussian's mean.

    Args:
        net: concatenated inputs without the mask to ``[*B, 2 * A]``.
        masked: whether the last input is an action mask: those actions are then 0.
        log_std_min, log_std_max: what the logarithm of the scale can be; a tanh maps onto the range.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        masked: bool = False,
        log_std_min: float = -10.0,
        log_std_max: float = 2.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.masked = masked
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def forward(self, *inputs: Tensor) -> Tensor:
        mean, log_std, mask = self._gaussian(inputs)
        if exploration_type() in _NO_DRAW:
            return torch.tanh(mean)
        return torch.tanh(mean + _noise(mean, mask) * log_std.exp())

    def sample(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw, differentiable, its log-probability and its entropy bonus: ``[*B, A]``, twice ``[*B, 1]``.

        The log-probability is that of the action, so it has the tanh's part. The bonus is minus that of
        the Gaussian's draw alone, times the number of actions: the official ``scaled_entropy``.
        """
        mean, log_std, mask = self._gaussian(inputs)
        noise = _noise(mean, mask)
        action = torch.tanh(mean + noise * log_std.exp())
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        gaussian = (gaussian if mask is None else gaussian * mask).sum(-1, keepdim=True)
        # 1e-6: as official; the logarithm stays finite where float32's tanh is 1.
        log_prob = gaussian - torch.log(1 - action.square() + 1e-6).sum(-1, keepdim=True)
        actions = mean.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
        return action, log_prob, -gaussian * actions

    def _gaussian(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = inputs[-1] if self.masked else None
        inputs = inputs[:-1] if self.masked else inputs
        x = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), -1)
        mean, raw = self.net(x).chunk(2, -1)
        half = 0.5 * (self.log_std_max - self.log_std_min)
        log_std = self.log_std_min + half * (torch.tanh(raw) + 1)
        return (mean, log_std, None) if mask is None else (mean * mask, log_std * mask, mask)


_NO_DRAW = (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN)


def _noise(mean: Tensor, mask: Tensor | None) -> Tensor:
    noise = torch.randn_like(mean)
    return noise if mask is None else noise * mask


class PolicySample(nn.Module):
    """:meth:`PolicyPrior.sample` as a module, for a TensorDictModule of three keys."""

    def __init__(self, prior: PolicyPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.prior.sample(*inputs)


class QEnsemble(nn.Module):
    """Q functions side by side: latent, action and, if so, embedding to logits ``[*B, members, num_bins]``.

    Each is two hidden layers of Linear, LayerNorm and Mish, the first with dropout before its norm, and
    a linear one that starts at 0. Parameters are stacked over the members, ``[members, ...]``.

    Args:
        inputs: width of the concatenated inputs.
        mlp_dim: width of the hidden layers.
        num_bins: outputs of a member.
        num_q: members.
        dropout: probability, in training mode.
    """

    def __init__(
        self, inputs: int, mlp_dim: int, num_bins: int, *, num_q: int = 5, dropout: float = 0.01
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.norm_weights, self.norm_biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise((inputs, mlp_dim, mlp_dim, num_bins)):
            weight = nn.Parameter(torch.empty(num_q, o, i))
            self.weights.append(nn.init.trunc_normal_(weight, std=0.02))
            self.biases.append(nn.Parameter(torch.zeros(num_q, o)))
        nn.init.zeros_(self.weights[-1])
        for _ in range(2):
            self.norm_weights.append(nn.Parameter(torch.ones(num_q, mlp_dim)))
            self.norm_biases.append(nn.Parameter(torch.zeros(num_q, mlp_dim)))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, -1)
        # One member after the other: measured on a CPU, faster than batched products, whose norms
        # need their weights applied by hand. (As many as there are: a loss may ask but a pair.)
        rows = [x] * self.biases[0].shape[0]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            layers = zip(rows, weight.unbind(0), bias.unbind(0), strict=True)
            rows = [functional.linear(*layer) for layer in layers]
            if i == len(self.norm_weights):
                break
            if i == 0 and self.dropout and self.training:
                rows = [functional.dropout(h, self.dropout) for h in rows]
            weight, bias = self.norm_weights[i], self.norm_biases[i]
            norms = zip(rows, weight.unbind(0), bias.unbind(0), strict=True)
            rows = [
                functional.mish(functional.layer_norm(h, h.shape[-1:], w, b)) for h, w, b in norms
            ]
        return torch.stack(rows, -2)


class QValues(nn.Module):
    """The value that each of an ensemble's members expects: latent, action and, if so, embedding to
    ``[*B, members]``.

    Args:
        ensemble: see :class:`QEnsemble`.
        two_hot: from logits to a value.
    """

    def __init__(self, ensemble: QEnsemble, two_hot: TwoHot) -> None:
        super().__init__()
        self.ensemble, self.two_hot = ensemble, two_hot

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.two_hot(self.ensemble(*inputs)).squeeze(-1)
