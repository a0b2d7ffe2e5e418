"""Random row programs and modules: C++ against `interpret`, gradients against autograd, fused against eager.

    python -m tests.row_program.fuzz --seconds 60 --seed 5

Each failure prints its seed (run again with ``--seed N --count 1``) and the smallest program found that still
fails.
"""

from __future__ import annotations

import argparse
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastwm.row_program import Program
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.program import Val
from fastwm.row_program.reference import interpret
from tests.row_program.backward_inputs import gather
from tests.row_program.executing import ISAS, assert_near, assert_ran, execute, threads
from tests.row_program.random_programs import random_program

__all__ = ["Failure", "fuzz"]

_SIZES = ((1, 1), (1, 7), (3, 2), (17, 5), (2, 0), (70, 3), (130, 2))


@dataclass
class Failure:
    """What went wrong with a seed."""

    seed: int
    kind: str
    message: str

    def __str__(self) -> str:
        again = f"python -m tests.row_program.fuzz --seed {self.seed} --count 1"
        return f"{self.kind}, seed {self.seed} ({again})\n{self.message}"


# ---------------------------------------------------------------- row programs


def check_forward(
    program: Program, inputs: dict[Any, torch.Tensor], rows: int, steps: int, rng: random.Random
) -> None:
    """C++ in both dtypes, on an instruction set and in a direction by chance."""
    reverse, isa = rng.random() < 0.3, rng.choice(list(ISAS))
    major = [n for n, i in program.inputs.items() if i.role == "step" and rng.random() < 0.3]
    with torch.no_grad():
        want = interpret(replace(program, dtype=torch.float64), inputs, steps, reverse=reverse)
    for dtype, rtol, atol in ((torch.float64, 1e-10, 1e-12), (torch.float32, 2e-3, 1e-4)):
        typed = replace(program, dtype=dtype)
        ran = execute(typed, inputs, rows, steps, reverse=reverse, isa=isa, time_major=major)
        assert_ran(ran, want, rtol=rtol, atol=atol)


def check_gradient(
    program: Program, inputs: dict[Any, torch.Tensor], rows: int, steps: int, rng: random.Random
) -> None:
    """Forward with its tape and the backward program, both in C++, against autograd through `interpret`."""
    program = replace(program, dtype=torch.float64)
    floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
    grads = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
    carries = [n for n in floats if program.inputs[n].role == "carry"]
    wrt = rng.sample(floats, rng.randint(1, len(floats)))
    final_grads = rng.sample(carries, rng.randint(0, len(carries)))
    budget = rng.choice([None, 0.0, 30.0])
    gradient = differentiate(program, wrt, grads, final_grads=final_grads, budget=budget)

    leaves = {n: t.double().clone().requires_grad_(n in wrt) for n, t in inputs.items()}
    result = interpret(replace(program, finals=list(final_grads)), leaves, steps)
    generator = torch.Generator().manual_seed(1)
    pairs = [(result.outputs[n], ("output", n)) for n in grads]
    pairs += [(result.finals[n], ("final", n)) for n in final_grads]
    given = {key: torch.randn(t.shape, generator=generator).double() for t, key in pairs}
    total = sum(((t * given[key]).sum() for t, key in pairs), torch.zeros((), dtype=torch.float64))
    expected: dict[Any, torch.Tensor | None] = dict.fromkeys(wrt)
    if total.requires_grad:
        found = torch.autograd.grad(total, [leaves[n] for n in wrt], allow_unused=True)
        expected = dict(zip(wrt, found, strict=True))

    isa = rng.choice(list(ISAS))
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-11), (torch.float32, 5e-3, 1e-3)):
        forward, backward = (replace(p, dtype=dtype) for p in (gradient.forward, gradient.backward))
        ahead = execute(forward, inputs, rows, steps, isa=isa)
        gathered = gather(
            replace(gradient, forward=forward, backward=backward), inputs, ahead.outputs,
            {n: given["output", n] for n in grads}, {n: given["final", n] for n in final_grads},
        )  # fmt: skip
        back = execute(backward, gathered, rows, steps, reverse=True, isa=isa)
        for name in wrt:
            want = expected[name]
            want = torch.zeros_like(leaves[name]) if want is None else want
            if name not in gradient.reached:
                assert not want.any(), f"{name} was taken for unreached"
                continue
            role = program.inputs[name].role
            got = (
                back.sums["grad", name] if role == "uniform"
                else back.outputs["grad", name] if role == "step" else back.finals["adjoint", name]
            )  # fmt: skip
            assert_near(got, want, rtol, atol, f"{dtype} gradient of {name}")


