"""Decisions per second of TD-MPC2's planner: 512 samples, 6 iterations, horizon 3, 5M parameters.

    python bench/planning.py               appends rows to bench/results/planning.jsonl

Who decides:

- ``fastwm``: :class:`fastwm.planning.TDMPC2Planner` on the engine that ``"auto"`` takes.
- ``torch``, ``torch_compile``: the algorithm in plain torch, as the official code has it (every candidate
  imagined in every iteration, every Q function evaluated, two of them used), that under ``torch.compile``.
- ``torch_lean``, ``torch_compile_lean``: the same without the work that cannot change a decision: the
  policy's own sequences imagined once, two Q functions evaluated. That is the work that ``fastwm`` does.
- ``torchrl``, ``torchrl_on_fastwm``: torchrl's ``MPPIPlanner`` on a model-based env of torchrl and on
  :class:`fastwm.WorldModelEnv`; its advantage module is the same score. It has no policy sequences, so its
  decisions are others; ``fastwm_mppi`` is :class:`fastwm.planning.MPPIPlanner` of the same arguments.

One thread, processor time, in turns; parity first: from the same seed ``fastwm`` decides what plain torch
does, and ``fastwm_mppi`` what torchrl does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.modules import MPPIPlanner as TorchRLPlanner

from fastwm.bench.conditions import code_hash
from fastwm.bench.limits import measure
from fastwm.bench.scripts import in_turns, record
from fastwm.bench.suites.base import linear_macs
from fastwm.models.family import Family
from fastwm.models.tdmpc2 import tdmpc2
from fastwm.planning import MPPIPlanner, TDMPC2Planner
from fastwm.planning.imagination import members
from fastwm.specs_env import SpecsEnv

OBSERVATION, ACTION, DISCOUNT = 24, 6, 0.99
SAMPLES, ELITES, PRIOR, HORIZON, ITERATIONS = 512, 64, 24, 3, 6
TEMPERATURE, MIN_STD, MAX_STD = 0.5, 0.05, 2.0
Decide = Callable[[Tensor], Tensor]


class Specs(SpecsEnv):
    """A base env that holds specs and is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((OBSERVATION,)))
        self.action_spec = Bounded(-1.0, 1.0, (ACTION,))
        self.reward_spec = Unbounded((1,))


