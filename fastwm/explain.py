"""Why a rollout runs where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastwm.backends import requested
from fastwm.plan import fuse_now, plan_for
from fastwm.request import NotCapturable, Request
from fastwm.rollout import start_of
from fastwm.tracing import preserved_random_state

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Which engine would run, and what rules out each one passed over.

    Attributes:
        engine: the engine that would run; None when the one asked for cannot.
        passed_over: reason by engine name.
        asked: the backend in force.
        program: the traced step, printed, where there is one.
        source: what runs, where there is something to read: the row program, or the generated loop.
        note: how it runs, where that is not as usual: "bfloat16 weights".
    """

    engine: str | None
    passed_over: dict[str, str]
    asked: str
    program: str = ""
    source: str = ""
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{name}: no, {reason}" for name, reason in self.passed_over.items()]
        if self.engine is not None:
            lines.append(f"{self.engine}: runs" + (f", with {self.note}" if self.note else ""))
        else:
            lines.append(f"nothing runs: backend={self.asked!r} was asked for")
        return "\n".join(lines)


def explain(env: FastEnv, request: Request) -> Explanation:
    """See :meth:`fastwm.WorldModelEnv.explain`."""
    asked = requested(env.backend)
    if asked == "eager":
        reason = "backend='eager' was asked for"
        return Explanation("eager", {"fused": reason, "captured": reason}, asked)
    passed: dict[str, str] = {}
    program = source = ""
    try:
        request.refuse(env)
        with preserved_random_state(env.device):
            td = start_of(env, request)
            feed = request.feed(env, td.batch_size)
            plan, start = plan_for(env, request, td, feed, patient=asked != "auto")
            if asked == "fused":
                try:
                    fuse_now(env, plan, start, feed)
                except NotCapturable as reason:
                    passed = {"fused": str(reason), "captured": "backend='fused' was asked for"}
                    return Explanation(None, passed, asked, str(plan.traced.graph))
        if not request.stops and env.restart and plan.flags_vary():
            raise NotCapturable(env.restart)
        program, source = str(plan.traced.graph), plan.loop.source(stop=request.stops)
    except NotCapturable as reason:
        passed = {"fused": str(reason), "captured": str(reason)}
        return Explanation("eager" if asked == "auto" else None, passed, asked)
    if asked == "captured":
        passed["fused"] = "backend='captured' was asked for"
    elif plan.fused is None:
        passed["fused"] = plan.unfused
        if asked == "fused":
            passed["captured"] = "backend='fused' was asked for"
            return Explanation(None, passed, asked, program)
    elif asked == "fused" or plan.prefers_fused():
        assert plan.fused is not None
        return Explanation("fused", passed, asked, program, str(plan.fused), plan.fused.note)
    else:
        passed["fused"] = plan.fused.slower
    device = env.device or torch.device("cpu")
    how = " (one CUDA graph per horizon)" if device.type == "cuda" else ""
    if plan.uncompiled:
        passed["captured + Inductor"] = plan.uncompiled
    return Explanation("captured" + how, passed, asked, program, source)
