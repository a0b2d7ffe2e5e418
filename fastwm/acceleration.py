"""`accelerate`: the fast engines for an imagined env that exists already, whatever its class."""

from __future__ import annotations

import copyreg
from typing import Any, TypeVar, cast

import torch
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.model_based import DreamerEnv, ModelBasedEnvBase
from torchrl.envs.model_based.imagined import ImaginedEnv

from fastwm.fast_env import FastEnv
from fastwm.request import Request

__all__ = ["accelerate", "never_resets"]

Env = TypeVar("Env", bound=EnvBase)

# What the engines do in the env's place: a class with its own does it itself.
_ROLLING = ("rollout", "_rollout_stop_early", "_rollout_nonstop")
_RESTARTING = ("any_done", "maybe_reset")
_STEPPING = ("step_and_maybe_reset", "_step_and_maybe_reset", *_RESTARTING)
# With these, no row of an env is ever reset in the course of a rollout.
_ONGOING = {getattr(cls, name) for cls in (DreamerEnv, ImaginedEnv) for name in _RESTARTING}


def accelerate(
    env: Env,
    backend: str = "auto",
    *,
    fused_weights: torch.dtype | None = None,
    fused_noise: str = "torch",
) -> Env:
    """Let an imagined env's ``rollout`` run on the fast engines; the env is changed in place.

    For torchrl's ``DreamerEnv``, ``ImaginedEnv`` and ``WorldModelEnv`` and any other
    ``ModelBasedEnvBase``, a class of your own included. ``env.rollout`` then returns what it returned
    before (values, gradients, keys, shapes, random numbers, errors), from the fused or the captured engine
    where these can run its step, and from its own step-by-step path where they cannot: ``env.explain(...)``
    says which and why. ``step``, ``reset`` and all else are the env's own as before.

    In place, so that whatever holds the env already, as a ``torchrl.objectives.DreamerActorLoss`` does, is
    faster too. The env's class becomes a subclass of what it was, so ``isinstance`` tells nothing new;
    copies and pickles of it are accelerated as well. A second time sets the arguments below anew, and
    nothing else; ``backend="eager"`` leaves every rollout to the env itself.

    One thing differs: the ``tensordict`` given to ``rollout`` is never written into. What a plan rests on
    includes the env's attributes: an env whose ``reset`` or ``step`` counts in one stays step by step.

    Args:
        env: the imagined env.
        backend: ``"auto"`` (the fastest engine that can run), ``"fused"``, ``"captured"`` or ``"eager"``.

    Keyword Args:
        fused_weights, fused_noise: as in :class:`fastwm.WorldModelEnv`.

    Returns:
        ``env`` itself.

    Raises:
        TypeError: ``env`` is a ``TransformedEnv`` (accelerate the env inside and roll that out), or no
            model-based env.
        ValueError: an unknown ``backend``, ``fused_weights`` or ``fused_noise``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.data import Composite, Unbounded
        >>> from torchrl.envs import DreamerEnv
        >>> from torchrl.modules import MLP, RSSMPrior, WorldModelWrapper
        >>> import fastwm
        >>> action = Unbounded((1,))
        >>> prior = RSSMPrior(action, hidden_dim=8, rnn_hidden_dim=8, state_dim=4, action_dim=1)
        >>> world_model = WorldModelWrapper(
        ...     Mod(prior, in_keys=["state", "belief", "action"], out_keys=["_", "_", "state", "belief"]),
        ...     Mod(MLP(12, 1, depth=1, num_cells=8), in_keys=["state", "belief"], out_keys=["reward"]),
        ... )
        >>> env = DreamerEnv(world_model, prior_shape=(4,), belief_shape=(8,))
        >>> env.observation_spec = Composite(state=Unbounded((4,)), belief=Unbounded((8,)))
        >>> env.action_spec, env.reward_spec = action, Unbounded((1,))
        >>> env = fastwm.accelerate(env)
        >>> policy = Mod(MLP(12, 1, depth=1, num_cells=8), in_keys=["state", "belief"], out_keys=["action"])
        >>> start = TensorDict({"state": torch.zeros(5, 4), "belief": torch.zeros(5, 8)}, [5])
        >>> env.rollout(3, policy, tensordict=start)["next", "reward"].shape
        torch.Size([5, 3, 1])
        >>> isinstance(env, DreamerEnv), env.explain(3, policy, tensordict=start).engine
        (True, 'fused')
    """
    if isinstance(env, TransformedEnv):
        raise TypeError(
            "accelerate cannot take a TransformedEnv: its rollout is not that of the env inside, but runs "
            "the transforms at every step. Accelerate the env inside, `fastwm.accelerate(env.base_env)`, "
            "and roll that out where the transforms only prepare the start or look at the result."
        )
    if not isinstance(env, ModelBasedEnvBase):
        raise TypeError(
            "accelerate takes a model-based env (torchrl.envs.ModelBasedEnvBase), not a "
            f"{type(env).__name__}: the engines run a step that is made of torch ops alone."
        )
    was = type(env)
    if not isinstance(env, FastEnv):
        env.__class__ = _accelerated(was)
    try:
        cast(FastEnv, env).choose_engine(backend, fused_weights, fused_noise)
    except ValueError:
        env.__class__ = was
        raise
    return env


class _Accelerated(FastEnv):
    """Stands before the class of an env that was accelerated."""

    _own_class: type[EnvBase]  # the class that the env had

    @property
    def restart(self) -> str:
        return "" if never_resets(self._own_class) else super().restart

    def refusal(self, request: Request) -> str:
        names: tuple[str, ...] = _ROLLING
        if request.policy is None and request.actions is None:
            names += ("rand_action",)
        if not request.stops:
            names += _STEPPING
            if self.__dict__.get("_torchrl_native_autoreset", False):
                return "an env that resets itself in the course of a step"
        for name in names:
            method = getattr(self._own_class, name)
            known = method is getattr(EnvBase, name) or method in _ONGOING
            if not known or name in self.__dict__:
                return f"{self._own_class.__name__} has a {name} of its own"
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as an env of its own class, accelerated anew."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[:2] != (copyreg.__newobj__, (type(self),)):  # type: ignore[attr-defined]
            return reduced  # the class has its own way
        return (_blank, (self._own_class,), *reduced[2:])


def never_resets(cls: type[EnvBase]) -> bool:
    """Whether rows that are finished go on in the rollouts of a class, as in a ``DreamerEnv``'s."""
    if cls.maybe_reset is EnvBase.maybe_reset:
        return cls.any_done in _ONGOING
    return cls.maybe_reset in _ONGOING


def _blank(own_class: type[EnvBase]) -> EnvBase:
    cls: Any = _accelerated(own_class)
    return cls.__new__(cls)


def _accelerated(own_class: type[EnvBase]) -> type[EnvBase]:
    """The subclass of ``own_class`` whose rollouts go to the engines: one, for as long as it is in use."""
    for cls in own_class.__subclasses__():
        if _Accelerated in cls.__bases__:
            return cls
    members = {
        "__doc__": own_class.__doc__,
        # A class of the user's is watched for changes, one of a library's is not.
        "__module__": own_class.__module__,
        "_own_class": own_class,
    }
    metaclass: Any = type(own_class)
    return metaclass(f"Accelerated{own_class.__name__}", (_Accelerated, own_class), members)
