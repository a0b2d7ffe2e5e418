"""What all planners have: their keys, the engine of a decision, and what happens when it fails."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Bounded, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules.planners.common import MPCPlannerBase, _planning_done_keys

from fastwm.backends import check_name, requested
from fastwm.engines.captured import ChecksFailed
from fastwm.engines.cuda_graph import CaptureFailed, Recorder, graphs_apply
from fastwm.env import WorldModelEnv
from fastwm.explain import Explanation
from fastwm.fast_env import FastEnv
from fastwm.plan import zero_done
from fastwm.planning.bootstrap import bootstrap
from fastwm.planning.graph import recorder_for
from fastwm.planning.imagination import (
    EagerImagination,
    Imagination,
    Keys,
    device_of,
    flat_start,
    path_of,
)  # fmt: skip
from fastwm.planning.traced import Ask, TracedImagination
from fastwm.request import NotCapturable, Request
from fastwm.rollout import start_of
from fastwm.tracing import Untraceable, is_tracing, kept_random_state

__all__ = ["Planner", "check_share"]


class Planner(MPCPlannerBase):
    """A planner over an imagined env: a TensorDict module that reads a state and writes an action.

    Subclasses say what they ask of the env (:meth:`_asks`) and how they search (:meth:`_search`).

    Args:
        env: an env without batch size: a :class:`fastwm.WorldModelEnv` or one given to
            :func:`fastwm.accelerate`, whose steps run on the fast engines, or any torchrl env that is not
            batch-locked.
        planning_horizon: steps of a candidate.
        reward_key, action_key: as in torchrl: ``("next", "reward")`` and ``"action"``.

    Keyword Args:
        backend: ``"auto"`` (that of the env), ``"fused"``, ``"captured"`` or ``"eager"``.
        policy, value, value_key: for planners with a policy prior and a value of the last latent.
    """

    def __init__(
        self,
        env: EnvBase,
        planning_horizon: int,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        *,
        backend: str = "auto",
        policy: TensorDictModuleBase | None = None,
        value: TensorDictModuleBase | None = None,
        value_key: NestedKey | None = None,
    ) -> None:
        super().__init__(env, action_key)
        if len(env.batch_size):
            raise ValueError(
                f"The env of a planner has batch_size={list(env.batch_size)}; a planner needs one with "
                "batch_size=[], which takes any number of candidates."
            )
        if planning_horizon < 1:
            raise ValueError(f"planning_horizon={planning_horizon}; it must be at least 1.")
        action_spec = env.full_action_spec.get(action_key, None)
        if action_spec is None:
            known = list(env.full_action_spec.keys(True, True))
            raise KeyError(f"The env takes no action {action_key!r}; it takes {known}.")
        if not action_spec.dtype.is_floating_point:
            raise ValueError(
                f"Planners search among actions of real numbers; {action_key!r} is {action_spec.dtype}."
            )
        self.backend = check_name(backend)
        self.planning_horizon = planning_horizon
        self.reward_key = reward_key
        self.action_key = action_key
        self.action_spec = action_spec
        self.policy = policy
        self.value = value
        required: list[NestedKey] = list(env.observation_spec.keys(True, True))
        self._carried = tuple(required)
        if isinstance(env, WorldModelEnv):
            self._carried, required = env.step_keys.carried, list(env.step_keys.required)
        self.value_key = value_key
        for module in (policy, self._bootstrap()):
            if module is not None:
                required += [
                    key for key in map(unravel_key, cast(list[NestedKey], module.in_keys))
                    if key not in required and path_of(key) != self.keys.action
                ]  # fmt: skip
        self.in_keys = required
        self._warned: set[str] = set()

    @property
    def keys(self) -> Keys:
        """Where things are in a step's tensordict."""
        valued = self.value is not None
        return Keys(
            path_of(self.action_key), path_of(self.reward_key),
            tuple(path_of(key) for key in _planning_done_keys(self.env)),
            tuple(map(path_of, self._carried)) if valued else (),
            path_of(self.value_key) if valued and self.value_key is not None else None,
        )  # fmt: skip

    def _bootstrap(self) -> TensorDictSequential | None:
        """The policy's action and the value of it, as long as these are the planner's."""
        kept = self.__dict__.get("_joined")
        if kept is None or kept[0] is not self.policy or kept[1] is not self.value:
            joined = bootstrap(self.policy, self.value, self.keys, self.action_spec)
            kept = self.__dict__["_joined"] = (self.policy, self.value, joined)
        return kept[2]

    # -- what subclasses are made of

    _records = True  # whether a search waits for nothing, and can be recorded as a CUDA graph

    @abstractmethod
    def _asks(self) -> list[Ask]:
        """What :meth:`_search` will ask of the imagination."""

    @abstractmethod
    def _search(
        self, imagine: Imagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        """The decision, from tensors to tensors: nothing in it may look at what they hold.

        Args:
            memory: see :meth:`_memory`, by name.
            explore: whether the action may be noisy: torchrl's exploration type.

        Returns:
            ``"action"`` ``[B, *A]``, ``"found"`` bool ``[B]`` (False: no candidate had a finite return),
            and the next memory by the same names.
        """

    def _memory(self, tensordict: TensorDictBase, device: torch.device) -> dict[str, Tensor]:
        """What the last decision left in the tensordict, ``[B, ...]``, and constants of the search."""
        return {}

    def _memory_keys(self) -> dict[str, NestedKey]:
        """Where the tensordict holds it."""
        return {}

    def _mode(self) -> AbstractContextManager[Any]:
        """What the whole decision runs under."""
        return nullcontext()

    # -- for subclasses

    def _remembered(
        self, tensordict: TensorDictBase, key: NestedKey, shape: tuple[int, ...]
    ) -> Tensor | None:
        """What the tensordict holds under ``key``, as ``[B, *shape]``; None where it does not.

        Raises:
            ValueError: it has another shape.
        """
        found = tensordict.get(key, None)
        if found is None:
            return None
        if found.shape != (*tensordict.batch_size, *shape):
            raise ValueError(
                f"The tensordict's {key!r} has shape {tuple(found.shape)}, of which "
                f"{tuple(found.shape[tensordict.ndim :])} is a row's; this planner (horizon "
                f"{self.planning_horizon}) carries on {tuple(shape)}."
            )
        return found.reshape(-1, *shape)

    def _restarts(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor | None:
        """Bool ``[B]``: where an episode begins, if the tensordict says so."""
        begins = tensordict.get(key, None)
        return None if begins is None else begins.reshape(tensordict.batch_size.numel(), -1).any(-1)

    def _sequences(self, imagine: Imagination, count: int) -> tuple[int, ...]:
        """``[B, N, T, *A]``."""
        return imagine.batch, count, self.planning_horizon, *self.action_spec.shape

    def _randn(self, imagine: Imagination, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.action_spec.dtype, device=imagine.device)

    def _around(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Candidates ``[B, N, T, *A]`` within the spec, from ``[B, T, *A]`` and standard noise."""
        return self._projected(mean.unsqueeze(1) + std.unsqueeze(1) * noise)

    def _full(self, imagine: Imagination, value: float) -> Tensor:
        """``[B, T, *A]``."""
        shape = imagine.batch, self.planning_horizon, *self.action_spec.shape
        return torch.full(shape, value, dtype=self.action_spec.dtype, device=imagine.device)

    def _projected(self, actions: Tensor) -> Tensor:
        """``action_spec.project``, for the usual specs without a look at the values."""
        spec = self.action_spec
        if isinstance(spec, Bounded):
            return torch.clamp(actions, spec.space.low, spec.space.high)
        return actions if isinstance(spec, Unbounded) else spec.project(actions)

    # -- a decision

    def planning(self, td: TensorDictBase) -> Tensor:
        """The action, ``[*batch, *A]``, without writing it."""
        return self._decide(td)["action"].reshape(*td.batch_size, *self.action_spec.shape)

    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Plan for every state of ``tensordict``, of any batch shape, and write the action.

        Raises:
            KeyError: a key that the model, the policy or the value reads is not there.
            RuntimeError: the engine asked for by name cannot run this; says why.
        """
        if kwargs:
            raise ValueError("Planners have no functional form: params and vmap are not supported.")
        batch = tensordict.batch_size
        results = self._decide(tensordict)
        action = self._projected(results["action"])
        values = [action.reshape(*batch, *self.action_spec.shape)]
        for name in self._memory_keys():
            values.append(results[name].reshape(*batch, *results[name].shape[1:]))
        return self._write_to_tensordict(tensordict, tuple(values), tensordict_out)

    def explain(self, tensordict: TensorDictBase) -> Explanation:
        """Which engine would plan for this tensordict, and why not a faster one."""
        asked = self._asked()
        start = self._start(tensordict)
        if asked == "eager":
            reason = "backend='eager' was asked for"
            return Explanation("eager", {"fused": reason, "captured": reason}, asked)
        try:
            with torch.no_grad(), self._mode():
                imagine = self._traced(start, asked)
        except NotCapturable as reason:
            passed = {"fused": str(reason), "captured": str(reason)}
            return Explanation("eager" if asked == "auto" else None, passed, asked)
        passed = {}
        for (kind, _), piece in imagine.pieces.items():
            if piece.fused is None:
                why = "backend='captured' was asked for" if asked == "captured" else piece.unfused
                passed.setdefault("fused", f"{kind}: {why}")
        engines = {kind: piece.engine for (kind, _), piece in imagine.pieces.items()}
        engine = "fused" if set(engines.values()) == {"fused"} else "captured"
        notes = []
        if len(set(engines.values())) > 1:
            notes.append(", ".join(f"{kind} {name}" for kind, name in engines.items()))
        if self._recorder(imagine) is not None:
            notes.append("one CUDA graph per decision")
        if any(p.fused is not None and p.fused.bf16 for p in imagine.pieces.values()):
            notes.append("bfloat16 weights")
        return Explanation(
            engine, passed, asked,
            "\n\n".join(f"{kind}:\n{p.graph}" for (kind, _), p in imagine.pieces.items()),
            "\n\n".join(f"{kind}:\n{p}" for (kind, _), p in imagine.pieces.items()),
            "; ".join(notes),
        )  # fmt: skip

    def _asked(self) -> str:
        own = self.backend
        if own == "auto":
            own = getattr(self.env, "backend", "auto")
        return requested(own)

    def _decide(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        if is_tracing():
            raise Untraceable("a planner decides anew at every step")
        start = self._start(tensordict)
        memory = self._memory(tensordict, device_of(start))
        explore = exploration_type() in (ExplorationType.RANDOM, None)
        with torch.no_grad(), self._mode():
            results = self._run(start, memory, explore)
        if not bool(results["found"].all()):
            self._warn(
                "no candidate had a finite return for some states, whose action is the mean that the search "
                "began with: the model or the value gives inf or NaN there"
            )
        return results

    def _run(
        self, start: TensorDictBase, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        asked = self._asked()
        if asked != "eager":
            restore = kept_random_state(self.env.device)
            try:
                return self._fast(self._traced(start, asked), memory, explore)
            except (NotCapturable, ChecksFailed) as error:
                reason = str(error) or "an argument check fails (a distribution's validation)"
                if asked != "auto":
                    raise RuntimeError(
                        f"backend={asked!r} cannot run this planner: {reason}."
                    ) from error
                restore()
                self._warn(
                    f"this planner runs on the eager engine: {reason}. "
                    "(planner.explain(...) says more; backend='eager' asks for it and silences this.)"
                )
        imagine = EagerImagination(
            self.env, start, self.keys, self.planning_horizon, self.policy, self._bootstrap()
        )
        return self._search(imagine, memory, explore)

    def _fast(
        self, imagine: TracedImagination, memory: dict[str, Tensor], explore: bool
    ) -> dict[str, Tensor]:
        """The decision on the pieces of ``imagine``: as one CUDA graph where that can be."""
        recorder = self._recorder(imagine)
        if recorder is None or not graphs_apply():
            return self._search(imagine, memory, explore)
        restore = kept_random_state(self.env.device)
        # All that Python looks at in the course of a search.
        settings = tuple((k, v) for k, v in vars(self).items() if isinstance(v, (int, float, str)))
        kind = explore, settings, self.keys, id(self.action_spec)
        try:
            return imagine.known.recorded.decide(
                lambda own, kept: self._search(own, kept, explore), imagine, memory, kind, recorder
            )
        except CaptureFailed as reason:
            restore()
            self._warn(f"this planner's decisions are not one CUDA graph: {reason}")
        return self._search(imagine, memory, explore)

    def _recorder(self, imagine: TracedImagination) -> Recorder | None:
        """What can record decisions on these pieces."""
        whole = self._records and not any(p.unrecorded for p in imagine.pieces.values())
        return recorder_for(imagine.device) if whole else None

    def _traced(self, start: TensorDictBase, engine: str) -> TracedImagination:
        if not isinstance(self.env, FastEnv):
            name = type(self.env).__name__
            raise NotCapturable(f"a {name} has no engines (fastwm.accelerate may give it some)")
        return TracedImagination(
            self, self.env, start, self.keys, self.planning_horizon, self._asks(), engine,
            self.action_spec.zero(), self.policy, self._bootstrap(),
        )  # fmt: skip

    def _start(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The state as batch ``[B]``, with nothing but what a rollout reads."""
        if not isinstance(self.env, FastEnv):
            return flat_start(tensordict)
        absent = [key for key in self.in_keys if tensordict.get(key, None) is None]
        if absent:
            raise KeyError(
                f"The planner reads {absent[0]!r}, which the tensordict lacks: it holds "
                f"{sorted(map(str, tensordict.keys(True, True)))}. A latent comes from "
                "`world_model.encode(observation)`."
            )
        optional = self.env.full_state_spec.keys(True, True)
        start = flat_start(tensordict.select(*self.in_keys, *optional, strict=False))
        if isinstance(self.env, WorldModelEnv):
            return start_of(self.env, Request(1, tensordict=start))
        for key, flag in zero_done(self.env, start.batch_size).items():
            start.set(key, flag)
        return start

    def _warn(self, text: str) -> None:
        if text not in self._warned and not torch._C._len_torch_dispatch_stack():
            self._warned.add(text)
            warnings.warn(f"fastwm: {text}", stacklevel=7)


def check_share(name: str, share: int, of: str, whole: int) -> None:
    """Hold the number of elites to what it is taken from.

    Raises:
        ValueError: less than one, or more than there are; names both.
    """
    if not 1 <= share <= whole:
        raise ValueError(f"{name}={share} of {of}={whole}: it must be from 1 up to that.")