def _shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """With fewer outputs, carries and instructions, as long as it fails."""

    def without_dead(p: Program) -> Program:
        needed = {v.index for v in p.roots()}
        kept = []
        for instr in reversed(p.instrs):
            if instr.out is None or instr.out.index in needed:
                needed |= {v.index for v in instr.values()}
                kept.append(instr)
        return replace(p, instrs=kept[::-1])

    def smaller(p: Program) -> list[Program]:
        found = []
        for table in ("outputs", "carries"):
            for name in getattr(p, table):
                found.append(replace(p, **{table: {k: v for k, v in getattr(p, table).items() if k != name}}))  # type: ignore[arg-type]  # fmt: skip
        found += [replace(p, checks=[])] if p.checks else []
        found += [replace(p, finals=[])] if p.finals else []
        # What an instruction read instead of what it made.
        for name, val in p.outputs.items():
            maker = next((i for i in p.instrs if i.out == val), None)
            uniform = p.uniforms()
            for v in maker.values() if maker is not None else ():
                if isinstance(v, Val) and v.index not in uniform:
                    found.append(replace(p, outputs={**p.outputs, name: v}))
        return found

    deadline = time.monotonic() + 10
    progress = True
    while progress and time.monotonic() < deadline:
        progress = False
        for candidate in smaller(program):
            candidate = without_dead(candidate)
            if fails(candidate):
                program, progress = candidate, True
                break
    return program


def fuzz_program(seed: int) -> Failure | None:
    rng = random.Random(seed)
    rows, steps = rng.choice(_SIZES)
    made = random_program(
        seed, depth=rng.randint(2, 20), max_width=rng.choice([3, 17, 40, 40, 130])
    )
    inputs = made.inputs(rows, steps, seed)
    for kind, check in (("forward", check_forward), ("gradient", check_gradient)):

        def fails(p: Program, check: Any = check) -> str:
            try:
                with threads(1 + seed % 2):
                    check(p, inputs, rows, steps, random.Random(seed))
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return ""

        if message := fails(made.program):
            small = _shrunk(made.program, lambda p: bool(fails(p)))
            return Failure(seed, kind, f"rows {rows}, steps {steps}: {message}\n{small}")
    return None


# ---------------------------------------------------------------- whole modules


def fuzz_module(seed: int) -> Failure | None:
    """A traced torch module through the environment, fused against eager, forward and backward."""
    from tests.row_program.random_modules import check_module

    try:
        check_module(seed)
    except Exception:
        return Failure(seed, "module", traceback.format_exc(limit=4))
    return None


def fuzz(seconds: float, seed: int, count: int | None = None) -> tuple[int, list[Failure]]:
    """Seeds from ``seed`` on until the time is up, or ``count`` of them.

    Returns:
        How many were tried, and the failures.
    """
    deadline = time.monotonic() + seconds
    tried, failures = 0, []
    while (count is None and time.monotonic() < deadline) or (count is not None and tried < count):
        runs = (
            [fuzz_program] if (seed + tried) % 4 and count is None else [fuzz_program, fuzz_module]
        )
        for run in runs:
            failure = run(seed + tried)
            if failure is not None:
                failures.append(failure)
                print(failure, flush=True)
        tried += 1
    return tried, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="the first one; default: the clock")
    parser.add_argument(
        "--count", type=int, default=None, help="that many seeds, whatever the time"
    )
    args = parser.parse_args()
    seed = int(time.time()) % 10**8 if args.seed is None else args.seed
    print(f"from seed {seed}", flush=True)
    tried, failures = fuzz(args.seconds, seed, args.count)
    print(f"{tried} seeds, {len(failures)} failures: {[f.seed for f in failures]}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
