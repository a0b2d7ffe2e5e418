"""The real pendulum: Gymnasium's Pendulum-v1 through torchrl's GymEnv."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torchrl.envs import GymEnv, SerialEnv
from tqdm import tqdm

__all__ = ["pendulum", "play", "returns"]

Policy = Callable[[TensorDictBase], TensorDictBase]


def pendulum() -> GymEnv:
    """Pendulum-v1: swing a rod upright and hold it there.

    Observation ``[3]``: cosine and sine of the angle, angular velocity (-8 to 8). Action ``[1]``:
    torque (-2 to 2). Reward ``[1]``: ``-(angle^2 + 0.1 velocity^2 + 0.001 torque^2)``, before the step.
    """
    return GymEnv("Pendulum-v1")


def play(
    episodes: int, steps: int, seed: int, label: str, policy: Policy | None = None
) -> TensorDictBase:
    """Play episodes side by side, with random actions where there is no policy.

    Returns:
        Transitions of batch ``[episodes, steps]``. One seed means the same starts, whatever the policy.
    """
    threads = torch.get_num_threads()
    env = SerialEnv(episodes, pendulum)
    env.set_seed(seed)
    try:
        with torch.no_grad(), tqdm(total=steps, desc=label, unit="step") as bar:
            played = env.rollout(steps, policy, callback=lambda *_: bar.update())
            bar.update(steps - bar.n)  # the last step calls no callback
            return played
    finally:
        env.close()
        # Closing a batched env of torchrl 0.14.1 raises the number of threads.
        torch.set_num_threads(threads)


def returns(played: TensorDictBase) -> torch.Tensor:
    """The summed reward of each episode, ``[episodes]``."""
    return played["next", "reward"].sum((-2, -1))
