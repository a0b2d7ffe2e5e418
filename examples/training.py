"""What all examples share: command line, seeds, progress bar, evaluation, learning curve, checkpoints.

run = Run.from_command_line("mbpo", __doc__, steps=10_000, quick_steps=300)
run.keep(family=family, optimizer=optimizer, buffer=buffer)
start = run.load()                                  # 0, or where --resume goes on
with run.progress(run.steps, initial=start) as bar:
    for step in range(start, run.steps, 200):
        ...                                         # learn from 200 real steps
        bar.update(200)
        run.evaluate(step + 200, policy, loss=...)  # 10 episodes; writes curve.json
        run.save(step + 200)
run.finish()                                        # curve.png
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import gymnasium
import numpy as np
import torch
import torchrl
from curves import draw
from torchrl.envs import EnvBase, ExplorationType, GymEnv, SerialEnv, set_exploration_type
from tqdm import tqdm

from fastwm.bench import conditions

__all__ = ["GOAL", "Run", "episode_returns"]

# Stated before any tuning: the swing-up counts as solved from here, in the mean of 10 episodes.
GOAL, EPISODES = {"Pendulum-v1": -250.0}, 10


class Run:
    """One training run: its options, its learning curve and its checkpoints.

    Attributes:
        family, seed, env, backend, classes, steps, out, quick, resume, threads: from the command line;
            ``steps`` are steps of the real env, ``out`` is a folder, made here.
        options: all of the command line, those that ``arguments`` added included.
        evaluations: the learning curve: ``step``; ``seconds`` of the run, before a resume and in
            evaluation included; ``evaluating``, the part of them that evaluation took;
            ``cpu_seconds``, which a busy machine does not stretch; ``mean``; ``returns``; and what the
            example added.
        values: the plain values of the checkpoint that :meth:`load` found.
    """

    def __init__(self, family: str, options: argparse.Namespace) -> None:
        self.family, self.options = family, options
        self.seed, self.env, self.classes = options.seed, options.env, options.classes
        self.backend, self.threads, self.steps = options.backend, options.threads, options.steps
        self.out, self.quick, self.resume = options.out, options.quick, options.resume
        self.evaluations: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        self._bar: tqdm | None = None
        self._test_env: EnvBase | None = None
        self._begin, self._evaluating = time.perf_counter(), 0.0
        self._cpu_begin = 0.0  # of the process: what came before is the run's as well
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self.threads)
        torchrl.logger.setLevel("WARNING")
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.seed)
        self._conditions = conditions.stamp()

    @classmethod
    def from_command_line(
        cls, family: str, description: str, *, steps: int, quick_steps: int,
        classes: Sequence[str] = ("fastwm",), arguments: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Run:  # fmt: skip
        """Read ``sys.argv``.

        ``steps`` and ``quick_steps``: real env steps by default, and with ``--quick``. ``classes``: whose
        ``WorldModel`` and ``WorldModelEnv`` the example can run on, the default first. ``arguments``:
        further ones, e.g. ``{"--size": {"default": "1M"}}``, found in ``run.options``.
        """
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add, engines = parser.add_argument, ("auto", "fused", "captured", "eager")
        add("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")
        add("--env", default="Pendulum-v1", help="a Gymnasium id (%(default)s)")
        add("--steps", type=int, help=f"real env steps ({steps}; {quick_steps} with --quick)")
        add("--backend", default="auto", choices=engines, help="imagination engine (%(default)s)")
        add("--classes", default=classes[0], choices=classes, help="whose WorldModel (%(default)s)")
        add("--out", type=Path, help=f"folder for results (example_results/{family})")
        add("--threads", type=int, default=1, help="of torch (%(default)s)")
        add("--quick", action="store_true", help="a smoke test; its numbers mean nothing")
        add("--resume", action="store_true", help="go on from the folder's checkpoint, if any")
        for name, settings in (arguments or {}).items():
            add(name, **settings)
        options = parser.parse_args()
        if options.steps is None:
            options.steps = quick_steps if options.quick else steps
        options.out = options.out or Path("example_results") / family
        return cls(family, options)

    def make_env(self, count: int = 0) -> EnvBase:
        """The real env; with ``count``, that many side by side, batch ``[count]``."""
        make: Callable[[], EnvBase] = lambda: GymEnv(self.env)  # noqa: E731
        return SerialEnv(count, make) if count else make()

    def progress(self, total: int, initial: int = 0, unit: str = "step") -> tqdm:
        """A progress bar that shows the last evaluation; seldom written to what is no terminal."""
        seldom = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(None, self.family, total, initial=initial, unit=unit, mininterval=seldom)
        return self._bar

    def evaluate(
        self, step: int, policy: Callable | None, env: EnvBase | None = None,
        limit: int | None = None, **scalars: float,
    ) -> float:  # fmt: skip
        """Play 10 real episodes without exploration, record them, return their mean return.

        Each step has starts of its own, the same in every run of this seed.

        Args:
            step: real env steps learnt from so far.
            policy: reads batches ``[10]``.
            env: to play in, by default ``make_env(10)``; for policies that need transforms.
            limit: decisions per episode, where the policy takes fewer than the task has steps.
            scalars: further things to record, e.g. losses.
        """
        begin = time.perf_counter()
        if env is None:
            env = self._test_env = self._test_env or self.make_env(2 if self.quick else EPISODES)
        env.set_seed(1_000_003 * (self.seed + 1) + step)
        if limit is None:
            limit = 20 if self.quick else gymnasium.spec(self.env).max_episode_steps or 1000
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            played = env.rollout(limit, policy, break_when_any_done=False)
        self._evaluating += time.perf_counter() - begin
        return self.record(step, episode_returns(played).tolist(), **scalars)

    def record(self, step: int, returns: Sequence[float], **scalars: float) -> float:
        """Add a point to the learning curve, write ``curve.json``, return the mean of ``returns``."""
        mean = sum(returns) / len(returns)
        cpu = time.process_time() - self._cpu_begin
        times = {"seconds": self.seconds(), "evaluating": self._evaluating, "cpu_seconds": cpu}
        times = {name: round(value, 2) for name, value in times.items()}
        added = {name: float(value) for name, value in scalars.items()}
        point = {"step": step, **times, "mean": mean, "returns": list(returns), **added}
        self.evaluations.append(point)
        if self._bar is not None:
            self._bar.set_postfix_str(f"return {mean:.0f}")
        self._write_curve()
        return mean

    def seconds(self) -> float:
        """Wall seconds of this run so far, those before a resume included."""
        return time.perf_counter() - self._begin

    def keep(self, **parts: Any) -> None:
        """Name what checkpoints hold: things with ``state_dict`` and ``load_state_dict``."""
        self._kept.update(parts)

    def save(self, step: int, **values: Any) -> None:
        """Write a checkpoint: what :meth:`keep` named, plain ``values``, the curve, random states.

        Real envs are not in it: save between episodes.
        """
        times = (self.seconds(), self._evaluating, time.process_time() - self._cpu_begin)
        own = (step, times, self.evaluations)
        checkpoints.save(self.out / "checkpoint.pt", self._same(), self._kept, (own, values))

    def load(self) -> int:
        """With ``--resume`` and a checkpoint, take everything from it; the step to go on from, or 0.

        Raises:
            SystemExit: the checkpoint is of another family, env, seed or classes; names it.
        """
        path = self.out / "checkpoint.pt"
        if not self.resume or not path.exists():
            return 0
        own, self.values = checkpoints.load(path, self._same(), self._kept)
        step, (seconds, self._evaluating, cpu), self.evaluations = own
        self._begin, self._cpu_begin = time.perf_counter() - seconds, time.process_time() - cpu
        return step

    def finish(self) -> None:
        """Write ``curve.json`` and ``curve.png``; say when the goal was reached."""
        self._write_curve()
        draw([self.out / "curve.json"], self.out / "curve.png")
        goal, text = GOAL.get(self.env), ""
        if goal is not None and not self.quick:
            reached = next((e for e in self.evaluations if e["mean"] >= goal), None)
            when = (
                f"after {reached['step']} steps, {reached['seconds']:.0f} s" if reached else "never"
            )
            text = f"return {goal:.0f} or better: {when}; last {self.evaluations[-1]['mean']:.0f}; "
        print(f"{text}{self.seconds():.0f} s in all; {self.out / 'curve.json'}, curve.png")

    def _same(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("family", "env", "seed", "classes")}

    def _write_curve(self) -> None:
        script = " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        curve = {**self._same(), "command": script, "goal": GOAL.get(self.env), "options": options}
        curve |= {"conditions": self._conditions, "evaluations": self.evaluations}
        text = json.dumps(curve, indent=1) + "\n"
        checkpoints.replace(self.out / "curve.json", lambda path: path.write_text(text))


def episode_returns(played: Any) -> torch.Tensor:
    """Summed reward of each row's first episode, ``[B, T] -> [B]``."""
    done = played["next", "done"].long()
    first = done.cumsum(1) - done == 0
    return (played["next", "reward"] * first).sum((-2, -1))
