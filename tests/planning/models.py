"""A small model of TD-MPC2's make for the planners' tests, as TensorDict modules and as plain functions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

import fastwm
from fastwm.models.layers import Concat, SimNorm, TwoHot, mlp
from tests.models import module, spec_env

OBS, LATENT, ACTION, HIDDEN, MEMBERS = 5, 16, 2, 24, 5
ENGINES = ["eager", "captured", "fused"]


class Prior(nn.Module):
    """Draws an action in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp((LATENT, HIDDEN, 2 * ACTION), nn.Mish, norm=nn.LayerNorm)

    def forward(self, latent: Tensor) -> Tensor:
        mean, log_std = self.net(latent).chunk(2, -1)
        return torch.tanh(mean + torch.randn_like(mean) * torch.tanh(log_std).exp())


class Ensemble(nn.Module):
    """Values of a latent and an action, ``[..., members]``."""

    def __init__(self, members: int = MEMBERS) -> None:
        super().__init__()
        sizes = LATENT + ACTION, HIDDEN, 101
        self.nets = nn.ModuleList(
            Concat(mlp(sizes, nn.Mish, norm=nn.LayerNorm), TwoHot()) for _ in range(members)
        )

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.cat([net(latent, action) for net in self.nets], -1)


class Parts(nn.Module):
    """Everything that plans.

    Args:
        done: with a head that ends episodes, about half of them.
        members: of the value.
    """

    def __init__(self, *, done: bool = False, members: int = MEMBERS) -> None:
        super().__init__()
        sizes = LATENT + ACTION, HIDDEN
        self.encoder = nn.Sequential(nn.Linear(OBS, LATENT), SimNorm())
        self.dynamics = Concat(mlp((*sizes, LATENT), nn.Mish, norm=nn.LayerNorm), SimNorm())
        self.reward = Concat(mlp((*sizes, 101), nn.Mish, norm=nn.LayerNorm), TwoHot())
        self.ends = nn.Linear(LATENT, 1) if done else None
        self.prior = Prior()
        self.ensemble = Ensemble(members)
        for net in [self.reward, *self.ensemble.nets]:  # so that rewards and values differ from 0
            net.net[-1].weight.data.mul_(4)
        self.policy = module(self.prior, ["latent"], ["action"])
        if done:
            self._end_half()
        self.value = module(self.ensemble, ["latent", "action"], ["state_action_value"])

    def world_model(self) -> fastwm.WorldModel:
        done = (
            None
            if self.ends is None
            else module(self.done, [("next", "latent")], [("next", "done")])
        )
        return fastwm.WorldModel(
            module(self.encoder, ["observation"], ["latent"]),
            module(self.dynamics, ["latent", "action"], [("next", "latent")]),
            module(self.reward, ["latent", "action"], [("next", "reward")]),
            done_head=done,
        )

    def done(self, latent: Tensor) -> Tensor:
        assert self.ends is not None
        return torch.sigmoid(self.ends(latent))

    @torch.no_grad()
    def _end_half(self) -> None:
        """Set the head's bias so that half of the episodes end within three steps."""
        assert self.ends is not None
        latent, highest = self.start(500)["latent"], []
        for _ in range(3):
            latent = self.dynamics(latent, self.prior(latent))
            highest.append(self.ends(latent))
        self.ends.bias -= torch.stack(highest).amax(0).median()

    def env(self, **kwargs: Any) -> fastwm.WorldModelEnv:
        base = spec_env(obs=OBS, action=ACTION, bounded=True)
        return fastwm.WorldModelEnv(self.world_model(), base, batch_size=[], **kwargs)

    def start(self, *batch: int) -> TensorDict:
        seen = torch.randn(*batch, OBS, device=self.encoder[0].weight.device)
        return TensorDict({"latent": self.encoder(seen).detach()}, batch)
