"""No number for a provider that is not right; and everything that is right agrees."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastwm.bench import cli, providers, report, rows
from fastwm.bench.plan import Plan
from fastwm.bench.problem import Problem
from fastwm.bench.providers import Built, Provider, Unavailable, torch_loop
from fastwm.bench.runner import run_plan
from fastwm.bench.timing import Effort
from fastwm.bench.verdict import compare

ONCE = Effort(seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=0.0)


def plan(tmp_path: Path, *names: str, direction: str = "forward", **changes: object) -> Plan:
    values = {
        "suite": "mlp", "batches": (3,), "horizons": (2,), "directions": (direction,), "threads": (1,),
        "providers": names, "device": "cpu", "results": str(tmp_path / "mlp.jsonl"), "effort": ONCE,
    }  # fmt: skip
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def names_in(tmp_path: Path) -> list[str]:
    return [row.provider for row in rows.read(tmp_path / "mlp.jsonl")]


@pytest.fixture(autouse=True)
def _as_before() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _limits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastwm.bench import limits

    found = limits.Limits(100.0, "not measured", 50.0)
    monkeypatch.setattr(limits, "measure", lambda *_: found)


def spoiled(spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Provider:
    """The plain loop with its result changed on the way out."""

    def build(problem: Problem) -> Built:
        right = torch_loop.build(problem)
        return Built(lambda: spoil(right.run()), lambda raw: raw)

    return Provider("wrong", build, ours=True)


def _later_calls_write_into_the_first(problem: Problem) -> Built:
    kept = torch_loop.build(problem).run()
    return Built(lambda: kept, lambda raw: raw)


def _returns_the_start_itself(problem: Problem) -> Built:
    right = torch_loop.build(problem)

    def run() -> dict[str, Tensor]:
        found = right.run()
        latent = found["latent"].unbind(1)
        # The first latent is the start's memory, the others are its own.
        return {**found, "first": problem.start["latent"], "latent": torch.stack(latent, 1)}

    return Built(run, lambda raw: raw)


def _off_by(key: str, amount: float) -> Provider:
    return spoiled(lambda found: {**found, key: found[key] + amount})


@pytest.mark.parametrize(
    ("wrong", "direction", "why"),
    [
        (_off_by("reward", 1e-3), "forward", "reward is off"),
        (_off_by("grad/policy.0.weight", 1e-2), "backward", "grad/policy.0.weight is off"),
        (_off_by("grad/start.latent", 1e-2), "backward", "grad/start.latent is off"),
        (_off_by("latent", torch.nan), "forward", "latent is off"),
        (spoiled(lambda f: {k: v for k, v in f.items() if k != "action"}), "forward", "action is missing"),
        (spoiled(lambda f: {**f, "reward": f["reward"][..., 0]}), "forward", "reward has shape"),
        (spoiled(lambda f: {k: v.double() for k, v in f.items()}), "forward", "latent has dtype"),
        (Provider("wrong", _later_calls_write_into_the_first), "forward", "latent is off"),
        (Provider("wrong", _returns_the_start_itself), "forward", "share memory with the start"),
    ],
    ids=["values", "gradient", "start-gradient", "nan", "missing", "shape", "dtype", "reused", "input"],
)  # fmt: skip
def test_a_wrong_provider_gets_no_number(
    wrong: Provider, direction: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_loop_too = providers.PROVIDERS["torch-loop"]
    here = plan(tmp_path, direction=direction)
    good = run_plan(here, report.show, {"wrong": wrong, "torch-loop": torch_loop_too})
    printed = capsys.readouterr().out
    assert not good
    assert names_in(tmp_path) == ["torchrl", "torch-loop"]
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("wrong")]
    assert line.startswith("  wrong: NOT REPORTED, red: ")
    assert why in line
    # Nor does it enter anybody's ratio.
    assert {row.best_peer for row in rows.read(tmp_path / "mlp.jsonl")} <= {"torchrl", "torch-loop"}


def test_a_failing_provider_is_named_and_hides_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(problem: Problem) -> Built:
        raise ArithmeticError("cannot add")

    here = plan(tmp_path)
    assert not run_plan(here, report.show, {"broken": Provider("broken", build)})
    assert "broken: NOT REPORTED, failed: ArithmeticError: cannot add" in capsys.readouterr().out
    assert names_in(tmp_path) == ["torchrl"]


def test_without_a_reference_there_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(problem: Problem) -> Built:
        raise ArithmeticError("cannot add")

    monkeypatch.setitem(providers.PROVIDERS, "torchrl", Provider("torchrl", build))
    assert not run_plan(plan(tmp_path, "torch-loop"), report.show)
    assert "torch-loop: NOT REPORTED, red: no reference" in capsys.readouterr().out
    assert names_in(tmp_path) == []


def test_what_cannot_run_here_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(problem: Problem) -> Built:
        raise Unavailable("needs a quantum computer")

    there = {"elsewhere": Provider("elsewhere", build)}
    assert run_plan(plan(tmp_path), report.show, there)
    assert "elsewhere: unavailable: needs a quantum computer" in capsys.readouterr().out
    absent = [row.absent for row in rows.read(tmp_path / "mlp.jsonl")]
    assert absent == [{"elsewhere": ["unavailable", "needs a quantum computer"]}]


def test_the_command_prints_no_speed_for_a_wrong_provider_and_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outsider.py").write_text(
        textwrap.dedent("""
        from fastwm.bench.providers import Built, Provider, torch_loop

        def build(problem):
            right = torch_loop.build(problem)
            return Built(lambda: {k: v + 1 for k, v in right.run().items()}, lambda raw: raw)

        WRONG = Provider("wrong", build)
        """)
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    status = cli.main(
        "--batch 2 --horizon 2 --direction forward --threads 1 --seconds 0.01 --rounds 1 1 --no-plot "
        f"--providers torch-loop outsider:WRONG --results {tmp_path}".split()
    )
    printed = capfd.readouterr()
    assert status == 1
    (line,) = [line for line in printed.out.splitlines() if line.strip().startswith("wrong")]
    assert line.startswith("  wrong: NOT REPORTED, red: latent is off by 1.0e+00")
    assert "NOT ALL GREEN" in printed.err
    assert names_in(tmp_path) == ["torchrl", "torch-loop"]


def test_unknown_providers_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--providers", "torhcrl"])
    assert "Unknown provider 'torhcrl'" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_quick_provider_is_green(direction: str, tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="jax is not installed; it is one of the peers")
    names = ["torch-loop", "jax-scan", "fastwm-eager", "fastwm-captured"]
    assert run_plan(plan(tmp_path, *names, direction=direction), lambda *_: None)
    found = list(rows.read(tmp_path / "mlp.jsonl"))
    assert [row.provider for row in found] == ["torchrl", *names]
    worst = max(value for row in found for value in row.parity["used"].values())
    assert worst <= 1
    keys = set(found[0].parity["used"])
    assert {"latent", "action", "next_latent", "reward"} <= keys
    assert ("grad/dynamics.net.4.bias" in keys and "grad/start.latent" in keys) == (
        direction == "backward"
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_compiled_provider_is_green(direction: str, tmp_path: Path) -> None:
    names = ["torch-compile", "torch-compile-loop", "fastwm-captured-inductor"]
    assert run_plan(plan(tmp_path, *names, direction=direction), lambda *_: None)
    assert names_in(tmp_path) == ["torchrl", *names]


def test_what_is_recorded_is_not_measured_again(tmp_path: Path) -> None:
    known: list[bool] = []
    here = plan(tmp_path, "torch-loop")
    for again in (
        here,
        here,
        Plan.from_json(here.to_json().replace('"force": false', '"force": true')),
    ):
        assert run_plan(again, lambda outcome, number, count, was: known.append(was))
    assert known == [False, True, False]
    assert names_in(tmp_path) == ["torchrl", "torch-loop"] * 2


def test_a_new_provider_or_a_red_one_is_measured_with_the_others(tmp_path: Path) -> None:
    known: list[bool] = []

    def run(**others: Provider) -> bool:
        here = plan(tmp_path)
        return run_plan(here, lambda outcome, number, count, was: known.append(was), others)

    assert run()
    assert not run(wrong=_off_by("reward", 1.0))
    assert not run(wrong=_off_by("reward", 1.0))
    assert known == [False, False, False]


def test_other_code_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastwm.bench import conditions

    known: list[bool] = []
    for code in ("one", "one", "two"):
        monkeypatch.setattr(conditions, "code_hash", lambda code=code: code)
        run_plan(plan(tmp_path), lambda outcome, number, count, was: known.append(was))
    assert known == [False, True, False]


def test_errors_are_held_to_the_tolerance_table() -> None:
    right = {"reward": torch.tensor([1.0, 100.0])}
    assert compare({"reward": right["reward"] * (1 + 5e-6)}, right).ok
    verdict = compare({"reward": right["reward"] * (1 + 5e-5)}, right)
    assert not verdict.ok
    assert verdict.used["reward"] == pytest.approx(5, rel=0.1)
    assert verdict.worst["reward"] == pytest.approx(5e-5, rel=0.01)
