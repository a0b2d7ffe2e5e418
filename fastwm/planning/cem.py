"""The cross-entropy method."""

from __future__ import annotations

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs import EnvBase

from fastwm.planning.base import Planner, check_share
from fastwm.planning.imagination import Imagination
from fastwm.planning.returns import elites, moments, until_done, where_rows
from fastwm.planning.traced import Ask

__all__ = ["CEMPlanner"]


class CEMPlanner(Planner):
    """Cross-entropy method: ``torchrl.modules.CEMPlanner``, a decision in one call.

    Draw action sequences from a Gaussian, zero mean and unit deviation at first; imagine them; fit the
    Gaussian to the best; repeat. The action is the first of the last mean. From the same seed it is
    torchrl's, up to rounding. What torchrl does not do: states of any batch shape, the engines of
    :class:`fastwm.WorldModelEnv`, and candidates whose return is inf or NaN are never among the best. Where
    fewer than ``top_k`` are finite, the Gaussian is fitted to those; where none is, it stays as it is, and a
    warning says so once. With ``top_k=1`` its deviation is 0 (torchrl: NaN actions).

    Rewards after the first done flag count as 0, as in torchrl.

    Args:
        env: the imagined env, ``batch_size=[]``; see :class:`fastwm.planning.Planner`.
        planning_horizon: steps of a candidate.
        optim_steps: how often the Gaussian is fitted.
        num_candidates: action sequences drawn each time, per state.
        top_k: of these, how many it is fitted to.
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
        >>> from torchrl.modules import MLP
        >>> from fastwm.planning import CEMPlanner
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(5, 4, depth=0), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> env = fastwm.WorldModelEnv(world_model, GymEnv("Pendulum-v1"), batch_size=[])
        >>> planner = CEMPlanner(env, planning_horizon=5, optim_steps=3, num_candidates=64, top_k=8)
        >>> start = world_model.encode(TensorDict({"observation": torch.randn(2, 3)}, [2]))
        >>> planner(start)["action"].shape
        torch.Size([2, 1])

    Source: Botev et al. 2013, "The cross-entropy method for optimization"; TorchRL 0.14's ``CEMPlanner``.
    """

    def __init__(
        self,
        env: EnvBase,
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
        self.optim_steps = optim_steps
        self.num_candidates = num_candidates
        self.top_k = top_k

    def _asks(self) -> list[Ask]:
        return [("candidates", self.num_candidates)]

    def _search(
        self, imagine: Imagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        mean, std = self._full(imagine, 0.0), self._full(imagine, 1.0)
        for _ in range(self.optim_steps):
            noise = self._randn(imagine, *self._sequences(imagine, self.num_candidates))
            actions = self._around(mean, std, noise)
            imagined = imagine.candidates(actions)
            returns = until_done(imagined.rewards, imagined.done).sum(-1)
            best = elites(returns, actions, self.top_k)
            fitted = moments(best, torch.ones_like(best.returns), unbiased=True)
            mean, std = where_rows(best.found, fitted, (mean, std))
        return {"action": mean[:, 0], "found": best.found}
