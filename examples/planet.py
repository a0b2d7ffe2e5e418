"""PlaNet: a recurrent state-space model from vectors, acted with by planning in its latents.

    python examples/planet.py --seed 0 --out example_results/planet

Episode by episode: play one, planning each action with the cross-entropy method in the latents, plus
exploration noise; then train the model on sequences of everything played so far. Each action is
repeated for two real steps, as PlaNet does, so an episode of Pendulum-v1 has 100 decisions. Source:
Hafner et al. 2019, "Learning Latent Dynamics for Planning from Pixels", algorithm 1; sizes are those of
`SETTINGS` below.

--classes torchrl runs the same modules on torchrl's RSSMRolloutV3, DreamerEnv and CEMPlanner (RSSMRolloutV3,
because its first RSSMRollout knows no resets; the prior takes the planner's two batch dims, which
torchrl's own refuses).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, FrameSkipTransform, TransformedEnv
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import CEMPlanner as TorchRLPlanner
from torchrl.modules import RSSMRolloutV3, WorldModelWrapper
from training import Run

from fastwm.models import RSSMFamily, insert_resets, planet
from fastwm.planning import CEMPlanner


@dataclass(frozen=True)
class Settings:
    """Sizes; where they differ from PlaNet's, it is because Pendulum is small.

    Args:
        action_repeat: real steps per decision (2 to 8 in PlaNet, by task).
        seed_episodes: played with random actions first (5).
        updates: of the model after each episode (100).
        batch, length: sequences per update, and their steps (50, 50).
        learning_rate, epsilon, max_norm: of Adam, and of the gradients (1e-3, 1e-4, 1000).
        belief, state, units, embedding: widths of the model (200, 30, 200, 1024).
        reward_scale: rewards are learnt times this, which brings them to the range of PlaNet's tasks.
        free_nats: divergence per step that costs nothing (3). Three numbers tell little: 3 nats would
            leave the prior far from the posterior, and a plan wrong by as much.
        reco_loss, reward_loss: weights of the likelihoods (1, which sums 12,288 pixels, and 10).
        horizon, iterations, candidates, best: of the planner (12, 10, 1000, 100).
        noise: deviation of the exploration noise, in actions of [-1, 1] (0.3).
        evaluate_every: episodes.
    """

    action_repeat: int = 2
    seed_episodes: int = 5
    updates: int = 200
    batch: int = 50
    length: int = 30
    learning_rate: float = 1e-3
    epsilon: float = 1e-4
    max_norm: float = 1000.0
    belief: int = 100
    state: int = 10
    units: int = 100
    embedding: int = 100
    reward_scale: float = 0.1
    free_nats: float = 1.0
    reco_loss: float = 100.0
    reward_loss: float = 100.0
    horizon: int = 12
    iterations: int = 4
    candidates: int = 100
    best: int = 10
    noise: float = 0.3
    evaluate_every: int = 5


SETTINGS = Settings()
QUICK = Settings(
    seed_episodes=1, updates=2, batch=4, length=5, belief=16, state=4, units=16, embedding=16,
    horizon=3, iterations=2, candidates=8, best=2, evaluate_every=1,
)  # fmt: skip


class ExplorationNoise(torch.nn.Module):
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


def make_policy(
    family: RSSMFamily, env: EnvBase, settings: Settings, run: Run
) -> TensorDictSequential:
    """Filters what is observed, plans from there, adds noise."""
    arguments = {
        "planning_horizon": settings.horizon,
        "optim_steps": settings.iterations,
        "num_candidates": settings.candidates,
        "top_k": settings.best,
    }
    planner: TensorDictModuleBase
    if run.classes == "torchrl":
        planner = TorchRLPlanner(torchrl_env(family, env), **arguments)
    else:
        imagined = family.env(env, backend=run.backend)
        planner = CEMPlanner(imagined, **arguments, backend=run.backend)
    noise = TensorDictModule(ExplorationNoise(env, settings.noise), ["action"], ["action"])
    return family.actor(TensorDictSequential(planner, noise))


def torchrl_env(family: RSSMFamily, env: EnvBase) -> DreamerEnv:
    """The family's prior and reward head as torchrl's imagined env; its rollout put in the place of ours."""
    rollout = RSSMRolloutV3(family.rollout.rssm_prior, family.rollout.rssm_posterior)
    family.observe[0].module[2] = rollout
    model, latents = family.world_model, ["state", "belief"]
    step = TensorDictModule(model.dynamics.module, [*latents, "action"], ["_", "_", *latents])
    reward = TensorDictModule(model.reward_head.module, latents, ["reward"])
    state, belief = (torch.Size([width]) for width in family.sizes)
    imagined = DreamerEnv(WorldModelWrapper(TensorDictSequential(step), reward), state, belief)
    imagined.set_specs_from_env(family.real_env(env))
    return imagined


def sequences(buffer: TensorDictReplayBuffer, batch: int, length: int) -> TensorDictBase:
    """Sequences ``[batch, length]`` from any place of what was played; they may cross episodes."""
    start = torch.randint(len(buffer) - length + 1, (batch, 1))
    return buffer[start + torch.arange(length)]


def train(
    family: RSSMFamily,
    optimizer: torch.optim.Adam,
    buffer: TensorDictReplayBuffer,
    settings: Settings,
) -> dict[str, float]:
    """Some updates of the model; the losses of the last one."""
    for _ in range(settings.updates):
        losses, _ = family.loss(sequences(buffer, settings.batch, settings.length))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(family.loss.parameters(), settings.max_norm)
        optimizer.step()
    return {key: value.item() for key, value in losses.items()}


def main() -> None:
    run = Run.from_command_line(
        "planet", __doc__, steps=5000, quick_steps=60, classes=("fastwm", "torchrl")
    )
    settings = QUICK if run.quick else SETTINGS
    repeat = FrameSkipTransform(settings.action_repeat)

    base_env = run.make_env()
    family = planet(
        base_env,
        deter_size=settings.belief,
        stoch_size=settings.state,
        num_units=settings.units,
        embedding=settings.embedding,
        free_nats=settings.free_nats,
        image_loss_scale=settings.reco_loss,
        reward_loss_scale=settings.reward_loss,
    )
    family.rollout.backend = run.backend
    policy = make_policy(family, base_env, settings, run)
    optimizer = torch.optim.Adam(
        family.loss.parameters(), settings.learning_rate, eps=settings.epsilon
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    run.keep(family=family, optimizer=optimizer, buffer=buffer)

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
                    decisions, policy if episode >= settings.seed_episodes else None
                )
            rows = insert_resets(played)
            rows["next", "reward"] *= settings.reward_scale
            buffer.extend(rows)
            step += decisions * settings.action_repeat
            bar.update(decisions * settings.action_repeat)
            if episode + 1 < settings.seed_episodes:
                continue

            losses = train(family, optimizer, buffer, settings)
            if (episode + 1) % settings.evaluate_every == 0 or step >= run.steps:
                run.evaluate(step, policy, test_env, decisions, **losses)
                run.save(step)
    run.finish()


if __name__ == "__main__":
    main()
