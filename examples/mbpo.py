"""MBPO: soft actor-critic that learns from short branches imagined from real states.

    python examples/mbpo.py --seed 0 --out example_results/mbpo

Block by block of 200 real steps: act; train the ensemble on all real transitions until its error on
held-out ones no longer falls; imagine branches under the policy from real states; update the policy on
what was imagined, with a little of the real. Source: Janner et al. 2019, "When to Trust Your Model",
algorithm 2; sizes are those of `SETTINGS` below.

--classes torchrl imagines on torchrl's own WorldModel and WorldModelEnv, around the same modules. They need
help (torchrl 0.14.1): a batched base env, and rewards given their last dim back; so their env has a fixed
batch size, and tasks that terminate cannot run (its rollout raises once a row is done).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import EnvBase, ExplorationType
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from training import Run

import fastwm
from fastwm.models import Family, mbpo
from fastwm.models.mbpo import fit, parameter_groups, rollout_length, terminations

# How episodes of these tasks end; others are taken not to.
TERMINATIONS = {
    "InvertedPendulum": terminations.inverted_pendulum,
    "Hopper": terminations.hopper,
    "Walker2d": terminations.walker2d,
}
# What the replay buffers hold of a transition.
TRANSITION = (
    "observation", "action",
    *(("next", key) for key in ("observation", "reward", "done", "terminated")),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Sizes; where they differ from MBPO's, it is because Pendulum is small.

    Args:
        block: real steps between two trainings of the model (250 in MBPO).
        random_blocks: played with random actions first.
        branches: imagined from real states per block (400 per real step); at 20 steps each, as many
            transitions as the updates until the next block read.
        lengths, blocks: the branches' length goes from the first to the second over these blocks.
        retained: blocks of the longest branches that are kept (4).
        updates: of the policy per real step (20 to 40).
        batch, real_ratio: rows per update, and the part of them that is real (256, 0.05).
        hidden: of the ensemble (4 x 200).
        width: of the two hidden layers of policy and critics (256).
        gamma, tau, learning_rate: of SAC (0.99, 0.005, 3e-4).
        model_learning_rate, model_batch: of the ensemble (1e-3, 256); 32 as in PETS, for 400 transitions
            are two batches of 256.
        model_epochs: at most, in each training.
    """

    block: int = 200
    random_blocks: int = 2
    branches: int = 20_000
    lengths: tuple[int, int] = (1, 20)
    blocks: tuple[int, int] = (1, 5)
    retained: int = 1
    updates: int = 10
    batch: int = 256
    real_ratio: float = 0.05
    hidden: tuple[int, ...] = (200,) * 4
    width: int = 128
    gamma: float = 0.98
    tau: float = 0.01
    learning_rate: float = 1e-3
    model_learning_rate: float = 1e-3
    model_batch: int = 32
    model_epochs: int = 60


SETTINGS = Settings()
QUICK = Settings(
    block=20, random_blocks=1, branches=50, lengths=(1, 3), blocks=(0, 2), updates=1, batch=32,
    hidden=(16, 16), width=16, model_epochs=3,
)  # fmt: skip


def make_sac(env: EnvBase, settings: Settings) -> tuple[SACLoss, ProbabilisticActor]:
    """torchrl's SAC with a tanh-Gaussian actor and two critics."""
    wide, narrow = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    cells = {"num_cells": [settings.width] * 2, "activation_class": nn.ReLU}
    net = nn.Sequential(MLP(wide, 2 * narrow, **cells), NormalParamExtractor())
    space = env.action_spec.space
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high},
        default_interaction_type=ExplorationType.RANDOM,  # evaluation asks for the mode
    )
    critic = ValueOperator(MLP(wide + narrow, 1, **cells), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, action_spec=env.action_spec, loss_function="l2")
    loss.make_value_estimator(gamma=settings.gamma)
    return loss, actor


def make_model(env: EnvBase, name: str, settings: Settings) -> tuple[Family, torch.optim.Adam]:
    """The ensemble and its optimizer; MBPO's weight decay where the layers are MBPO's five."""
    rule = next((rule for task, rule in TERMINATIONS.items() if name.startswith(task)), None)
    family = mbpo(env, hidden=settings.hidden, termination=rule)
    mbpos = len(settings.hidden) == 4
    parameters = parameter_groups(family.loss) if mbpos else family.loss.parameters()
    return family, torch.optim.Adam(parameters, lr=settings.model_learning_rate, fused=True)


