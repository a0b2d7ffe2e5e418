"""What a planner asks of its env: rollouts of candidates, of the policy, and what follows the last latent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import _make_compatible_policy

from fastwm.fast_env import FastEnv
from fastwm.specs import next_key

__all__ = ["EagerImagination", "Imagination", "Imagined", "Keys", "Path", "device_of", "flat_start",
           "mean_of_pair", "members", "path_of", "rows_of", "shown"]  # fmt: skip

Path = tuple[str, ...]


def path_of(key: NestedKey) -> Path:
    """``"latent" -> ("latent",)``."""
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def shown(path: Path | None) -> NestedKey | None:
    """``("latent",) -> "latent"``, as users write keys."""
    return None if path is None else unravel_key(path)


@dataclass(frozen=True)
class Keys:
    """Where things are.

    Attributes:
        action: that the candidates are of.
        reward: of a step, from the root: ``("next", "reward")``.
        done: flags that end an episode, from the root.
        carried: latents that a step carries on, each of them under ``"next"`` after it.
        value: what the value writes; None without one.
    """

    action: Path
    reward: Path
    done: tuple[Path, ...]
    carried: tuple[Path, ...] = ()
    value: Path | None = None


def members(pair: Tensor, count: int) -> Tensor:
    """Two different members of an ensemble, every pair equally likely, from two uniform numbers.

    Example:
        >>> import torch
        >>> from fastwm.planning.imagination import members
        >>> members(torch.tensor([0.5, 0.9]), 5).tolist()
        [2, 1]
    """
    first = (pair[0] * count).long()
    second = (first + 1 + (pair[1] * (count - 1)).long()) % count
    return torch.stack([first, second])


def mean_of_pair(values: Tensor, pair: Tensor) -> Tensor:
    """``[B, N, V] -> [B, N]``: of one value, itself; of several, the mean of two."""
    count = values.shape[-1]
    return values[..., 0] if count == 1 else values[..., members(pair, count)].mean(-1)


class Imagined(NamedTuple):
    """Rollouts of ``N`` candidates in each of ``B`` environments.

    Attributes:
        actions: ``[B, N, T, *A]``.
        rewards: ``[B, N, T]``.
        done: bool ``[B, N, T]``; None where no step ever ends an episode.
        last: by path, the latents after the last step, ``[B, N, ...]``.
    """

    actions: Tensor
    rewards: Tensor
    done: Tensor | None
    last: dict[Path, Tensor]


class Imagination(ABC):
    """The env as one decision sees it.

    Args:
        start: where the environments are: batch ``[B]``.
        keys: where things are.
        horizon: ``T``.
    """

    def __init__(self, start: TensorDictBase, keys: Keys, horizon: int) -> None:
        self.start = start
        self.keys = keys
        self.horizon = horizon
        self.batch = start.batch_size[0]
        self.device = device_of(start)

    @abstractmethod
    def candidates(self, actions: Tensor) -> Imagined:
        """Follow sequences of actions ``[B, N, T, *A]``."""

    @abstractmethod
    def rollout(self, actions: Tensor) -> TensorDictBase:
        """The same as an env's rollout, ``[B * N, T]``."""

    @abstractmethod
    def policy(self, count: int) -> Imagined:
        """Follow the policy ``count`` times from each start."""

    @abstractmethod
    def value(self, last: dict[Path, Tensor], pair: Tensor) -> Tensor:
        """What the value says of such latents, under the policy's action: ``[B, N]``.

        Args:
            pair: two uniform random numbers, ``[2]``: choose two members of an ensemble of values, of which
                the mean is taken. See :func:`members`.
        """

    def _imagined(
        self, count: int, results: Callable[[Path], Tensor | None], actions: Tensor,
        done: tuple[Path, ...],
    ) -> Imagined:  # fmt: skip
        """Results by path, ``[B * N, T, ...]``, taken apart."""
        lead, keys = (self.batch, count), self.keys

        def read(path: Path) -> Tensor:
            found = results(path)
            if found is None:
                raise KeyError(f"The planner reads {path}, but no step writes {path}.")
            return found

        flag: Tensor | None = None
        for path in done:
            one = self._one(read(path), path)
            flag = one if flag is None else flag | one
        last = {path: read(next_key(path))[:, -1].unflatten(0, lead) for path in keys.carried}
        rewards = self._one(read(keys.reward), keys.reward).unflatten(0, lead)
        ends = None if flag is None else flag.unflatten(0, lead)
        return Imagined(actions.unflatten(0, lead), rewards, ends, last)

    def _one(self, value: Tensor, path: Path) -> Tensor:
        """``[rows, T, 1] -> [rows, T]``."""
        if value[0, 0].numel() != 1:
            raise ValueError(
                f"A planner needs one number per step and row under {path}; "
                f"a step's has shape {tuple(value.shape[2:])}."
            )
        return value.flatten(1)


