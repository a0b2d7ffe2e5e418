"""A call of ``rollout`` as data, and the actions it brings along."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key_list
from torchrl.envs.utils import _make_compatible_policy
from torchrl.modules.planners import cem, mppi

from fastwm.process_modes import NotCapturable, refuse_modes

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["Feed", "NotCapturable", "Request", "same_function"]

_SETTERS = (cem._PrecomputedActionsSequentialSetter, mppi._PrecomputedActionsSequentialSetter)


@dataclass
class Feed:
    """Actions that come from outside the step.

    Attributes:
        paths: the action entries.
        next: this step's actions, one per path.
        done: told how many steps ran, once they did.
        template: actions of the right kind, to trace with.
        horizon: at most so many steps; None for no limit.
        draws: ``next`` takes numbers from the random generator.
    """

    paths: tuple[tuple[str, ...], ...]
    next: Callable[[], Sequence[torch.Tensor]]
    template: tuple[torch.Tensor, ...]
    done: Callable[[int], None] = lambda steps: None
    horizon: int | None = None
    draws: bool = False


@dataclass
class Request:
    """The arguments of one ``rollout`` call.

    Attributes:
        begun: ``tensordict`` is the first step's, which a reset has made.
        The others are those of ``EnvBase.rollout``.
    """

    max_steps: int
    policy: Any = None
    callback: Any = None
    actions: Any = None
    auto_reset: bool = True
    auto_cast_to_device: bool = False
    break_when_any_done: bool | None = None
    break_when_all_done: bool | None = None
    return_contiguous: bool | None = False
    tensordict: TensorDictBase | None = None
    set_truncated: bool = False
    out: Any = None
    trust_policy: bool = False
    storing_device: Any = None
    set_state: bool | None = None
    begun: bool = False

    def refuse(self, env: FastEnv) -> None:
        """Raise :class:`NotCapturable` for what only the eager path does."""
        if self.callback is not None:
            raise NotCapturable("a callback, called at each step")
        if self.out is not None:
            raise NotCapturable("out= tensordict")
        if self.auto_cast_to_device:
            raise NotCapturable("auto_cast_to_device=True")
        if self.break_when_all_done:
            raise NotCapturable("break_when_all_done=True")
        if self.max_steps < 1:
            raise NotCapturable("max_steps < 1")
        if self.tensordict is None and not self.auto_reset:
            raise NotCapturable("no tensordict with auto_reset=False")
        if self.policy is not None and self.actions is not None:
            raise NotCapturable("both policy and actions")
        if "_compiled_step_and_maybe_reset" in env.__dict__:
            raise NotCapturable("a compiled step_and_maybe_reset")
        if env._post_step_mdp_hooks is not None:
            raise NotCapturable("step hooks of a transform")
        own = env.refusal(self)
        if own:
            raise NotCapturable(own)
        refuse_modes(env.device.type if env.device is not None else "cuda")

    @property
    def stops(self) -> bool:
        """Whether the first finished row ends the rollout."""
        if self.break_when_any_done is None:
            return not self.break_when_all_done
        return bool(self.break_when_any_done)

    @property
    def steps_on(self) -> bool:
        """Whether steps are taken by ``step_and_maybe_reset``, which names the env's device in each."""
        steps = self.max_steps
        if self.actions is not None and hasattr(self.actions, "__len__"):
            steps = min(steps, len(self.actions))
        return steps > 1 and not (self.stops or self.break_when_all_done)

    def compatible_policy(self, env: FastEnv) -> Any:
        """The policy as ``EnvBase.rollout`` wraps it."""
        return _make_compatible_policy(
            self.policy,
            env.observation_spec,
            env=env,
            fast_wrap=True,
            trust_policy=self.trust_policy,
        )

    def feed(self, env: FastEnv, batch_size: torch.Size) -> Feed | None:
        """Where actions come from when no policy computes them, else None."""
        if self.actions is not None:
            return self._given_actions(env, batch_size)
        if isinstance(self.policy, _SETTERS):
            return self._planner_actions(batch_size)
        if self.policy is None:
            return _random_actions(env, batch_size)
        return None

    @property
    def own_policy(self) -> Any:
        """The policy that computes actions inside the step; None where they are fed from outside."""
        fed = self.actions is not None or isinstance(self.policy, _SETTERS)
        return None if fed else self.policy

    def policy_key(self) -> Any:
        """Equal for policies that are the same object, or the same code over the same closure."""
        policy = self.own_policy
        if policy is None:
            return None
        if isinstance(policy, types.FunctionType):
            cells = tuple(id(c.cell_contents) for c in policy.__closure__ or () if _filled(c))
            return policy.__code__, cells, self.trust_policy
        if isinstance(policy, types.MethodType):
            return policy.__func__, id(policy.__self__), self.trust_policy
        return id(policy), self.trust_policy

    def _given_actions(self, env: FastEnv, batch_size: torch.Size) -> Feed:
        actions = self.actions
        if not isinstance(actions, (list, tuple, torch.Tensor)):
            raise NotCapturable(
                f"actions= is a {type(actions).__name__}, not a list, tuple or tensor"
            )
        steps = actions.unbind(0) if isinstance(actions, torch.Tensor) else tuple(actions)
        if not steps or not all(isinstance(a, torch.Tensor) for a in steps):
            raise NotCapturable("actions= holds something else than tensors")
        first = steps[0]
        if any(_kind(a) != _kind(first) for a in steps):
            raise NotCapturable("actions= of different kinds from step to step")
        _refuse_unbatched(first, batch_size)
        key = next(iter(env.full_action_spec.keys()))
        source = iter(steps)
        return Feed(((key,),), lambda: (next(source),), (first,), horizon=len(steps))

    def _planner_actions(self, batch_size: torch.Size) -> Feed:
        setter = self.policy
        if setter.actions.ndim < 2 or setter.cmpt + self.max_steps > setter.actions.shape[-2]:
            raise NotCapturable("the precomputed actions are shorter than the horizon")
        steps = setter.actions.unbind(-2)[setter.cmpt :]
        _refuse_unbatched(steps[0], batch_size)
        source = iter(steps)

        def done(count: int) -> None:
            setter.cmpt += count

        return Feed((("action",),), lambda: (next(source),), (steps[0],), done)


