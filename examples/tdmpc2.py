"""TD-MPC2: plan in the latent space of a model that learns latents, rewards and values together.

    python examples/tdmpc2.py --seed 0 --out example_results/tdmpc2

Episode by episode: play it by planning; then update the world model, the Q functions and the policy prior as
often as there were steps. Source: Hansen et al. 2024, "TD-MPC2", and its official repository; sizes are those
of `SETTINGS` below.

--backend is the engine of the planner's imagination and of the losses' latent rollout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import ActionScaling, Compose, EnvBase, InitTracker, TransformedEnv
from torchrl.objectives import SoftUpdate
from training import Run

from fastwm.models import Family
from fastwm.models.tdmpc2 import discount_of, tdmpc2
from fastwm.planning import TDMPC2Planner

# What the replay buffer holds of a transition.
TRANSITION = (
    "observation", "action",
    *(("next", key) for key in ("observation", "reward", "terminated")),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """In brackets the official values, where these differ: Pendulum is small, and this is a CPU.

    Args:
        enc_dim, mlp_dim, latent_dim, num_q: of the networks (256, 512, 512, 5; 5M parameters).
        num_samples, num_elites, num_pi_trajs, iterations: of the planner (512, 64, 24, 6).
        horizon: of the planner and of the losses.
        batch: sequences per update (256).
        learning_rate: the encoder's is 0.3 of it (3e-4, for a million steps and more).
        tau: of the target Q functions (0.01).
        random_episodes: played with random actions first.
        evaluate_every: so many episodes.
    """

    enc_dim: int = 64
    mlp_dim: int = 128
    latent_dim: int = 64
    num_q: int = 2
    num_samples: int = 128
    num_elites: int = 16
    num_pi_trajs: int = 8
    iterations: int = 4
    horizon: int = 3
    batch: int = 128
    learning_rate: float = 1e-3
    tau: float = 0.01
    random_episodes: int = 5
    evaluate_every: int = 2


SETTINGS = Settings()
QUICK = Settings(
    enc_dim=16, mlp_dim=16, latent_dim=16, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2,
    batch=16, random_episodes=1, evaluate_every=1,
)  # fmt: skip


def make_env(run: Run, count: int = 0) -> EnvBase:
    """The real env with actions in [-1, 1], which says when an episode begins: there plans begin anew."""
    return TransformedEnv(run.make_env(count), Compose(ActionScaling(), InitTracker()))


def make_actor(
    run: Run, family: Family, env: EnvBase, steps: int, settings: Settings
) -> TensorDictModuleBase:
    """Encode, then plan; the plan travels in the tensordict from step to step."""
    planner = TDMPC2Planner(
        family.env(env),
        policy=family.policy,
        value=family.value,
        discount=discount_of(steps),
        planning_horizon=settings.horizon,
        num_samples=settings.num_samples,
        num_elites=settings.num_elites,
        num_pi_trajs=settings.num_pi_trajs,
        iterations=settings.iterations,
        backend=run.backend,
    )
    return TensorDictSequential(family.world_model.encoder, planner)


class Learner:
    """The official update: the model and the Q functions, then the policy, then the targets."""

    def __init__(self, family: Family, settings: Settings) -> None:
        self.loss, rate = family.loss, settings.learning_rate
        self.model_optimizer = torch.optim.Adam(self.loss.parameter_groups(rate), lr=rate)
        self.policy_optimizer = torch.optim.Adam(family.policy.parameters(), lr=rate, eps=1e-5)
        self.target_update = SoftUpdate(self.loss, tau=settings.tau)

    def update(self, batch: TensorDictBase) -> TensorDictBase:
        losses, states = self.loss.model_losses(batch)
        self._step(self.model_optimizer, sum(losses.values()))
        of_policy = self.loss.policy_losses(states)
        self._step(self.policy_optimizer, of_policy["loss_policy"])
        self.target_update.step()
        return losses.update(of_policy).detach()

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 20.0)
        optimizer.step()


def main() -> None:
    episodic = {"action": "store_true", "help": "the task's episodes can terminate"}
    run = Run.from_command_line(
        "tdmpc2", __doc__, steps=4000, quick_steps=60, arguments={"--episodic": episodic}
    )
    settings = QUICK if run.quick else SETTINGS
    most = 20 if run.quick else gymnasium.spec(run.env).max_episode_steps or 1000
    env = make_env(run)
    family = tdmpc2(
        env,
        size="1M",
        enc_dim=settings.enc_dim,
        mlp_dim=settings.mlp_dim,
        latent_dim=settings.latent_dim,
        num_q=settings.num_q,
        episodic=run.options.episodic,
        episode_length=most,
        loss={"backend": run.backend},
    )
    learner = Learner(family, settings)
    actor = make_actor(run, family, env, most, settings)
    test_env = make_env(run, 2 if run.quick else 10)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100_000),
        sampler=SliceSampler(num_slices=settings.batch, traj_key="episode", strict_length=True),
        batch_size=settings.batch * settings.horizon,
    )
    run.keep(
        family=family.eval(), buffer=buffer,
        model_optimizer=learner.model_optimizer, policy_optimizer=learner.policy_optimizer,
    )  # fmt: skip

    step = run.load()
    episodes = run.values.get("episodes", 0)
    with run.progress(run.steps, initial=step) as bar:
        while step < run.steps:
            at_random = episodes < settings.random_episodes
            env.set_seed(1000 * run.seed + episodes)
            with torch.no_grad():
                played = env.rollout(most, None if at_random else actor).select(*TRANSITION)
            buffer.extend(played.set("episode", torch.full(played.shape, episodes)))
            step, episodes = step + len(played), episodes + 1
            bar.update(len(played))
            if episodes < settings.random_episodes:
                continue

            family.train()
            # The first time as often as there were random steps.
            for _ in range(len(buffer) if at_random else len(played)):
                batch = buffer.sample().reshape(settings.batch, settings.horizon)
                losses = learner.update(batch)
            family.eval()

            if episodes % settings.evaluate_every == 0:
                run.evaluate(step, actor, test_env, cpu_seconds=time.process_time(), **losses)
                run.save(step, episodes=episodes)
    run.finish()


if __name__ == "__main__":
    main()
