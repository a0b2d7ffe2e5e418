"""How far the vectorised float32 functions are from the truth: the bounds stated in csrc/vec.h."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastwm.row_program import Program
from fastwm.row_program.executor import Executor
from tests.row_program.executing import ISAS, WHY_NOT

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"needs the C++ library: {WHY_NOT}")

Tensor = torch.Tensor
WIDTH = 4096
TINY = 2.0**-126  # the least normal float
VEC = Path(__file__).parents[2] / "csrc" / "vec.h"


@dataclass
class Bound:
    """Units in the last place, for results of at least ``least`` (a normal number by default), of arguments
    within ``domain``."""

    truth: Callable[[Tensor], Tensor]
    ulp: float
    domain: tuple[float, float] = (-torch.inf, torch.inf)
    least: float = TINY
    params: dict[str, float] = field(default_factory=dict)
    portable: float = 0.0  # without multiply-add, if larger
    stated: str = ""  # the function in vec.h whose comment states the bound


def _mish(x: Tensor) -> Tensor:
    return x * F.softplus(x, threshold=700.0).tanh()


FUNCTIONS: dict[str, Bound] = {
    "exp": Bound(torch.exp, 2, stated="exp_"),
    "expm1": Bound(torch.expm1, 2, stated="expm1_"),
    "log": Bound(torch.log, 1, stated="log_"),
    "log1p": Bound(torch.log1p, 3, stated="log1p_"),
    "tanh": Bound(torch.tanh, 2, stated="tanh_"),
    "sigmoid": Bound(torch.sigmoid, 3, stated="sigmoid_"),
    "erf": Bound(torch.erf, 2, stated="erf_"),
    "softplus": Bound(lambda x: F.softplus(x, threshold=700.0), 3, params={"beta": 1.0, "threshold": 20.0}),
    "log_sigmoid": Bound(F.logsigmoid, 3),
    "elu": Bound(F.elu, 2, params={"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}),
    # 1 + erf and 1 + tanh lose where they are near 0; so do torch's.
    "gelu": Bound(F.gelu, 3, (-1.0, torch.inf)),
    "gelu_tanh": Bound(lambda x: F.gelu(x, approximate="tanh"), 4, (-1.0, torch.inf)),
    "silu": Bound(F.silu, 5, (-86.0, torch.inf), portable=70),
    "mish": Bound(_mish, 5, (-80.0, torch.inf)),
    "safe_tanh": Bound(lambda x: x.tanh().clamp(-0.5, 0.5), 2, params={"limit": 0.5}),
}  # fmt: skip


def samples() -> Tensor:
    """Every 1999th float of all there are, and those next to what the functions branch at."""
    patterns = torch.arange(-(2**31), 2**31, 1999, dtype=torch.int64).to(torch.int32)
    found = patterns.view(torch.float32)
    edges = torch.tensor(
        [0.5, 0.625, 0.70710678, 0.927734375, 1.0, 1.41421356, 2.0, 4.0, 10.0, 20.0, 83.0,
         87.33655, 88.72283, 103.97]
    )  # fmt: skip
    steps = torch.arange(-40, 41, dtype=torch.int32)
    near = (edges.view(torch.int32).unsqueeze(1) + steps).view(torch.float32)
    dense = torch.linspace(-20, 20, 100_001)
    found = torch.cat([found, near.flatten(), -near.flatten(), dense])
    found = found[found.isfinite()]
    return found[: len(found) // WIDTH * WIDTH].reshape(-1, WIDTH)


SAMPLES = samples() if not WHY_NOT else torch.zeros(0, WIDTH)


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """The error in units of the last place of ``want`` rounded to float32."""
    exponent = torch.frexp(want)[1].clamp(min=-125)
    return (got.double() - want).abs() / torch.ldexp(torch.ones_like(want), exponent - 24)


@lru_cache(maxsize=1)  # instruction sets follow one another
def truth(name: str) -> Tensor:
    return FUNCTIONS[name].truth(SAMPLES.double())


def worst(name: str, isa: int) -> tuple[float, float]:
    """The largest error and where."""
    bound = FUNCTIONS[name]
    p = Program()
    x = p.input("x", "context", (WIDTH,))
    p.outputs["y"] = p.emit(name, x, **bound.params)
    got = Executor(p, isa=isa)({"x": SAMPLES}, len(SAMPLES), 1)["y"].squeeze(1)
    want = truth(name)
    counted = (want.abs() >= bound.least) & (want.abs() < 3.4e38)
    low, high = bound.domain
    counted &= (low <= SAMPLES) & (high >= SAMPLES)
    assert counted.sum() > 100_000
    assert got[counted].isfinite().all(), SAMPLES[counted][~got[counted].isfinite()][:5]
    error = torch.where(counted, ulps(got, want), 0.0)
    at = int(error.argmax())
    return error.view(-1)[at].item(), SAMPLES.view(-1)[at].item()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_within_their_bounds(name: str, isa: int) -> None:
    error, x = worst(name, isa)
    bound = FUNCTIONS[name]
    assert error <= (max(bound.ulp, bound.portable) if isa == 0 else bound.ulp), (
        f"{error:.2f} ulp at {x!r}"
    )


@pytest.mark.parametrize("name", [n for n, b in FUNCTIONS.items() if b.stated.endswith("_")])
def test_the_bounds_are_those_that_vec_h_states(name: str) -> None:
    bound = FUNCTIONS[name]
    head = r"^// (\d+) ulp[^\n]*\n(?:template <typename T>\n)?FASTWM_INLINE Vec<\w+> "
    (said,) = re.findall(head + bound.stated + r"\(", VEC.read_text(), re.MULTILINE)
    assert int(said) == bound.ulp
