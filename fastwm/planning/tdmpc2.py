"""TD-MPC2's planner: MPPI with a policy prior, a value at the end, and the last plan to begin with."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fastwm.planning.base import Planner, check_share
from fastwm.planning.imagination import Imagination, Imagined
from fastwm.planning.returns import elites, moments, until_done, where_rows
from fastwm.planning.traced import Ask

__all__ = ["TDMPC2Planner"]

_LARGE_ACTION = 20  # from so many action dims on the official code takes two more iterations


class TDMPC2Planner(Planner):
    """The planner of TD-MPC and TD-MPC2: model predictive path integral control around a learned policy.

    Each iteration draws action sequences from a Gaussian, adds those that the policy played in imagination,
    scores each by its discounted rewards and the value of its last latent, and moves mean and deviation to
    the best, weighted by ``exp(temperature * (score - best score))``. The first Gaussian is the last plan,
    moved on by one step. The action is the first of one of the best, drawn by its weight, plus noise of the
    plan's deviation while exploring (torchrl's exploration type ``RANDOM``, or none set).

    The planner has no state of its own. The last plan is read from the tensordict under ``plan_key``, if it
    is there, and the new one written: ``[*batch, planning_horizon, *A]``. A row whose ``init_key`` is True
    (as ``torchrl.envs.InitTracker`` writes it) begins anew.

    What ends an episode (``done``) ends its rewards and its value. The policy's own sequences are imagined
    once per decision, since nothing about them changes from one iteration to the next (the official code
    imagines them in each). A candidate whose score is inf or NaN is never among the best; where none has a
    finite score the last mean is played without noise, and a warning says so once.

    Actions should be scaled to about [-1, 1], as ``min_std`` and ``max_std`` suppose; candidates and the
    action are clamped to the env's action spec.

    Args:
        env: the imagined env, ``batch_size=[]``; see :class:`fastwm.planning.Planner`.

    Keyword Args:
        policy: draws an action from the latent; needed for ``num_pi_trajs`` and for a value of actions.
        value: a TensorDict module that writes ``value_key``: ``[..., 1]``, or ``[..., V]`` for an ensemble,
            of which the mean of a random pair is taken. None: rewards alone count.
        value_key: default ``"state_action_value"``, what ``torchrl.modules.ValueOperator`` writes.
        discount: per step. The official code derives it from the length of an episode:
            ``fastwm.models.tdmpc2.discount_of``; 0.99 is TD-MPC's.
        planning_horizon, num_samples, num_elites, num_pi_trajs: 3, 512, 64, 24 (0 without a policy) in the
            official code's ``config.yaml``.
        temperature, min_std, max_std: 0.5, 0.05 and 2 there.
        iterations: default 6, and 8 from 20 action dims on, as in the official code.
        reward_key, action_key: ``("next", "reward")`` and ``"action"``.
        plan_key, init_key: ``"plan"`` and ``"is_init"``.
        backend: ``"auto"``, ``"fused"``, ``"captured"`` or ``"eager"``.

    Raises:
        ValueError: more elites or policy sequences than samples, or an env with a batch size of its own.
        KeyError: a key that no module provides.

    Example:
        >>> import torch, fastwm
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP, ValueOperator
        >>> from fastwm.planning import TDMPC2Planner
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(5, 4, depth=0), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> env = fastwm.WorldModelEnv(world_model, GymEnv("Pendulum-v1"), batch_size=[])
        >>> policy = Mod(torch.nn.Linear(4, 1), in_keys=["latent"], out_keys=["action"])
        >>> value = ValueOperator(MLP(5, 1, depth=0), in_keys=["latent", "action"])
        >>> planner = TDMPC2Planner(env, policy=policy, value=value, discount=0.975)
        >>> state = world_model.encode(TensorDict({"observation": torch.randn(2, 3)}, [2]))
        >>> decided = planner(state)
        >>> decided["action"].shape, decided["plan"].shape
        (torch.Size([2, 1]), torch.Size([2, 3, 1]))

    Source: Hansen et al. 2022, "Temporal difference learning for model predictive control", section 3 and
    algorithm 1; Hansen et al. 2024, "TD-MPC2", section 3.2; the official repository ``nicklashansen/tdmpc2``.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        policy: TensorDictModuleBase | None = None,
        value: TensorDictModuleBase | None = None,
        value_key: NestedKey = "state_action_value",
        discount: float = 0.99,
        planning_horizon: int = 3,
        iterations: int | None = None,
        num_samples: int = 512,
        num_elites: int = 64,
        num_pi_trajs: int | None = None,
        temperature: float = 0.5,
        min_std: float = 0.05,
        max_std: float = 2.0,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        plan_key: NestedKey = "plan",
        init_key: NestedKey = "is_init",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            env, planning_horizon, reward_key, action_key, backend=backend, policy=policy, value=value,
            value_key=None if value is None else value_key,
        )  # fmt: skip
        if num_pi_trajs is None:
            num_pi_trajs = 0 if policy is None else min(24, num_samples - 1)
        check_share("num_elites", num_elites, "num_samples", num_samples)
        if not 0 <= num_pi_trajs < num_samples:
            raise ValueError(
                f"num_pi_trajs={num_pi_trajs} of num_samples={num_samples}: some must be left to draw."
            )
        if num_pi_trajs and policy is None:
            raise ValueError(f"num_pi_trajs={num_pi_trajs} without a policy.")
        if iterations is None:
            iterations = 8 if math.prod(self.action_spec.shape) >= _LARGE_ACTION else 6
        if iterations < 1:
            raise ValueError(f"iterations={iterations}; it must be at least 1.")
        self.discount = discount
        self.iterations = iterations
        self.num_samples = num_samples
        self.num_elites = num_elites
        self.num_pi_trajs = num_pi_trajs
        self.temperature = temperature
        self.min_std = min_std
        self.max_std = max_std
        self.plan_key = plan_key
        self.init_key = init_key
        self.out_keys = [action_key, plan_key]

    def _asks(self) -> list[Ask]:
        asks = [("candidates", self.num_samples - self.num_pi_trajs)]
        if self.num_pi_trajs:
            asks.append(("policy", self.num_pi_trajs))
        if self.value is not None:
            asks.append(("value", self.num_samples))
        return asks

    def _mode(self) -> AbstractContextManager[Any]:
        # Also where the action itself is not noisy, the prior's sequences differ from each other.
        return set_exploration_type(ExplorationType.RANDOM)

    def _memory_keys(self) -> dict[str, NestedKey]:
        return {"plan": self.plan_key}

    def _memory(self, tensordict: TensorDictBase, device: torch.device) -> dict[str, Tensor]:
        shape = self.planning_horizon, *self.action_spec.shape
        plan = self._remembered(tensordict, self.plan_key, shape)
        if plan is None:
            return {}
        begins = self._restarts(tensordict, self.init_key)
        if begins is not None:
            (plan,) = where_rows(~begins, [plan], [torch.zeros_like(plan)])
        return {"plan": plan.nan_to_num(0.0, 0.0, 0.0)}

    def _search(
        self, imagine: Imagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        mean, std = self._full(imagine, 0.0), self._full(imagine, self.max_std)
        if "plan" in memory:
            mean[:, :-1] = memory["plan"][:, 1:]
        prior = imagine.policy(self.num_pi_trajs) if self.num_pi_trajs else None
        drawn = self._sequences(imagine, self.num_samples - self.num_pi_trajs)
        for _ in range(self.iterations):
            actions = self._around(mean, std, self._randn(imagine, *drawn))
            imagined = imagine.candidates(actions)
            if prior is not None:
                imagined = _joined(prior, imagined)
            best = elites(self._scores(imagine, imagined), imagined.actions, self.num_elites)
            weights = torch.softmax(self.temperature * best.returns, 1).masked_fill(
                ~best.valid, 0.0
            )
            fitted_mean, fitted_std = moments(best, weights)
            fitted = fitted_mean, fitted_std.clamp(self.min_std, self.max_std)
            mean, std = where_rows(best.found, fitted, (mean, std))
        # The largest of weight over exponential noise: a draw by weight.
        noise = torch.empty_like(weights).exponential_()
        chosen = (weights / noise).argmax(1)
        action = best.actions[torch.arange(imagine.batch, device=imagine.device), chosen, 0]
        if explore:
            action = action + std[:, 0] * self._randn(imagine, *action.shape)
        (action,) = where_rows(best.found, [action], [mean[:, 0]])
        return {"action": self._projected(action), "found": best.found, "plan": mean}

    def _scores(self, imagine: Imagination, imagined: Imagined) -> Tensor:
        """Discounted rewards and the value of what is left after them, ``[B, N]``."""
        rewards = until_done(imagined.rewards, imagined.done)
        steps = torch.arange(self.planning_horizon, device=rewards.device, dtype=rewards.dtype)
        scores = (rewards * self.discount**steps).sum(-1)
        if self.value is None:
            return scores
        pair = torch.rand(2, device=imagine.device, dtype=rewards.dtype)
        value = imagine.value(imagined.last, pair)
        if imagined.done is not None:
            value = value.masked_fill(imagined.done.any(-1), 0.0)
        return scores + self.discount**self.planning_horizon * value


def _joined(a: Imagined, b: Imagined) -> Imagined:
    """The candidates of both, one after the other."""
    done = None
    if a.done is not None or b.done is not None:
        done = torch.cat([_flags(a), _flags(b)], 1)
    last = {path: torch.cat([a.last[path], b.last[path]], 1) for path in a.last}
    return Imagined(
        torch.cat([a.actions, b.actions], 1), torch.cat([a.rewards, b.rewards], 1), done, last
    )


def _flags(imagined: Imagined) -> Tensor:
    if imagined.done is not None:
        return imagined.done
    return torch.zeros_like(imagined.rewards, dtype=torch.bool)