def imagined_env(run: Run, family: Family, env: EnvBase, batch: int) -> EnvBase:
    """The model as an env, on fastwm's classes or on torchrl's own."""
    if run.classes == "fastwm":
        return family.env(env, backend=run.backend)
    from torchrl.envs import WorldModelEnv
    from torchrl.modules import WorldModel

    base_env = fastwm.WorldModelEnv(
        family.world_model, env, batch_size=[batch], latent_key="observation"
    )
    base_env.action_spec = Unbounded(base_env.action_spec.shape)
    model = family.world_model
    parts = WorldModel(model.encoder, model.dynamics, model.reward_head, done_head=model.done_head)
    return WorldModelEnv(parts, base_env, batch_size=[batch], latent_key="observation")


@torch.no_grad()
def imagine(
    env: EnvBase, actor: ProbabilisticActor, starts: torch.Tensor, length: int
) -> TensorDictBase:
    """Branches from real observations ``[B, O]``, as transitions; nothing after a branch's end."""
    start = TensorDict({"observation": starts}, [starts.shape[0]])
    branches = env.rollout(length, actor, tensordict=start, break_when_any_done=False)
    done = branches["next", "done"].reshape(branches.shape)
    before_the_end = done.cumsum(1) - done.long() == 0
    # torchrl's own env loses the reward's last dim.
    branches["next", "reward"] = branches["next", "reward"].reshape(*branches.shape, 1)
    return branches.select(*TRANSITION)[before_the_end]


class Mixed:
    """Batches of imagined transitions with a part of real ones."""

    def __init__(
        self, real: TensorDictReplayBuffer, imagined: TensorDictReplayBuffer, settings: Settings
    ) -> None:
        self.real, self.imagined = real, imagined
        self.of_real = math.ceil(settings.real_ratio * settings.batch)
        self.of_imagined = settings.batch - self.of_real

    def sample(self) -> TensorDictBase:
        parts = self.real.sample(self.of_real), self.imagined.sample(self.of_imagined)
        return torch.cat([part.select(*TRANSITION) for part in parts])


def main() -> None:
    run = Run.from_command_line(
        "mbpo", __doc__, steps=2000, quick_steps=60, classes=("fastwm", "torchrl")
    )
    settings = QUICK if run.quick else SETTINGS
    real_env = run.make_env()
    family, model_optimizer = make_model(real_env, run.env, settings)
    sac, actor = make_sac(real_env, settings)
    optimizer = torch.optim.Adam(sac.parameters(), lr=settings.learning_rate, fused=True)
    target_update = SoftUpdate(sac, tau=settings.tau)
    env = imagined_env(run, family, real_env, settings.branches)

    capacity = settings.retained * settings.branches * max(settings.lengths)
    real = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    imagined = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))
    mixed = Mixed(real, imagined, settings)
    run.keep(
        family=family, model_optimizer=model_optimizer, sac=sac, optimizer=optimizer,
        real=real, imagined=imagined,
    )  # fmt: skip

    step = run.load()
    with run.progress(run.steps, initial=step) as bar:
        while step < run.steps:
            block = step // settings.block
            real_env.set_seed(1000 * run.seed + block)
            with torch.no_grad():
                policy = None if block < settings.random_blocks else actor
                played = real_env.rollout(settings.block, policy, break_when_any_done=False)
            real.extend(played.select(*TRANSITION).reshape(-1))
            step += settings.block
            bar.update(settings.block)
            if block + 1 < settings.random_blocks:
                continue

            fitted = fit(
                family.loss,
                model_optimizer,
                real[:],
                batch_size=settings.model_batch,
                max_epochs=settings.model_epochs,
            )

            length = rollout_length(block, epochs=settings.blocks, lengths=settings.lengths)
            starts = real.sample(settings.branches)["observation"]
            imagined.extend(imagine(env, actor, starts, length))

            for _ in range(settings.updates * settings.block):
                losses = sac(mixed.sample())
                optimizer.zero_grad()
                sum(losses[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
                optimizer.step()
                target_update.step()

            error = fitted.error[fitted.elites].mean().item()
            run.evaluate(step, actor, model_error=error, model_epochs=fitted.epochs, length=length)
            run.save(step)
    run.finish()


if __name__ == "__main__":
    main()
