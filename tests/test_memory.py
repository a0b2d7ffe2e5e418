"""How much memory a rollout takes at its peak, from the allocator's own record of every block.

``torch.profiler`` logs each allocation and release with its size; their running sum is what is live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch.profiler import ProfilerActivity, profile

import fastwm
from fastwm.engines import captured
from fastwm.plan import cache_of
from tests.models import make_case

T = 15


def live_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes above what was there before: at the highest point, and at the end with the result held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes, "the profiler logged no memory"
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    del kept
    return peak, now


def bytes_of(result: TensorDictBase) -> int:
    return sum(v.untyped_storage().nbytes() for v in result.values(True, True))


def test_the_measure_itself() -> None:
    def work() -> torch.Tensor:
        one = torch.ones(1 << 20)
        two = one * 2
        del one
        return two + torch.ones(1 << 18).sum()

    peak, end = live_bytes(work)
    # two (4 MiB) and the result (4 MiB) beside each other, or one and two, or two and a quarter.
    assert 8 << 20 <= peak < 9 << 20
    assert 4 << 20 <= end < 5 << 20


@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize("name", ["mlp", "mlp_sampled", "rssm_sampled"])
@pytest.mark.parametrize("stop", [True, False])
def test_without_gradients_the_peak_is_the_output_and_one_steps_intermediates(
    name: str, batch: int, stop: bool
) -> None:
    case = make_case(name)
    env, start = case.env([batch]), case.start(batch)

    def work() -> TensorDictBase:
        with torch.no_grad(), fastwm.backend("captured"):
            return env.rollout(T, case.policy, tensordict=start, break_when_any_done=stop)

    output = bytes_of(work())
    (variants,) = cache_of(env).plans.values()
    graph = variants[0].loop.graph
    made = {o.index for op in graph.ops for o in op.outputs if o is not None}
    sizes = {graph.storage[i]: graph.metas[i] for i in made}
    step = sum(m.shape.numel() * m.dtype.itemsize for m in sizes.values())
    peak, end = live_bytes(work)
    assert end <= output + (64 << 10)
    if batch == 4096:
        assert peak <= output + step + (256 << 10), f"{peak} over {output} + {step}"
        assert peak < 1.6 * output  # far from every step and their stack
    else:  # small steps are stacked at the end, and held until then
        assert peak <= 2 * output + step + captured._DEFER_BYTES["cpu"]


@pytest.mark.parametrize("name", ["mlp", "rssm_sampled"])
@pytest.mark.parametrize("batch", [16, 1024])
@pytest.mark.parametrize("waits", [True, False])
def test_with_gradients_the_peak_is_eagers(
    name: str, batch: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that wait for all steps may hold their gradients at once, up to the limit set for that."""
    if not waits:
        monkeypatch.setattr(captured, "_DEFER_BYTES_GRAD", {})
    case = make_case(name)
    env, start = case.env([batch]), case.start(batch)
    wanted = [*case.policy.parameters(), *case.world_model.step_module.parameters()]

    def work(engine: str) -> Callable[[], Any]:
        def run() -> Any:
            with fastwm.backend(engine):
                out = env.rollout(T, case.policy, tensordict=start)
            torch.autograd.grad(out["next", "reward"].sum(), wanted, allow_unused=True)
            return out

        return run

    peaks = {}
    for engine in ("eager", "captured"):
        work(engine)()
        peaks[engine], _ = live_bytes(work(engine))
    more = captured._DEFER_BYTES_GRAD["cpu"] if waits else 0
    assert peaks["captured"] <= 1.01 * peaks["eager"] + more + (16 << 10), peaks


def test_rollouts_do_not_pile_up() -> None:
    """What a plan keeps between rollouts does not grow."""
    case = make_case("mlp_sampled")
    env, start = case.env([256]), case.start(256)

    def many() -> None:
        with fastwm.backend("captured"):
            for horizon in (3, 5, 7):
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        env.rollout(horizon, case.policy, tensordict=start)

    many()
    _, left = live_bytes(many)
    assert abs(left) < 16 << 10
