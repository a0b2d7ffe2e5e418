"""Small world models, actors and spec-only base envs that the tests share.

Every builder is deterministic under ``torch.manual_seed`` and takes ``cls`` (fastwm's
``WorldModel`` or torchrl's), so that one test body can run on both. ``CASES`` names one
:class:`Case` per family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.nn.distributions import NormalParamExtractor
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal

import fastwm

OBS, LATENT, ACTION = 8, 4, 2
BELIEF = 5
AGENTS = 3


# ---------------------------------------------------------------- base envs


class SpecEnv(EnvBase):
    """A base env that holds specs and refuses to run: world-model envs must only read it."""

    def __init__(
        self,
        observation: Composite,
        action: TensorSpec,
        reward: TensorSpec,
        done: TensorSpec,
        state: Composite | None = None,
        batch_size: Sequence[int] = (),
        device: Any = None,
    ) -> None:
        super().__init__(batch_size=torch.Size(batch_size), device=device)

        def expanded(spec: TensorSpec) -> TensorSpec:
            return spec.expand(torch.Size([*batch_size, *spec.shape])).clone()

        self.observation_spec = expanded(observation)
        if state is not None:
            self.state_spec = expanded(state)
        self.action_spec = expanded(action)
        self.reward_spec = expanded(reward)
        self.done_spec = expanded(done)

    def _reset(self, tensordict: Any, **kwargs: Any) -> Any:
        raise AssertionError("a world-model env must not reset its base env")

    def _step(self, tensordict: Any) -> Any:
        raise AssertionError("a world-model env must not step its base env")

    def _set_seed(self, seed: int | None) -> None:
        raise AssertionError("a world-model env must not seed its base env")


def flag(*event: int) -> Categorical:
    """A boolean flag of shape ``[*event, 1]``."""
    return Categorical(n=2, shape=(*event, 1), dtype=torch.bool)


def spec_env(
    batch_size: Sequence[int] = (),
    *,
    obs: int = OBS,
    action: int = ACTION,
    latent: int | None = None,
    done: Sequence[str] = ("done", "terminated"),
    bounded: bool = False,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> SpecEnv:
    """Flat specs: ``observation [O]``, ``latent [Z]`` if asked for, ``action [A]``, ``reward``."""
    observation = Composite(observation=Unbounded((obs,), dtype=dtype))
    if latent is not None:
        observation["latent"] = Unbounded((latent,), dtype=dtype)
    action_spec: TensorSpec = (
        Bounded(-1.0, 1.0, (action,), dtype=dtype) if bounded else Unbounded((action,), dtype=dtype)
    )
    return SpecEnv(
        observation,
        action_spec,
        Unbounded((1,), dtype=dtype),
        Composite({name: flag() for name in done}),
        batch_size=batch_size,
        device=device,
    )


def nested_spec_env(batch_size: Sequence[int] = ()) -> SpecEnv:
    """Every key one level down, the done flag in a group of its own."""
    return SpecEnv(
        Composite(sensors=Composite(observation=Unbounded((OBS,)))),
        Composite(control=Composite(action=Unbounded((ACTION,)))),
        Composite(gain=Composite(reward=Unbounded((1,)))),
        Composite(status=Composite(done=flag(), terminated=flag())),
        batch_size=batch_size,
    )


def multi_agent_spec_env(batch_size: Sequence[int] = (), *, agent_done: bool = True) -> SpecEnv:
    """An ``agents`` group with a trailing agent dim, ``[*B, N, ...]``; a ``done`` at the root."""
    done = Composite(done=flag(), terminated=flag())
    if agent_done:
        done["agents"] = Composite(done=flag(AGENTS), terminated=flag(AGENTS), shape=(AGENTS,))
    return SpecEnv(
        Composite(agents=Composite(observation=Unbounded((AGENTS, OBS)), shape=(AGENTS,))),
        Composite(agents=Composite(action=Unbounded((AGENTS, ACTION)), shape=(AGENTS,))),
        Composite(agents=Composite(reward=Unbounded((AGENTS, 1)), shape=(AGENTS,))),
        done,
        batch_size=batch_size,
    )


# ---------------------------------------------------------------- modules


class CatLinear(nn.Module):
    """Linear layer over the concatenation of its inputs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.linear(torch.cat(inputs, -1))


