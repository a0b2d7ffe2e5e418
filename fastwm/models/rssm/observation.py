"""Observation models of the recurrent state-space families: encoder and decoder for vectors and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import (
    MLP,
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    ObsDecoder,
    ObsEncoder,
)
from torchrl.modules.functional import symexp, symlog

__all__ = [
    "ObservationModel",
    "conv_observation",
    "conv_observation_v3",
    "dense_observation",
    "dense_observation_v3",
    "observation_shape",
]


@dataclass(frozen=True)
class ObservationModel:
    """Encoder and decoder of one observation.

    Attributes:
        encoder: ``[*B, *shape] -> [*B, embedding]``.
        decoder: ``(state, belief) -> [*B, *shape]``.
        embedding: width of what the encoder says.
        shape: of an observation.
    """

    encoder: nn.Module
    decoder: nn.Module
    embedding: int
    shape: torch.Size

    @property
    def image(self) -> bool:
        """Whether it is an image ``[C, H, W]`` and no vector."""
        return len(self.shape) == 3


def observation_shape(base_env: EnvBase, key: NestedKey) -> torch.Size:
    """The shape of a vector ``[O]`` or of a float image ``[C, H, W]`` that the env emits.

    Raises:
        KeyError: the env has no such observation; names those that it has.
        ValueError: it is neither, or an image of integers.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models.rssm.observation import observation_shape
        >>> observation_shape(GymEnv("Pendulum-v1"), "observation")
        torch.Size([3])
    """
    specs = base_env.full_observation_spec
    if key not in specs.keys(True, True):
        raise KeyError(
            f"The env has no observation {key!r}; it has {list(specs.keys(True, True))}."
        )
    spec = specs[key]
    shape = torch.Size(spec.shape[len(base_env.batch_size) :])
    if len(shape) not in (1, 3):
        raise ValueError(
            f"{key!r} must be a vector [O] or an image [C, H, W], its shape is {tuple(shape)}."
        )
    if not spec.dtype.is_floating_point:
        raise ValueError(
            f"{key!r} must be floating point, it is {spec.dtype}: append "
            "torchrl.envs.ToTensorImage() or DoubleToFloat() to the env."
        )
    return shape


def dense_observation(
    shape: torch.Size,
    latent: int,
    *,
    layers: int,
    units: int,
    embedding: int,
    activation: Callable[[], nn.Module] = nn.ELU,
) -> ObservationModel:
    """Two ``torchrl.modules.MLP``: of a vector ``[O]``, and back from state and belief.

    Args:
        shape: ``[O]``.
        latent: width of state and belief together.

    Keyword Args:
        layers, units: hidden layers of each, and their width.
        embedding: width of the embedding.
        activation: between the layers.
    """
    encoder = MLP(shape[0], embedding, depth=layers, num_cells=units, activation_class=activation)
    decoder = MLP(latent, shape[0], depth=layers, num_cells=units, activation_class=activation)
    return ObservationModel(encoder, decoder, embedding, shape)


def conv_observation(shape: torch.Size, latent: int, *, channels: int = 32) -> ObservationModel:
    """``torchrl.modules.ObsEncoder`` and ``ObsDecoder``, for images of 64 x 64 pixels.

    Four convolutions of stride 2, as Ha and Schmidhuber 2018 ("World Models") have them and as PlaNet
    and Dreamer took them over. With 32 channels the embedding is 1024 wide.

    Args:
        shape: ``[C, 64, 64]``.
        latent: width of state and belief together.

    Keyword Args:
        channels: of the first layer; they double with each.

    Raises:
        ValueError: an image of another size.
    """
    if shape[1:] != (64, 64):
        raise ValueError(
            f"The image must be [C, 64, 64], its shape is {tuple(shape)}: append "
            "torchrl.envs.Resize(64, 64) to the env."
        )
    encoder = ObsEncoder(channels, in_channels=shape[0])
    decoder = ObsDecoder(channels, latent_dim=latent, out_channels=shape[0])
    return ObservationModel(encoder, decoder, 32 * channels, shape)


class _InSymlog(nn.Module):
    """A network on the symlog of a vector."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(symlog(x))


class _FromSymlog(nn.Module):
    """A network that says the symlog of a vector."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        return symexp(self.net(state, belief))


def dense_observation_v3(
    shape: torch.Size, latent: int, *, layers: int = 3, units: int
) -> ObservationModel:
    """Two ``torchrl.modules.DreamerV3MLP`` on symlogs; the embedding is the last hidden layer.

    Args:
        shape: ``[O]``.
        latent: width of state and belief together.

    Keyword Args:
        layers, units: of each. 3 (official repository, ``configs.yaml``).
    """
    encoder = DreamerV3MLP(shape[0], None, depth=layers, num_cells=units)
    decoder = DreamerV3MLP(latent, shape[0], depth=layers, num_cells=units)
    return ObservationModel(_InSymlog(encoder), _FromSymlog(decoder), units, shape)


def conv_observation_v3(
    shape: torch.Size, latent: int, *, depth: int, mults: tuple[int, ...] = (2, 3, 4, 4)
) -> ObservationModel:
    """``torchrl.modules.DreamerV3ImageEncoder`` and ``DreamerV3ImageDecoder``.

    They halve by strides; the official repository's default halves by max-pooling, and its decoder
    projects state and belief apart.

    Args:
        shape: ``[C, H, W]``, in [0, 1].
        latent: width of state and belief together, a multiple of 8.

    Keyword Args:
        depth, mults: stage ``i`` has ``depth * mults[i]`` channels. (2, 3, 4, 4) (``configs.yaml``).

    Raises:
        ValueError: height or width cannot be halved at each stage.
    """
    encoder = DreamerV3ImageEncoder(shape[0], depth, mults)
    decoder = DreamerV3ImageDecoder(latent, tuple(shape), depth, mults)
    return ObservationModel(encoder, decoder, encoder.output_features(tuple(shape)), shape)
