"""What the examples share: the command line, the learning curve, checkpoints, evaluation."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tests.examples.examples import FOLDER


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """``examples/training.py`` as the scripts import it; random states and threads are put back."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import training

    threads, numpy, python = torch.get_num_threads(), np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield training
    torch.set_num_threads(threads)
    np.random.set_state(numpy)
    random.setstate(python)
    for name in ("training", "curves", "checkpoints"):
        sys.modules.pop(name, None)


def make_run(training, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str, **settings):
    monkeypatch.setattr(sys, "argv", ["some.py", "--quick", "--out", str(out), *arguments])
    return training.Run.from_command_line("some", "About.", steps=100, quick_steps=40, **settings)


def test_command_line(training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = make_run(training, monkeypatch, tmp_path / "new", "--backend", "eager", "--seed", "3")
    assert (run.seed, run.steps, run.backend, run.quick) == (3, 40, "eager", True)
    assert (run.env, run.classes, run.out) == ("Pendulum-v1", "fastwm", tmp_path / "new")
    assert torch.get_num_threads() == 1
    more = {"arguments": {"--size": {"default": "1M"}}, "classes": ("fastwm", "torchrl")}
    run = make_run(training, monkeypatch, tmp_path, "--steps", "7", "--classes", "torchrl", **more)
    assert (run.steps, run.options.size, run.classes) == (7, "1M", "torchrl")
    with pytest.raises(SystemExit):
        make_run(training, monkeypatch, tmp_path, "--classes", "torchrl")


def test_one_seed_is_one_run(training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    for seed in ("1", "1", "2"):
        run = make_run(training, monkeypatch, tmp_path, "--seed", seed)
        run.evaluate(0, None)
        run.evaluate(40, None)
        drawn.append([e["returns"] for e in run.evaluations] + [torch.rand(()), np.random.rand()])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_curve_is_written_and_drawn(
    training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(training, monkeypatch, tmp_path)
    assert run.record(20, [-300.0, -100.0], loss=torch.tensor(0.5)) == -200.0
    run.record(40, [-1.0, -3.0])
    run.finish()
    curve = json.loads((tmp_path / "curve.json").read_text())
    first, last = curve["evaluations"]
    assert (first["step"], first["mean"], first["returns"]) == (20, -200.0, [-300.0, -100.0])
    assert first["loss"] == 0.5
    assert last["seconds"] >= first["seconds"] >= first["evaluating"] == 0
    assert curve["command"].startswith("python examples/some.py --quick --out")
    assert (curve["family"], curve["seed"], curve["goal"]) == ("some", 0, -250.0)
    assert {"machine", "versions", "commit", "uncommitted_changes"} == set(curve["conditions"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.json" in capsys.readouterr().out


def test_several_curves_in_one_picture(
    training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import curves

    paths = []
    for seed, backend in (("0", "auto"), ("1", "auto"), ("0", "eager")):
        out = tmp_path / f"{seed}{backend}"
        run = make_run(training, monkeypatch, out, "--seed", seed, "--backend", backend)
        run.record(20, [-300.0])
        run.finish()
        paths.append(str(out / "curve.json"))
    curves.main([*paths, "--out", str(tmp_path / "all.png")])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_goes_on_as_if_never_stopped(
    training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def parts(run):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50), batch_size=4)
        run.keep(model=model, optimizer=optimizer, buffer=buffer)
        return model, optimizer, buffer

    def learn(model, optimizer, buffer) -> list[float]:
        buffer.extend(TensorDict({"x": torch.randn(5, 2)}, [5]))
        optimizer.zero_grad()
        model(buffer.sample()["x"]).square().mean().backward()
        optimizer.step()
        return [random.random(), np.random.rand(), *model.weight.flatten().tolist()]

    run = make_run(training, monkeypatch, tmp_path)
    own = parts(run)
    learn(*own)
    run.record(20, [-5.0])
    run.save(20, note="hello")
    seconds = run.seconds()
    expected = learn(*own)

    again = make_run(training, monkeypatch, tmp_path, "--resume")
    torch.manual_seed(99)
    own = parts(again)
    assert again.load() == 20
    assert again.values == {"note": "hello"}
    assert again.evaluations == run.evaluations
    assert again.seconds() >= seconds - 0.1
    assert again.record(40, [-4.0]) == -4.0
    assert again.evaluations[1]["cpu_seconds"] >= run.evaluations[0]["cpu_seconds"] > 0
    run.record(40, [-4.0])
    assert len(own[2]) == 5
    assert learn(*own) == expected


def test_checkpoint_only_when_asked_for_and_only_of_this_run(
    training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert make_run(training, monkeypatch, tmp_path, "--resume").load() == 0
    make_run(training, monkeypatch, tmp_path).save(20)
    assert make_run(training, monkeypatch, tmp_path).load() == 0
    assert make_run(training, monkeypatch, tmp_path, "--resume", "--backend", "eager").load() == 20
    with pytest.raises(SystemExit, match="seed 0 in it, 1 asked for"):
        make_run(training, monkeypatch, tmp_path, "--resume", "--seed", "1").load()


def test_returns_are_of_the_first_episode_of_each_row(training) -> None:
    done = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool).unsqueeze(-1)
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]]).unsqueeze(-1)
    played = TensorDict({"next": {"done": done, "reward": reward}}, [2, 4])
    assert training.episode_returns(played).tolist() == [3.0, 15.0]
