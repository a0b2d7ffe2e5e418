"""The same imagination on torchrl's classes and on fastwm's engines: equal first, then timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import MLP

import fastwm
from fastwm.bench.stats import median_ratio
from fastwm.bench.timing import Effort, interleave
from fastwm.bench.verdict import compare
from fastwm.demo.planning import make_planner
from fastwm.demo.real import pendulum
from fastwm.demo.settings import Settings
from fastwm.ops.library import cpu_library
from fastwm.patching import TORCHRL_CLASSES

__all__ = ["PROVIDERS", "Race", "Row", "describe_parity", "imagination", "planning", "time_race"]

#: Name in tables -> our backend; None: torchrl's published classes around the same modules.
PROVIDERS: dict[str, str | None] = {
    "torchrl": None,
    "fastwm eager": "eager",
    "fastwm captured": "captured",
    # Only where the C++ library could be built.
    **({"fastwm fused": "fused"} if cpu_library().loaded else {}),
}

Run = Callable[[], dict[str, Tensor]]


@dataclass
class Race:
    """One piece of work and how each provider does it.

    Args:
        work: what is done.
        batch: rows imagined side by side.
        runs: per provider, a call that does the work once.
        absent: providers that cannot do it, with their error.
        worst: per provider, its largest relative error: eager's against torchrl, an engine's against eager.
        red: what parity found wrong; empty when all is green.
    """

    work: str
    batch: int
    runs: dict[str, Run] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    red: list[str] = field(default_factory=list)

    def hold_to_eager(self, report: fastwm.ParityReport) -> None:
        """Take in what :func:`fastwm.check_parity` found: every key and, where asked, every gradient."""
        found = {engine.engine: engine for engine in report.engines}
        for name, backend in PROVIDERS.items():
            if backend in found:
                engine = found[backend]
                self.worst[name] = max((c.error for c in engine.comparisons), default=float("nan"))
                if engine.refused or not engine.ok:
                    self.red.append(f"{self.work}: {engine}")

    def hold_to_torchrl(self) -> None:
        """Compare the values of our eager path with those of torchrl's classes."""
        verdict = compare(self.runs["fastwm eager"](), self.runs["torchrl"]())
        self.worst["fastwm eager"] = max(verdict.worst.values())
        if not verdict.ok:
            self.red.append(f"{self.work}, fastwm eager against torchrl: {verdict}")


@dataclass(frozen=True)
class Row:
    """A timed race.

    Args:
        milliseconds: per provider, the median over the rounds.
        speedup: per provider, how many times faster than the first: the median of the rounds' ratios.
    """

    work: str
    batch: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    worst: dict[str, float]
    absent: dict[str, str]
    rounds: int


def imagination(world_model: fastwm.WorldModel, latents: Tensor, settings: Settings) -> Race:
    """A rollout from ``latents`` ``[B, Z]`` under a policy network, as actor-critic training imagines."""
    batch, horizon = latents.shape[0], settings.rollout
    # Not trained: its speed does not depend on that.
    actor = nn.Sequential(MLP(latents.shape[-1], 1, num_cells=[settings.width] * 2), nn.Tanh())
    policy = TensorDictModule(actor, in_keys=["latent"], out_keys=["action"])

    def start() -> TensorDict:
        # A new one each time, as from an encoder: torchrl's rollout writes into the one it is given.
        return TensorDict({"latent": latents}, [batch])

    def run_on(env: EnvBase) -> Run:
        def run() -> dict[str, Tensor]:
            with torch.no_grad():
                out = env.rollout(horizon, policy, tensordict=start())
            following = out.get("next")
            return {
                "latent": out.get("latent"),
                "action": out.get("action"),
                "next latent": following.get("latent"),
                # torchrl 0.14.1's reward lacks the last dim.
                "reward": following.get("reward").reshape(batch, horizon, 1),
            }

        return run

    race = Race(f"rollout, {batch:,} row{'s' if batch > 1 else ''}", batch)
    for name in PROVIDERS:
        race.runs[name] = run_on(_env(name, world_model, [batch]))
    env = fastwm.WorldModelEnv(world_model, pendulum(), batch_size=[batch])
    race.hold_to_eager(fastwm.check_parity(env, policy, start(), horizon))
    race.hold_to_torchrl()
    return race


def planning(
    world_model: fastwm.WorldModel, latents: Tensor, settings: Settings, seed: int
) -> Race:
    """One decision of the planner for each of ``latents`` ``[episodes, Z]``, as the demo just played."""
    episodes, candidates = latents.shape[0], settings.candidates
    start = TensorDict({"latent": latents}, [episodes])

    def run_on(env: EnvBase) -> Run:
        planner = make_planner(env, settings)

        def run() -> dict[str, Tensor]:
            torch.manual_seed(seed)
            with torch.no_grad():
                return {"action": planner(env.reset(start.clone()))["action"]}

        return run

    race = Race(f"one CEM plan, {episodes * candidates:,} rows", episodes * candidates)
    for name in PROVIDERS:
        try:
            race.runs[name] = run_on(_env(name, world_model, []))
        except RuntimeError as error:
            if name != "torchrl":
                raise
            race.absent[name] = str(error)
    # A planner picks its elites, so a rounding may tip it: what it imagines is what has to be equal.
    env = fastwm.WorldModelEnv(world_model, pendulum(), batch_size=[])
    each = start.unsqueeze(-1).expand(episodes, candidates).clone()
    actions = [env.action_spec.rand(each.batch_size) for _ in range(settings.horizon)]
    with torch.no_grad():
        report = fastwm.check_parity(env, None, each, settings.horizon, actions=actions)
    race.hold_to_eager(report)
    return race


def _env(name: str, world_model: fastwm.WorldModel, batch_size: list[int]) -> EnvBase:
    """The imagined env of a provider; the modules inside are the same for all."""
    backend = PROVIDERS[name]
    if backend is not None:
        return fastwm.WorldModelEnv(world_model, pendulum(), batch_size=batch_size, backend=backend)
    # torchrl 0.14.1 needs a base env that is batched, observes the latent and has no bounds on actions.
    base_env = fastwm.WorldModelEnv(world_model, pendulum(), batch_size=batch_size)
    base_env.action_spec = Unbounded(base_env.action_spec.shape)
    parts = world_model.encoder, world_model.dynamics, world_model.reward_head
    return TORCHRL_CLASSES["WorldModelEnv"](
        TORCHRL_CLASSES["WorldModel"](*parts), base_env, batch_size=batch_size
    )


def time_race(race: Race, settings: Settings) -> Row:
    """Time a race whose parity is green: one sample of each provider per round, in turns."""
    samples = interleave(race.runs, Effort(settings.seconds, *settings.rounds))
    first = next(iter(samples))
    return Row(
        race.work,
        race.batch,
        {name: statistics.median(s.ms) for name, s in samples.items()},
        {name: median_ratio(samples[first].ms, s.ms) for name, s in samples.items()},
        race.worst,
        race.absent,
        len(samples[first].ms),
    )


def describe_parity(races: Sequence[Race]) -> str:
    """The largest errors over all races, in words."""
    eager = max(race.worst.get("fastwm eager", 0.0) for race in races)
    engines = max(e for race in races for name, e in race.worst.items() if name != "fastwm eager")
    return f"eager against torchrl {eager:.1e}; its engines against eager, gradients included, {engines:.1e}"
