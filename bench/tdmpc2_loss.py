"""The model losses of TD-MPC2, forward and backward: the latent rollout on each engine beside a plain loop.

    python -m bench.tdmpc2_loss --size 5M --batch 256   appends a row to bench/results/tdmpc2_loss.jsonl

All in turns, one thread. The plain loop steps the latent with the dynamics' module and asks each head once
for all steps, as the official update does. It is first held to the same values: no figure comes from a wrong
result. Times are of this process's CPU, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import fastwm
from fastwm.bench.scripts import record
from fastwm.models.tdmpc2 import SIZES, TDMPC2Loss, tdmpc2
from tests.models import spec_env

HORIZON, OBS, ACTION = 3, 24, 6


class PlainLoop(TDMPC2Loss):
    """The losses around a loop in plain torch."""

    def _rollout(self, start: TensorDictBase, action: Tensor) -> TensorDictBase:
        latents = [start["latent"]]
        for step in action.unbind(1):
            latents.append(self.world_model.dynamics.module(latents[-1], step))
        stacked = torch.stack(latents, 1)
        at = stacked[:, :-1], action
        heads = {
            "latent": stacked[:, 1:],
            "reward_logits": self.world_model.reward_head.module[0].module(*at),
            "value_logits": self.qvalue_network.module(*at),
        }
        return TensorDict({"next": heads}, action.shape[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="5M")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path("bench/results/tdmpc2_loss.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = spec_env(obs=OBS, action=ACTION, bounded=True)
    loss = tdmpc2(env, size=options.size).loss
    plain = PlainLoop(loss.world_model, loss.actor_network, loss.qvalue_network)
    plain.target_qvalue_network_params = loss.target_qvalue_network_params
    batch = TensorDict(
        {
            "observation": torch.randn(options.batch, HORIZON, OBS),
            "action": torch.rand(options.batch, HORIZON, ACTION) * 2 - 1,
            "next": {
                "observation": torch.randn(options.batch, HORIZON, OBS),
                "reward": torch.randn(options.batch, HORIZON, 1),
                "terminated": torch.zeros(options.batch, HORIZON, 1, dtype=torch.bool),
            },
        },
        [options.batch, HORIZON],
    )

    def on(backend: str) -> Callable[[], TensorDictBase]:
        def run() -> TensorDictBase:
            with fastwm.backend(backend):
                return loss.model_losses(batch)[0]

        return run

    ways = {name: on(name) for name in ("fused", "captured", "eager")}
    ways["plain loop"] = lambda: plain.model_losses(batch)[0]
    loss.eval()  # without dropout, of which each way draws its own
    for way in ways.values():
        torch.manual_seed(1)
        got = way()
        torch.manual_seed(1)
        torch.testing.assert_close(got.to_dict(), on("eager")().to_dict(), rtol=1e-4, atol=1e-5)
    loss.train()

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            begin = time.process_time()
            total = sum(way().values())
            middle = time.process_time()
            total.backward()
            seconds[name].append((middle - begin, time.process_time() - begin))
    print(f"TD-MPC2 {options.size}, batch {options.batch}, {HORIZON} steps; CPU ms, medians:")
    ms: dict[str, dict[str, float]] = {}
    for name, found in seconds.items():
        forward, both = (1e3 * statistics.median(one) for one in zip(*found, strict=True))
        ms[name] = {"forward": round(forward, 2), "forward+backward": round(both, 2)}
        print(f"  {name:<10}  forward {forward:7.1f}   with backward {both:7.1f}")
    row = {
        "size": options.size, "batch": options.batch, "steps": HORIZON, "threads": 1,
        "rounds": options.rounds, "ms": ms,
    }  # fmt: skip
    record(options.results, row)


if __name__ == "__main__":
    main()
