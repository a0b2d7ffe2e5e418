"""Plans: a traced step with the engine that runs it, cached, and trusted only as long as nothing changed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase

from fastwm import plan_cache
from fastwm.assemble import leaves
from fastwm.engines.captured import CapturedLoop, ChecksFailed
from fastwm.engines.choice import UNMEASURED
from fastwm.engines.codegen import step_varying
from fastwm.engines.cuda_graph import GraphedLoop, graphed_loop
from fastwm.engines.fused import FusedLoop, NotFusible
from fastwm.guarded_trace import Guard, own_saved_tensors, state_holds
from fastwm.nvtx import annotate
from fastwm.process_modes import process_modes
from fastwm.request import Feed, NotCapturable, Request, same_function
from fastwm.row_program.kinds import matmul_precision
from fastwm.traced_step import Results, TracedStep, trace_step, watch_step
from fastwm.tracing import preserved_random_state
from fastwm.watch import Watch

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["Plan", "RolloutCache", "cache_of", "fuse_now", "plan_for", "recall", "remember",
           "zero_done"]  # fmt: skip

_RECENT = 8  # calls remembered to the letter


class CompileFailed(Exception):
    """``torch.compile`` does not take the step; the loop runs without it."""


@dataclass
class Plan:
    """A traced step with what runs it.

    Attributes:
        traced, loop: the step, and its loop over the horizon.
        policy: the policy it was traced for.
        exact: the loop has to bind every op to its very overload.
        draws: the step takes random numbers.
        graphed: the loop behind CUDA graphs, where they apply.
        uncompiled: why the step is not compiled although that was asked for.
        put_off: ``fused`` is made once somebody asks for it by name (:func:`fuse_now`).
        fused: the step as a row program, where it is one.
        unfused: why it is not.
    """

    traced: TracedStep
    loop: CapturedLoop
    policy: Any
    exact: bool = False
    graphed: GraphedLoop | None = None
    uncompiled: str = ""
    draws: bool = False
    put_off: bool = False
    fused: FusedLoop | None = None
    unfused: str = ""

    def __post_init__(self) -> None:
        traced = self.traced
        self.guard = Guard(traced.watch, traced.sources, traced.read)
        self.draws = traced.graph.draws

    @property
    def constants(self) -> list[torch.Tensor]:
        """Parameters, buffers and the like, in the graph's order."""
        return self.guard.constants

    def holds(self, request: Request) -> tuple[bool, str | None]:
        """Whether nothing the trace took for granted has changed; else what did."""
        return self.guard.holds() if _same_policy(self.policy, request) else _OTHER_POLICY

    def prefers_fused(self) -> bool:
        """Whether ``"auto"`` takes the fused engine."""
        return self.fused is not None and not self.fused.slower

    def flags_vary(self) -> bool:
        """Whether a done flag can differ from step to step: whether there is a done head."""
        graph = self.traced.graph
        varying = step_varying(graph, {*self.traced.carried, *self.traced.fed})
        return any(graph.outputs[flag].index in varying for flag in self.traced.flags)


_OTHER_POLICY = False, "the policy is another function"


def _same_policy(policy: Any, request: Request) -> bool:
    own = request.own_policy
    return policy is own or same_function(policy, own)


def _refusal_holds(watch: Watch, policy: Any, request: Request) -> tuple[bool, str | None]:
    return state_holds(watch) if _same_policy(policy, request) else _OTHER_POLICY


@dataclass
class Recent:
    """A call whose start needed no reset, and its plan.

    Attributes:
        kind: see :func:`_kind_of_call`.
        plan: its plan.
        key: under which the plan is kept.
        flags: the done flags that were put into the start.
    """

    kind: Any
    plan: Plan
    key: Any
    flags: dict[Any, torch.Tensor]


@dataclass
class RolloutCache(plan_cache.PlanCache):
    """The plans of one env.

    Attributes:
        recent: calls remembered to the letter, latest first.
    """

    recent: list[Recent] = field(default_factory=list)


def cache_of(env: FastEnv) -> RolloutCache:
    # In the env and nowhere else: a policy that holds the env makes a cycle, which can be collected.
    cache = env.__dict__.get("_plans")
    if cache is None or cache.owner is not env:
        cache = env.__dict__["_plans"] = RolloutCache(owner=env)
    return cache


def zero_done(env: FastEnv, batch_size: torch.Size) -> dict[Any, torch.Tensor]:
    """The done flags of a fresh start. Read only: every output copies them."""
    # torchrl empties this cache when a spec changes.
    zeros = env._cache.setdefault("_zero_done", {})
    if batch_size not in zeros:
        if len(zeros) >= plan_cache.KEYS:
            zeros.clear()
        zero = env.full_done_spec.zero(env._leading(batch_size))
        zeros[batch_size] = {k: zero.get(k) for k in env.full_done_spec.keys(True, True)}
    return zeros[batch_size]