def device_of(tensordict: TensorDictBase) -> torch.device:
    """Where its tensors are, whether or not it says so itself."""
    return next(iter(tensordict.values(True, True))).device


def rows_of(start: TensorDictBase, count: int) -> TensorDictBase:
    """Each of the ``[B]`` starts ``count`` times over: batch ``[B * count]``, memory of its own."""
    batch = start.batch_size[0]
    return start.unsqueeze(-1).expand(batch, count).reshape(batch * count)


class EagerImagination(Imagination):
    """Step by step through the env itself, whatever env it is: the definition.

    Args:
        env: stepped from copies of the start.
        policy: of :meth:`policy`.
        bootstrap: writes the value, the policy's action first.
    """

    def __init__(
        self,
        env: EnvBase,
        start: TensorDictBase,
        keys: Keys,
        horizon: int,
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        bootstrap: Callable[[TensorDictBase], TensorDictBase] | None = None,
    ) -> None:
        super().__init__(start, keys, horizon)
        self.env = env
        self._policy = policy
        self._bootstrap = bootstrap

    def candidates(self, actions: Tensor) -> Imagined:
        given = actions.flatten(0, 1)
        return self._follow(actions.shape[1], _Given(self.keys.action, given))

    def rollout(self, actions: Tensor) -> TensorDictBase:
        return self._rolled(actions.shape[1], _Given(self.keys.action, actions.flatten(0, 1)))

    def policy(self, count: int) -> Imagined:
        assert self._policy is not None
        return self._follow(count, self._compatible(self._policy))

    def value(self, last: dict[Path, Tensor], pair: Tensor) -> Tensor:
        assert self._bootstrap is not None
        assert self.keys.value is not None
        count = next(iter(last.values())).shape[1]
        td = rows_of(self.start, count)
        for path, value in last.items():
            td.set(path, value.flatten(0, 1))
        td.update(self._compatible(self._bootstrap)(td))
        return mean_of_pair(td.get(self.keys.value).reshape(self.batch, count, -1), pair)

    def _compatible(self, policy: Any) -> Any:
        return _make_compatible_policy(
            policy, self.env.observation_spec, env=self.env, fast_wrap=True
        )

    def _follow(self, count: int, policy: Any) -> Imagined:
        out = self._rolled(count, policy)
        return self._imagined(count, out.get, out.get(self.keys.action), self.keys.done)

    def _rolled(self, count: int, policy: Any) -> TensorDictBase:
        td = rows_of(self.start, count)
        if not isinstance(self.env, FastEnv):
            # One that starts anew where an episode ends does so, as under torchrl's own planners.
            return self.env.rollout(
                self.horizon, policy, auto_reset=False, tensordict=td, break_when_any_done=False
            )
        steps = []
        for _ in range(self.horizon):
            td.update(policy(td))
            td = self.env.step(td)
            steps.append(td)
            td = self.env._step_mdp(td)
        out: TensorDictBase = torch.stack(steps, 1)
        out.names = [None, "time"]
        return out


class _Given:
    """A policy that plays given actions, one step after the other."""

    def __init__(self, key: Path, actions: Tensor) -> None:
        self.key = key
        self.actions = actions
        self.step = 0

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict.set(self.key, self.actions[:, self.step])
        self.step += 1
        return tensordict


def flat_start(tensordict: TensorDictBase) -> TensorDict:
    """Any batch as ``[B]``."""
    return tensordict.reshape(-1)
