"""Running a rollout: choose the engine, run it, hand back what the eager path would have."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import _replace_last

from fastwm.backends import requested
from fastwm.engines.captured import ChecksFailed
from fastwm.engines.cuda_graph import CaptureFailed, graphs_apply
from fastwm.engines.fused import FusedLoop
from fastwm.nvtx import annotate
from fastwm.plan import Plan, cache_of, fuse_now, plan_for, recall, remember, zero_done
from fastwm.request import Feed, NotCapturable, Request
from fastwm.tracing import cuda_device

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["fast_rollout", "rollout"]


class _CheckFails(NotCapturable):
    """A check of the step's arguments failed, in the course of the rollout."""


def rollout(env: FastEnv, request: Request) -> TensorDictBase:
    """Run ``request`` on the engine in force for ``env``.

    Raises:
        RuntimeError: an engine was asked for by name and cannot run this.
    """
    name = requested(env.backend)
    if name == "eager":
        return env.eager_rollout(request)
    if name != "auto":
        try:
            return fast_rollout(env, request, name, patient=True)
        except NotCapturable as reason:
            raise RuntimeError(f"backend={name!r} cannot run this rollout: {reason}.") from reason
    try:
        return fast_rollout(env, request, name)
    except NotCapturable as reason:
        _warn_once(env, str(reason))
    return env.eager_rollout(request)


def _warn_once(env: FastEnv, reason: str, engine: str = "eager engine") -> None:
    warned = cache_of(env).warned
    if reason in warned or torch._C._len_torch_dispatch_stack():
        return
    warned.add(reason)
    warnings.warn(
        f"fastwm: this rollout runs on the {engine}: {reason}. "
        "(env.explain(...) says more; backend='eager' asks for it and silences this.)",
        stacklevel=4,
    )


def fast_rollout(
    env: FastEnv, request: Request, engine: str, *, patient: bool = False
) -> TensorDictBase:
    """The rollout from a traced step, on the fused or the captured engine.

    Args:
        engine: ``"fused"``, ``"captured"``, or ``"auto"`` for the first of them that takes it.

    Raises:
        NotCapturable: before anything of the caller's was changed.
    """
    request.refuse(env)
    known = recall(env, request)
    td = start_of(env, request) if known is None else None
    random_state = None if known and not known[0].draws else _RandomState(env.device)
    try:
        feed = None
        if known is not None:
            plan, start = known
        else:
            assert td is not None
            feed = request.feed(env, td.batch_size)
            plan, start = plan_for(env, request, td, feed, patient=patient)
            if feed is None:
                remember(env, request, plan, start)
        if plan.uncompiled:
            _warn_once(env, plan.uncompiled, "traced loop, not compiled")
        if engine == "fused":
            fuse_now(env, plan, start, feed)
        if engine == "fused" and plan.fused is None:
            raise NotCapturable(plan.unfused)
        fused = (
            plan.fused if engine == "fused" or (engine == "auto" and plan.prefers_fused()) else None
        )
        if fused is not None and engine == "auto":
            try:
                return _run(env, request, plan, td, start, feed, fused)
            except _CheckFails:  # the captured engine goes on, where the check allows it
                if random_state is not None:
                    random_state.restore()
                feed = None if td is None else request.feed(env, td.batch_size)
                fused = None
        return _run(env, request, plan, td, start, feed, fused)
    except NotCapturable:
        # The eager path goes on from here: a second reset might give another start.
        if random_state is not None:
            random_state.restore()
        if td is None:
            td = start_of(env, request)
        request.tensordict, request.begun = env.begun(td), True
        request.auto_reset, request.set_state = False, None
        raise


class _RandomState:
    """The generators as they stood before the rollout, should it have to be run again."""

    def __init__(self, device: torch.device | None) -> None:
        self.cpu = torch.get_rng_state()
        self.device = cuda_device(device)
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and self.device is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def start_of(env: FastEnv, request: Request) -> TensorDictBase:
    """The tensordict of the first step, as ``EnvBase.rollout`` gets it."""
    start = _made_start(env, request)
    if start.device is None and env.device is not None and request.steps_on:
        start = start.to(env.device)
    return start


