"""Why a loss runs where it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase

from fastwm.explain import Explanation
from fastwm.loss_plan import LossPlan
from fastwm.process_modes import NotCapturable
from fastwm.tracing import preserved_random_state

__all__ = ["explain_loss"]


def explain_loss(
    plan_of: Callable[[TensorDictBase, str], tuple[LossPlan, Any]],
    compute: Callable[..., tuple[tuple[Any, str], list[torch.Tensor]]],
    tensordict: TensorDictBase,
    asked: str,
) -> Explanation:
    """See :meth:`fastwm.WorldModelLoss.explain`.

    Args:
        plan_of: ``plan_of(batch, backend)``: the plan of the captured engine.
        compute: ``compute(batch, backend)``: what that plan traces; beside the values it says why no kernel
            gave them.
        asked: the backend in force.
    """
    by_name = f"backend={asked!r} was asked for"
    passed: dict[str, str] = {}
    if asked in ("auto", "captured"):
        try:
            plan, _ = plan_of(tensordict, asked)
        except NotCapturable as reason:
            passed["captured"] = str(reason)
        else:
            return _of_plan(plan, asked)
    else:
        passed["captured"] = by_name
    if asked in ("captured", "eager"):
        passed["fused"] = by_name
        return Explanation("eager" if asked == "eager" else None, passed, asked)
    # What stands against the kernel is known once there is a prediction. By name it may be any device's.
    with preserved_random_state(tensordict.device):
        (_, unfused), _ = compute(tensordict, "captured" if asked == "fused" else "auto")
    if not unfused:
        return Explanation("fused", passed, asked, note="the world model run eagerly")
    passed["fused"] = unfused
    return Explanation("eager" if asked == "auto" else None, passed, asked)


def _of_plan(plan: LossPlan, asked: str) -> Explanation:
    _, unfused = plan.structure
    how, passed = "", {}
    if plan.device.type == "cuda":
        why = plan.uncaptured()
        how = "" if why else " (one CUDA graph forward, one backward)"
        if why:
            passed["CUDA graph"] = why
    note = f"elementwise sub-losses ({unfused})" if unfused else "all sub-losses in one kernel"
    graph, source = str(plan.loop.graph), plan.loop.source()
    return Explanation("captured" + how, passed, asked, graph, source, note)
