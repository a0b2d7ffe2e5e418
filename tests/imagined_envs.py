"""Imagined envs of torchrl's own classes, and of a user's, that the tests of `fastwm.accelerate` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import DreamerEnv, EnvBase, ModelBasedEnvBase, TensorDictPrimer, TransformedEnv
from torchrl.envs.model_based import WorldModelEnv
from torchrl.envs.model_based.imagined import ImaginedEnv
from torchrl.modules import (
    MLP,
    DreamerActor,
    RSSMPrior,
    SafeModule,
    SafeProbabilisticModule,
    SafeProbabilisticTensorDictSequential,
    SafeSequential,
    TanhNormal,
    WorldModel,
    WorldModelWrapper,
)
from torchrl.testing.mocking_classes import ContinuousActionConvMockEnv

from tests.models import (
    ACTION,
    BELIEF,
    LATENT,
    CatMLP,
    linear_policy,
    linear_world_model,
    module,
    spec_env,
)

STATE = 3


@dataclass
class Imagined:
    """An env that imagines, with a policy and a start for it.

    Attributes:
        engine: the fastest engine that takes its rollouts on a CPU.
    """

    env: EnvBase
    policy: Any
    start: TensorDictBase
    engine: str

    def parameters(self) -> list[Tensor]:
        policy = list(self.policy.parameters()) if isinstance(self.policy, nn.Module) else []
        return [p for p in (*self.env.parameters(), *policy) if p.requires_grad]


def dreamer(rows: int = 5) -> Imagined:
    """Dreamer v1's imagination, wired as torchrl's own test of it wires it."""
    base = TransformedEnv(
        ContinuousActionConvMockEnv(pixel_shape=[3, 4, 4]),
        TensorDictPrimer(
            random=False, default_value=0, state=Unbounded(STATE), belief=Unbounded(BELIEF)
        ),
    )
    action = base.action_spec
    (size,) = action.shape
    prior = RSSMPrior(
        action, hidden_dim=BELIEF, rnn_hidden_dim=BELIEF, state_dim=STATE, action_dim=size
    )
    transition = SafeSequential(
        SafeModule(
            prior, in_keys=["state", "belief", "action"], out_keys=["_", "_", "state", "belief"]
        )
    )
    reward = SafeModule(
        MLP(STATE + BELIEF, 1, depth=1, num_cells=8, activation_class=nn.ELU),
        in_keys=["state", "belief"],
        out_keys=["reward"],
    )
    env = DreamerEnv(
        WorldModelWrapper(transition, reward),
        prior_shape=torch.Size([STATE]),
        belief_shape=torch.Size([BELIEF]),
    )
    env.set_specs_from_env(base)
    start = TensorDict(
        {"state": torch.randn(rows, STATE), "belief": torch.randn(rows, BELIEF)}, [rows]
    )
    actor = dreamer_actor(size, action)
    actor(start.clone())  # its first layer is lazy
    return Imagined(env, actor, start, "fused")


def dreamer_actor(size: int, action: Any) -> SafeProbabilisticTensorDictSequential:
    return SafeProbabilisticTensorDictSequential(
        SafeModule(
            DreamerActor(size, depth=1, num_cells=8, activation_class=nn.ELU),
            in_keys=["state", "belief"],
            out_keys=["loc", "scale"],
        ),
        SafeProbabilisticModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            default_interaction_type=InteractionType.RANDOM,
            distribution_class=TanhNormal,
            distribution_kwargs={"tanh_loc": True},
            spec=Composite(action=action),
        ),
    )


class MomentMatching(nn.Module):
    """A linear model of mean and covariance: ``m' = A m + B a``, ``S' = A S A^T + Q``."""

    def __init__(self, observation: int, action: int) -> None:
        super().__init__()
        self.transition = nn.Parameter(
            torch.eye(observation) + 0.1 * torch.randn(observation, observation)
        )
        self.control = nn.Parameter(0.1 * torch.randn(observation, action))
        self.noise = nn.Parameter(0.1 * torch.rand(observation))

    def forward(self, action: Tensor, observation: TensorDictBase) -> tuple[Tensor, Tensor]:
        mean, var = observation.get("mean"), observation.get("var")
        mean = mean @ self.transition.mT + action @ self.control.mT
        return mean, self.transition @ var @ self.transition.mT + torch.diag(self.noise)


def imagined(rows: int = 5) -> Imagined:
    """torchrl's ``ImaginedEnv``, with a covariance matrix among its observations."""
    model = TensorDictModule(
        MomentMatching(LATENT, ACTION),
        in_keys=["action", "observation"],
        out_keys=[("next", "observation", "mean"), ("next", "observation", "var")],
    )
    env = ImaginedEnv(model, spec_env([rows], obs=LATENT), batch_size=[rows])
    policy = module(nn.Linear(LATENT, ACTION), [("observation", "mean")], ["action"])
    mean, root = torch.randn(rows, LATENT), torch.randn(rows, LATENT, LATENT)
    start = TensorDict({"observation": {"mean": mean, "var": root @ root.mT}}, [rows])
    return Imagined(env, policy, start, "fused")


def upstream(rows: int = 5, done: str | None = None) -> Imagined:
    """torchrl's ``WorldModelEnv``, with a base env of the same batch, as it needs it."""
    env = WorldModelEnv(
        linear_world_model(WorldModel, done=done, done_kind="bool"),
        spec_env([rows], latent=LATENT),
        batch_size=[rows],
    )
    start = TensorDict({"latent": torch.randn(rows, LATENT)}, [rows])
    return Imagined(env, linear_policy(), start, "fused")


class Spring(ModelBasedEnvBase):
    """A user's env: a mass on a spring, its force learned; done where it is drawn too far."""

    def __init__(self, batch_size: tuple[int, ...] = ()) -> None:
        force = module(CatMLP(3, 1, 8, 1), ["position", "velocity", "action"], ["force"])
        super().__init__(force, batch_size=torch.Size(batch_size))
        self.dt = 0.5
        self.limit = 1e9
        shape = (*batch_size, 1)
        self.observation_spec = Composite(
            position=Unbounded(shape), velocity=Unbounded(shape), shape=batch_size
        )
        self.state_spec = self.observation_spec.clone()
        self.action_spec = Bounded(-1, 1, shape)
        self.reward_spec = Unbounded(shape)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        position, velocity = tensordict.get("position"), tensordict.get("velocity")
        force = self.world_model(tensordict.copy()).get("force")
        velocity = velocity + self.dt * self.pull(force, position)
        position = position + self.dt * velocity
        return TensorDict(
            {
                "position": position,
                "velocity": velocity,
                "reward": -(position**2),
                "done": position.abs() > self.limit,
            },
            tensordict.batch_size,
        )

    def pull(self, force: Tensor, position: Tensor) -> Tensor:
        return force - position

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        if tensordict is not None and "position" in tensordict:
            return tensordict.copy()
        size = self.batch_size if tensordict is None else tensordict.batch_size
        return TensorDict({key: torch.randn(*size, 1) for key in ("position", "velocity")}, size)


def spring(rows: int = 5) -> Imagined:
    start = TensorDict({key: torch.randn(rows, 1) for key in ("position", "velocity")}, [rows])
    policy = module(CatMLP(2, 1, 8, 1), ["position", "velocity"], ["action"])
    return Imagined(Spring(), policy, start, "fused")


BUILDERS = {"dreamer": dreamer, "imagined": imagined, "upstream": upstream, "spring": spring}
