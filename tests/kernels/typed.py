"""Random row programs through Triton's front end, which checks types and shapes; the interpreter does not.

    python -m tests.kernels.typed --seconds 60 --seed 5

In a process without the interpreter; half a second a program, and no GPU. Exit status 1 where one is refused.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from fastwm.kernels import Build
from fastwm.kernels.row_program.builds import build
from fastwm.kernels.row_program.source import Tile
from fastwm.row_program import Program
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.noise import Law, Noise
from tests.row_program.random_programs import random_program

TARGET = GPUTarget("cuda", 90, 32)


def typed(made: Build) -> Any:
    """The kernel in Triton's first representation."""
    backend = make_backend(TARGET)
    options = backend.parse_options(dict(made.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(made.kernel, made.signature, made.constexprs)
    functions = backend.get_codegen_implementation(options)
    return source.make_ir(TARGET, options, functions, backend.get_module_map(), context)


def both_ways(program: Program, rng: random.Random) -> list[tuple[Program, bool]]:
    """The program and its backward program."""
    floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
    grads = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
    gradient = differentiate(program, floats, grads, budget=rng.choice([None, 0.0, 30.0]))
    return [(program, False), (gradient.backward, True)]


def drawn(program: Program, rng: random.Random) -> dict[Any, Noise]:
    """Some of its step inputs as noise that the kernel draws."""
    laws = [Law("normal", 1.0, 2.0), Law("uniform", -1.0, 1.0), Law("exponential", 2.0)]
    floats = [
        name
        for name, item in program.inputs.items()
        if item.role == "step" and program.type(item.val).kind == "float"
    ]
    return {n: Noise(rng.choice(laws), i) for i, n in enumerate(floats) if rng.random() < 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    seed, tried, end = options.seed, 0, time.monotonic() + options.seconds
    while time.monotonic() < end or not tried:
        rng = random.Random(seed)
        made = random_program(seed, depth=rng.randint(1, 10), max_width=rng.choice([4, 40, 200]))
        dtype = rng.choice([torch.float32, torch.float64])
        for program, reverse in both_ways(replace(made.program, dtype=dtype), rng):
            try:
                tile = Tile(rows=rng.choice([16, 64]))
                precision = "ieee" if dtype is torch.float64 else rng.choice(["ieee", "bf16"])
                noise = drawn(program, rng)
                typed(build("random", program, tile, precision, reverse=reverse, noise=noise))
            except Exception as error:
                print(f"seed {seed}, reverse {reverse}: {error}\n{program}")
                return 1
        seed, tried = seed + 1, tried + 1
    print(f"{tried} programs, forward and back")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
