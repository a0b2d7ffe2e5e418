"""What the tests of kernels share."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

# What these tests call in processes of their own, or import once they know that Triton is there.
collect_ignore = ["on_triton.py", "typed.py"]


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Any:
    """The kernels that ``interpreted_<name>.py`` is about."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is not set; test_interpreter.py sets it")
    name = request.path.stem.removeprefix("interpreted_")
    return importlib.import_module(f"fastwm.kernels.{name}")
