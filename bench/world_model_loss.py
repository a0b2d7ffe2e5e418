"""`WorldModelLoss` forward and backward on each engine, beside torchrl's class: what its ``"auto"`` rests on.

    python bench/world_model_loss.py       appends rows to bench/results/world_model_loss.jsonl

World model of MLPs (latent 64, hidden 256, two layers, action 6, observation 32), reward, done (cross-entropy
of logits) and latent losses. One thread; medians over rounds, the engines in turns, and medians of the ratios
to what ``"auto"`` was before there was a captured engine. On a CPU processor time, since the machine may be
shared; on CUDA wall time, waiting for the device. Each is held to torchrl's results first.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import Tensor
from torchrl.modules import MLP
from torchrl.objectives.world_model_loss import WorldModelLoss as TorchRLLoss

import fastwm
from fastwm.bench.scripts import in_turns, record
from fastwm.models.layers import Concat
from fastwm.tolerances import tolerance

OBS, LATENT, HIDDEN, ACTION = 32, 64, 256, 6
ENGINES = ("eager", "fused", "captured")


def world_model() -> fastwm.WorldModel:
    hidden: dict[str, Any] = {"num_cells": [HIDDEN, HIDDEN]}
    latent = ("next", "latent")
    return fastwm.WorldModel(
        Mod(MLP(OBS, LATENT, **hidden), ["observation"], ["latent"]),
        Mod(Concat(MLP(LATENT + ACTION, LATENT, **hidden)), ["latent", "action"], [latent]),
        Mod(MLP(LATENT, 1, **hidden), [latent], [("next", "reward")]),
        done_head=Mod(MLP(LATENT, 1, **hidden), [latent], [("next", "done")]),
    )


def batch_of(size: list[int]) -> TensorDict:
    reward, done = torch.randn(*size, 1), torch.rand(*size, 1) < 0.1
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            "action": torch.randn(*size, ACTION),
            "target_latent": torch.randn(*size, LATENT),
            "next": {"reward": reward, "done": done, "terminated": done.clone()},
        },
        size,
    )


def measure(size: list[int], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call and backward of each round, by engine."""
    torch.manual_seed(0)
    model, batch = world_model().to(device), batch_of(size).to(device)
    losses: dict[str, Any] = {"losses": ["reward", "done", "latent"]}
    makes: dict[str, Any] = {"torchrl": functools.partial(TorchRLLoss, model, **losses)}
    for engine in ENGINES:
        makes[engine] = functools.partial(fastwm.WorldModelLoss, model, backend=engine, **losses)
    runs, results = {}, {}
    for name, make in makes.items():
        loss = make()
        loss.set_keys(predicted_latent=("next", "latent"))

        def run(loss: Any = loss) -> list[Tensor]:
            out = loss(batch)
            total = out["loss_reward"] + out["loss_done"] + out["loss_latent"]
            total.backward()
            return list(out.values())

        model.zero_grad()
        try:
            values = [v.detach() for v in run()]
        except RuntimeError as reason:  # such as a kernel that the device lacks
            print(f"  {name} does not run: {reason}")
            continue
        runs[name] = run
        results[name] = values, [p.grad.clone() for p in model.parameters()]
    for values, gradients in results.values():
        for what, got, want in (
            ("loss", values, results["torchrl"][0]),
            ("loss.gradient", gradients, results["torchrl"][1]),
        ):
            torch.testing.assert_close(got, want, **tolerance(what, torch.float32).kwargs())
    return in_turns(runs, rounds, warmups=5, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", action="append", help="of one batch")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results/world_model_loss.jsonl")
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.batch or [[256, 1], [16, 50], [1], [4096]]:
        found = measure(size, options.device, options.rounds)
        before = found["fused" if options.device == "cpu" else "eager"]
        ms = {name: round(statistics.median(taken), 4) for name, taken in found.items()}
        ratios = {
            name: round(statistics.median(b / m for b, m in zip(before, taken, strict=True)), 3)
            for name, taken in found.items()
        }
        row = {
            "batch": size, "device": options.device, "threads": 1, "rounds": options.rounds,
            "ms": ms, "auto_before_over": ratios,
        }  # fmt: skip
        record(options.results, row, options.device)
        shown = "  ".join(f"{name} {ms[name]:.3f} ms ({ratios[name]:.3f}x)" for name in ms)
        print(f"batch {size}: {shown}", flush=True)


if __name__ == "__main__":
    main()
