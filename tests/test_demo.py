"""The demo: a smoke run of all its parts, and what its numbers and its exit status mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import fastwm
from fastwm.demo import main, speed
from fastwm.demo.model import make_world_model, prediction_error
from fastwm.demo.real import pendulum, play, returns


def quick(tmp_path: Path) -> tuple[int, Path]:
    return main(["--quick", "--out", str(tmp_path / "results")]), tmp_path / "results"


def test_quick_run_leaves_a_record_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    threads = torch.get_num_threads()
    status, results = quick(tmp_path)
    assert status == 0
    record = json.loads((results / "demo.json").read_text())
    assert [row["batch"] for row in record["speed"]] == [1, 16, 16]
    for row in record["speed"]:
        assert set(row["milliseconds"]) | set(row["absent"]) == set(speed.PROVIDERS)
        assert row["speedup"]["fastwm captured"] > 0
        assert row["speedup"][list(speed.PROVIDERS)[-1]] > 0
    assert all(len(each) == 2 for each in record["returns"].values())
    assert record["red"] == []
    assert {"machine", "versions", "commit"} <= set(record["conditions"])
    assert (results / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "numbers mean nothing" in printed
    assert printed.index("parity, largest") < printed.index(f"{list(speed.PROVIDERS)[-1]}\n")
    assert torch.get_num_threads() == threads


def test_red_parity_is_exit_status_1_and_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = fastwm.check_parity

    def red(*args, **kwargs):
        report = real(*args, **kwargs)
        captured = next(engine for engine in report.engines if engine.engine == "captured")
        captured.refused = "the test says so"
        return report

    monkeypatch.setattr(fastwm, "check_parity", red)
    monkeypatch.setattr(speed, "time_race", lambda *_: pytest.fail("timed in spite of red parity"))
    status, results = quick(tmp_path)
    assert status == 1
    record = json.loads((results / "demo.json").read_text())
    assert len(record["red"]) == 3
    assert record["speed"] == []
    assert "the test says so" in capsys.readouterr().err


def test_planning_no_better_than_random_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from fastwm.demo import cli

    monkeypatch.setattr(cli, "Settings", lambda: cli.QUICK)
    monkeypatch.setattr(cli, "returns", lambda played: torch.zeros(played.shape[0]))
    assert main(["--out", str(tmp_path)]) == 1
    assert "not clearly better than random" in capsys.readouterr().err


class _Exact(torch.nn.Module):
    """Pendulum-v1's own equations on the demo's latent: cosine, sine, velocity / 8."""

    def forward(
        self, latent: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angle, velocity = torch.atan2(latent[..., 1:2], latent[..., :1]), 8 * latent[..., 2:]
        reward = -(angle.square() + 0.1 * velocity.square() + 0.001 * action.square())
        velocity = (velocity + (15 * angle.sin() + 3 * action) * 0.05).clamp(-8, 8)
        angle = angle + 0.05 * velocity
        return torch.cat((angle.cos(), angle.sin(), velocity / 8), -1), reward


class _Stays(torch.nn.Module):
    def forward(
        self, latent: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return latent + 0 * action, 0 * action


@pytest.fixture(scope="module")
def played() -> TensorDict:
    torch.manual_seed(0)
    return play(2, 40, 0, "test")


def error_of(step: torch.nn.Module, played: TensorDict) -> dict[str, list[float]]:
    encoder = make_world_model(played, 8).encoder
    dynamics = TensorDictModule(
        step, ["latent", "action"], [("next", "latent"), ("next", "reward")]
    )
    head = TensorDictModule(torch.nn.Identity(), [("next", "reward")], [("next", "reward")])
    world_model = fastwm.WorldModel(encoder, dynamics, head)
    env = fastwm.WorldModelEnv(world_model, pendulum(), batch_size=[])
    return prediction_error(env, world_model, played, 7)


def test_prediction_error_of_the_real_equations_is_zero(played: TensorDict) -> None:
    error = error_of(_Exact(), played)
    assert len(error["state"]) == len(error["reward"]) == 7
    assert max(error["state"] + error["reward"]) < 1e-3  # float32 against Gymnasium's float64


def test_prediction_error_of_persistence_is_one(played: TensorDict) -> None:
    assert error_of(_Stays(), played)["state"] == pytest.approx([1.0] * 7)


def test_one_seed_means_the_same_starts_whatever_is_played(played: TensorDict) -> None:
    torch.manual_seed(1)
    idle = play(2, 40, 0, "test", lambda td: td.set("action", torch.zeros(2, 1)))
    torch.testing.assert_close(idle["observation"][:, 0], played["observation"][:, 0])
    assert not torch.equal(idle["observation"][:, -1], played["observation"][:, -1])


def test_returns_are_sums_over_each_episode(played: TensorDict) -> None:
    torch.testing.assert_close(returns(played)[1], played[1]["next", "reward"].sum())


def test_playing_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    # torchrl raises the number of threads up to this when a batched env closes.
    monkeypatch.setattr(torchrl, "_THREAD_POOL_INIT", 4)
    torch.set_num_threads(1)
    try:
        play(2, 2, 0, "test")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
