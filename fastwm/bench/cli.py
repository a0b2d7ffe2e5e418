"""``python -m fastwm bench``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import fastwm
from fastwm.bench import memory, providers
from fastwm.bench.plan import Plan
from fastwm.bench.problem import DIRECTIONS
from fastwm.bench.suites import SUITES
from fastwm.bench.timing import Effort

__all__ = ["main"]

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
HORIZONS = (5, 15, 50)
#: Of the other suites: a step of theirs is up to eighty times the work of an mlp's.
OTHER_BATCHES, OTHER_HORIZONS = (1, 16, 256, 2500), (15,)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastwm bench",
        description="Imagined rollouts on fastwm's engines and their peers: in turns, parity first",
        epilog="What is recorded for the same code is not measured again. "
        "Exit status 1: something was red or failed.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few configurations, a minute or two")
    add(
        "--suite", choices=list(SUITES), nargs="+", default=["mlp"], metavar="SUITE",
        help=f"the models, of {', '.join(SUITES)} (mlp)",
    )  # fmt: skip
    add(
        "--batch", type=int, nargs="+", metavar="B",
        help=f"default {BATCHES} for mlp, {OTHER_BATCHES} for others",
    )  # fmt: skip
    add(
        "--horizon", type=int, nargs="+", metavar="T",
        help=f"default {HORIZONS} for mlp, {OTHER_HORIZONS} for others",
    )  # fmt: skip
    add("--direction", choices=DIRECTIONS, nargs="+", help="backward is forward + all gradients")
    add("--threads", type=int, nargs="+", metavar="N", help="default 1 2 (on CUDA 1)")
    add("--providers", nargs="+", metavar="NAME", help="default all; also module:attribute")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--seconds", type=float, help="aim per configuration, all providers together")
    add("--rounds", type=int, nargs=2, metavar=("MIN", "MAX"), help="default 5 30")
    add(
        "--memory", action="store_true", help="peak memory instead of time; no gradients by default"
    )
    add("--results", type=Path, help="folder of the rows and plots (bench/results)")
    add("--force", action="store_true", help="measure again what is already recorded")
    add("--no-plot", action="store_true", help="leave the plots as they are")
    add("--plot-only", action="store_true", help="draw the recorded rows, measure nothing")
    add("--list", action="store_true", help="name the providers and stop")
    return parser


def _results(given: Path | None) -> Path:
    """The checkout's folder where there is a checkout, else one below the working directory."""
    if given is not None:
        return given
    root = Path(fastwm.__file__).resolve().parent.parent
    return (root if (root / "pyproject.toml").exists() else Path.cwd()) / "bench" / "results"


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(options: argparse.Namespace, suite: str, results: Path) -> Plan:
    quick, on_cpu = options.quick, options.device == "cpu"
    batches: tuple[int, ...] = BATCHES if suite == "mlp" else OTHER_BATCHES
    horizons: tuple[int, ...] = HORIZONS if suite == "mlp" else OTHER_HORIZONS
    directions: tuple[str, ...] = DIRECTIONS
    threads = tuple(n for n in (1, 2) if n <= _cores()) if on_cpu else (1,)
    effort = Effort()
    if quick:
        batches, horizons, threads = (1, 16, 256), (15,), (1,)
        effort = Effort(seconds=2.0, min_rounds=5, max_rounds=15)
    if options.memory:
        batches, horizons, directions, threads = (4096,), (15,), ("forward",), (1,)
    rounds = options.rounds or (effort.min_rounds, effort.max_rounds)
    names = options.providers or providers.default_names(options.device)
    if quick and not options.providers:
        # Compiling takes longer than everything else together.
        names = [name for name in names if name != "torch-compile-loop"]
    providers.chosen(names)
    return Plan(
        suite=suite,
        batches=tuple(options.batch or batches),
        horizons=tuple(options.horizon or horizons),
        directions=tuple(options.direction or directions),
        threads=tuple(options.threads or threads),
        providers=tuple(names),
        device=options.device,
        results=str(results / f"{suite}.jsonl"),
        effort=Effort(options.seconds or effort.seconds, *rounds),
        force=options.force,
        memory=options.memory,
    )


@contextmanager
def _only_cores(count: int) -> Iterator[None]:
    """Children started within may use ``count`` cores; where the system cannot say so, all."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _environment(plan: Plan, threads: int) -> dict[str, str]:
    """What a worker must find before it imports anything."""
    env = dict(os.environ)
    env.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    if plan.device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
        env["XLA_FLAGS"] = (
            f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
        ).strip()
    else:
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if plan.memory:
        env.update(memory.environment())
    return env


def _run_worker(plan: Plan, threads: int) -> int:
    command = [sys.executable, "-m", "fastwm.bench.worker"]
    text = plan.with_threads(threads).to_json()
    # The host threads of a CUDA run are left alone.
    with _only_cores(threads) if plan.device == "cpu" else nullcontext():
        env = _environment(plan, threads)
        return subprocess.run(command, input=text, text=True, env=env).returncode


def _draw(results: Path) -> None:
    from fastwm.bench import plots

    try:
        for path in plots.draw(results):
            print(f"plot: {path}")
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says.

    Returns:
        0; 1 when a provider was red or failed (its speed is then not reported).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        for provider in providers.PROVIDERS.values():
            print(f"{provider.name}{' *' if provider.ours else ''}")
        return 0
    results = _results(options.results)
    status = 0
    if not options.plot_only:
        try:
            # dict: a suite named twice is measured once.
            plans = [_plan(options, suite, results) for suite in dict.fromkeys(options.suite)]
        except ValueError as error:
            parser.error(str(error))
        for plan in plans:
            for threads in plan.threads:
                status |= int(_run_worker(plan, threads) != 0)
            print(f"\nrows: {plan.results}")
    if not options.no_plot:
        _draw(results)
    if status:
        print("NOT ALL GREEN: see above for what was red or failed.", file=sys.stderr)
    return status
