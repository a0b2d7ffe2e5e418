"""iCEM: the cross-entropy method with coloured noise and a memory."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from fastwm.planning.base import Planner, check_share
from fastwm.planning.imagination import Imagination
from fastwm.planning.noise import coloured
from fastwm.planning.returns import Elites, elites, moments, until_done, where_rows
from fastwm.planning.traced import Ask

__all__ = ["ICEMPlanner"]


class ICEMPlanner(Planner):
    """Improved cross-entropy method, for real-time planning with few candidates.

    As :class:`fastwm.planning.CEMPlanner`, and beyond it:

    - noise of power spectrum ``1 / f**noise_beta`` along the horizon: sequences that push one way for longer;
    - fewer candidates with each iteration, by ``decay``, but at least ``2 * top_k``;
    - part of the elites, ``keep``, stand among the next iteration's candidates with the returns they had, and
      moved on by one step among the next decision's;
    - the mean moves on by one step between decisions, its last action repeated;
    - momentum: mean and deviation keep the share ``alpha`` of what they were;
    - the mean itself is one of the last iteration's candidates;
    - the action is the first of the best sequence found, not of the mean.

    The planner has no state of its own. Mean and kept elites are read from the tensordict, where they are
    there, and written anew: ``plan_key``, ``[*batch, T, *A]``, and ``elites_key``, ``[*batch, K, T, *A]``
    with ``K = int(keep * top_k)``. A row whose ``init_key`` is True (``torchrl.envs.InitTracker``)
    begins anew; where a row has no elites from before, fresh candidates stand in for them.

    Rewards after the first done flag count as 0. A candidate whose return is inf or NaN is never an elite;
    where none is finite, mean and deviation stay, the mean is played, and a warning says so once.

    Args:
        env: the imagined env, ``batch_size=[]``; see :class:`fastwm.planning.Planner`.
        planning_horizon, optim_steps, num_candidates, top_k: 30, 3, 40 and 10 in the official code's
            settings, where they are called horizon, opt_iterations, num_simulated_trajectories, elites_size.
        reward_key, action_key: ``("next", "reward")`` and ``"action"``.

    Keyword Args:
        noise_beta: 3.0 there; of its tasks, HalfCheetah takes 0.25, the others 2 to 3.5.
        init_std: first deviation, in halves of the action's range where it is bounded: 0.5 there.
        decay: ``factor_decrease_num``, 1.25 there.
        alpha: 0.1 there.
        keep: ``fraction_elites_reused``, 0.3 there.
        plan_key, elites_key, init_key: ``"plan"``, ``"plan_elites"`` and ``"is_init"``.
        backend: ``"auto"``, ``"fused"``, ``"captured"`` or ``"eager"``.

    Raises:
        ValueError: ``top_k`` above ``num_candidates``, a ``decay`` below 1, shares outside [0, 1], or an
            env with a batch size of its own.

    Example:
        >>> import torch, fastwm
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from fastwm.planning import ICEMPlanner
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(5, 4, depth=0), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> env = fastwm.WorldModelEnv(world_model, GymEnv("Pendulum-v1"), batch_size=[])
        >>> planner = ICEMPlanner(env, planning_horizon=10)
        >>> decided = planner(world_model.encode(TensorDict({"observation": torch.randn(2, 3)}, [2])))
        >>> decided["action"].shape, decided["plan_elites"].shape
        (torch.Size([2, 1]), torch.Size([2, 3, 10, 1]))

    Source: Pinneri et al. 2020, "Sample-efficient cross-entropy method for real-time planning", algorithm 1
    and section 3; its repository ``martius-lab/iCEM``.
    """

    def __init__(
        self,
        env: EnvBase,
        planning_horizon: int = 30,
        optim_steps: int = 3,
        num_candidates: int = 40,
        top_k: int = 10,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        *,
        noise_beta: float = 3.0,
        init_std: float = 0.5,
        decay: float = 1.25,
        alpha: float = 0.1,
        keep: float = 0.3,
        plan_key: NestedKey = "plan",
        elites_key: NestedKey = "plan_elites",
        init_key: NestedKey = "is_init",
        backend: str = "auto",
    ) -> None:
        super().__init__(env, planning_horizon, reward_key, action_key, backend=backend)
        check_share("top_k", top_k, "num_candidates", num_candidates)
        if decay < 1:
            raise ValueError(f"decay={decay}: the number of candidates cannot grow.")
        if not (0 <= keep <= 1 and 0 <= alpha <= 1):
            raise ValueError(f"keep={keep} and alpha={alpha} must lie in [0, 1].")
        self.optim_steps = optim_steps
        self.num_candidates = num_candidates
        self.top_k = top_k
        self.noise_beta = noise_beta
        self.init_std = init_std
        self.decay = decay
        self.alpha = alpha
        self.keep = keep
        self.plan_key = plan_key
        self.elites_key = elites_key
        self.init_key = init_key
        self.out_keys = [action_key, plan_key, elites_key]

    @property
    def num_kept(self) -> int:
        """Elites that are carried on."""
        return int(self.keep * self.top_k)

    def populations(self) -> list[int]:
        """Candidates drawn in each iteration; in the first, besides those that stand for elites."""
        sizes = [self.num_candidates]
        for _ in range(1, self.optim_steps):
            sizes.append(max(2 * self.top_k, int(sizes[-1] / self.decay)))
        return sizes

    def _asks(self) -> list[Ask]:
        first, *others = self.populations()
        return [("candidates", n) for n in dict.fromkeys([first + self.num_kept, *others])]

    # -- memory

    def _memory_keys(self) -> dict[str, NestedKey]:
        return {"plan": self.plan_key, "elites": self.elites_key}

    def _memory(self, tensordict: TensorDictBase, device: torch.device) -> dict[str, Tensor]:
        colour = coloured(self.planning_horizon, self.noise_beta)
        found = {"colour": colour.to(device, self.action_spec.dtype)}
        shape = self.planning_horizon, *self.action_spec.shape
        plan = self._remembered(tensordict, self.plan_key, shape)
        kept = self._remembered(tensordict, self.elites_key, (self.num_kept, *shape))
        if plan is None or kept is None:
            return found
        begins = self._restarts(tensordict, self.init_key)
        if begins is None:
            begins = torch.zeros(plan.shape[0], dtype=torch.bool, device=device)
        found |= {"plan": plan, "elites": kept}
        return {k: v.nan_to_num(0.0, 0.0, 0.0) for k, v in found.items()} | {"begins": begins}

    # -- the search

    def _search(
        self, imagine: Imagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        mean, start_std = self._first(imagine)
        std, kept = start_std, self.num_kept
        if "plan" in memory:
            plan = memory["plan"]
            moved = torch.cat([plan[:, 1:], plan[:, -1:]], 1)
            (mean,) = where_rows(memory["begins"], [mean], [moved])
        best: Elites | None = None
        for i, count in enumerate(self.populations()):
            drawn = count if i else count + kept
            actions = self._drawn(imagine, mean, std, memory["colour"], drawn)
            if i == 0 and kept and "plan" in memory:
                actions = self._with_moved(actions, memory)
            if i == self.optim_steps - 1:
                actions[:, 0] = mean
            imagined = imagine.candidates(actions)
            returns = until_done(imagined.rewards, imagined.done).sum(-1)
            if best is not None:
                returns = torch.cat([returns, best.returns[:, :kept]], 1)
                actions = torch.cat([actions, best.actions[:, :kept]], 1)
            best = elites(returns, actions, self.top_k)
            fitted = moments(best, torch.ones_like(best.returns))
            mixed = tuple(
                torch.lerp(new, old, self.alpha)
                for new, old in zip(fitted, (mean, std), strict=True)
            )
            mean, std = where_rows(best.found, mixed, (mean, std))
        assert best is not None
        valid = best.valid[:, :kept].reshape(imagine.batch, kept, *(1,) * (mean.ndim - 1))
        return {
            "action": where_rows(best.found, [best.actions[:, 0, 0]], [mean[:, 0]])[0],
            "found": best.found,
            "plan": mean,
            "elites": torch.where(valid, best.actions[:, :kept], mean.unsqueeze(1)),
        }  # fmt: skip

    def _first(self, imagine: Imagination) -> tuple[Tensor, Tensor]:
        """Mean and deviation where nothing is known."""
        mean, std = self._full(imagine, 0.0), self._full(imagine, self.init_std)
        if isinstance(self.action_spec, Bounded):
            low, high = self.action_spec.space.low, self.action_spec.space.high
            mean, std = mean + (high + low) / 2, std * (high - low) / 2
        return mean, std

    def _drawn(
        self, imagine: Imagination, mean: Tensor, std: Tensor, colour: Tensor, count: int
    ) -> Tensor:
        white = self._randn(imagine, *self._sequences(imagine, count))
        noise = (white.movedim(2, -1) @ colour).movedim(-1, 2)
        return self._around(mean, std, noise)

    def _with_moved(self, actions: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """The last elites in the place of the last candidates drawn, of which they take the last action."""
        fresh = actions[:, -self.num_kept :]
        moved = torch.cat([memory["elites"][:, :, 1:], fresh[:, :, -1:]], 2)
        (moved,) = where_rows(memory["begins"], [fresh], [moved])
        return torch.cat([actions[:, : -self.num_kept], moved], 1)
