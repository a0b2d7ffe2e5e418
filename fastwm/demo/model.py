"""The world model of the pendulum: what it is, how it is trained, how far off it is."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import TensorDictReplayBuffer
from torchrl.modules import MLP
from tqdm import tqdm

import fastwm
from fastwm.demo.real import pendulum
from fastwm.demo.settings import Settings

__all__ = ["make_world_model", "prediction_error", "train"]


class Scale(nn.Module):
    """Encoder: the observation in units of its limits, ``[*B, O] -> [*B, O]``. Nothing to learn here."""

    limit: Tensor

    def __init__(self, limit: Tensor) -> None:
        super().__init__()
        self.register_buffer("limit", limit)

    def forward(self, observation: Tensor) -> Tensor:
        return observation / self.limit


class Head(nn.Module):
    """An MLP of latent and action whose output has the spread of what it predicts.

    ``start + scale * mlp(latent, action)``; dynamics start from the latent (they predict the change), the
    reward from the mean reward.
    """

    mean: Tensor | None
    scale: Tensor

    def __init__(self, inputs: int, width: int, mean: Tensor | None, scale: Tensor) -> None:
        super().__init__()
        self.mlp = MLP(
            in_features=inputs,
            out_features=scale.shape[-1],
            num_cells=[width, width],
            activation_class=nn.SiLU,
        )
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        start = latent if self.mean is None else self.mean
        return start + self.scale * self.mlp(torch.cat((latent, action), -1))


def make_world_model(data: TensorDictBase, width: int) -> fastwm.WorldModel:
    """A world model whose scales are taken from ``data``, real transitions of any batch."""
    env = pendulum()
    encoder = Scale(env.observation_spec["observation"].space.high)
    change = encoder(data["next", "observation"] - data["observation"])
    reward = data["next", "reward"]
    inputs = change.shape[-1] + env.action_spec.shape[-1]
    env.close()
    dynamics = Head(inputs, width, None, change.flatten(0, -2).square().mean(0).sqrt())
    rewards = Head(inputs, width, reward.mean().reshape(1), reward.std().reshape(1))
    return fastwm.WorldModel(
        TensorDictModule(encoder, in_keys=["observation"], out_keys=["latent"]),
        TensorDictModule(dynamics, in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        # Pendulum pays for where it is and what it does there, not for where that leads.
        TensorDictModule(rewards, in_keys=["latent", "action"], out_keys=[("next", "reward")]),
    )


def train(
    world_model: fastwm.WorldModel, buffer: TensorDictReplayBuffer, settings: Settings, label: str
) -> dict[str, float]:
    """Train on batches from the replay buffer; the losses are parts of the targets' variances.

    Returns:
        The mean of each loss over the last tenth of the updates.
    """
    dynamics, rewards = world_model.dynamics.module, world_model.reward_head.module
    loss = fastwm.WorldModelLoss(
        world_model,
        losses=["reward", "latent"],
        reward_weight=1 / rewards.scale.square().item(),
        latent_weight=1 / dynamics.scale.square().mean().item(),
    )
    loss.set_keys(predicted_latent=("next", "latent"), target_latent="target")
    optimizer = torch.optim.Adam(loss.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.updates)
    last = max(1, settings.updates // 10)
    total = dict.fromkeys(loss.out_keys, 0.0)
    with tqdm(total=settings.updates, desc=label, unit="update") as bar:
        for update in range(settings.updates):
            batch = buffer.sample(settings.batch)
            # The target is what the encoder makes of the observation that really followed.
            batch["target"] = world_model.encoder.module(batch["next", "observation"])
            losses = loss(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            schedule.step()
            if update >= settings.updates - last:
                for key in total:
                    total[key] += losses[key].item() / last
            bar.update()
    return total


@torch.no_grad()
def prediction_error(
    env: fastwm.WorldModelEnv, world_model: fastwm.WorldModel, played: TensorDictBase, steps: int
) -> dict[str, list[float]]:
    """Open-loop error, 1 to ``steps`` steps ahead, from every fifth step of held-out episodes.

    The model sees the start and the actions that were really played, nothing else.

    Args:
        env: the world model as an env of batch ``[]``.
        played: real transitions, ``[episodes, time]``.

    Returns:
        ``"state"``: RMSE of the latent over that of persistence ("it stays as it is"); ``"reward"``: RMSE
        over the reward's standard deviation. A perfect model has 0; a useless one 1.
    """
    starts = torch.arange(0, played.shape[1] - steps + 1, 5)
    ahead = [starts + i for i in range(steps)]
    latent = world_model.encoder.module(played["observation"])
    begin = latent[:, starts]
    imagined = env.rollout(
        steps,
        actions=[played["action"][:, i] for i in ahead],
        tensordict=TensorDict({"latent": begin}, begin.shape[:2]),
    )
    following = world_model.encoder.module(played["next", "observation"])
    reward = played["next", "reward"]
    error: dict[str, list[float]] = {"state": [], "reward": []}
    for i, real in enumerate(ahead):
        state = _rms(imagined["next", "latent"][:, :, i] - following[:, real])
        error["state"].append(state / _rms(begin - following[:, real]))
        off = _rms(imagined["next", "reward"][:, :, i] - reward[:, real])
        error["reward"].append(off / reward.std().item())
    return error


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item()
