"""`check_parity`: green where engines agree, red where one is wrong, and it names the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import fastwm
from fastwm.engines.captured import CapturedLoop
from fastwm.engines.fused import FusedLoop
from fastwm.parity import _compare_one
from tests.models import CASES, counting_world_model, linear_policy, make_case, module, spec_env

B, T = 3, 5


@pytest.mark.parametrize("name", CASES)
def test_green_on_every_model(name: str) -> None:
    case = make_case(name)
    start = case.start(B, requires_grad=True)
    report = fastwm.check_parity(case.env([B]), case.policy, start, T, break_when_any_done=False)
    assert report.ok, report
    assert report.steps == T
    text = str(report)
    assert "captured: parity" in text
    assert "fused: parity" in text
    compared = {c.name for e in report.engines for c in e.comparisons}
    assert any(n.startswith("grad of policy.") for n in compared)
    assert any(n.startswith("grad of model.") for n in compared)
    assert any(n.startswith("grad of start ") for n in compared)
    assert any(n.endswith("done") for n in compared)


def test_random_actions_starts_from_initial_state_and_early_stops() -> None:
    case = make_case("linear_done")
    env = case.env([B], initial_state=case.start(B))
    assert fastwm.check_parity(env, None, None, T).ok
    counting = fastwm.WorldModelEnv(counting_world_model(done_at=3), spec_env(), batch_size=[B])
    start = TensorDict({"latent": torch.zeros(B, 1)}, [B])
    report = fastwm.check_parity(counting, linear_policy(1), start, T)
    assert report.ok, report
    assert report.steps == 3


@pytest.mark.parametrize("gradients", [None, True, False])
def test_gradients_on_demand(gradients: bool | None) -> None:
    case = make_case("linear")
    report = fastwm.check_parity(case.env([B]), case.policy, case.start(B), T, gradients=gradients)
    assert report.ok
    found = [c for e in report.engines for c in e.comparisons if c.name.startswith("grad of")]
    assert bool(found) is (gradients is not False)


def test_nothing_is_left_changed() -> None:
    case = make_case("rssm_sampled")
    start = case.start(B, requires_grad=True)
    state, kept = torch.get_rng_state(), start.clone()
    fastwm.check_parity(case.env([B]), case.policy, start, T)
    assert torch.equal(torch.get_rng_state(), state)
    assert (start == kept).all()
    assert start["state"].grad is None
    assert all(p.grad is None for p in case.world_model.parameters())


# ---------------------------------------------------------------- red


Results = dict[Any, Tensor]
FAULTS: dict[str, tuple[Callable[[Results], Results], str]] = {
    "value": (
        lambda r: {k: v + 1e-2 if k == ("next", "reward") else v for k, v in r.items()},
        "next.reward",
    ),
    "one value": (
        lambda r: {k: spoiled(v) if k == ("latent",) else v for k, v in r.items()},
        "latent",
    ),
    "flag": (lambda r: {k: ~v if k == ("next", "done") else v for k, v in r.items()}, "next.done"),
    "shape": (
        lambda r: {k: v[..., None] if k == ("action",) else v for k, v in r.items()},
        "action",
    ),
    "dtype": (lambda r: {k: v.double() if k == ("action",) else v for k, v in r.items()}, "action"),
    "nan": (
        lambda r: {k: v * torch.nan if k == ("next", "latent") else v for k, v in r.items()},
        "next.latent",
    ),
    "steps swapped": (
        lambda r: {k: v.flip(1) if k == ("next", "reward") else v for k, v in r.items()},
        "next.reward",
    ),
}


def spoiled(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] += 1e-3 * value.abs().max()
    return value


def halved_gradient(value: Tensor) -> Tensor:
    return value.detach() / 2 + value / 2 if value.requires_grad else value


LOOPS: dict[str, type] = {"fused": FusedLoop, "captured": CapturedLoop}


def inject(
    monkeypatch: pytest.MonkeyPatch, engine: str, fault: Callable[[Results], Results]
) -> None:
    """Make an engine wrong once its plan, held against fewer steps, was accepted."""
    run = LOOPS[engine].run

    def faulty(self: Any, horizon: int, *args: Any, **kwargs: Any) -> tuple[int, Results]:
        steps, results = run(self, horizon, *args, **kwargs)
        return steps, fault(results) if horizon == T else results

    monkeypatch.setattr(LOOPS[engine], "run", faulty)


@pytest.mark.parametrize("engine", LOOPS)
@pytest.mark.parametrize("name", FAULTS)
def test_red_on_a_wrong_engine(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, key = FAULTS[name]
    inject(monkeypatch, engine, fault)
    case = make_case("linear_done")
    report = fastwm.check_parity(
        case.env([B]), case.policy, case.start(B), T, gradients=False, break_when_any_done=False
    )
    assert not report.ok
    bad = [c.name for e in report.engines for c in e.comparisons if not c.ok]
    assert bad == [key]
    other = {"fused": "captured", "captured": "fused"}[engine]
    assert f"{engine}: DIFFERS FROM EAGER" in str(report)
    assert f"{other}: parity" in str(report)
    (line,) = [text for text in str(report).splitlines() if "BAD" in text]
    assert key in line


@pytest.mark.parametrize("engine", LOOPS)
def test_red_on_wrong_gradients(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, engine, lambda r: {k: halved_gradient(v) for k, v in r.items()})
    case = make_case("linear")
    report = fastwm.check_parity(case.env([B]), case.policy, case.start(B), T)
    assert not report.ok
    bad = [c.name for e in report.engines for c in e.comparisons if not c.ok]
    assert bad
    assert all(n.startswith("grad of ") for n in bad)


@pytest.mark.parametrize("engine", LOOPS)
def test_red_on_missing_gradients(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, engine, lambda r: {k: v.detach() for k, v in r.items()})
    case = make_case("linear")
    report = fastwm.check_parity(case.env([B]), case.policy, case.start(B), T)
    assert not report.ok
    assert "missing" in str(report)


def test_where_no_engine_runs_nothing_is_claimed() -> None:
    case = make_case("linear")
    case.policy = module(
        lambda z: z[..., :2] if z.sum() > 0 else -z[..., :2], ["latent"], ["action"]
    )
    report = fastwm.check_parity(case.env([B]), case.policy, case.start(B), T)
    assert not report.ok
    assert "Python reads a value" in str(report)


def test_eagers_errors_are_raised() -> None:
    case = make_case("linear")
    with pytest.raises(RuntimeError, match="initial latent"):
        fastwm.check_parity(case.env([B]), case.policy, None, T)


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("want", "got", "ok"),
    [
        ([1.0, torch.nan], [1.0, torch.nan], True),
        ([1.0, torch.nan], [torch.nan, 1.0], False),
        ([1.0, torch.inf], [1.0, torch.inf], True),
        ([1.0, torch.inf], [1.0, -torch.inf], False),
        ([torch.nan], [torch.nan], True),
        ([0.0, 0.0], [0.0, 1e-9], True),
        ([0.0, 0.0], [0.0, 1e-3], False),
        ([1e3, 1.0], [1e3, 1.005], True),  # small beside the largest of its tensor
        ([], [], True),
        ([True, False], [True, True], False),
        ([1, 2], [1, 2], True),
    ],
)
def test_one_tensor(want: list, got: list, ok: bool) -> None:
    assert _compare_one("x", torch.tensor(want), torch.tensor(got)).ok is ok


def test_a_missing_tensor() -> None:
    value = torch.ones(2)
    assert not _compare_one("x", value, None).ok
    assert not _compare_one("x", None, value).ok
    assert _compare_one("x", None, None).ok


def test_rounded_weights_are_held_to_their_own_line() -> None:
    case = make_case("mlp")
    env = case.env([B], fused_weights=torch.bfloat16)
    report = fastwm.check_parity(env, case.policy, case.start(B), 15, gradients=False)
    assert report.ok, report
    fused, captured = ({c.name: c for c in e.comparisons} for e in report.engines)
    assert fused["next.reward"].tolerance > 100 * captured["next.reward"].tolerance
    assert fused["next.reward"].error > captured["next.reward"].tolerance