def _key(
    env: FastEnv, request: Request, start: dict[Any, torch.Tensor], td: TensorDictBase,
    feed: Feed | None, compiled: Any,
) -> Any:  # fmt: skip
    kinds = tuple((path, t.shape, t.dtype, t.device, t.requires_grad) for path, t in start.items())
    fed = () if feed is None else tuple(
        (path, t.shape, t.dtype, t.device, t.requires_grad)
        for path, t in zip(feed.paths, feed.template, strict=True)
    )  # fmt: skip
    return (
        request.policy_key(), kinds, fed, td.batch_size, td.device,
        tuple(td.names) if td._has_names() else None,
        *process_modes(), compiled,
    )  # fmt: skip


def _kind_of_call(request: Request) -> Any:
    """All that tells how a call with a policy and a flat start runs, but for what the plan watches."""
    given: Any = request.tensordict
    if type(given) is not TensorDict or not request.auto_reset or request.set_state is False:
        return None
    policy = request.policy_key()
    if policy is None:
        return None
    names = given._td_dim_names
    kind: list[Any] = [policy, given._batch_size, given._device, names and tuple(names)]
    kind.append(given._device is None and request.steps_on)
    for key, item in given._tensordict.items():
        if key == "next":  # left from another step
            continue
        if not isinstance(item, torch.Tensor):
            return None
        kind += key, item.shape, item.dtype, item.device, item.requires_grad
    kind += process_modes()
    return kind


def recall(env: FastEnv, request: Request) -> tuple[Plan, dict[Any, torch.Tensor]] | None:
    """As :func:`plan_for`, from the caller's own tensordict, if there was just such a call.

    What a reset does to a start is decided by the kind of start and by the env's attributes, specs included.
    The plan watches these: while it holds, the reset would do what it did then.
    """
    cache = cache_of(env)
    if not cache.recent:
        return None
    kind = _kind_of_call(request)
    with cache.lock:
        for recent in cache.recent:
            if recent.kind == kind:
                break
        else:
            return None
        if not recent.plan.holds(request)[0]:
            cache.recent = [r for r in cache.recent if r is not recent]
            return None
        cache.calls += 1
        cache.unused = 0
        if next(reversed(cache.plans), None) is not recent.key:
            cache.plans.move_to_end(recent.key)
    given: Any = request.tensordict
    start = {(key,): item for key, item in given._tensordict.items() if key != "next"}
    start.update(recent.flags)
    return recent.plan, start


def remember(env: FastEnv, request: Request, plan: Plan, start: dict[Any, torch.Tensor]) -> None:
    """Let :func:`recall` find this call, if its start was taken as it is, without reset."""
    kind = _kind_of_call(request)
    cache = cache_of(env)
    if kind is None or any(len(path) > 1 for path in start):
        return
    with cache.lock:
        given = request.tensordict.copy()  # type: ignore[union-attr]
        given.pop("next", None)
        key = next((k for k, found in cache.plans.items() if any(p is plan for p in found)), None)
        if key is not None and env.starts_plainly(given):
            flags = {(k,): start[k,] for k in zero_done(env, given.batch_size)}
            others = [r for r in cache.recent if r.kind != kind]
            cache.recent = [Recent(kind, plan, key, flags), *others[: _RECENT - 1]]


def plan_for(
    env: FastEnv,
    request: Request,
    td: TensorDictBase,
    feed: Feed | None,
    *,
    patient: bool = False,
) -> tuple[Plan, dict[Any, torch.Tensor]]:
    """The plan for this call, made anew where none holds, and the start's leaves.

    Args:
        patient: make a plan even if plans for this env have not been of use for long.

    Raises:
        NotCapturable: with the reason.
    """
    try:
        start = leaves(td)
    except TypeError as error:
        raise NotCapturable(str(error)) from error
    for path in start:
        if path[-1] in ("_reset", "_step"):
            raise NotCapturable(f"the start holds {path}")
    cache = cache_of(env)
    with cache.lock:
        plan = _plan_for(env, request, td, feed, start, cache, patient)
    # What is left of another step was found to have no part in this one.
    return plan, {path: value for path, value in start.items() if path[0] != "next"}


