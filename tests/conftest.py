"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastwm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh buffers hold NaN, so an element that a kernel does not write cannot pass for a
    result."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture(params=["eager", "auto"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the reference path, then on whatever engine takes it."""
    with fastwm.backend(request.param):
        yield request.param
