"""Model predictive path integral control with an advantage module."""

from __future__ import annotations

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules.planners.common import _mask_post_done_reward

from fastwm.planning.base import Planner, check_share
from fastwm.planning.imagination import Imagination
from fastwm.planning.returns import elites, moments, where_rows
from fastwm.planning.traced import Ask

__all__ = ["MPPIPlanner"]


class MPPIPlanner(Planner):
    """Model predictive path integral control: ``torchrl.modules.MPPIPlanner``, on the engines of rollouts.

    Draw action sequences from a Gaussian, zero mean and unit deviation at first; imagine them; take mean and
    deviation of the ``top_k`` of the highest advantage in the first state, weighted by
    ``exp(temperature * advantage)``; repeat. The action is the first of the last mean. From the same seed it
    is torchrl's, up to rounding. What torchrl does not do: states of any batch shape; advantages so large
    that their exponential overflows; and candidates whose advantage is inf or NaN are never among the best:
    where none is finite, mean and deviation stay, and a warning says so once. No gradient flows through the
    action.

    Each iteration is one rollout on an engine; the advantage module, any value estimator of torchrl's, is
    then run on its TensorDict. For the planner of TD-MPC2 see :class:`fastwm.planning.TDMPC2Planner`.

    Args:
        env: the imagined env, ``batch_size=[]``; see :class:`fastwm.planning.Planner`.
        advantage_module: writes ``"advantage"`` into a rollout, as
            ``torchrl.objectives.value.TDLambdaEstimator``.
        temperature: of the weights.
        planning_horizon: steps of a candidate.
        optim_steps: how often mean and deviation are fitted.
        num_candidates: action sequences drawn each time, per state.
        top_k: of these, how many they are fitted to.
        reward_key, action_key: ``("next", "reward")`` and ``"action"``.

    Keyword Args:
        backend: ``"auto"``, ``"fused"``, ``"captured"`` or ``"eager"``.

    Raises:
        ValueError: ``top_k`` above ``num_candidates``, or an env with a batch size of its own.

    Example:
        >>> import torch, fastwm
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP, ValueOperator
        >>> from torchrl.objectives.value import TDLambdaEstimator
        >>> from fastwm.planning import MPPIPlanner
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(5, 4, depth=0), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> env = fastwm.WorldModelEnv(world_model, GymEnv("Pendulum-v1"), batch_size=[])
        >>> value = ValueOperator(torch.nn.Linear(4, 1), in_keys=["latent"])
        >>> advantage = TDLambdaEstimator(gamma=0.99, lmbda=0.95, value_network=value)
        >>> planner = MPPIPlanner(env, advantage, 1.0, 5, 3, num_candidates=64, top_k=8)
        >>> start = world_model.encode(TensorDict({"observation": torch.randn(2, 3)}, [2]))
        >>> planner(start)["action"].shape
        torch.Size([2, 1])

    Source: Williams et al. 2015, "Model predictive path integral control using covariance variable importance
    sampling"; TorchRL 0.14's ``MPPIPlanner``.
    """

    temperature: Tensor
    _records = False  # the advantage module may do anything

    def __init__(
        self,
        env: EnvBase,
        advantage_module: nn.Module,
        temperature: float,
        planning_horizon: int,
        optim_steps: int,
        num_candidates: int,
        top_k: int,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(env, planning_horizon, reward_key, action_key, backend=backend)
        check_share("top_k", top_k, "num_candidates", num_candidates)
        self.advantage_module = advantage_module
        self.optim_steps = optim_steps
        self.num_candidates = num_candidates
        self.top_k = top_k
        self.register_buffer("temperature", torch.as_tensor(temperature))

    def _asks(self) -> list[Ask]:
        return [("rollout", self.num_candidates)]

    def _search(
        self, imagine: Imagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        mean, std = self._full(imagine, 0.0), self._full(imagine, 1.0)
        for _ in range(self.optim_steps):
            noise = self._randn(imagine, *self._sequences(imagine, self.num_candidates))
            actions = self._around(mean, std, noise)
            best = elites(self._advantages(imagine, actions), actions, self.top_k)
            weights = torch.softmax(self.temperature * best.returns, 1)
            mean, std = where_rows(best.found, moments(best, weights), (mean, std))
        return {"action": mean[:, 0], "found": best.found}

    def _advantages(self, imagine: Imagination, actions: Tensor) -> Tensor:
        """Of the first state under each sequence, ``[B, N]``."""
        rollout = imagine.rollout(actions)
        rewards = _mask_post_done_reward(
            rollout, reward_key=self.reward_key, done_key=list(self.keys.done)
        )
        rollout.set(self.reward_key, rewards)
        self.advantage_module(rollout)
        return rollout.get("advantage")[:, 0].reshape(actions.shape[:2])
