"""Random programs: the backward program against autograd, with every way to save."""

from __future__ import annotations

import random

import pytest
import torch

from fastwm.row_program.ops import REFERENCES
from fastwm.row_program.reference import interpret
from tests.row_program.against_autograd import check
from tests.row_program.random_programs import RandomProgram, random_program

SEEDS = range(40)


def _asked(made: RandomProgram, seed: int) -> dict[str, list[str]]:
    """Some of the inputs, outputs and carries."""
    rng = random.Random(seed)
    program = made.program
    floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
    outputs = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
    carries = [n for n in floats if program.inputs[n].role == "carry"]
    every = rng.random() < 0.4
    return {
        "wrt": floats if every else rng.sample(floats, rng.randint(1, len(floats))),
        "output_grads": outputs if every else rng.sample(outputs, rng.randint(1, len(outputs))),
        "final_grads": rng.sample(carries, rng.randint(0, len(carries))),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program(seed: int) -> None:
    rows, steps = ((1, 1), (3, 2), (1, 5), (3, 5), (2, 0))[seed % 5]
    made = random_program(
        seed, depth=3 + seed % 12, max_width=(3, 12, 40)[seed % 3], dtype=torch.float64
    )
    inputs = made.inputs(rows, steps, seed)
    asked = _asked(made, seed)
    widths = []
    for budget in (None, 0.0, 20.0, float("inf")):
        gradient = check(made.program, inputs, steps, budget=budget, **asked)
        widths.append(gradient.tape_width)
    all_of_it, nothing, some, worth_it = widths
    # ``nothing`` is the carries that no output holds.
    assert nothing <= min(all_of_it, some, worth_it)
    assert some <= nothing + 20


def test_the_generator_knows_every_op() -> None:
    ops = {
        instr.op
        for seed in range(120)
        for instr in random_program(seed, depth=20, max_width=6).program.instrs
    }
    sums = {"outer", "grouped_outer", "member_outer", "row_sum", "member_row_sum"}
    backward_only = {name for name in REFERENCES if name.endswith("_grad")} | sums
    assert set(REFERENCES) - ops == backward_only


@pytest.mark.parametrize("width", [1, 700])
def test_numbers_stay_moderate(width: int) -> None:
    for seed in range(8):
        made = random_program(seed, depth=15, max_width=width)
        result = interpret(made.program, made.inputs(2, 4, seed), 4)
        assert result.ok
        assert all(v.abs().max() < 100 for v in result.outputs.values())
