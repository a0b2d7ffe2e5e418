"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastwm


@pytest.fixture(params=["eager", "auto"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the reference path, then on whatever engine takes it."""
    with fastwm.backend(request.param):
        yield request.param
