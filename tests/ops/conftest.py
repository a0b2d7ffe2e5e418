"""Fixtures for the tests of ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastwm.ops import cpu_isa, cpu_library

_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(params=_SETS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the losses' loops for each instruction set that this CPU has."""
    if not cpu_library().loaded:
        pytest.skip(f"only the reference is tested here: {cpu_library().reason}")
    wanted, best = _SETS.index(request.param), _SETS.index(cpu_isa() or "portable")
    if wanted > best:
        pytest.skip(f"this CPU has no {request.param}")
    was = torch.ops.fastwm.limit_loss_isa(wanted)
    yield request.param
    torch.ops.fastwm.limit_loss_isa(was)