class TorchRLEnv(ModelBasedEnvBase):
    """The model as torchrl's planners take it: a step that reads and writes the latent at the root."""

    def __init__(self, family: Family, latent: int) -> None:
        dynamics, reward = family.dynamics, family.reward  # type: ignore[attr-defined]
        super().__init__(
            TensorDictSequential(
                TensorDictModule(reward, ["latent", "action"], ["reward"]),
                TensorDictModule(dynamics, ["latent", "action"], ["latent"]),
            )
        )
        self.state_spec = Composite(latent=Unbounded((latent,)))
        self.observation_spec = Composite(latent=Unbounded((latent,)))
        self.action_spec = Bounded(-1.0, 1.0, (ACTION,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        raise NotImplementedError("the planner's starts are given")


def make_family(size: str) -> Family:
    """The family, its heads moved from the zeros that they begin with so that candidates differ."""
    family = tdmpc2(Specs(), size=size).eval()
    with torch.no_grad():
        for p in family.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
    modules = dict(family.world_model.named_modules())
    found = [m for m in modules.values() if type(m) is TensorDictModule]
    by_key = {m.out_keys[0]: m.module for m in found}
    family.add_module("dynamics", by_key["next", "latent"])
    family.add_module("reward", Reward(by_key["reward_logits"], by_key["next", "reward"]))
    return family


class Reward(nn.Module):
    """Logits and their decoding as one."""

    def __init__(self, logits: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.logits, self.decode = logits, decode

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.decode(self.logits(latent, action))


class Plain:
    """TD-MPC2's planner in plain torch, batched over environments, without warm start.

    Args:
        family: whose networks.
        lean: without the work that cannot change a decision.
    """

    def __init__(self, family: Any, *, lean: bool) -> None:
        self.dynamics, self.reward = family.dynamics, family.reward
        self.prior, self.q = family.policy.module, family.value.module
        self.lean = lean

    def value(self, latent: Tensor, pair: Tensor) -> Tensor:
        action = self.prior(latent)
        stacked = dict(self.q.named_parameters())
        count = stacked["ensemble.biases.0"].shape[0]
        chosen = members(pair, count)
        if not self.lean:
            return self.q(latent, action)[..., chosen].mean(-1)
        two = {k: p.index_select(0, chosen) for k, p in stacked.items()}
        return functional_call(self.q, two, (latent, action)).mean(-1)

    def follow(self, latent: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        returns = torch.zeros(latent.shape[0], actions.shape[1])
        latent = latent.unsqueeze(1).expand(-1, actions.shape[1], -1)
        for t in range(HORIZON):
            action = actions[:, :, t]
            returns = returns + DISCOUNT**t * self.reward(latent, action).squeeze(-1)
            latent = self.dynamics(latent, action)
        return returns, latent

    def policy(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, played = latent.unsqueeze(1).expand(-1, PRIOR, -1), []
        returns = torch.zeros(latent.shape[:2])
        for t in range(HORIZON):
            action = self.prior(latent)
            played.append(action)
            if self.lean:
                returns = returns + DISCOUNT**t * self.reward(latent, action).squeeze(-1)
            if self.lean or t < HORIZON - 1:
                latent = self.dynamics(latent, action)
        return torch.stack(played, 2), returns, latent

    def __call__(self, latent: Tensor) -> Tensor:
        batch = latent.shape[0]
        own, own_returns, own_last = self.policy(latent)
        mean = torch.zeros(batch, HORIZON, ACTION)
        std = torch.full_like(mean, MAX_STD)
        for _ in range(ITERATIONS):
            noise = torch.randn(batch, SAMPLES - PRIOR, HORIZON, ACTION)
            drawn = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).clamp(-1, 1)
            actions = torch.cat([own, drawn], 1)
            if self.lean:
                returns, last = self.follow(latent, drawn)
                returns = torch.cat([own_returns, returns], 1)
                last = torch.cat([own_last, last], 1)
            else:
                returns, last = self.follow(latent, actions)
            score = returns + DISCOUNT**HORIZON * self.value(last, torch.rand(2))
            best, index = score.nan_to_num(0.0).topk(ELITES, 1)
            shape = batch, ELITES, HORIZON, ACTION
            elite = actions.gather(1, index[..., None, None].expand(shape))
            weight = torch.softmax(TEMPERATURE * best, 1)[..., None, None]
            mean = (weight * elite).sum(1)
            std = (weight * (elite - mean.unsqueeze(1)).square()).sum(1).sqrt()
            std = std.clamp(MIN_STD, MAX_STD)
        noise = torch.empty(batch, ELITES).exponential_()
        chosen = (weight[..., 0, 0] / noise).argmax(1)
        action = elite[torch.arange(batch), chosen, 0] + std[:, 0] * torch.randn(batch, ACTION)
        return action.clamp(-1, 1)


class Score(TensorDictModuleBase):
    """The same score as an advantage module, for MPPI as torchrl has it."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["latent"], ["advantage"]
        self.plain = plain

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = tensordict.get(("next", "reward")).squeeze(-1)
        returns = (reward * DISCOUNT ** torch.arange(HORIZON)).sum(-1)
        last = tensordict.get(("next", "latent"))[..., -1, :]
        score = returns + DISCOUNT**HORIZON * self.plain.value(last, torch.rand(2))
        return tensordict.set("advantage", score[..., None, None].expand(*score.shape, HORIZON, 1))


def deciders(family: Any, compiled: bool) -> dict[str, Decide]:
    """Each takes latents ``[B, Z]`` and returns actions ``[B, A]``."""
    env = family.env(Specs())
    official, lean = Plain(family, lean=False), Plain(family, lean=True)
    score = Score(lean)
    mppi = {
        "temperature": TEMPERATURE, "planning_horizon": HORIZON, "optim_steps": ITERATIONS,
        "num_candidates": SAMPLES, "top_k": ELITES,
    }  # fmt: skip
    latent = env.full_state_spec["latent"].shape[-1]

    def through(planner: Any) -> Decide:
        def decide(z: Tensor) -> Tensor:
            flag = torch.zeros(z.shape[0], 1, dtype=torch.bool)
            state = {"latent": z, "done": flag, "terminated": flag.clone()}
            return planner(TensorDict(state, [z.shape[0]]))["action"]

        return decide

    found: dict[str, Decide] = {
        "fastwm": through(
            TDMPC2Planner(env, policy=family.policy, value=family.value, discount=DISCOUNT)
        ),
        "torch": official,
        "torch_lean": lean,
        "torchrl": through(TorchRLPlanner(TorchRLEnv(family, latent), score, **mppi)),
        "torchrl_on_fastwm": through(TorchRLPlanner(env, score, **mppi)),
        "fastwm_mppi": through(MPPIPlanner(env, score, **mppi)),
    }
    if compiled:
        # Numbers as eager draws them; without this they are others, not fewer.
        torch._inductor.config.fallback_random = True
        found["torch_compile"] = torch.compile(official)
        found["torch_compile_lean"] = torch.compile(lean)
    return found


def check(found: dict[str, Decide], latent: Tensor) -> dict[str, float]:
    """Largest difference of an action from its reference's, from the same seed."""

    def action(name: str) -> Tensor:
        torch.manual_seed(1)
        return found[name](latent)

    pairs = {"fastwm": "torch", "torch_lean": "torch", "fastwm_mppi": "torchrl"}
    pairs |= {"torchrl_on_fastwm": "torchrl"}
    pairs |= {name: "torch" for name in found if name.startswith("torch_compile")}
    worst = {a: (action(a) - action(b)).abs().max().item() for a, b in pairs.items()}
    for name, difference in worst.items():
        assert difference < 1e-3, f"{name} decides otherwise than {pairs[name]}: {difference}"
    return worst


def gflop(family: Any, batch: int) -> dict[str, float]:
    """Matrix products of one decision: what it needs, and as the official code does it."""

    networks = family.dynamics, family.reward
    step, prior = sum(map(linear_macs, networks)), linear_macs(family.policy)
    weights = family.value.module.ensemble.weights
    one, count = sum(w[0].numel() for w in weights), weights[0].shape[0]
    own = PRIOR * HORIZON * (prior + step)
    # Of the first step, the products with the latent that all candidates share are made once.
    first = [next(m for m in net.modules() if isinstance(m, nn.Linear)) for net in networks]
    shared = sum(m.out_features * (m.in_features - ACTION) for m in first)
    drawn = HORIZON * step - shared
    needed = own + shared + ITERATIONS * ((SAMPLES - PRIOR) * drawn + SAMPLES * (prior + 2 * one))
    official = PRIOR * (
        HORIZON * prior + (HORIZON - 1) * linear_macs(family.dynamics)
    ) + ITERATIONS * SAMPLES * (HORIZON * step + prior + count * one)
    return {"needed": 2e-9 * batch * needed, "official": 2e-9 * batch * official}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="5M", help="of fastwm.models.tdmpc2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="environments")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--results", type=Path, default=Path("bench/results/planning.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = make_family(options.size)
    weights = sum(p.numel() * 4 for p in family.world_model.parameters())
    for batch in options.batch:
        with torch.no_grad():
            seen = TensorDict({"observation": torch.randn(batch, OBSERVATION)}, [batch])
            latent = family.world_model.encode(seen)["latent"]
            runs = deciders(family, compiled=not options.no_compile)
            parity = check(runs, latent)
            turns = {name: partial(run, latent) for name, run in runs.items()}
            ms = in_turns(turns, options.rounds, warmups=0)  # warm from the check
        limits = measure(weights)
        work = gflop(family, batch)
        medians = {name: statistics.median(taken) for name, taken in ms.items()}
        peers = {n: m for n, m in medians.items() if "fastwm" not in n}
        best = min(peers, key=lambda name: peers[name])
        row = {
            "what": "tdmpc2 planning", "size": options.size, "environments": batch, "threads": 1,
            "samples": SAMPLES, "iterations": ITERATIONS, "horizon": HORIZON, "rounds": options.rounds,
            "ms": {name: round(m, 2) for name, m in medians.items()},
            "decisions_per_s": {name: round(1e3 * batch / m, 3) for name, m in medians.items()},
            "best_peer": best, "fastwm_vs_best_peer": round(peers[best] / medians["fastwm"], 3),
            "gflop": {name: round(value, 2) for name, value in work.items()},
            "fastwm_gflops": round(1e3 * work["needed"] / medians["fastwm"], 1),
            "floor_ms": round(1e3 * work["needed"] / limits.peak_gflops, 1),
            "limits": limits.to_dict(), "parity": parity, "how": "median of processor time, in turns",
            "code": code_hash(),
        }  # fmt: skip
        record(options.results, row)
        print(json.dumps({k: row[k] for k in ("environments", "ms", "decisions_per_s", "best_peer",
              "fastwm_vs_best_peer", "gflop", "fastwm_gflops", "floor_ms", "parity")}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