def _plan_for(
    env: FastEnv, request: Request, td: TensorDictBase, feed: Feed | None,
    start: dict[Any, torch.Tensor], cache: RolloutCache, patient: bool,
) -> Plan:  # fmt: skip
    key = _key(env, request, start, td, feed, env.compile_options_key())
    found = cache.find(key, request)
    if found is None:
        if not patient:
            cache.refuse_if_in_vain("env", "the policy, the model or the kind of input")
        found = cache.make(
            key,
            functools.partial(_make, env, request, td, feed),
            functools.partial(_rests_on, env, request, feed),
        )
        kept = {id(p) for variants in cache.plans.values() for p in variants}
        cache.recent = [r for r in cache.recent if id(r.plan) in kept]
    return plan_cache.usable(found)


def _rests_on(env: FastEnv, request: Request, feed: Feed | None) -> plan_cache.Holds:
    watch = watch_step(env, None, None if feed is not None else request.policy)
    return functools.partial(_refusal_holds, watch, request.own_policy)


def _make(env: FastEnv, request: Request, td: TensorDictBase, feed: Feed | None) -> Plan:
    policy = None if feed is not None else request.compatible_policy(env)
    with annotate("fastwm.trace"):
        traced, results = trace_step(env, policy, feed, td, request.policy)
    td = td.exclude("next")
    given = [*traced.constants(), *leaves(td).values(), *(feed.template if feed else ())]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    loop = CapturedLoop(
        traced.graph, traced.carried, traced.fed, traced.flags, traced.dim,
        grad=wants, compiler=env.step_compiler(),
    )  # fmt: skip
    plan = Plan(traced, loop, request.own_policy)
    stop = request.stops or bool(env.restart)
    try:
        _verify(env, plan, td, feed, results, stop)
    except CompileFailed as error:
        plan.uncompiled = f"compiling the step raises {error}"
        plan.loop = CapturedLoop(
            traced.graph, traced.carried, traced.fed, traced.flags, traced.dim, grad=wants
        )
        _verify(env, plan, td, feed, results, stop)
    plan.graphed = graphed_loop(plan.loop, next(iter(results[0].values())).device)
    if _fuses_at_once(results):
        _fuse(env, plan, dict(leaves(td)), feed, results)
    else:
        plan.put_off, plan.unfused = True, UNMEASURED
    return plan


def _fuses_at_once(results: list[Results]) -> bool:
    """On CUDA kernels take seconds to compile, and ``"auto"`` does not run them."""
    return next(iter(results[0].values())).device.type == "cpu"


def fuse_now(env: FastEnv, plan: Plan, start: dict[Any, torch.Tensor], feed: Feed | None) -> None:
    """Give a plan its row program, if that was put off; held to what the captured loop makes of the start.

    Raises:
        NotCapturable: the row program is there, but cannot do what the env asks of it.
    """
    if plan.put_off:  # asked at each rollout
        _fuse_put_off(env, plan, start, feed)
    if plan.fused is not None and plan.fused.ignored:
        raise NotCapturable(plan.fused.ignored)


def _fuse_put_off(
    env: FastEnv, plan: Plan, start: dict[Any, torch.Tensor], feed: Feed | None
) -> None:
    with cache_of(env).lock, own_saved_tensors():
        if not plan.put_off:  # another thread made it
            return
        given = None if feed is None else lambda: feed.template
        inputs = {path: value.contiguous() for path, value in start.items()}
        steps = 1 if plan.draws else 2
        with preserved_random_state(env.device, plan.traced.graph.generators()):
            _, values = plan.loop.run(
                steps, inputs, plan.constants, given, stop=False, exact=plan.exact
            )
        dim = plan.traced.dim
        results = [
            {("td", path): value.detach().select(dim, step) for path, value in values.items()}
            for step in range(steps)
        ]
        _fuse(env, plan, inputs, feed, results)
        plan.put_off = False


def _fuse(
    env: FastEnv, plan: Plan, inputs: dict[Any, torch.Tensor], feed: Feed | None,
    results: list[Results],
) -> None:  # fmt: skip
    """Give the plan its row program; or say why not."""
    traced, wants = plan.traced, plan.loop.grad
    given = dict(inputs)
    if feed is not None:
        given.update(zip((("feed", p) for p in feed.paths), feed.template, strict=True))
    if env.step_compiler() is not None:
        plan.unfused = "compile=True asks for the captured engine"
        return
    try:
        with annotate("fastwm.lower"):
            make = functools.partial(
                FusedLoop,
                traced.graph, traced.carried, traced.fed, traced.flags, traced.dim,
                constants=plan.constants, bf16=env.fused_weights is torch.bfloat16,
                wanting={n for n, t in given.items() if t.requires_grad} if wants else None,
            )  # fmt: skip
            fused = make()
            with preserved_random_state(env.device, traced.graph.generators()):
                _, replayed = fused.run(
                    len(results), inputs, plan.constants,
                    None if feed is None else lambda: feed.template, stop=False,
                )  # fmt: skip
        problem = _gross_difference(replayed, results, traced.dim, fused.rounds)
        if problem:
            raise NotFusible(f"the row program does not give what the step gave: {problem}")
        if (
            env.fused_noise == "kernel"
        ):  # only with torch's numbers could it be held to what the step gave
            fused = make(noise="kernel")
        plan.fused, plan.unfused = fused, ""
    except (NotFusible, ChecksFailed) as reason:
        plan.unfused = str(reason) or "an argument check fails"
    except Exception as error:  # a fault of this engine is no reason not to run on another
        text = " ".join(str(error).split())
        plan.unfused = f"lowering failed: {type(error).__name__}: {text[:200]}"


