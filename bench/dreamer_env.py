"""Dreamer's imagination in torchrl's `DreamerEnv`, as it is and accelerated, in turns on one core.

    python bench/dreamer_env.py            appends rows to bench/results/dreamer_env.jsonl

Dreamer v1 in its official code's sizes (belief 200, state 30, heads of 400 ELU units), 15 steps:

    rollout     env.rollout, no gradients
    gradient    the same with the actor's gradient of the summed rewards, the world model frozen
    actor_loss  torchrl's DreamerActorLoss, forward and backward: with a value and lambda-returns

The accelerated env is held to the other first, values and gradients. Milliseconds are processor time of the
one thread, since the machine may be shared; ratios are medians over rounds. ``floor_ms`` is what the matrix
products alone take at the machine's measured peak: no float32 engine can be faster.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import DreamerEnv
from torchrl.modules import MLP, DreamerActor, RSSMPrior, WorldModelWrapper
from torchrl.objectives import DreamerActorLoss
from torchrl.objectives.utils import hold_out_net

import fastwm
from fastwm.bench.limits import measure as measure_limits
from fastwm.bench.scripts import in_turns, record
from fastwm.bench.suites.base import linear_macs
from fastwm.models.rssm.heads import tanh_normal_actor
from fastwm.tolerances import tolerance

BELIEF, STATE, UNITS, ACTION, STEPS = 200, 30, 400, 6, 15
LATENTS = ["state", "belief"]


class Dreamer:
    """torchrl's modules of Dreamer v1, its env, and the loss that imagines in it."""

    def __init__(self) -> None:
        spec = Bounded(-1, 1, (ACTION,))
        prior = RSSMPrior(spec, BELIEF, BELIEF, STATE, action_dim=ACTION)
        heads = {"num_cells": UNITS, "activation_class": nn.ELU}
        reward, value = (MLP(STATE + BELIEF, 1, depth=depth, **heads) for depth in (2, 3))
        self.env = DreamerEnv(
            WorldModelWrapper(
                TensorDictModule(prior, [*LATENTS, "action"], ["_", "_", *LATENTS]),
                TensorDictModule(reward, LATENTS, ["reward"]),
            ),
            prior_shape=(STATE,),
            belief_shape=(BELIEF,),
        )
        specs = {"state": Unbounded(STATE), "belief": Unbounded(BELIEF)}
        self.env.observation_spec, self.env.state_spec = Composite(specs), Composite(specs)
        self.env.action_spec, self.env.reward_spec = spec, Unbounded(1)
        actor = DreamerActor(ACTION, depth=4, num_cells=UNITS)
        actor(torch.zeros(1, STATE), torch.zeros(1, BELIEF))  # its first layer is lazy
        self.actor = tanh_normal_actor(spec, actor)
        self.value = TensorDictModule(value, LATENTS, ["state_value"])
        self.loss = DreamerActorLoss(self.actor, self.value, self.env, imagination_horizon=STEPS)
        self.loss.make_value_estimator(time_dim=-2)
        model, policy, critic = map(linear_macs, (self.env, self.actor, self.value))
        gradient = (
            2 * model + 3 * policy
        )  # of the model's inputs, and of the actor's weights besides
        self.macs = {
            "rollout": model + policy,
            "gradient": gradient,
            "actor_loss": gradient + 2 * critic,
        }

    def rollout(self, start: TensorDictBase) -> list[Tensor]:
        with torch.no_grad():
            dream = self.env.rollout(STEPS, self.actor, tensordict=start)
        return [dream["next", key] for key in (*LATENTS, "reward")]

    def gradient(self, start: TensorDictBase) -> list[Tensor]:
        self.actor.zero_grad()
        with hold_out_net(self.env):
            dream = self.env.rollout(STEPS, self.actor, tensordict=start)
        total = dream["next", "reward"].sum()
        total.backward()
        return [dream["next", "reward"].detach(), *self.gradients()]

    def actor_loss(self, start: TensorDictBase) -> list[Tensor]:
        self.actor.zero_grad()
        losses, data = self.loss(start)
        losses["loss_actor"].backward()
        return [data["lambda_target"], *self.gradients()]

    def gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.actor.parameters()]
        assert all(g is not None for g in found)
        return [g.clone() for g in found if g is not None]


def measure(
    eager: Dreamer, fast: Dreamer, what: str, start: TensorDict, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each round by name, parity checked first."""
    runs: dict[str, Callable[[TensorDictBase], list[Tensor]]] = {
        "torchrl": getattr(eager, what),
        "accelerated": getattr(fast, what),
    }
    results = []
    for run in runs.values():
        torch.manual_seed(0)
        results.append(run(start))
    kind = tolerance("rollout" if what == "rollout" else "rollout.gradient", torch.float32)
    for want, got in zip(*results, strict=True):
        largest = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=kind.rtol, atol=kind.rtol * largest + kind.atol)
    return in_turns({name: partial(run, start) for name, run in runs.items()}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256, 2500])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path("bench/results/dreamer_env.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    eager = Dreamer()
    fast = copy.deepcopy(eager)
    fastwm.accelerate(fast.env)
    weights = sum(p.numel() * 4 for p in (*eager.env.parameters(), *eager.actor.parameters()))
    peak = measure_limits(weights).peak_gflops
    for batch in options.batch:
        start = TensorDict(
            {"state": torch.randn(batch, STATE), "belief": torch.randn(batch, BELIEF).tanh()},
            [batch],
        )
        engine = fast.env.explain(STEPS, fast.actor, tensordict=start).engine
        for what, macs in eager.macs.items():
            ms = measure(eager, fast, what, start, options.rounds)
            ratios = [a / b for a, b in zip(ms["torchrl"], ms["accelerated"], strict=True)]
            gflop = 2e-9 * macs * batch * STEPS
            row = {
                "what": what, "batch": batch, "steps": STEPS, "threads": 1, "engine": engine,
                "ms": {name: round(statistics.median(values), 4) for name, values in ms.items()},
                "ratio": round(statistics.median(ratios), 3),
                "samples_ms": {name: [round(v, 4) for v in values] for name, values in ms.items()},
                "gflop": round(gflop, 3), "peak_gflops": round(peak, 1),
                "floor_ms": round(1e3 * gflop / peak, 2),
            }  # fmt: skip
            record(options.results, row)
            print(batch, what, row["ms"], f"{row['ratio']}x", f"floor {row['floor_ms']} ms", engine)


if __name__ == "__main__":
    main()
