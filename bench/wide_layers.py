"""Fused against captured as layers get wider: what the rule in ``fastwm/engines/choice.py`` rests on.

    python bench/wide_layers.py            appends rows to bench/results/wide_layers.jsonl

Policy, dynamics and reward MLPs of two hidden layers, 5 steps, one thread, processor time, the two engines
in turns; the smallest of several rounds, since wide layers take long and the machine is shared.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from tensordict import TensorDict

import fastwm
from fastwm.bench.providers.env_rollout import environment
from fastwm.bench.scripts import record
from fastwm.bench.suites import MLPWorldModel

LATENT, ACTION, STEPS = 64, 6, 5


def measure(hidden: int, batch: int, grad: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time per rollout by engine, parity checked first."""
    torch.manual_seed(0)
    parts = MLPWorldModel(LATENT, hidden, ACTION).parts()
    policy, carry = parts.policy, {"latent": LATENT}
    env = environment(parts, carry, ACTION, batch, "cpu", fastwm.WorldModel, fastwm.WorldModelEnv)
    start = TensorDict({"latent": torch.randn(batch, LATENT)}, [batch])
    report = fastwm.check_parity(env, policy, start, STEPS, gradients=grad)
    assert report.ok, report
    times: dict[str, list[float]] = {"fused": [], "captured": []}
    for _ in range(rounds + 2):
        for engine, taken in times.items():
            with fastwm.backend(engine), torch.set_grad_enabled(grad):
                begin = time.thread_time()
                rollout = env.rollout(STEPS, policy, tensordict=start)
                if grad:
                    rollout["next", "reward"].sum().backward()
                taken.append(time.thread_time() - begin)
    return {engine: 1e3 * min(taken[2:]) for engine, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("bench/results/wide_layers.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for hidden in options.hidden:
        for batch in options.batch:
            for grad in (False, True):
                ms = measure(hidden, batch, grad, options.rounds)
                row = {
                    "hidden": hidden, "batch": batch, "steps": STEPS, "gradients": grad, "threads": 1,
                    "ms": {k: round(v, 4) for k, v in ms.items()},
                    "captured_over_fused": round(ms["captured"] / ms["fused"], 3),
                }  # fmt: skip
                record(options.results, row)
                what = "gradients" if grad else "forward"
                print(hidden, batch, what, row["ms"], row["captured_over_fused"])


if __name__ == "__main__":
    main()
