"""Every suite: the same numbers from every provider, and the arithmetic that it states."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastwm.bench import cli
from fastwm.bench.limits import Limits, floor
from fastwm.bench.plan import Plan
from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers import PROVIDERS, REFERENCE, Unavailable, torch_loop
from fastwm.bench.suites import SUITES, Suite, rssm_v3, suite
from fastwm.bench.verdict import compare

NEW = [name for name in SUITES if name != "mlp"]
PEERS = ("torch-loop", "fastwm-captured", "fastwm-fused", "jax-scan")
the = functools.cache(suite)


def problem_of(name: str, direction: str = "forward", batch: int = 3, horizon: int = 2) -> Problem:
    return Problem.of(Case(name, batch, horizon, direction, 1), the(name))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NEW)
def test_every_provider_gives_the_same_numbers(name: str, direction: str) -> None:
    problem = problem_of(name, direction)
    reference = PROVIDERS[REFERENCE].build(problem)
    expected = {k: v.detach() for k, v in reference.read(reference.checked()).items()}
    keys = {*the(name).outputs}
    if problem.backward:
        keys |= {f"grad/{leaf}" for leaf in problem.leaves}
    assert set(expected) == keys
    # A leaf that nothing depends on would hide what its providers do wrong.
    assert all(value.abs().amax() > 0 for value in expected.values())
    for peer in PEERS:
        try:
            built = PROVIDERS[peer].build(problem)
        except Unavailable:
            continue
        # Twice: the second run begins with the same noise.
        for _ in range(2):
            verdict = compare(built.read(built.checked()), expected)
            assert verdict.ok, f"{peer}: {verdict}"


def test_the_timed_jax_program_draws_its_own_noise() -> None:
    pytest.importorskip("jax", reason="jax is not installed; it is one of the peers")
    problem = problem_of("mbpo")  # which draws floats and integers
    built = PROVIDERS["jax-scan"].build(problem)
    timed, checked = built.read(built.run()), built.read(built.checked())
    assert timed.keys() == checked.keys()
    for key, value in timed.items():
        assert value.shape == checked[key].shape
        assert value.isfinite().all()
    assert not torch.equal(timed["action"], checked["action"])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NEW)
def test_the_stated_work_is_the_work_of_the_peers(name: str, direction: str) -> None:
    problem, of = problem_of(name, direction), the(name)
    with FlopCounterMode(display=False) as counter:
        found = torch_loop.loop(problem.model.step, problem.start, 2, of.outputs)
        if problem.backward:
            heads = [found[key] for key in problem.cotangents]
            torch.autograd.backward(heads, list(problem.cotangents.values()))
    assert of.flop_done(3, 2, problem.backward) == counter.get_total_flops()
    assert of.flop(3, 2, problem.backward) <= of.flop_done(3, 2, problem.backward)
    size = 4 * sum(value.numel() for value in found.values())
    assert of.output_bytes(3, 2) == size


def test_the_needed_work_is_counted_by_hand() -> None:
    actor, member = 17 * 256 + 256 * 256 + 256 * 12, 23 * 200 + 3 * 200 * 200 + 200 * 36
    assert the("mbpo").macs == actor + member
    assert the("mbpo").macs_done == actor + 7 * member
    # The three layers that read the state add up 32 rows of 512 weights each.
    gru, prior = 6 * 512 * 512, 512 * 512 + 512 * 1024
    project, actor = 38 * 512, (512 + 32) * 512 + 512 * 512 + 512 * 12
    reward = (512 + 32) * 512 + 512 * 512 + 512 * 101
    assert the("rssm_v3").macs == gru + prior + project + actor + reward


def test_weights_that_no_row_needs_are_not_in_the_floor() -> None:
    limits = Limits(gflops=100.0, how="by hand", read_gbs=50.0)

    def weights_ms(of: Suite, batch: int) -> float:
        return floor(Case(of.name, batch, 1, "forward", 1), of, limits, 10**9).weights_ms

    model = the("mbpo").model()
    total = sum(p.numel() for p in model.parameters())
    one = total - sum(p.numel() for p in model.dynamics.net.parameters()) * 6 / 7
    assert weights_ms(the("mbpo"), 1) == pytest.approx(4 * one / 50e9 * 1e3, rel=1e-5)
    assert weights_ms(the("mbpo"), 1000) == pytest.approx(4 * total / 50e9 * 1e3, rel=1e-5)
    # Bare multiply-adds are faster than the best product, and no product is faster than they.
    faster = Limits(gflops=100.0, how="by hand", read_gbs=50.0, fma_gflops=200.0)
    case = Case("mlp", 1000, 1, "forward", 1)
    times = [floor(case, the("mlp"), limit, 0).compute_ms for limit in (limits, faster)]
    assert times[0] == 2 * times[1]


def test_no_start_of_rssm_v3_meets_a_near_tie() -> None:
    problem = problem_of("rssm_v3", batch=64, horizon=5)
    model, carry = problem.model, tuple(problem.start.values())
    assert isinstance(model, rssm_v3.RSSMv3WorldModel)
    assert rssm_v3._margins(model, carry, 5).min() >= rssm_v3.TIE  # type: ignore[arg-type]
    # What is looked at is what a run does.
    state = problem.start["state"].view(64, 32, 32)
    assert torch.equal(state.sum(-1), torch.ones(64, 32))
    found = PROVIDERS["torch-loop"].build(problem).checked()["next_state"]
    assert torch.equal(found.view(64, 5, 32, 32).amax(-1), torch.ones(64, 5, 32))


def test_several_suites_are_measured_each_into_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(cli, "_run_worker", lambda plan, threads: plans.append(plan) or 0)
    words = f"--suite rssm mlp rssm --threads 1 --no-plot --results {tmp_path}"
    assert cli.main(words.split()) == 0
    assert [(p.suite, Path(p.results).name) for p in plans] == [
        ("rssm", "rssm.jsonl"),
        ("mlp", "mlp.jsonl"),
    ]
    assert plans[0].batches == (1, 16, 256, 2500)
    assert plans[1].batches == cli.BATCHES
    assert "fastwm-fused" in plans[0].providers
    with pytest.raises(SystemExit):
        cli.main(["--suite", "dreams"])
