"""Planning by imagination: CEM over the world model, acting in the real pendulum."""

from __future__ import annotations

from tensordict import TensorDictBase
from torchrl.modules import CEMPlanner

import fastwm
from fastwm.demo.settings import Settings

__all__ = ["Planned", "make_planner"]


def make_planner(env: fastwm.WorldModelEnv, settings: Settings) -> CEMPlanner:
    """torchrl's cross-entropy planner over an imagined env of batch ``[]``."""
    return CEMPlanner(
        env,
        planning_horizon=settings.horizon,
        optim_steps=settings.refinements,
        num_candidates=settings.candidates,
        top_k=settings.elites,
    )


class Planned:
    """A policy for the real env: encode what is seen, plan in imagination, play the first action."""

    def __init__(
        self, env: fastwm.WorldModelEnv, world_model: fastwm.WorldModel, settings: Settings
    ) -> None:
        self.env = env
        self.world_model = world_model
        self.planner = make_planner(env, settings)

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Observations ``[episodes, 3]`` in, ``"action"`` ``[episodes, 1]`` written: one plan for all."""
        seen = self.world_model.encode(tensordict.select("observation"))
        start = self.env.reset(seen.select("latent"))
        return tensordict.set("action", self.planner(start)["action"])
