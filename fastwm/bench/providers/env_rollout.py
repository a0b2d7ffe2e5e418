"""The rollout through an environment: torchrl's published classes, and ours on each engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase

from fastwm.bench.problem import Problem, gradients
from fastwm.bench.providers import torch_compile
from fastwm.bench.providers.base import Built, Unavailable
from fastwm.bench.suites import Parts
from fastwm.specs_env import SpecsEnv

__all__ = ["environment", "fastwm", "torchrl"]


class _Specs(SpecsEnv):
    """A base env that holds specs and is never run.

    It is batched and its observation is the carry: otherwise torchrl 0.14.1 loses the specs' last
    dim or never advances the latent.
    """

    def __init__(self, batch: int, carry: Mapping[str, int], action: int, device: Any) -> None:
        super().__init__(batch_size=torch.Size([batch]), device=device)
        self.observation_spec = Composite(
            {key: Unbounded((batch, width), device=device) for key, width in carry.items()},
            shape=(batch,),
            device=device,
        )
        self.action_spec = Unbounded((batch, action), device=device)
        self.reward_spec = Unbounded((batch, 1), device=device)


def environment(
    parts: Parts, carry: Mapping[str, int], action: int, batch: int, device: Any,
    world_model_class: Any, env_class: Any,
) -> Any:  # fmt: skip
    """An env of ``env_class`` that imagines with these modules."""
    first = next(iter(carry))
    world_model = world_model_class(
        # Needed by the constructor; an imagined rollout never encodes.
        TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=[first]),
        parts.dynamics,
        parts.reward,
    )
    base_env = _Specs(batch, carry, action, device)
    specs = base_env.observation_spec.clone()
    return env_class(world_model, base_env, observation_spec=specs, latent_key=first)


def _built(problem: Problem, world_model_class: Any, env_class: Any) -> Built:
    suite, device, parts = problem.suite, problem.device, problem.model.parts()
    env = environment(
        parts, suite.carry, suite.action, problem.batch, device, world_model_class, env_class
    )
    policy = parts.policy
    rows, steps = (problem.batch, problem.horizon), problem.horizon

    def imagine() -> TensorDictBase:
        # A new tensordict each time, as from an encoder: a rollout writes its flags into the one it
        # is given.
        problem.reseed()
        start = TensorDict(problem.start, [problem.batch], device=device)
        return env.rollout(steps, policy, tensordict=start)

    def named(rollout: TensorDictBase) -> dict[str, Tensor]:
        following = rollout.get("next")
        return {
            **{key: rollout.get(key) for key in suite.carry},
            "action": rollout.get("action"),
            **{f"next_{key}": following.get(key) for key in suite.carry},
            # torchrl 0.14.1's reward lacks the last dim.
            "reward": following.get("reward").reshape(*rows, 1),
        }

    if problem.backward:
        return Built(lambda: gradients(problem, named(imagine())), lambda raw: raw)

    def without_gradients() -> TensorDictBase:
        with torch.no_grad():
            return imagine()

    return Built(without_gradients, named)


def torchrl(problem: Problem) -> Built:
    """The published classes of torchrl: the definition of right, and the speed to compare with."""
    from torchrl.envs.model_based import WorldModelEnv
    from torchrl.modules import WorldModel

    return _built(problem, WorldModel, WorldModelEnv)


def fastwm(backend: str, *, inductor: bool = False) -> Callable[[Problem], Built]:
    """Our classes with ``backend=`` fixed, so that nothing else can run in its name.

    Args:
        backend: the engine.
        inductor: compile its step.
    """

    def build(problem: Problem) -> Built:
        import fastwm as library

        def make(*args: Any, **kwargs: Any) -> EnvBase:
            env = library.WorldModelEnv(*args, backend=backend, **kwargs)
            return env.compile() if inductor else env

        if inductor:
            torch_compile.check_compiler(problem)
        built = _built(problem, library.WorldModel, make)
        if backend == "fused":
            _refused(built)
        return built

    return build


def _refused(built: Built) -> None:
    """Raise :class:`Unavailable` where the fused engine says that this model is not for it."""
    try:
        built.run()
    except RuntimeError as error:
        if "backend='fused' cannot run" not in str(error):
            raise
        raise Unavailable(str(error)) from None
