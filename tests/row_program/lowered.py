"""Lowering a step as it comes, running the program in the reference interpreter, and holding it to eager."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

import fastwm
from fastwm.assemble import leaves
from fastwm.request import Request
from fastwm.rollout import start_of
from fastwm.row_program.lowering import Lowered, lower
from fastwm.row_program.reference import interpret
from fastwm.traced_step import TracedStep, trace_step
from tests.compare import assert_close, run

__all__ = ["assert_lowers", "lowered_rollout", "traced"]


def traced(
    env: fastwm.WorldModelEnv, policy: Any, start: TensorDictBase, **kwargs: Any
) -> tuple[TracedStep, TensorDictBase, Any]:
    request = Request(max_steps=3, policy=policy, tensordict=start, **kwargs)
    td = start_of(env, request)
    feed = request.feed(env, td.batch_size)
    policy = None if feed is not None else request.compatible_policy(env)
    step, _ = trace_step(env, policy, feed, td, request.policy)
    return step, td, feed


def lowered_rollout(
    step: TracedStep, lowered: Lowered, td: TensorDictBase, horizon: int, feed: Any = None
) -> tuple[dict[Any, torch.Tensor], bool]:
    """What the program gives, in eager's shapes and dtypes; and whether its checks held."""
    program, batch = lowered.program, tuple(td.batch_size)
    inputs: dict[Any, torch.Tensor] = {}
    start = leaves(td)
    noise: dict[Any, list[torch.Tensor]] = {}
    for _ in range(horizon):
        if feed is not None:
            for path, action in zip(feed.paths, feed.next(), strict=True):
                rows = action.reshape(lowered.rows, *action.shape[len(batch) :])
                noise.setdefault(("feed", path), []).append(rows)
        for draw in lowered.draws:
            sample = draw.sample()
            assert tuple(sample.shape) == draw.shape
            assert sample.dtype is draw.dtype
            if draw.name is not None:
                noise.setdefault(draw.name, []).append(draw.rows(sample))
    uniforms = lowered.prologue(step.constants())
    for uniform, tensor in zip(lowered.uniforms, uniforms, strict=True):
        assert tuple(tensor.shape) == uniform.shape
        assert tensor.dtype is program.dtype
        inputs[uniform.name] = tensor.detach()
    for name in program.inputs:
        if name[0] == "in":
            value = start[name[1]].detach()
            inputs[name] = value.reshape(lowered.rows, *value.shape[len(batch) :])
        elif name in noise:
            inputs[name] = torch.stack(noise[name], 1)
    found = interpret(program, inputs, horizon)
    out = {}
    for name, (inner, dtype) in lowered.casts.items():
        value = found.outputs[name]
        assert value.shape == (lowered.rows, horizon, *inner)
        out[name] = value.reshape(*batch, horizon, *inner).to(dtype)
    for name, source in lowered.passed.items():
        value = start[source[1]]
        out[name] = value.unsqueeze(step.dim).expand(*batch, horizon, *value.shape[len(batch) :])
    return out, found.ok


def assert_lowers(
    env: fastwm.WorldModelEnv,
    policy: Any,
    start: TensorDictBase,
    horizon: int = 4,
    *,
    grad: bool = False,
    seed: int = 0,
    actions: Any = None,
) -> Lowered:
    """The program's rollout is eager's: values, shapes, dtypes, and the generator afterwards."""
    kwargs = {} if actions is None else {"actions": actions}
    with torch.set_grad_enabled(grad):
        want, state = run(
            "eager", env, horizon, policy, start, seed=seed, break_when_any_done=False, **kwargs
        )
        step, td, feed = traced(env, policy, start, **kwargs)
        lowered = lower(step.graph, step.carried, step.fed, step.dim)
        torch.manual_seed(seed)
        got, ok = lowered_rollout(step, lowered, td, horizon, feed)
    assert ok
    assert torch.equal(torch.get_rng_state(), state), "the generator stands elsewhere"
    assert set(got) == {n for n in step.graph.outputs if n[0] == "td"}
    for name, value in got.items():
        expected = want.get(name[1])
        assert value.shape == expected.shape, name
        assert value.dtype == expected.dtype, name
        assert_close(value, expected, "rollout", str(name))
    return lowered
