"""The table of tolerances."""

from __future__ import annotations

import pytest
import torch

from fastwm.tolerances import TOLERANCES, tolerance


def test_every_line_says_where_it_comes_from() -> None:
    assert all(len(line.why.split()) >= 3 for line in TOLERANCES.values())


def test_the_designs_promise_is_kept() -> None:
    assert tolerance("rollout", torch.float32).rtol == 1e-5


def test_float64_is_never_looser_than_float32() -> None:
    for (what, dtype), line in TOLERANCES.items():
        if dtype == torch.float64:
            single = tolerance(what, torch.float32)
            assert (line.rtol, line.atol) <= (single.rtol, single.atol)


def test_what_has_no_line_is_refused() -> None:
    with pytest.raises(KeyError, match=r"no line for 'nothing' at torch\.float32"):
        tolerance("nothing", torch.float32)
