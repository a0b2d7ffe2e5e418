"""Dreamer: an actor and a critic that learn in the latents of a recurrent state-space model.

    python examples/dreamer.py --seed 0 --out example_results/dreamer

Episode by episode: play one with the actor, plus exploration noise; then, update by update, train the
model on sequences of everything played so far, and from each of their states imagine the actor's future.
The actor climbs the gradient of the imagined returns, which runs through the model's dynamics; the critic
learns to predict them. Each action is repeated for two real steps, as Dreamer does, so an episode of
Pendulum-v1 has 100 decisions. Source: Hafner et al. 2020, "Dream to Control", algorithm 1; sizes are those of
`SETTINGS` below.

--classes torchrl imagines in torchrl's own DreamerEnv, around the same networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import DreamerEnv, EnvBase, FrameSkipTransform, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import WorldModelWrapper
from training import Run

import fastwm
from fastwm.models import RSSMFamily, dreamer_v1, insert_resets

LATENTS = ["state", "belief"]


@dataclass(frozen=True)
class Settings:
    """Sizes; where they differ from Dreamer's, it is because Pendulum is small.

    Args:
        action_repeat: real steps per decision (2).
        seed_episodes: played with random actions first (5).
        updates: of model, actor and critic after each episode (100).
        batch, length: sequences per update, and their steps (50, 50).
        horizon: steps imagined from each state of a batch (15).
        gamma, lmbda: of the imagined returns (0.99, 0.95).
        model_rate, actor_rate, value_rate: learning rates of Adam (6e-4, 8e-5, 8e-5).
        max_norm: of the gradients (100).
        belief, state, units, embedding: widths of the model (200, 30, 400, 1024).
        action_init_std: deviation of the actor's actions, before their tanh, at first (5).
        free_nats: of the divergence (3).
        reward_scale: rewards are learnt times this, which brings them to the range of Dreamer's tasks.
        reco_scale: of the observation's loss (0.5, summed over 12,288 pixels and not over 3 numbers).
        noise: deviation of the exploration noise, in actions of [-1, 1] (0.3).
        evaluate_every: episodes.
    """

    action_repeat: int = 2
    seed_episodes: int = 5
    updates: int = 100
    batch: int = 32
    length: int = 16
    horizon: int = 15
    gamma: float = 0.99
    lmbda: float = 0.95
    model_rate: float = 1e-3
    actor_rate: float = 3e-4
    value_rate: float = 3e-4
    max_norm: float = 100.0
    belief: int = 64
    state: int = 10
    units: int = 64
    embedding: int = 64
    action_init_std: float = 1.0
    free_nats: float = 1.0
    reward_scale: float = 0.1
    reco_scale: float = 10.0
    noise: float = 0.3
    evaluate_every: int = 5


SETTINGS = Settings()
QUICK = Settings(
    seed_episodes=1, updates=2, batch=4, length=5, horizon=3, belief=16, state=4, units=16,
    embedding=16, evaluate_every=1,
)  # fmt: skip


class ExplorationNoise(nn.Module):
    """Gaussian noise on the actions where something is to be explored, kept within bounds."""

    def __init__(self, env: EnvBase, deviation: float) -> None:
        super().__init__()
        space = env.full_action_spec_unbatched["action"].space
        self.low, self.high = space.low, space.high
        self.deviation = deviation * (self.high - self.low) / 2

    def forward(self, action: Tensor) -> Tensor:
        if exploration_type() is ExplorationType.RANDOM:
            action = action + self.deviation * torch.randn_like(action)
        return action.clamp(self.low, self.high)


def make_family(env: EnvBase, settings: Settings, backend: str) -> RSSMFamily:
    family = dreamer_v1(
        env,
        deter_size=settings.belief,
        stoch_size=settings.state,
        num_units=settings.units,
        embedding=settings.embedding,
        action_init_std=settings.action_init_std,
        free_nats=settings.free_nats,
    )
    family.loss.lambda_reco = settings.reco_scale
    family.rollout.backend = backend
    return family


def imagined_env(run: Run, family: RSSMFamily, env: EnvBase) -> EnvBase:
    """The model as an env, on fastwm's class or on torchrl's own."""
    if run.classes == "fastwm":
        return family.env(env, backend=run.backend)
    dynamics, reward = family.world_model.dynamics, family.world_model.reward_head
    dreams = DreamerEnv(
        WorldModelWrapper(
            TensorDictModule(dynamics.module, [*LATENTS, "action"], ["_", "_", *LATENTS]),
            TensorDictModule(reward.module, LATENTS, ["reward"]),
        ),
        *family.sizes,
    )
    widths = zip(LATENTS, family.sizes, strict=True)
    dreams.observation_spec = Composite({key: Unbounded(width) for key, width in widths})
    dreams.state_spec = dreams.observation_spec.clone()
    dreams.action_spec, dreams.reward_spec = env.action_spec.clone(), Unbounded(1)
    return dreams


def sequences(buffer: TensorDictReplayBuffer, batch: int, length: int) -> TensorDictBase:
    """Sequences ``[batch, length]`` from any place of what was played; they may cross episodes."""
    start = torch.randint(len(buffer) - length + 1, (batch, 1))
    return buffer[start + torch.arange(length)]


class Learner:
    """Model, actor and critic, each with its optimizer."""

    def __init__(self, family: RSSMFamily, env: EnvBase, settings: Settings) -> None:
        self.family, self.env, self.settings = family, env, settings
        self.parts = {"model": family.loss, "actor": family.policy, "value": family.value}
        rates = settings.model_rate, settings.actor_rate, settings.value_rate
        self.optimizers = {
            name: torch.optim.Adam(part.parameters(), rate, fused=True)
            for (name, part), rate in zip(self.parts.items(), rates, strict=True)
        }

    def update(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One step of each, on sequences ``[B, T]``."""
        settings, family = self.settings, self.family
        losses, batch = family.loss(batch)
        self.step("model", sum(losses.values()))

        start = batch["next"].select(*LATENTS).flatten(0, 1)
        dream = fastwm.imagine(
            self.env, family.policy, start, settings.horizon, value=family.value,
            gamma=settings.gamma, lmbda=settings.lmbda, stop_policy_inputs=True, policy_terms=False,
        )  # fmt: skip
        weight, target = dream["discount_weight"], dream["lambda_target"]
        self.step("actor", -(weight * target).mean())

        predicted = family.value(dream.select(*LATENTS).detach())["state_value"]
        error = (weight * (predicted - target.detach()).square()).mean() / 2
        self.step("value", error)
        return {**losses, "imagined_return": target.mean(), "value_error": error}

    def step(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts[name].parameters(), self.settings.max_norm)
        self.optimizers[name].step()


