"""Gradients through the fused engine: of which parts, through which outputs, and when they must fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import fastwm
from fastwm.engines import fused
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_parity, run
from tests.engines.test_captured import (
    DISTRIBUTIONS,
    FloatAction,
    begin,
    begin_of,
    env_of,
    frozen,
    parameters,
)
from tests.models import CASES, LATENT, Case, linear_policy, make_case

B, T = 3, 6
ENGINES = ("eager", "fused")


def alike(found: list[Any], what: str = "rollout.gradient") -> None:
    for i, (want, got) in enumerate(zip(*found, strict=True)):
        assert (got is None) == (want is None), i
        if want is not None:
            assert_close(got, want, what, f"gradient {i}")


def leaves(case: Case, start: TensorDictBase) -> list[Tensor]:
    return [*parameters(case), *(start.get(key) for key in case.latents)]


# ---------------------------------------------------------------- of what


@pytest.mark.parametrize("horizon", [1, 2, T])
@pytest.mark.parametrize("live", ["policy", "model", "start", "policy+start", "none"])
@pytest.mark.parametrize("name", ["rssm", "mlp_sampled", "multi_agent"])
def test_gradients_of_a_part_alone(name: str, live: str, horizon: int) -> None:
    case = make_case(name)
    start = case.start(B, requires_grad="start" in live)
    if "model" not in live:
        frozen(case.world_model)
    if "policy" not in live:
        frozen(case.policy)
    wrt = [p for p in leaves(case, start) if p.requires_grad]
    out = assert_parity(case.env([B]), case.policy, start, horizon, wrt=wrt, engine="fused")
    assert out.get(("next", case.reward_key)).requires_grad == bool(wrt) or live == "none"


@pytest.mark.parametrize("batch", [(), (B,), (2, B)])
def test_gradients_of_given_actions_alone(batch: tuple[int, ...]) -> None:
    case = make_case("mlp")
    frozen(case.world_model)
    actions = [torch.randn(*batch, 6, requires_grad=True) for _ in range(T)]
    start, env = case.start(*batch), case.env(batch)
    assert_parity(env, None, start, T, wrt=actions, actions=actions, engine="fused")
    mixed = [a.detach().requires_grad_(i % 2 == 0) for i, a in enumerate(actions)]
    live = mixed[::2]
    assert_parity(env, None, start, T, wrt=live, actions=mixed, engine="auto")


def test_gradients_reach_a_start_that_hangs_on_a_graph() -> None:
    case = make_case("linear")
    source = torch.randn(B, LATENT, requires_grad=True)
    found = []
    for engine in ENGINES:
        start = TensorDict({"latent": source.exp()}, [B])
        out, _ = run(engine, case.env([B]), T, case.policy, start)
        found.append(torch.autograd.grad(out["next", "reward"].sum(), source))
    alike(found)
    assert found[0][0].abs().sum() > 0


def test_parameters_that_are_computed_from_others() -> None:
    """A parametrised weight: the gradient goes on to what it is computed from."""
    torch.manual_seed(0)
    policy = linear_policy()
    nn.utils.parametrizations.weight_norm(policy.module.linear)
    wrt = list(policy.parameters())
    assert len(wrt) == 3
    assert_parity(env_of(FloatAction()), policy, begin(B), T, wrt=wrt, engine="fused")


# ---------------------------------------------------------------- through what


OUTPUTS: dict[str, Callable[[TensorDictBase], Tensor]] = {
    "reward": lambda td: td["next", "reward"].square().sum(),
    "last reward": lambda td: td["next", "reward"][:, -1].sum(),
    "latent": lambda td: td["latent"].square().sum(),
    "next latent": lambda td: td["next", "latent"].square().sum(),
    "action": lambda td: td["action"].square().sum(),
    "log-prob": lambda td: td["action_log_prob"].sum(),
    "reward and log-prob": lambda td: (td["next", "reward"][..., 0] * td["action_log_prob"]).sum(),
    "loc": lambda td: td["loc"].exp().sum(),
}


@pytest.mark.parametrize("saving", ["all", "little"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_gradients_through_some_outputs(name: str, saving: str, monkeypatch: Any) -> None:
    """Whether everything is saved for them, or next to nothing and the rest is worked out again."""
    monkeypatch.setattr(fused, "_PLENTY", None)
    if saving == "little":
        monkeypatch.setattr(fused, "_TAPE_BYTES", -1)
        monkeypatch.setattr(fused, "_TAPE_SHARE", 0.0)
    torch.manual_seed(0)
    policy = DISTRIBUTIONS["IndependentNormal"]()
    env, found = env_of(FloatAction()), []
    start = begin(B)
    start["latent"].requires_grad_()
    wrt = [*policy.parameters(), *env.world_model.parameters(), start["latent"]]
    for engine in ENGINES:
        out, _ = run(engine, env, T, policy, start)
        found.append(torch.autograd.grad(OUTPUTS[name](out), wrt, allow_unused=True))
    alike(found)
    (plans,) = cache_of(env).plans.values()
    assert list(plans[0].fused._modes)[-1] is (saving == "all")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_every_model_with_little_saved(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(fused, "_TAPE_BYTES", -1)
    case = make_case(name)
    start = case.start(B, requires_grad=True)
    assert_parity(
        case.env([B]), case.policy, start, T, wrt=leaves(case, start), engine="fused",
        break_when_any_done=False,
    )  # fmt: skip


def test_results_stop_where_eagers_do() -> None:
    """A result is a stack of its own: the reward does not hang on the stacked latents."""
    case = make_case("linear")
    for engine in ENGINES:
        out, _ = run(engine, case.env([B]), T, case.policy, case.start(B))
        found = torch.autograd.grad(
            out["next", "reward"].sum(), [out["latent"], out["action"]], allow_unused=True
        )
        assert found == (None, None)


def test_backward_accumulates_into_parameters_and_runs_their_hooks() -> None:
    case = make_case("linear")
    weight = next(case.policy.parameters())
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    for _ in range(2):
        out, _ = run("fused", case.env([B]), T, case.policy, begin_of(case))
        out["next", "reward"].sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(weight.grad, 2 * seen[0])


# ---------------------------------------------------------------- more than once


def test_backward_twice_over_one_graph() -> None:
    case = make_case("rssm_sampled")
    wrt, found = parameters(case), []
    for engine in ENGINES:
        out, _ = run(engine, case.env([B]), T, case.policy, begin_of(case))
        one = torch.autograd.grad(out["next", "reward"].sum(), wrt, retain_graph=True)
        two = torch.autograd.grad(out["next", "belief"].sum(), wrt[:6], retain_graph=True)
        again = torch.autograd.grad(out["next", "reward"].sum(), wrt)
        found.append([*one, *two, *again])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(out["next", "reward"].sum(), wrt)
    alike(found)
    n = len(wrt)
    assert all(torch.equal(a, b) for a, b in zip(found[1][:n], found[1][-n:], strict=True))


@pytest.mark.parametrize("batch", [(B,), (2, B)])
@pytest.mark.parametrize("name", ["rssm_sampled", "multi_agent"])
def test_second_derivatives(name: str, batch: tuple[int, ...]) -> None:
    """By torch's autograd over the same program: slower, and right."""
    case, found = make_case(name), []
    start = case.start(*batch, requires_grad=True)
    key = next(iter(case.latents))
    for engine in ENGINES:
        out, _ = run(engine, case.env(batch), 3, case.policy, start)
        reward = out.get(("next", case.reward_key)).square().sum()
        (first,) = torch.autograd.grad(reward, start.get(key), create_graph=True)
        second = torch.autograd.grad(first.square().sum(), parameters(case), allow_unused=True)
        found.append([first, *second])
    alike(found)
    assert found[0][1].abs().sum() > 0