def _random_actions(env: FastEnv, batch_size: torch.Size) -> Feed:
    spec = env.full_action_spec
    lead = env._leading(batch_size)
    keys = list(spec.keys(True, True))
    paths = tuple(k if isinstance(k, tuple) else (k,) for k in keys)

    def draw() -> tuple[torch.Tensor, ...]:
        action = spec.rand(lead)
        return tuple(action.get(k) for k in keys)

    zero = spec.zero(lead)
    template = tuple(zero.get(k) for k in unravel_key_list(keys))
    return Feed(paths, draw, template, draws=True)


def _refuse_unbatched(action: torch.Tensor, batch_size: torch.Size) -> None:
    if action.shape[: len(batch_size)] != batch_size:
        raise NotCapturable(
            f"actions of shape {tuple(action.shape)} do not start with the batch {tuple(batch_size)}"
        )


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def same_function(a: Any, b: Any) -> bool:
    """Whether two functions or methods run the same code on the very same objects."""
    if isinstance(a, types.MethodType) and isinstance(b, types.MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return a.__code__ == b.__code__ and a.__globals__ is b.__globals__ and _held(a, b)
    return False


def _held(a: types.FunctionType, b: types.FunctionType) -> bool:
    if a.__dict__ or b.__dict__ or a.__kwdefaults__ or b.__kwdefaults__:
        return False
    cells = [c.cell_contents if _filled(c) else c for c in a.__closure__ or ()]
    others = [c.cell_contents if _filled(c) else c for c in b.__closure__ or ()]
    held, other = cells + list(a.__defaults__ or ()), others + list(b.__defaults__ or ())
    return len(held) == len(other) and all(map(is_, held, other))


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad
