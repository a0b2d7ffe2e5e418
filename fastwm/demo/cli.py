"""``python -m fastwm demo``: the whole demo, top to bottom."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl import logger
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from tqdm import tqdm

import fastwm
from fastwm.demo import speed
from fastwm.demo.model import make_world_model, prediction_error, train
from fastwm.demo.planning import Planned
from fastwm.demo.real import pendulum, play, returns
from fastwm.demo.report import Record, draw, speed_table
from fastwm.demo.settings import QUICK, Settings

__all__ = ["run"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastwm demo",
        description="A world model of Gymnasium's Pendulum-v1: real data, training, planning in "
        "imagination, and the same imagined rollouts on torchrl's classes and on fastwm's engines.",
        epilog="Exit status 1: a parity check is red (nothing is timed then), or the mean planned "
        "return is not above every random episode's.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")
    add("--out", type=Path, default=Path("demo_results"), help="folder for results (%(default)s)")
    add("--threads", type=int, default=1, help="of torch (%(default)s)")
    add("--quick", action="store_true", help="a smoke test of seconds; its numbers mean nothing")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the demo; see :func:`fastwm.demo.main`."""
    options = _parser().parse_args(argv)
    threads, level = torch.get_num_threads(), logger.level
    torch.set_num_threads(options.threads)
    logger.setLevel("WARNING")
    try:
        return _run(options.seed, options.out, options.threads, options.quick)
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def _run(seed: int, out: Path, threads: int, quick: bool) -> int:
    settings = QUICK if quick else Settings()
    record = Record(seed, quick, threads, settings)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    seeds = (1000 * seed + i for i in range(1000))  # one per set of real episodes
    episodes, steps = settings.episodes, settings.steps

    with _part(record, "1. Real data: Gymnasium's Pendulum-v1 through torchrl's GymEnv"):
        rounds = [
            play(episodes, steps, next(seeds), "random actions")
            for _ in range(settings.random_rounds)
        ]
        data = torch.stack(rounds)
        held_out = play(episodes, steps, next(seeds), "held out")
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
        buffer.extend(_transitions(data))
        print(f"{data.numel():,} transitions in the replay buffer, {held_out.numel():,} held out")

    with _part(record, "2. A world model, trained with fastwm.WorldModelLoss"):
        world_model = make_world_model(data, settings.width)
        env = fastwm.WorldModelEnv(world_model, pendulum(), batch_size=[])
        policy = Planned(env, world_model, settings)
        record.losses = train(world_model, buffer, settings, "training")
        for _ in range(settings.planned_rounds):
            # What planning meets is not what random actions meet: learn from both.
            met = play(episodes, steps, next(seeds), "planned actions", policy)
            buffer.extend(_transitions(met))
            record.losses = train(world_model, buffer, settings, "training on both")
        losses = ", ".join(f"{k.removeprefix('loss_')} {v:.1e}" for k, v in record.losses.items())
        print(f"unexplained part of the variance in training, one step: {losses}")

    with _part(record, "3. Planning by imagination, in the real environment"):
        start = next(seeds)
        played = {
            "random actions": play(episodes, steps, start, "random, same starts"),
            "planned (CEM)": play(episodes, steps, start, "planning", policy),
        }
        record.returns = {name: returns(p).tolist() for name, p in played.items()}
        # No episode of these two sets was trained on.
        sets = {"random episodes": held_out, "planned episodes": played["planned (CEM)"]}
        for name, episodes_played in sets.items():
            record.errors[name] = prediction_error(
                env, world_model, episodes_played, settings.open_loop
            )
        _print_errors(record)
        _print_returns(record)

    with _part(record, "4. The same imagination on torchrl's classes and on fastwm's engines"):
        races = []
        latents = world_model.encode(_transitions(data))["latent"]
        for batch in tqdm(settings.batches, desc="parity", unit="size"):
            # From random play: held upright, the reward is zero, and a relative error means nothing.
            rows = torch.randint(latents.shape[0], (batch,))
            races.append(speed.imagination(world_model, latents[rows], settings))
        races.append(
            speed.planning(world_model, latents[: episodes * steps : steps], settings, seed)
        )
        record.red = [red for race in races for red in race.red]
        if not record.red:
            print("parity, largest relative error: " + speed.describe_parity(races))
            for race in tqdm(races, desc="timing", unit="row"):
                record.speed.append(speed.time_race(race, settings))
            print(speed_table(record.speed))

    record.save(out / "demo.json")
    if record.red:
        print("parity: RED, so nothing is timed\n" + "\n".join(record.red), file=sys.stderr)
        return 1
    draw(record, out / "demo.png")
    print(f"\n{record.describe()}")
    print(
        f"results: {out / 'demo.png'}, {out / 'demo.json'} ({sum(record.seconds.values()):.0f} s)"
    )
    random, planned = record.returns.values()
    if not quick and statistics.fmean(planned) <= max(random):
        print("Planning was not clearly better than random actions.", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _part(record: Record, title: str) -> Iterator[None]:
    print(f"\n{title}", flush=True)
    begin = time.perf_counter()
    yield
    record.seconds[title] = time.perf_counter() - begin


def _transitions(played: TensorDictBase) -> TensorDictBase:
    """What the loss reads, one transition per row."""
    keys = "observation", "action", ("next", "observation"), ("next", "reward")
    return played.select(*keys).reshape(-1)


def _print_errors(record: Record) -> None:
    ahead = sorted({1, 5, record.settings.open_loop})
    print(
        "prediction error on held-out episodes, open loop"
        + "".join(f"{f'{n} ahead':>10}" for n in ahead)
    )
    units = {"state": "1: guessing that it stays", "reward": "1: guessing its mean"}
    for name, error in record.errors.items():
        for what, values in error.items():
            label = f"  {what}, {name} ({units[what]})"
            print(f"{label:<58}" + "".join(f"{values[n - 1]:>10.3f}" for n in ahead))


def _print_returns(record: Record) -> None:
    print("returns of the real episodes, same starts")
    for name, values in record.returns.items():
        each = " ".join(f"{value:.0f}" for value in values)
        print(f"  {name:<16} mean {statistics.fmean(values):7.0f}   each {each}")