# ---------------------------------------------------------------- writes between forward and backward


def test_a_weight_written_in_place_before_backward_raises_as_eager_does() -> None:
    case = make_case("mlp")
    for engine in ENGINES:
        out, _ = run(engine, case.env([B]), T, case.policy, case.start(B))
        with torch.no_grad():
            case.world_model.dynamics.module.net[2].weight.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out["next", "reward"].sum().backward()


def test_an_optimizer_step_on_what_no_gradient_needs_is_allowed_as_in_eager() -> None:
    """The biases, and the reward head where the loss is the latents'."""
    case, found = make_case("mlp"), []
    weights = [p.detach().clone() for p in parameters(case)]
    for engine in ENGINES:
        out, _ = run(engine, case.env([B]), T, case.policy, begin_of(case))
        with torch.no_grad():
            for name, p in case.world_model.named_parameters():
                if name.endswith("bias"):
                    p.add_(1.0)
        found.append(torch.autograd.grad(out["next", "latent"].sum(), parameters(case)[:6]))
        with torch.no_grad():
            for p, w in zip(parameters(case), weights, strict=True):
                p.copy_(w)
    alike(found)


@pytest.mark.parametrize("saving", ["all", "little"])
def test_results_may_be_written_into_before_backward(saving: str, monkeypatch: Any) -> None:
    """Also those that the backward pass would read: it works them out once more."""
    if saving == "little":
        monkeypatch.setattr(fused, "_TAPE_BYTES", -1)
    case, found = make_case("mlp_sampled"), []
    start = begin_of(case)
    start["latent"].requires_grad_()
    wrt = [*parameters(case), start["latent"]]
    for engine in ENGINES:
        out, _ = run(engine, case.env([B]), T, case.policy, start)
        total = out["next", "latent"].square().sum() + out["action"].sum()
        out["latent"].mul_(3.0)
        with torch.no_grad():
            out["loc"].zero_()
        out["next", "reward"].add_(1.0)
        out["next", "done"].fill_(True)
        total = total + out["latent"].sum() + out["next", "reward"].square().sum()
        found.append(torch.autograd.grad(total, wrt, allow_unused=True))
    alike(found)


