"""Random row programs and modules for a fixed time.

``FASTWM_FUZZ_SEED`` starts elsewhere, ``FASTWM_FUZZ_SECONDS`` goes on for longer.
"""

from __future__ import annotations

import os

import pytest

from tests.row_program.executing import WHY_NOT
from tests.row_program.fuzz import fuzz

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"needs the C++ library: {WHY_NOT}")


def test_random_programs_and_modules() -> None:
    seed = int(os.environ.get("FASTWM_FUZZ_SEED", "1"))
    seconds = float(os.environ.get("FASTWM_FUZZ_SECONDS", "20"))
    print(f"FASTWM_FUZZ_SEED={seed}")
    tried, failures = fuzz(seconds, seed)
    assert tried > 0
    assert not failures, "\n\n".join(map(str, failures))