def _made_start(env: FastEnv, request: Request) -> TensorDictBase:
    given = env.own_start(request)
    if not request.auto_reset:
        return env.maybe_reset(given)
    if given is not None and request.set_state is not False and env.starts_plainly(given):
        # What reset does to a start that has its latents and asks for no partial reset.
        for key, value in zero_done(env, given.batch_size).items():
            given.set(key, value)
        return given
    return env.reset(given, set_state=request.set_state)


def _run(
    env: FastEnv, request: Request, plan: Plan, td: TensorDictBase | None, start: dict,
    feed: Feed | None, fused: FusedLoop | None,
) -> TensorDictBase:  # fmt: skip
    traced = plan.traced
    horizon = request.max_steps
    if feed is not None and feed.horizon is not None:
        horizon = min(horizon, feed.horizon)
    restart = "" if request.stops else env.restart
    stop = request.stops or bool(restart)
    own = [(g, g.get_state()) for g in traced.generators]
    try:
        with annotate("fastwm.replay"):
            steps, values, feed = _replay(env, request, plan, td, start, feed, fused, horizon, stop)
        if restart and (steps < horizon or _any_flag(values, traced.flags)):
            raise NotCapturable(restart)
    except (ChecksFailed, NotCapturable) as reason:
        for generator, state in own:
            generator.set_state(state)
        if isinstance(reason, NotCapturable):
            raise
        raise _CheckFails(
            "an argument check fails (a distribution's validation, an index's range, or one_hot's)"
        ) from None
    if feed is not None:
        feed.done(steps)
    with annotate("fastwm.assemble"):
        out = traced.template.fill(values, steps, traced.dim)
    if request.set_truncated:
        _set_truncated(env, out)
    if request.storing_device is not None:
        device = torch.device(request.storing_device)
        if out.device != device:
            out = out.to(device)
    return out


def _replay(
    env: FastEnv, request: Request, plan: Plan, td: TensorDictBase | None, start: dict,
    feed: Feed | None, fused: FusedLoop | None, horizon: int, stop: bool,
) -> tuple[int, dict, Feed | None]:  # fmt: skip
    if fused is not None:
        draws = feed is not None and feed.draws
        given = None if feed is None else feed.next
        return *fused.run(
            horizon, start, plan.constants, given, stop=stop, draws_feed=draws
        ), feed  # fmt: skip
    inputs = {path: value.contiguous() for path, value in start.items()}
    # A graph is given all actions ahead of its first step: random ones would be drawn in another order.
    mixed = feed is not None and feed.draws and (stop or plan.traced.graph.draws)
    if plan.graphed is not None and graphs_apply() and not mixed:
        before = _RandomState(next(iter(inputs.values())).device)
        try:
            given = None if feed is None else feed.next
            return *plan.graphed.run(
                horizon, inputs, plan.constants, given, stop=stop, exact=plan.exact
            ), feed  # fmt: skip
        except CaptureFailed as reason:
            _warn_once(env, str(reason), "traced loop, uncaptured")
            before.restore()
            feed = None if td is None else request.feed(env, td.batch_size)
    given = None if feed is None else feed.next
    return *plan.loop.run(
        horizon, inputs, plan.constants, given, stop=stop, exact=plan.exact
    ), feed  # fmt: skip


def _any_flag(values: dict, flags: tuple) -> bool:
    return any(bool(values[path].any()) for _, path in flags)


def _set_truncated(env: FastEnv, out: TensorDictBase) -> None:
    truncated = [k for k in env.done_keys if (k if isinstance(k, str) else k[-1]) == "truncated"]
    if not truncated:
        raise RuntimeError(
            "set_truncated was set to True but no truncated key could be found. "
            "Make sure a 'truncated' entry was set in the environment "
            "full_done_keys using `env.add_truncated_keys()`."
        )
    last = (slice(None),) * (out.ndim - 1) + (-1,)
    for key in truncated:
        value = out.get(("next", key))
        value[last] = True
        done_key = ("next", _replace_last(key, "done"))
        out.set(done_key, value | out.get(done_key))