def test_results_written_into_and_weights_as_well_is_an_error() -> None:
    case = make_case("mlp")
    out, _ = run("fused", case.env([B]), T, case.policy, case.start(B))
    with torch.no_grad():
        out["next", "latent"].zero_()
        case.world_model.dynamics.module.net[0].bias.add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: input .* the fused engine"
    ):
        out["next", "reward"].sum().backward()


# ---------------------------------------------------------------- threads, modes


@pytest.mark.parametrize("saving", ["all", "little"])
@pytest.mark.parametrize("name", ["mlp_sampled", "rssm_sampled"])
@pytest.mark.parametrize("batch", [3, 65, 300])
def test_threads_change_no_bit(name: str, batch: int, saving: str, monkeypatch: Any) -> None:
    """Sums over rows are added up in an order that does not depend on who adds."""
    if saving == "little":
        monkeypatch.setattr(fused, "_TAPE_BYTES", -1)
    case = make_case(name)
    env, found = case.env([batch]), []
    start = case.start(batch, requires_grad=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            out, _ = run("fused", env, 5, case.policy, start)
            total = sum(
                v.double().square().sum() for v in out.values(True, True) if v.requires_grad
            )
            grads = torch.autograd.grad(total, leaves(case, start), allow_unused=True)
            values = [v.detach() for v in out.values(True, True)]
            found.append([*values, *(g for g in grads if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_plan_made_without_gradients_is_not_used_with_them() -> None:
    case = make_case("mlp_sampled")
    env, start = case.env([B]), case.start(B)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            out = assert_parity(
                env, case.policy, start, T, wrt=parameters(case) if grad else (), engine="fused"
            )
        assert out["next", "reward"].requires_grad == grad


def test_inference_mode() -> None:
    case = make_case("mlp_sampled")
    env = case.env([B])
    with torch.inference_mode():
        inside = case.start(B)
        out = assert_parity(env, case.policy, inside, T, engine="fused")
        assert out["action"].is_inference()
    start = case.start(B)
    assert_parity(env, case.policy, start, T, wrt=parameters(case), engine="fused")


def test_under_anomaly_detection_and_saved_tensors_hooks() -> None:
    case = make_case("linear")
    with torch.autograd.set_detect_anomaly(True):
        assert_parity(
            case.env([B]), case.policy, case.start(B), T, wrt=parameters(case), engine="fused"
        )
    with torch.autograd.graph.save_on_cpu():
        assert_parity(
            case.env([B]), case.policy, case.start(B), T, wrt=parameters(case), engine="fused"
        )


def test_checkpoint_around_a_rollout() -> None:
    case, found = make_case("mlp"), []
    start = begin_of(case)

    def imagined(latent: Tensor) -> Tensor:
        out = env.rollout(T, case.policy, tensordict=TensorDict({"latent": latent}, [B]))
        return out["next", "reward"].sum()

    env = case.env([B])
    for engine in ENGINES:
        latent = start["latent"].clone().requires_grad_()
        with fastwm.backend(engine):
            total = torch.utils.checkpoint.checkpoint(imagined, latent, use_reentrant=False)
            found.append(torch.autograd.grad(total, [latent, *case.policy.parameters()]))
    alike(found)


def test_a_start_made_in_inference_mode_and_used_outside() -> None:
    """Eager concatenates it first, and saves that."""
    case = make_case("mlp")
    with torch.inference_mode():
        start = TensorDict({"latent": begin_of(case)["latent"].clone()}, [B])
        assert start["latent"].is_inference()
    frozen(case.policy)
    wrt = [p for p in parameters(case) if p.requires_grad]
    assert_parity(case.env([B]), case.policy, start, T, wrt=wrt, engine="fused")
