"""`patch` / `unpatch`: torchrl-only scripts run on fastwm, and torchrl comes back whole."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torchrl.envs
import torchrl.modules
import torchrl.objectives

from fastwm.backends import backend
from fastwm.env import WorldModelEnv
from fastwm.loss import WorldModelLoss
from fastwm.patching import TORCHRL_CLASSES, patch, unpatch
from fastwm.world_model import WorldModel

OURS = {c.__name__: c for c in (WorldModel, WorldModelEnv, WorldModelLoss)}

# Where torchrl 0.14.1 names its three classes.
PLACES = [
    ("torchrl.modules", "WorldModel"),
    ("torchrl.modules.tensordict_module", "WorldModel"),
    ("torchrl.modules.tensordict_module.world_models", "WorldModel"),
    ("torchrl.envs", "WorldModelEnv"),
    ("torchrl.envs.model_based", "WorldModelEnv"),
    ("torchrl.envs.model_based.world_model_env", "WorldModelEnv"),
    ("torchrl.objectives", "WorldModelLoss"),
    ("torchrl.objectives.world_model_loss", "WorldModelLoss"),
]


@pytest.fixture(autouse=True)
def torchrl_as_it_is() -> Iterator[None]:
    before = namespaces()
    yield
    unpatch()
    after = namespaces()
    assert {place: after.get(place) for place in before} == before


def torchrl_modules() -> dict[str, ModuleType]:
    return {
        path: module
        for path, module in sys.modules.items()
        if path.partition(".")[0] == "torchrl" and isinstance(module, ModuleType)
    }


def namespaces() -> dict[tuple[str, str], int]:
    """Every class that a module of torchrl names, by identity."""
    return {
        (path, name): id(value)
        for path, module in torchrl_modules().items()
        for name, value in vars(module).items()
        if isinstance(value, type)
    }


def held() -> set[str]:
    """Whose classes the known places hold: {"fastwm"}, {"torchrl"}, or both in a bad patch."""
    classes = [getattr(importlib.import_module(path), name) for path, name in PLACES]
    assert [c.__name__ for c in classes] == [name for _, name in PLACES]
    return {c.__module__.partition(".")[0] for c in classes}


# ---------------------------------------------------------------- what is replaced


def test_patch_and_unpatch() -> None:
    before = namespaces()
    assert held() == {"torchrl"}
    patch()
    assert held() == {"fastwm"}
    for path, name in PLACES:
        assert getattr(sys.modules[path], name) is OURS[name]
    changed = {place for place, cls in namespaces().items() if cls != before[place]}
    assert changed == set(PLACES)
    unpatch()
    assert namespaces() == before


def test_no_module_of_torchrl_is_forgotten() -> None:
    with patch():
        left = [
            (path, name)
            for path, module in torchrl_modules().items()
            for name, value in vars(module).items()
            if any(value is cls for cls in TORCHRL_CLASSES.values())
        ]
    assert left == []


def test_torchrls_own_classes_stay_at_hand() -> None:
    before = {name: getattr(importlib.import_module(path), name) for path, name in PLACES}
    with patch():
        assert dict(TORCHRL_CLASSES) == before
        assert all(c.__module__.startswith("torchrl.") for c in TORCHRL_CLASSES.values())


def test_from_imports_find_fastwm() -> None:
    with patch():
        from torchrl.envs import WorldModelEnv as env
        from torchrl.envs.model_based import WorldModelEnv as env_too
        from torchrl.modules import WorldModel as model
        from torchrl.objectives import WorldModelLoss as loss
    assert (env, env_too, model, loss) == (
        WorldModelEnv,
        WorldModelEnv,
        WorldModel,
        WorldModelLoss,
    )


# ---------------------------------------------------------------- order of calls


def test_idempotent() -> None:
    patch()
    patch()
    assert held() == {"fastwm"}
    unpatch()
    assert held() == {"torchrl"}
    unpatch()
    assert held() == {"torchrl"}


def test_block() -> None:
    with patch():
        assert held() == {"fastwm"}
    assert held() == {"torchrl"}


def test_block_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert held() == {"torchrl"}


def test_nested_blocks_restore_at_the_outermost_exit() -> None:
    with patch():
        with patch():
            with patch():
                pass
            assert held() == {"fastwm"}
        assert held() == {"fastwm"}
    assert held() == {"torchrl"}


def test_block_after_a_plain_patch_leaves_it_on() -> None:
    patch()
    with patch():
        pass
    assert held() == {"fastwm"}
    unpatch()
    assert held() == {"torchrl"}


def test_plain_patch_within_a_block_stays() -> None:
    with patch():
        patch()
    assert held() == {"fastwm"}


def test_one_handle_twice_and_within_itself() -> None:
    handle = patch()
    with handle, handle:
        assert held() == {"fastwm"}
    assert held() == {"torchrl"}
    with handle:
        assert held() == {"fastwm"}
    assert held() == {"torchrl"}


def test_unpatch_ends_open_blocks_and_a_later_one_is_not_cut_short() -> None:
    outer = patch().__enter__()
    unpatch()
    assert held() == {"torchrl"}
    with patch():
        outer.__exit__(None, None, None)
        assert held() == {"fastwm"}
    assert held() == {"torchrl"}


def test_blocks_of_two_threads_overlap() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with patch():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with patch():
        thread.start()
        assert entered.wait(10)
    # This block was the first in and is the first out; the other thread is still within its own.
    assert held() == {"fastwm"}
    leave.set()
    thread.join(10)
    assert held() == {"torchrl"}


# ---------------------------------------------------------------- what others do meanwhile


def test_module_imported_while_patched_is_restored_too() -> None:
    late = ModuleType("torchrl._imported_late")
    sys.modules[late.__name__] = late
    try:
        with patch():
            exec("from torchrl.envs import WorldModelEnv as Env", vars(late))
            assert late.Env is WorldModelEnv
        assert late.Env is TORCHRL_CLASSES["WorldModelEnv"]
    finally:
        del sys.modules[late.__name__]


def test_somebody_elses_replacement_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        pass

    with monkeypatch.context() as m:
        with patch():
            m.setattr(torchrl.objectives, "WorldModelLoss", Mine)
        assert torchrl.objectives.WorldModelLoss is Mine
        # monkeypatch gives back what it found, which was ours; the next unpatch mends it.
    with patch():
        pass


def test_modules_outside_torchrl_are_left_alone() -> None:
    other = ModuleType("torchrlish")
    other.Env = TORCHRL_CLASSES["WorldModelEnv"]
    sys.modules[other.__name__] = other
    try:
        with patch():
            assert other.Env is TORCHRL_CLASSES["WorldModelEnv"]
    finally:
        del sys.modules[other.__name__]


def test_pickles_name_fastwm_also_while_patched() -> None:
    with patch():
        for cls in OURS.values():
            assert pickle.loads(pickle.dumps(cls)) is cls
            assert b"fastwm" in pickle.dumps(cls)


def test_pickle_of_torchrls_loss_opens_as_ours() -> None:
    from tests.test_loss import make_batch, make_model

    theirs = TORCHRL_CLASSES["WorldModelLoss"](make_model(), reward_weight=2.0)
    data = pickle.dumps(theirs)
    with patch():
        ours = pickle.loads(data)
    assert type(ours) is WorldModelLoss
    batch = make_batch()
    with backend("eager"):  # whose values are torchrl's to the last bit
        assert ours(batch)["loss_reward"] == theirs(batch)["loss_reward"]
    assert ours.reduction == "mean"
    assert ours.in_keys == ["observation", "action", ("next", "reward")]


# ---------------------------------------------------------------- an unmodified script

SCRIPT = """
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, WorldModelEnv
from torchrl.modules import MLP, WorldModel
from torchrl.objectives import WorldModelLoss


class Real(EnvBase):
    def __init__(self, *batch):
        super().__init__(batch_size=batch)
        self.observation_spec = Composite(latent=Unbounded((*batch, 4)), shape=batch)
        self.action_spec = Unbounded((*batch, 2))
        self.reward_spec = Unbounded((*batch, 1))
        self.done_spec = Composite(
            done=Categorical(2, (*batch, 1), dtype=torch.bool), shape=batch)

    def _reset(self, tensordict=None): ...
    def _step(self, tensordict): ...
    def _set_seed(self, seed): ...


torch.manual_seed(0)
model = WorldModel(
    TensorDictModule(torch.nn.Linear(5, 4), ["observation"], ["latent"]),
    TensorDictModule(MLP(6, 4, num_cells=[8]), ["latent", "action"], [("next", "latent")]),
    TensorDictModule(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
)
loss = WorldModelLoss(model)
data = TensorDict(
    {"observation": torch.randn(3, 5), "action": torch.randn(3, 2),
     "next": {"reward": torch.randn(3, 1)}}, [3])
env = WorldModelEnv(model, Real(3))
policy = TensorDictModule(torch.nn.Linear(4, 2), ["latent"], ["action"])
with torch.no_grad():
    rollout = env.rollout(6, policy, tensordict=model.encode(data.exclude("next", "action")))
print(type(model).__module__, type(env).__module__, type(loss).__module__)
print(f"{loss(data)['loss_reward'].item():.6f}", f"{rollout['next', 'latent'].sum().item():.5f}")
print(f"{rollout['next', 'reward'].sum().item():.5f}")
print(tuple(rollout["next", "reward"].shape))
"""


def run(script: Path, *, patched: bool) -> subprocess.CompletedProcess[str]:
    """``python script``, or the same with fastwm patched in beforehand; the file is not touched."""
    before = "from fastwm.patching import patch; patch(); " if patched else ""
    start = f"import runpy; {before}runpy.run_path({str(script)!r}, run_name='__main__')"
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", start],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def test_an_unmodified_script_runs_on_fastwm_with_the_same_numbers(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    outputs = []
    for patched in (False, True):
        done = run(script, patched=patched)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    (modules, values, reward, shape), (our_modules, our_values, our_reward, our_shape) = outputs
    assert modules.split() == [
        "torchrl.modules.tensordict_module.world_models",
        "torchrl.envs.model_based.world_model_env",
        "torchrl.objectives.world_model_loss",
    ]
    assert our_modules.split() == ["fastwm.world_model", "fastwm.env", "fastwm.loss"]
    assert our_values == values
    assert our_reward == reward
    # One of torchrl 0.14.1's faults: what GAE and TDLambda cannot take.
    assert (shape, our_shape) == ("(3, 6)", "(3, 6, 1)")


def test_a_script_that_raises_on_torchrl_runs_on_fastwm(tmp_path: Path) -> None:
    """An unbatched base env with a batch size, as in the docstring of torchrl's own class."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("Real(3)", "Real(), batch_size=[3]"))
    done = run(script, patched=True)
    assert done.returncode == 0, done.stderr
    modules, *_, shape = done.stdout.splitlines()
    assert modules.split() == ["fastwm.world_model", "fastwm.env", "fastwm.loss"]
    assert shape == "(3, 6, 1)"
    if torchrl.__version__.startswith("0.14.1"):
        done = run(script, patched=False)
        assert done.returncode != 0
        assert "in expand" in done.stderr