def _gross_difference(
    replayed: dict[Any, torch.Tensor], results: list[Results], dim: int, rounds: bool
) -> str:
    """As :func:`_difference`, for an engine that rounds in another order: only the gross is wrong.

    A choice between near equals (the largest of several, a threshold) may fall the other way in a few rows.
    """
    rough = matmul_precision() == "tf32" and next(iter(results[0].values())).is_cuda
    single = 1e-1 if rounds else 1e-2 if rough else 1e-4
    bound = {torch.float64: 1e-9, torch.float32: single, torch.bfloat16: 1e-1}
    steps = [(step, *item) for step, result in enumerate(results) for item in result.items()]
    for step, (_, path), value in steps:
        got = replayed[path].select(dim, step)
        if got.shape != value.shape or got.dtype != value.dtype:
            return f"{path}: {got.dtype}{list(got.shape)} for {value.dtype}{list(value.shape)}"
        got, value = got.detach(), value.detach()
        if value.is_floating_point():
            scale = value.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if value.numel() else 0.0
            close = bound[value.dtype] * max(1.0, scale)
            same = torch.isclose(got, value, rtol=0.0, atol=close, equal_nan=True)
        else:
            same = got == value
        rows = same.reshape(math.prod(value.shape[:dim]), -1).all(1)
        if (~rows).sum().item() > 0.02 * len(rows):
            return f"{path}: other values at step {step + 1}"
    return ""


def _verify(
    env: FastEnv,
    plan: Plan,
    td: TensorDictBase,
    feed: Feed | None,
    results: list[Results],
    stop: bool,
) -> None:
    """A plan is accepted only once replaying its step gave what the traced steps gave."""
    inputs: dict[Any, torch.Tensor] = dict(leaves(td))
    given = None
    if feed is not None:
        given = lambda: feed.template  # noqa: E731
    if plan.loop.compiler is not None:
        # Rounding differs, and check_parity is there to say by how much.
        try:
            with preserved_random_state(env.device, plan.traced.graph.generators()):
                plan.loop.run(1, inputs, plan.constants, given, stop=stop)
        except Exception as error:
            text = " ".join(str(error).split())
            raise CompileFailed(f"{type(error).__name__}: {text[:200]}") from error
        return
    problem = ""
    for exact in (False, True):
        try:
            with preserved_random_state(env.device, plan.traced.graph.generators()):
                _, replayed = plan.loop.run(
                    len(results), inputs, plan.constants, given, stop=False, exact=exact
                )
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        problem = _difference(replayed, results, plan.traced.dim)
        if not problem:
            plan.exact = exact
            return
    raise NotCapturable(f"replaying the traced step does not give what the step gave: {problem}")


def _difference(replayed: dict[Any, torch.Tensor], results: list[Results], dim: int) -> str:
    steps = [(step, *item) for step, result in enumerate(results) for item in result.items()]
    for step, (_, path), value in steps:
        got = replayed[path].select(dim, step)
        if got.shape != value.shape or got.dtype != value.dtype:
            return f"{path}: {got.dtype}{list(got.shape)} for {value.dtype}{list(value.shape)}"
        # One stack of all steps: where one requires gradients, it does.
        wants = torch.is_grad_enabled() and any(r["td", path].requires_grad for r in results)
        # Heads put off for two steps hang together, where eagerly the first may need no gradient.
        if got.requires_grad != wants and (wants or len(results) == 1):
            return f"{path}: requires_grad={got.requires_grad} for {wants}"
        got, value = got.detach(), value.detach()
        close = 1e-6
        if step and value.is_floating_point() and value.numel():
            # Two steps at once are products of another shape, rounded another way: only the gross is wrong.
            close = 1e-4 * max(1.0, value.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
        if not torch.allclose(got, value, rtol=1e-6, atol=close, equal_nan=True):
            return f"{path}: other values at step {step + 1}"
    return ""
