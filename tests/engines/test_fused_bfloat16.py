"""bfloat16 models on the fused engine: float32 inside, eager's dtypes outside."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import fastwm
from fastwm.tolerances import tolerance
from tests.compare import assert_parity, run, why_not_fused
from tests.models import Case, linear_policy, linear_world_model, make_case, spec_env
from tests.row_program.executing import WHY_NOT

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

B, T, LATENT = 3, 15, 4


def rounded(name: str) -> Case:
    case = make_case(name)
    case.world_model.bfloat16(), case.policy.bfloat16()
    return case


def starting(case: Case, *batch: int, grad: bool = False) -> TensorDictBase:
    start = case.start(*batch).apply(lambda t: t.bfloat16() if t.is_floating_point() else t)
    return start.apply(lambda t: t.requires_grad_(grad and t.is_floating_point()))


def in_float32(case: Case) -> Case:
    """The same weights in float32."""
    return replace(
        case, world_model=deepcopy(case.world_model).float(), policy=deepcopy(case.policy).float()
    )


def parameters(case: Case) -> list[nn.Parameter]:
    return [*case.world_model.parameters(), *case.policy.parameters()]


def weighted(out: TensorDictBase) -> Tensor:
    """A sum of all results, by weights that bfloat16 has."""
    generator, total = torch.Generator().manual_seed(3), torch.zeros(())
    for value in out.values(True, True):
        if value.requires_grad:
            weights = torch.randint(-4, 5, value.shape, generator=generator)
            total = total + (value.float() * weights).sum()
    return total


def close(got: Tensor, want: Tensor, what: str) -> None:
    """Each element by itself."""
    torch.testing.assert_close(got, want, **tolerance(what, torch.bfloat16).kwargs())


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [(1,), (3,), (2, 3), (200,)], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_done", "mlp", "rssm", "multi_agent"])
def test_it_is_the_float32_model_of_these_weights_rounded_once(
    name: str, batch: tuple[int, ...], grad: bool
) -> None:
    case = rounded(name)
    wide = in_float32(case)
    found, grads = [], []
    for one, engine in ((case, "fused"), (wide, "eager")):
        start = starting(case, *batch, grad=grad)
        if one is wide:
            start = start.apply(
                lambda t: t.detach().float().requires_grad_(grad) if t.is_floating_point() else t
            )
        with torch.set_grad_enabled(grad):
            out, _ = run(engine, one.env(batch), T, one.policy, start, break_when_any_done=False)
        found.append(out)
        if grad:
            wrt = [*parameters(one), *(t for t in start.values(True, True) if t.requires_grad)]
            grads.append(torch.autograd.grad(weighted(out), wrt, allow_unused=True))
    got, want = found
    assert list(got.keys(True, True)) == list(want.keys(True, True))
    for key in got.keys(True, True, sort=False):
        value = want[key]
        if value.is_floating_point():
            value = value.bfloat16()
            close(got[key], value, "rollout.bf16_model")
        assert got[key].dtype is value.dtype
    for g, w in zip(*grads, strict=True) if grad else ():
        assert (g is None) == (w is None)
        if w is not None:
            assert g.dtype is torch.bfloat16
            close(g, w.bfloat16(), "rollout.bf16_model.gradient")


@pytest.mark.parametrize("name", ["mlp", "mlp_sampled", "rssm_sampled", "nested", "context"])
def test_keys_dtypes_and_draws_are_eagers(name: str) -> None:
    """Values too, within the roundings that eager makes and this does not."""
    case = rounded(name)
    with torch.no_grad():
        assert_parity(case.env([B]), case.policy, starting(case, B), 5, engine="fused")
    start = starting(case, B, grad=True)
    got, _ = run("fused", case.env([B]), 5, case.policy, start)
    want, _ = run("eager", case.env([B]), 5, case.policy, start)
    for key, value in want.items(True, True):
        assert got[key].requires_grad == value.requires_grad, key


class Creep(nn.Module):
    """Steps that a bfloat16 carry would round away."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(2.0**-10, dtype=torch.bfloat16))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return latent + self.step


@pytest.mark.parametrize("stop", [False, True], ids=["whole", "in blocks"])
def test_the_carry_is_float32(stop: bool) -> None:
    """Also from one block of steps to the next, where a flag may end the rollout."""
    wm = linear_world_model(done="done").bfloat16()
    dynamics = TensorDictModule(Creep(), ["latent", "action"], [("next", "latent")])
    env = fastwm.WorldModelEnv(
        fastwm.WorldModel(wm.encoder, dynamics, wm.reward_head, done_head=wm.done_head),
        spec_env(dtype=torch.bfloat16), batch_size=[B], done_threshold=1e6,
    )  # fmt: skip
    start = TensorDict({"latent": torch.ones(B, LATENT, dtype=torch.bfloat16)}, [B])
    with torch.no_grad():
        last = {
            engine: run(
                engine, env, 128, linear_policy().bfloat16(), start, break_when_any_done=stop
            )[0]["next", "latent"][:, -1]
            for engine in ("eager", "fused")
        }
    assert (last["eager"] == 1.0).all()
    assert (last["fused"] == 1.125).all()


def test_it_is_asked_for_by_name() -> None:
    case = rounded("mlp")
    env, start = case.env([B]), starting(case, B)
    reason = (
        "bfloat16 values are held in float32 within the rollout, where eager rounds each of them: "
        "backend='fused' asks for it"
    )
    assert why_not_fused(env, case.policy, start) == reason
    with torch.no_grad():
        auto, _ = run("auto", env, T, case.policy, start)
        captured, _ = run("captured", env, T, case.policy, start)
        with fastwm.backend("fused"):
            found = env.explain(T, case.policy, tensordict=start)
    assert (auto == captured).all()
    assert str(found) == "fused: runs, with values held in float32"


def test_writes_into_weights_are_seen() -> None:
    case = rounded("mlp")
    env, start = case.env([B]), starting(case, B)
    with torch.no_grad():
        before, _ = run("fused", env, T, case.policy, start)
        for p in parameters(case):
            p.data.neg_()
        after, _ = run("fused", env, T, case.policy, start)
        fresh, _ = run("fused", case.env([B]), T, case.policy, start)
    assert not torch.equal(before["next", "reward"], after["next", "reward"])
    assert torch.equal(fresh["next", "reward"], after["next", "reward"])


class Chooses(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.argmax(-1, keepdim=True).expand(-1, 2).to(latent.dtype)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, latent: Tensor) -> Tensor:
        return (latent[..., :2] * self.scale).to(latent.dtype)


REFUSED: dict[str, tuple[Any, str]] = {
    "choice": (
        Chooses,
        "aten.argmax: the largest or smallest of bfloat16 values, whose ties eager",
    ),
    "mixed": (Mixes, "bfloat16 inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_with_the_captured_engine(name: str) -> None:
    made, reason = REFUSED[name]
    env = fastwm.WorldModelEnv(
        linear_world_model().bfloat16(), spec_env(dtype=torch.bfloat16), batch_size=[B]
    )
    policy = TensorDictModule(made(), ["latent"], ["action"])
    start = TensorDict({"latent": torch.randn(B, LATENT).bfloat16()}, [B])
    assert why_not_fused(env, policy, start).startswith(reason)
