"""Who draws a fused rollout's noise; kernels that do are tested in ``tests/kernels``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import fastwm
from fastwm.plan import plan_for
from fastwm.request import Request
from fastwm.rollout import start_of
from fastwm.row_program.noise import Law
from tests.compare import assert_parity, run
from tests.models import LATENT, linear_world_model, make_case, spec_env
from tests.row_program.executing import WHY_NOT

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

B, T = 3, 4


def test_noise_is_torchs_unless_the_kernel_can_draw_it() -> None:
    """On the CPU the option has no effect, and the fused engine by name says so."""
    case = make_case("mlp_sampled")
    env, start = case.env([B], fused_noise="kernel"), case.start(B)
    reason = "fused_noise='kernel' is for CUDA"
    with torch.no_grad():
        found = env.explain(T, case.policy, tensordict=start)
        assert str(found) == f"fused: runs, with noise drawn by torch: {reason}"
        assert_parity(env, case.policy, start, T, engine="auto")
        with pytest.raises(RuntimeError, match=f"backend='fused' cannot run this.*: {reason}"):
            run("fused", env, T, case.policy, start)
        with fastwm.backend("fused"):
            refused = env.explain(T, case.policy, tensordict=start)
    assert refused.engine is None
    assert refused.passed_over["fused"] == reason
    env.fused_noise = "torch"
    with torch.no_grad():
        run("fused", env, T, case.policy, start)


def test_a_step_that_draws_nothing_does_not_ask_who_draws() -> None:
    case = make_case("mlp")
    env, start = case.env([B], fused_noise="kernel"), case.start(B)
    with torch.no_grad():
        assert_parity(env, case.policy, start, T, engine="fused")
        assert str(env.explain(T, case.policy, tensordict=start)) == "fused: runs"


def test_parity_is_looked_at_with_torchs_noise() -> None:
    case = make_case("mlp_sampled")
    env = case.env([B], fused_noise="kernel")
    report = fastwm.check_parity(env, case.policy, case.start(B), T)
    assert report.ok, report
    assert not any(engine.refused for engine in report.engines)
    assert env.fused_noise == "kernel"


def test_other_sources_of_noise_are_unknown() -> None:
    with pytest.raises(ValueError, match="fused_noise='philox'; choose one of torch, kernel"):
        make_case("linear").env([B], fused_noise="philox")


@dataclass
class Draws:
    """How a step can draw, and what the kernel may draw of it by itself."""

    draw: Any
    laws: list[Law | None]


OWN = torch.Generator()
DRAWS = {
    "randn": Draws(lambda x: torch.randn_like(x), [Law("normal", 0.0, 1.0)]),
    "normal": Draws(lambda x: torch.empty_like(x).normal_(1.0, 2.0), [Law("normal", 1.0, 2.0)]),
    "uniform": Draws(lambda x: torch.empty_like(x).uniform_(-1, 1), [Law("uniform", -1.0, 1.0)]),
    "rand": Draws(lambda x: torch.rand(x.shape), [Law("uniform", 0.0, 1.0)]),
    "exponential": Draws(lambda x: torch.empty_like(x).exponential_(2), [Law("exponential", 2.0)]),
    "of-a-mean": Draws(lambda x: torch.normal(x, 0.5), [Law("normal", 0.0, 1.0)]),
    "multinomial": Draws(
        lambda x: torch.multinomial(x.softmax(-1), 1) + 0 * x, [Law("exponential", 1.0)]
    ),
    "bernoulli": Draws(lambda x: torch.bernoulli(x.sigmoid()), [Law("uniform", 0.0, 1.0)]),
    "another-generator": Draws(lambda x: torch.empty_like(x).normal_(generator=OWN), [None]),
    "the-same-for-all-rows": Draws(lambda x: x + torch.randn(x.shape[-1]), [None]),
    "integers": Draws(lambda x: x + torch.randint(0, 3, x.shape), [None]),
    "cauchy": Draws(lambda x: x + torch.empty_like(x).cauchy_(), [None]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_which_draws_a_kernel_may_draw(name: str) -> None:
    how = DRAWS[name]

    class Policy(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return how.draw(latent)[..., :2]

    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    policy = TensorDictModule(Policy(), ["latent"], ["action"])
    start = TensorDict({"latent": torch.randn(B, LATENT)}, [B])
    with torch.no_grad():
        request = Request(max_steps=1, policy=policy, tensordict=start)
        plan, _ = plan_for(env, request, start_of(env, request), None)
    assert plan.fused is not None, plan.unfused
    assert [draw.law for draw in plan.fused.lowered.draws] == how.laws
