"""The row programs that are compiled ahead of time: the bench's model families, at their real sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict

from fastwm.bench.providers.env_rollout import environment
from fastwm.bench.suites import suite
from fastwm.engines.drawing import Drawing
from fastwm.kernels import Build
from fastwm.kernels.row_program.executor import TritonExecutor, kernel_of
from fastwm.kernels.row_program.source import Tile
from fastwm.request import Request
from fastwm.rollout import start_of
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.kinds import dtype_of
from fastwm.row_program.lowering import Lowered, lower
from fastwm.row_program.passes import fuse_act
from fastwm.row_program.program import Program
from fastwm.traced_step import trace_step
from fastwm.world_model import WorldModel

__all__ = ["build", "builds", "lowered_suite"]

SMALL, TALL = Tile(rows=16), Tile(rows=64, warps=8)
#: suite, direction, tile, precision; with "philox" the kernel draws the noise
_BUILDS = (
    ("mlp", "forward", SMALL, "ieee"),
    ("mlp", "forward", TALL, "tf32"),
    ("mlp", "backward", SMALL, "ieee"),
    ("mlp", "backward", TALL, "tf32"),
    ("mlp", "forward", SMALL, "bf16"),
    ("mlp", "forward", TALL, "bf16"),
    ("mlp", "backward", TALL, "bf16"),
    ("mbpo", "forward", TALL, "tf32"),
    ("tdmpc2", "forward", SMALL, "tf32"),
    ("rssm", "forward", SMALL, "tf32"),
    ("rssm", "forward", SMALL, "tf32", "philox"),
    ("rssm", "backward", SMALL, "tf32", "philox"),
    ("rssm_v3", "forward", TALL, "tf32"),
)
# Bytes of registers, stores and loads together: a few values of one stage, set aside once per step.
_SPILLS = 512
_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1", torch.int64: "*i64",
}  # fmt: skip


def lowered_suite(name: str, batch: int = 4) -> Lowered:
    """The step of one of the bench's models, as a row program."""
    from fastwm.env import WorldModelEnv

    family = suite(name)
    parts = family.model("cpu", 0).parts()
    env = environment(parts, family.carry, family.action, batch, "cpu", WorldModel, WorldModelEnv)
    start = TensorDict({k: torch.zeros(batch, width) for k, width in family.carry.items()}, [batch])
    with torch.no_grad():
        request = Request(max_steps=1, policy=parts.policy, tensordict=start)
        td = start_of(env, request)
        step, _ = trace_step(env, request.compatible_policy(env), None, td, parts.policy)
        return lower(step.graph, step.carried, step.fed, step.dim)


def build(
    variant: str, program: Program, tile: Tile, precision: str, *, reverse: bool = False, **how: Any
) -> Build:
    """A program's kernel with the types of its arguments."""
    executor = TritonExecutor(program, "cpu", tile=tile, bf16=precision == "bf16", **how)
    source = executor.source(tile.rows, reverse=reverse, precision=precision)
    signature = dict.fromkeys(source.arguments, "i32")
    inner = executor.inner
    for number, name in enumerate(executor.inputs):
        kind = program.type(program.inputs[name].val).kind
        signature[f"p_in{number}"] = _TYPES[dtype_of(kind, program.dtype)]
        if name in executor.noise:  # the key
            signature[f"p_in{number}"] = "*i64"
    for number, (name, val) in enumerate(inner.outputs.items()):
        kind = executor.kinds.get(name, program.type(val).kind)
        signature[f"p_out{number}"] = _TYPES[dtype_of(kind, program.dtype)]
    for number in range(len(program.finals)):
        signature[f"p_final{number}"] = _TYPES[program.dtype]
    signature |= {name: "*bf16" for name in source.arguments if name.startswith("p_bf16_")}
    signature |= {"p_failed": "*i32", "p_maps": "*i32", "p_scratch": _TYPES[program.dtype]}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Build(variant, kernel_of(source), signature, {}, options, _SPILLS)


def builds() -> Iterator[Build]:
    """Forward and backward, small tiles and tall ones, true float32, tensor-float32 and bfloat16."""
    for name, direction, tile, precision, *how in _BUILDS:
        lowered = lowered_suite(name)
        program = fuse_act(lowered.program)
        variant = "-".join([name, direction, str(tile.rows), precision, *how])
        drawing = Drawing(lowered, [], torch.device("cpu"), in_kernel="philox" in how)
        if direction == "forward":
            major, kinds = lowered.time_major, lowered.kinds
            yield build(
                variant, program, tile, precision, time_major=major, kinds=kinds, noise=drawing.noise
            )  # fmt: skip
            continue
        wrt = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
        outputs = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
        # Where noise is drawn, little is saved, so that it is drawn again.
        budget = 0.0 if drawing.noise else None
        gradient = differentiate(program, wrt, outputs, budget=budget)
        noise = drawing.again(gradient)
        yield build(variant, gradient.backward, tile, precision, reverse=True, noise=noise)
