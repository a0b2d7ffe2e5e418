"""Passes over row programs: each takes a program and returns one that computes the same."""

from fastwm.row_program.passes.choose_early import choose_early
from fastwm.row_program.passes.cse import cse
from fastwm.row_program.passes.dce import dce
from fastwm.row_program.passes.fold import fold
from fastwm.row_program.passes.fuse_act import fuse_act
from fastwm.row_program.passes.fuse_bias import fuse_bias
from fastwm.row_program.passes.merge_linears import merge_linears
from fastwm.row_program.passes.rewrite import renumbered
from fastwm.row_program.program import Program

__all__ = [
    "choose_early", "cse", "dce", "fold", "fuse_act", "fuse_bias", "merge_linears", "optimise", "renumbered",
]  # fmt: skip


def optimise(program: Program) -> Program:
    """The passes that are good for every program, with gradients or without."""
    program = fuse_bias(cse(fold(dce(program))))
    program = fold(choose_early(program))
    return cse(program)