def main() -> None:
    run = Run.from_command_line(
        "dreamer", __doc__, steps=15_000, quick_steps=80, classes=("fastwm", "torchrl")
    )
    settings = QUICK if run.quick else SETTINGS
    base_env = run.make_env()
    family = make_family(base_env, settings, run.backend)
    learner = Learner(family, imagined_env(run, family, base_env), settings)
    noise = TensorDictModule(ExplorationNoise(base_env, settings.noise), ["action"], ["action"])
    actor = family.actor(TensorDictSequential(family.policy, noise))
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    run.keep(family=family, buffer=buffer, **learner.optimizers)

    repeat = FrameSkipTransform(settings.action_repeat)
    env = family.real_env(TransformedEnv(base_env, repeat))
    test_env = family.real_env(TransformedEnv(run.make_env(2 if run.quick else 10), repeat.clone()))
    decisions = (20 if run.quick else 200) // settings.action_repeat

    step = run.load()
    with run.progress(run.steps, initial=step) as bar:
        while step < run.steps:
            episode = step // (decisions * settings.action_repeat)
            env.set_seed(1000 * run.seed + episode)
            with torch.no_grad():
                played = env.rollout(
                    decisions, actor if episode >= settings.seed_episodes else None
                )
            rows = insert_resets(played)
            rows["next", "reward"] *= settings.reward_scale
            buffer.extend(rows)
            step += decisions * settings.action_repeat
            bar.update(decisions * settings.action_repeat)
            if episode + 1 < settings.seed_episodes:
                continue

            found: dict[str, Any] = {}
            for _ in range(settings.updates):
                found = learner.update(sequences(buffer, settings.batch, settings.length))
            if (episode + 1) % settings.evaluate_every == 0 or step >= run.steps:
                scalars = {key: value.item() for key, value in found.items()}
                run.evaluate(step, actor, test_env, decisions, **scalars)
                run.save(step)
    run.finish()


if __name__ == "__main__":
    main()
