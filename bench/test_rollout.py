"""pytest-benchmark over the same providers as ``python -m fastwm bench``, at a few sizes.

    pytest bench --benchmark-enable --benchmark-group-by=param:case

For looking while working on an engine: what is recorded and plotted comes from ``python -m fastwm bench``,
which times providers in turns. Here, too, a provider whose parity is red is not timed.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers import PROVIDERS, REFERENCE, Unavailable, default_names
from fastwm.bench.suites import suite
from fastwm.bench.verdict import compare

CASES = [
    Case("mlp", batch, horizon=15, direction=direction, threads=1)
    for direction in ("forward", "backward")
    for batch in (1, 16, 256)
]
# Unrolled, it compiles for a minute; `python -m fastwm bench` has it.
NAMES = [name for name in default_names("cpu") if name != "torch-compile-loop"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.direction}-{c.batch}x{c.horizon}")
@pytest.mark.parametrize("name", NAMES)
def test_rollout(benchmark: BenchmarkFixture, name: str, case: Case) -> None:
    torch.set_num_threads(case.threads)
    problem = Problem.of(case, suite(case.suite))
    try:
        built = PROVIDERS[name].build(problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    reference = PROVIDERS[REFERENCE].build(problem)
    verdict = compare(built.read(built.checked()), reference.read(reference.checked()))
    assert verdict.ok, verdict
    benchmark.extra_info["gflop"] = (
        problem.suite.flop(case.batch, case.horizon, case.backward) / 1e9
    )
    benchmark(built.run)