class CatMLP(nn.Module):
    """``depth`` hidden layers with SiLU over the concatenation of its inputs."""

    def __init__(self, in_features: int, out_features: int, hidden: int, depth: int = 2) -> None:
        super().__init__()
        sizes = [in_features, *[hidden] * depth]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], out_features))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(torch.cat(inputs, -1))


class AsDone(nn.Module):
    """A linear head whose output has the kind of flag asked for: float, int or bool."""

    def __init__(self, in_features: int, kind: str = "float") -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 1)
        self.kind = kind

    def forward(self, latent: Tensor) -> Tensor:
        return as_kind(self.linear(latent), self.kind)


def as_kind(logit: Tensor, kind: str) -> Tensor:
    """A flag that is set where ``logit > 0.5``, as float (the logit itself), int or bool."""
    if kind == "float":
        return logit
    return (logit > 0.5).to({"int": torch.int64, "bool": torch.bool}[kind])


class RecurrentPrior(nn.Module):
    """An RSSM's prior: GRU belief, Gaussian state; sampled, or its mean."""

    def __init__(self, state: int, belief: int, action: int, hidden: int, sampled: bool) -> None:
        super().__init__()
        self.project = nn.Linear(state + action, hidden)
        self.rnn = nn.GRUCell(hidden, belief)
        self.to_state = nn.Sequential(nn.Linear(belief, 2 * state), NormalParamExtractor())
        self.sampled = sampled

    def forward(self, state: Tensor, belief: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.nn.functional.elu(self.project(torch.cat([state, action], -1)))
        if hidden.ndim <= 2:
            belief = self.rnn(hidden, belief)
        else:  # a GRU cell takes one batch dim
            lead = hidden.shape[:-1]
            belief = self.rnn(hidden.flatten(0, -2), belief.flatten(0, -2)).unflatten(0, lead)
        mean, std = self.to_state(belief)
        return (mean + std * torch.randn_like(std) if self.sampled else mean), belief


class Count(nn.Module):
    """A latent that counts its steps: trajectories whose every value is known beforehand."""

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return latent + 1 + 0 * action.sum(-1, keepdim=True)


def module(
    net: nn.Module | Callable[..., Any], in_keys: Sequence[Any], out_keys: Sequence[Any]
) -> TensorDictModule:
    return TensorDictModule(net, in_keys=list(in_keys), out_keys=list(out_keys))


# ---------------------------------------------------------------- world models


def linear_world_model(
    cls: Any = fastwm.WorldModel,
    *,
    done: str | None = None,
    done_kind: str = "float",
    decoder: bool = False,
    obs: int = OBS,
    latent: int = LATENT,
    action: int = ACTION,
) -> Any:
    """One linear layer per part; ``done`` names the flag that the done head writes, if any."""
    return cls(
        module(nn.Linear(obs, latent), ["observation"], ["latent"]),
        module(CatLinear(latent + action, latent), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(latent, 1), [("next", "latent")], [("next", "reward")]),
        done_head=None
        if done is None
        else module(AsDone(latent, done_kind), [("next", "latent")], [("next", done)]),
        decoder=module(nn.Linear(latent, obs), ["latent"], ["reconstruction"]) if decoder else None,
    )


def mlp_world_model(
    cls: Any = fastwm.WorldModel,
    *,
    obs: int = 24,
    latent: int = 64,
    hidden: int = 256,
    action: int = 6,
    depth: int = 2,
    done: bool = False,
) -> Any:
    """The MLP model that the speed targets are stated for: latent 64, hidden 256, action 6."""
    return cls(
        module(nn.Linear(obs, latent), ["observation"], ["latent"]),
        module(
            CatMLP(latent + action, latent, hidden, depth),
            ["latent", "action"],
            [("next", "latent")],
        ),
        module(CatMLP(latent, 1, hidden, 1), [("next", "latent")], [("next", "reward")]),
        done_head=module(AsDone(latent), [("next", "latent")], [("next", "done")])
        if done
        else None,
    )


class TwoHeads(nn.Module):
    """Observation to (state, belief)."""

    def __init__(self, obs: int, state: int, belief: int) -> None:
        super().__init__()
        self.to_state, self.to_belief = nn.Linear(obs, state), nn.Linear(obs, belief)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_state(observation), self.to_belief(observation)


def rssm_world_model(
    cls: Any = fastwm.WorldModel,
    *,
    sampled: bool = False,
    obs: int = OBS,
    state: int = LATENT,
    belief: int = BELIEF,
    action: int = ACTION,
    hidden: int = 16,
) -> Any:
    """Two latents, ``state`` and ``belief``, as a recurrent state-space model carries them."""
    return cls(
        module(TwoHeads(obs, state, belief), ["observation"], ["state", "belief"]),
        module(
            RecurrentPrior(state, belief, action, hidden, sampled),
            ["state", "belief", "action"],
            [("next", "state"), ("next", "belief")],
        ),
        module(
            CatLinear(state + belief, 1),
            [("next", "state"), ("next", "belief")],
            [("next", "reward")],
        ),
    )


def nested_world_model(cls: Any = fastwm.WorldModel, *, done: bool = True) -> Any:
    """Every key nested; fits :func:`nested_spec_env`."""
    latent = ("hidden", "deep", "latent")
    return cls(
        module(nn.Linear(OBS, LATENT), [("sensors", "observation")], [latent]),
        module(
            CatLinear(LATENT + ACTION, LATENT), [latent, ("control", "action")], [("next", *latent)]
        ),
        module(nn.Linear(LATENT, 1), [("next", *latent)], [("next", "gain", "reward")]),
        done_head=module(AsDone(LATENT), [("next", *latent)], [("next", "status", "done")])
        if done
        else None,
    )


class TeamDone(nn.Module):
    """One flag for the team out of the agents' latents, ``[*B, N, Z] -> [*B, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, 1)

    def forward(self, latent: Tensor) -> Tensor:
        return self.linear(latent).mean(-2)


def multi_agent_world_model(cls: Any = fastwm.WorldModel, *, done: str | None = None) -> Any:
    """Latents ``[*B, N, Z]`` under ``agents``; ``done`` is None, ``"team"`` or ``"agents"``."""
    latent = ("agents", "latent")
    heads = {
        None: None,
        "team": lambda: module(TeamDone(), [("next", *latent)], [("next", "done")]),
        "agents": lambda: module(AsDone(LATENT), [("next", *latent)], [("next", "agents", "done")]),
    }
    return cls(
        module(nn.Linear(OBS, LATENT), [("agents", "observation")], [latent]),
        module(
            CatLinear(LATENT + ACTION, LATENT), [latent, ("agents", "action")], [("next", *latent)]
        ),
        module(nn.Linear(LATENT, 1), [("next", *latent)], [("next", "agents", "reward")]),
        done_head=None if done is None else heads[done](),
    )


def context_world_model(cls: Any = fastwm.WorldModel, *, context: int = 3) -> Any:
    """The step also reads ``goal``, which nothing writes: a constant of the trajectory."""
    return cls(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(
            CatLinear(LATENT + context + ACTION, LATENT),
            ["latent", "goal", "action"],
            [("next", "latent")],
        ),
        module(CatLinear(LATENT + context, 1), [("next", "latent"), "goal"], [("next", "reward")]),
    )


def counting_world_model(
    cls: Any = fastwm.WorldModel,
    *,
    done_at: float | None = None,
    flags: Sequence[str] = ("done",),
    kind: str = "bool",
) -> Any:
    """The latent (size 1) goes up by one a step, the reward is the next latent, and each flag of
    ``flags`` is set from the step on whose next latent reaches ``done_at``."""

    def reached(latent: Tensor) -> Any:
        hit = (latent >= done_at).to(latent.dtype)
        out = tuple(as_kind(hit, kind) for _ in flags)
        return out if len(out) > 1 else out[0]

    return cls(
        module(nn.Linear(OBS, 1), ["observation"], ["latent"]),
        module(Count(), ["latent", "action"], [("next", "latent")]),
        module(nn.Identity(), [("next", "latent")], [("next", "reward")]),
        done_head=None
        if done_at is None
        else module(reached, [("next", "latent")], [("next", name) for name in flags]),
    )


# ---------------------------------------------------------------- policies


def linear_policy(
    latent: int = LATENT,
    action: int = ACTION,
    *,
    latent_keys: Sequence[NestedKey] = ("latent",),
    action_key: NestedKey = "action",
) -> TensorDictModule:
    """A deterministic policy; ``latent`` is the summed width of what ``latent_keys`` hold."""
    return module(CatLinear(latent, action), latent_keys, [action_key])


class ActorNet(nn.Module):
    """Latents to the loc and scale of a distribution over actions."""

    def __init__(self, latent: int, action: int) -> None:
        super().__init__()
        self.net = nn.Sequential(CatLinear(latent, 2 * action), NormalParamExtractor())

    def forward(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.net[1](self.net[0](*latents))


def sampled_actor(
    latent: int = LATENT,
    action: int = ACTION,
    *,
    latent_keys: Sequence[NestedKey] = ("latent",),
    action_key: NestedKey = "action",
    return_log_prob: bool = False,
) -> ProbabilisticActor:
    """A reparametrised ``TanhNormal`` actor that samples (exploration type RANDOM by default)."""
    return ProbabilisticActor(
        module(ActorNet(latent, action), latent_keys, ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[action_key],
        distribution_class=TanhNormal,
        default_interaction_type="random",
        return_log_prob=return_log_prob,
    )


# ---------------------------------------------------------------- data


def real_observations(*observation_key: str, size: int = 50, batch: int = 8) -> ReplayBuffer:
    """A buffer of real transitions, as a collector fills one."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=batch)
    key = observation_key or ("observation",)
    td = TensorDict({"action": torch.randn(size, ACTION)}, [size])
    td.set(key, torch.randn(size, OBS))
    td.set(("next", *key), torch.randn(size, OBS))
    buffer.extend(td)
    return buffer


# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """One model family with what it takes to roll it out.

    ``latents`` and ``context`` map each key of the start to its event shape.
    """

    name: str
    world_model: Any
    base_env: EnvBase
    policy: TensorDictModuleBase
    latents: dict[NestedKey, tuple[int, ...]]
    context: dict[NestedKey, tuple[int, ...]] = field(default_factory=dict)
    action_key: NestedKey = "action"
    reward_key: NestedKey = "reward"
    latent_key: NestedKey = "latent"
    dtype: torch.dtype = torch.float32

    def env(self, batch_size: Sequence[int] = (), cls: Any = None, **kwargs: Any) -> Any:
        cls = fastwm.WorldModelEnv if cls is None else cls
        return cls(
            self.world_model,
            self.base_env,
            batch_size=torch.Size(batch_size),
            latent_key=self.latent_key,
            **kwargs,
        )

    def start(self, *batch: int, requires_grad: bool = False) -> TensorDict:
        """A fresh random start of batch ``[*batch]``."""
        out = TensorDict({}, batch_size=batch)
        for key, shape in {**self.latents, **self.context}.items():
            value = torch.randn(*batch, *shape, dtype=self.dtype)
            out.set(key, value.requires_grad_(requires_grad))
        return out


def _linear(cls: Any, **kwargs: Any) -> Case:
    return Case(
        "linear",
        linear_world_model(cls, **kwargs),
        spec_env(),
        linear_policy(),
        {"latent": (LATENT,)},
    )


def _linear_done(cls: Any) -> Case:
    return _linear(cls, done="done")


def _mlp(cls: Any) -> Case:
    return Case(
        "mlp",
        mlp_world_model(cls),
        spec_env(obs=24, action=6),
        linear_policy(64, 6),
        {"latent": (64,)},
    )


def _mlp_sampled(cls: Any) -> Case:
    case = _mlp(cls)
    case.policy = sampled_actor(64, 6)
    return case


def _rssm(cls: Any, sampled: bool = False) -> Case:
    return Case(
        "rssm",
        rssm_world_model(cls, sampled=sampled),
        spec_env(),
        linear_policy(LATENT + BELIEF, latent_keys=["state", "belief"]),
        {"state": (LATENT,), "belief": (BELIEF,)},
        latent_key="state",
    )


def _rssm_sampled(cls: Any) -> Case:
    case = _rssm(cls, sampled=True)
    case.policy = sampled_actor(LATENT + BELIEF, latent_keys=["state", "belief"])
    return case


def _nested(cls: Any) -> Case:
    latent = ("hidden", "deep", "latent")
    return Case(
        "nested",
        nested_world_model(cls),
        nested_spec_env(),
        linear_policy(latent_keys=[latent], action_key=("control", "action")),
        {latent: (LATENT,)},
        action_key=("control", "action"),
        reward_key=("gain", "reward"),
        latent_key=latent,
    )


def _multi_agent(cls: Any) -> Case:
    latent = ("agents", "latent")
    return Case(
        "multi_agent",
        multi_agent_world_model(cls),
        multi_agent_spec_env(),
        linear_policy(latent_keys=[latent], action_key=("agents", "action")),
        {latent: (AGENTS, LATENT)},
        action_key=("agents", "action"),
        reward_key=("agents", "reward"),
        latent_key=latent,
    )


def _context(cls: Any) -> Case:
    return Case(
        "context",
        context_world_model(cls),
        spec_env(),
        linear_policy(),
        {"latent": (LATENT,)},
        {"goal": (3,)},
    )


_BUILDERS: dict[str, Callable[[Any], Case]] = {
    "linear": _linear,
    "linear_done": _linear_done,
    "mlp": _mlp,
    "mlp_sampled": _mlp_sampled,
    "rssm": _rssm,
    "rssm_sampled": _rssm_sampled,
    "nested": _nested,
    "multi_agent": _multi_agent,
    "context": _context,
}
CASES = tuple(_BUILDERS)


def make_case(name: str, *, seed: int = 0, cls: Any = fastwm.WorldModel) -> Case:
    """The case of that name, weights drawn from ``seed``; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = _BUILDERS[name](cls)
    case.name = name
    return case


def plain_rollout(
    case: Case, start: TensorDict, max_steps: int, policy: Any = None
) -> dict[NestedKey, Tensor]:
    """What a rollout that never stops must hold, by a loop over the parts that knows no env.

    Keys: the latents and the context, ``("next", *latent)``, the action, ``("next", *reward)``;
    each ``[*batch, time, *event]``.
    """
    policy = case.policy if policy is None else policy
    keys: list[NestedKey] = [*case.latents, *case.context, case.action_key]
    writes = [_next(key) for key in case.latents] + [_next(case.reward_key)]
    steps: dict[NestedKey, list[Tensor]] = {key: [] for key in [*keys, *writes]}
    state = start.copy()
    for _ in range(max_steps):
        state = case.world_model.step(policy(state))
        for key in steps:
            steps[key].append(state.get(key))
        following = TensorDict({}, start.batch_size)
        for key in case.latents:
            following.set(key, state.get(_next(key)))
        for key in case.context:
            following.set(key, state.get(key))
        state = following
    return {key: torch.stack(values, start.ndim) for key, values in steps.items()}


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
