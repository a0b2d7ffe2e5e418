"""`WorldModelLoss` on the captured engine: eager's values and gradients, and nothing goes unseen that eager
would see."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchrl.envs.utils import ExplorationType

from fastwm.backends import backend
from fastwm.loss import WorldModelLoss
from fastwm.loss_plan import cache_of
from fastwm.tolerances import tolerance
from tests.loss_models import (
    ALL,
    LATENT,
    NEXT_LATENT,
    NEXT_REWARD,
    OBS,
    RECON,
    Latents,
    make_batch,
    make_model,
)

LOGITS = "binary_cross_entropy_with_logits"


def full_batch(*size: int, seed: int = 1) -> TensorDict:
    batch = make_batch(*size, seed=seed)
    batch["target_latent"] = torch.randn(*batch.batch_size, LATENT)
    return batch


def full_loss(model: nn.Module | None = None, **kwargs: Any) -> WorldModelLoss:
    model = make_model("done", decoder=RECON) if model is None else model
    loss = WorldModelLoss(model, **{"losses": ALL, **kwargs})
    loss.set_keys(predicted_latent=NEXT_LATENT)
    return loss


def run(
    loss: WorldModelLoss, batch: TensorDictBase, engine: str, wrt: Any = None, seed: int = 0
) -> tuple[dict[Any, Tensor], list[Tensor | None]]:
    """Losses, and the gradients of a weighting of them."""
    torch.manual_seed(seed)
    with backend(engine):
        out = loss(batch)
    values = dict(out.items(True, True))
    wrt = [*loss.parameters()] if wrt is None else wrt
    wrt = [p for p in wrt if p.requires_grad]
    total = sum((i + 1.0) * v.sum() for i, v in enumerate(values.values()) if v.requires_grad)
    grads: list[Tensor | None] = []
    if isinstance(total, Tensor) and wrt:
        grads = list(torch.autograd.grad(total, wrt, allow_unused=True))
    return {k: v.detach() for k, v in values.items()}, grads


def assert_same(got: Any, want: Any) -> None:
    for what, a, b in zip(("loss", "loss.gradient"), got, want, strict=True):
        bound = tolerance(what, torch.float32).kwargs()
        if isinstance(b, dict):
            assert list(a) == list(b)
            torch.testing.assert_close(a, b, equal_nan=True, **bound)
            continue
        assert [x is None for x in a] == [x is None for x in b]
        found = [[x for x in xs if x is not None] for xs in (a, b)]
        torch.testing.assert_close(*found, equal_nan=True, **bound)


def assert_parity(loss: WorldModelLoss, batch: TensorDictBase, wrt: Any = None) -> None:
    assert_same(run(loss, batch, "captured", wrt), run(loss, batch, "eager", wrt))


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("size", [(5,), (1,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_parity(distance: str, reduction: str, size: tuple[int, ...]) -> None:
    distances = {f"{name}_loss": distance for name in ALL if name != "done"}
    loss = full_loss(reduction=reduction, done_loss=LOGITS, latent_weight=0.3, **distances)
    for seed in range(3):
        assert_parity(loss, full_batch(*size, seed=seed))
    assert cache_of(loss).traces == 1
    with torch.no_grad():
        assert_parity(loss, full_batch(*size))
    assert cache_of(loss).traces == 2


@pytest.mark.parametrize("mask", ["steps", "column", "nothing counts", "two"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parity_with_masks(reduction: str, mask: str) -> None:
    loss = full_loss(reduction=reduction)
    for seed in range(2):
        batch = full_batch(3, 4, seed=seed)
        counts = torch.rand(3, 4) < (-1 if mask == "nothing counts" else 0.5)
        batch["collector", "mask"] = counts if mask == "steps" else counts[..., None]
        if mask == "two":
            batch["shifted_valid"] = torch.rand(3, 4) < 0.5
        batch[NEXT_REWARD][~counts] = 1e3
        assert_parity(loss, batch)
    assert cache_of(loss).traces == 1


def test_gradients_reach_a_batch_that_hangs_on_a_graph() -> None:
    loss, source = full_loss(), torch.randn(5, OBS, requires_grad=True)
    batch = full_batch()
    found = []
    for engine in ("captured", "captured", "eager"):
        batch["observation"] = source.exp()
        found.append(run(loss, batch, engine, [source, *loss.parameters()]))
    for got in found[:2]:
        assert_same(got, found[2])


def test_a_batch_that_is_not_contiguous() -> None:
    loss, batch = full_loss(), full_batch(4, 6)
    assert_parity(loss, batch[:, 1:4])
    assert_parity(loss, batch.transpose(0, 1))


def test_each_loss_trains_what_eagers_does() -> None:
    """No gradient, and not one of zeros, for the heads of the others."""
    loss, batch = full_loss(), full_batch()
    trained = []
    for engine in ("captured", "eager"):
        loss.zero_grad()
        with backend(engine):
            loss(batch)["loss_reward"].backward()
        trained.append({n for n, p in loss.named_parameters() if p.grad is not None})
    assert trained[0] == trained[1]
    assert not any("done_head" in name for name in trained[0])


def test_second_derivatives() -> None:
    loss, batch = full_loss(), full_batch()
    parameters = [*loss.world_model.reward_head.parameters()]
    results = []
    for engine in ("captured", "eager"):
        with backend(engine):
            out = loss(batch)["loss_reward"]
        first = torch.autograd.grad(out, parameters, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), parameters)
        results.append([*first, *second])
    torch.testing.assert_close(*results)


def test_two_calls_in_one_graph() -> None:
    loss, one, two = full_loss(), full_batch(seed=1), full_batch(seed=2)
    found = []
    for engine in ("captured", "eager"):
        loss.zero_grad()
        with backend(engine):
            total = sum(loss(one).values()) - 2 * sum(loss(two).values())
        total.backward()
        found.append([p.grad.clone() for p in loss.parameters()])
    torch.testing.assert_close(*found)


def test_training_ends_at_eagers_weights() -> None:
    ends = []
    for engine in ("captured", "eager"):
        loss, batch = full_loss(), full_batch(16)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            with backend(engine):
                sum(loss(batch).values()).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in loss.parameters()])
        assert engine == "eager" or cache_of(loss).traces == 1
    torch.testing.assert_close(*ends)


def test_the_batch_is_left_as_it_was_and_results_are_the_callers() -> None:
    loss, batch = full_loss(reduction="none"), full_batch(3, 4).lock_()
    before = batch.clone()
    with backend("captured"):
        first = loss(batch)
        kept = first.clone()
        loss(full_batch(3, 4, seed=5))
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))
    assert (first == kept).all()
    assert first.batch_size == (3, 4)


def test_a_loss_that_hands_back_what_it_read_hands_back_a_copy() -> None:
    """A reduction of the user's own may return a parameter, or the same tensor for two losses."""
    shared = nn.Parameter(torch.ones(()))

    class Own(WorldModelLoss):
        def _reduce_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return shared

    loss = Own(make_model("done"), losses=["reward", "done"], reward_weight=1, done_weight=1)
    loss._weight = lambda pair: _One()  # type: ignore[method-assign]
    with backend("captured"):
        out = loss(make_batch())
    places = {v.data_ptr() for v in (*out.values(), shared)}
    assert len(places) == 3
    assert all(v == 1 for v in out.values())


class _One:
    def __mul__(self, other: Tensor) -> Tensor:
        return other


def test_dispatch_by_name_and_selected_keys() -> None:
    loss, batch = WorldModelLoss(make_model("done"), losses=["reward", "done"]), make_batch()
    named = {
        "observation": batch["observation"],
        "action": batch["action"],
        "next_reward": batch["next", "reward"],
        "next_done": batch["next", "done"],
    }
    with backend("captured"):
        reward, done = loss(**named)
        out = loss(batch)
        assert (reward, done) == (out["loss_reward"], out["loss_done"])
        loss.select_out_keys("loss_done")
        assert list(loss(batch).keys()) == ["loss_done"]
        assert loss(**named) == done


def test_draws_are_eagers() -> None:
    model = make_model(extra={"encoder": Mod(Dropped(), ["observation"], ["latent"])})
    loss, batch = WorldModelLoss(model), make_batch(64)
    states = []
    for engine in ("captured", "captured", "eager"):
        got = run(loss, batch, engine, seed=7)
        states.append((got, torch.get_rng_state()))
    for got, state in states[:2]:
        assert_same(got, states[2][0])
        assert torch.equal(state, states[2][1])


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(OBS, LATENT), nn.Dropout(0.5))

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)


def test_entries_that_no_loss_reads_do_not_matter_to_the_engine() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    batch["index"] = torch.arange(5)
    batch["empty"] = TensorDict({}, [5])
    assert_parity(loss, batch)
    ((plan,),) = cache_of(loss).plans.values()
    assert set(plan.loop.inputs) == {("observation",), ("action",), NEXT_REWARD}


# ---------------------------------------------------------------- what is handed on, and errors


def _captured(loss: WorldModelLoss, batch: TensorDictBase) -> str:
    """Why the captured engine passes the call on; "" when it takes it."""
    with backend("auto"):
        return loss.explain(batch).passed_over.get("captured", "")


def refused(
    loss: WorldModelLoss, batch: TensorDictBase, why: str, expected: TensorDictBase | None = None
) -> None:
    """By name an error that says why; with "auto" eager's result."""
    with backend("captured"):
        with pytest.raises(RuntimeError, match=f"'captured' was asked for.*{why}"):
            loss(batch)
        assert loss.explain(batch).engine is None
    assert why in _captured(loss, batch)
    assert loss.explain(batch).engine in ("fused", "eager")
    with backend("eager"):
        want = loss(batch) if expected is None else expected
    torch.testing.assert_close(loss(batch).to_dict(), want.to_dict())


def test_explain() -> None:
    loss, batch = full_loss(), full_batch()
    state = torch.get_rng_state()
    found = loss.explain(batch)
    assert found.engine == "captured"
    assert not found.passed_over
    assert "addmm" in found.program
    assert "def run" in found.source
    for name, engine in {"captured": "captured", "fused": "fused", "eager": "eager"}.items():
        with backend(name):
            assert loss.explain(batch).engine == engine
    loss.reduction = "none"
    assert "reduction='none'" in loss.explain(batch).note
    with backend("fused"):
        assert loss.explain(batch).engine is None
        assert "reduction='none'" in loss.explain(batch).passed_over["fused"]
    assert torch.equal(state, torch.get_rng_state())


def test_what_holds_no_plain_tensors() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    refused(loss, TensorDict.lazy_stack([batch, batch]), "LazyStackedTensorDict")
    batch["info"] = NonTensorData("text", batch_size=[5])
    refused(loss, batch, "NonTensorData")


def test_no_losses() -> None:
    refused(WorldModelLoss(make_model(), losses=[]), make_batch(), "no losses")


def test_lazy_parameters_are_captured_once_they_are_there() -> None:
    model = make_model(extra={"encoder": Mod(nn.LazyLinear(LATENT), ["observation"], ["latent"])})
    loss = WorldModelLoss(model)
    assert "LazyLinear" in _captured(copy.deepcopy(loss), make_batch())
    loss(make_batch())
    assert _captured(loss, make_batch()) == ""
    assert_parity(loss, make_batch())


def test_a_model_that_reads_what_it_computes() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)

    model = make_model(extra={"encoder": Mod(Reads(OBS, LATENT), ["observation"], ["latent"])})
    loss, batch = WorldModelLoss(model), make_batch()
    refused(loss, batch, "Python reads a value")
    traces = cache_of(loss).traces
    batch["observation"].neg_()
    refused(loss, batch, "Python reads a value")
    assert cache_of(loss).traces == traces


def test_a_model_that_counts() -> None:
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    net = Counts(OBS, LATENT)
    model = make_model(extra={"encoder": Mod(net, ["observation"], ["latent"])})
    loss = WorldModelLoss(model)
    for i in range(1, 5):
        loss(make_batch())
        assert net.calls == i


def test_a_model_that_is_new_at_every_call_ends_on_the_other_engines() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    for _ in range(40):
        loss.world_model = make_model()
        loss(batch)
    assert cache_of(loss).traces < 20
    assert "never used twice" in _captured(loss, batch)


@pytest.mark.parametrize("engine", ["captured", "auto"])
def test_errors_are_eagers(engine: str) -> None:
    good, loss = full_batch(), full_loss(done_loss="binary_cross_entropy")
    with backend(engine):
        for _ in range(2):
            loss(good)
            lacking = full_batch().exclude(NEXT_REWARD)
            with pytest.raises(KeyError, match=r"'reward' loss needs \('next', 'reward'\)"):
                loss(lacking)
            other = full_batch()
            other["target_latent"] = torch.randn(5, 1)
            with pytest.raises(RuntimeError, match=r"\(5, 4\).*'target_latent'.*\(5, 1\)"):
                loss(other)
            loss.world_model.done_head.module.fn = lambda x: x + 3
            with pytest.raises(RuntimeError, match=r"\('next', 'done'\) as probabilities"):
                loss(good)
            loss.world_model.done_head.module.fn = torch.sigmoid
        loss.reward_loss = "l3"
        with pytest.raises(ValueError, match="'l3' for reward_loss"):
            loss(good)
        with pytest.raises(ValueError, match="'l3' for reward_loss"):
            loss.explain(good)


def test_probabilities_are_checked_at_every_call() -> None:
    """The check is part of the plan: the very values that it was made for may leave [0, 1]."""
    head = Mod(lambda x: x, ["p"], [("next", "done")])
    model = make_model(extra={"done_head": head})
    loss = WorldModelLoss(model, losses=["done"], done_loss="binary_cross_entropy")
    batch = make_batch()
    batch["p"] = torch.rand(5, 1)
    assert_parity(loss, batch)
    batch["p"][2] = 1.5
    for engine in ("captured", "auto"):
        with backend(engine), pytest.raises(RuntimeError, match=r"values from .* to 1.5"):
            loss(batch)
    batch["p"][2] = torch.nan
    assert run(loss, batch, "captured")[0]["loss_done"].isnan()
    assert cache_of(loss).traces == 1


# ---------------------------------------------------------------- never stale


class Gained(nn.Module):
    """A linear encoder times a gain; the subclasses say where that comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(OBS, LATENT)

    def forward(self, observation: Tensor) -> Tensor:
        return self.linear(observation) * self.gain()

    def gain(self) -> Any:
        return 1.0


@dataclass
class Scene:
    """A loss, and the one thing about to change.

    ``around`` is entered for what comes after the change. ``why`` is part of the reason why that is not
    captured, "" where it is.
    """

    loss: WorldModelLoss
    change: Callable[[], Any] = lambda: None
    batch: TensorDictBase = field(default_factory=lambda: full_batch(4))
    around: Callable[[], Any] = contextlib.nullcontext
    why: str = ""


SCENES: dict[str, Callable[[], Scene]] = {}


def scene(build: Callable[[], Scene]) -> Callable[[], Scene]:
    SCENES[build.__name__] = build
    return build


def gained(net: nn.Module | None = None, cls: type = WorldModelLoss) -> tuple[Any, Any]:
    net = Gained() if net is None else net
    extra = {"encoder": Mod(net, ["observation"], ["latent"])}
    loss = cls(make_model("done", decoder=RECON, extra=extra), losses=ALL)
    loss.set_keys(predicted_latent=NEXT_LATENT)
    return loss, net


def differs(a: Any, b: Any) -> bool:
    if list(a[0]) != list(b[0]):
        return True
    grads = [x is None for x in a[1]] != [x is None for x in b[1]]
    return grads or any(not torch.equal(x, b[0][k]) for k, x in a[0].items())


def check(made: Scene) -> None:
    loss, batch = made.loss, made.batch
    before = run(loss, batch, "captured")
    assert not differs(before, run(loss, batch, "captured"))
    assert cache_of(loss).traces == 1, "the second call did not use the first's plan"
    made.change()
    with made.around():
        got = [run(loss, batch, "auto") for _ in range(2)]
        want = run(loss, batch, "eager")
        why = _captured(loss, batch)
        if not made.why:
            got.append(run(loss, batch, "captured"))
    for found in got:
        assert_same(found, want)
    assert differs(before, want), "the change did nothing, so this test shows nothing"
    assert (made.why in why) if made.why else (why == "")


def act(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def doubled(net: nn.Module) -> dict[str, Tensor]:
    return {key: value * 2 for key, value in net.state_dict().items()}


@scene
def optimizer_step() -> Scene:
    loss = full_loss()

    def change() -> None:
        sum(loss(full_batch(4)).values()).backward()
        torch.optim.Adam(loss.parameters(), lr=0.1).step()

    return Scene(loss, change)


@scene
def parameter_written() -> Scene:
    loss, net = gained()
    return Scene(loss, act(lambda: net.linear.weight.mul_(2)))


@scene
def load_state_dict() -> Scene:
    loss, _ = gained()
    return Scene(loss, lambda: loss.load_state_dict(doubled(loss)))


@scene
def load_state_dict_assign() -> Scene:
    loss, _ = gained()
    return Scene(loss, lambda: loss.load_state_dict(doubled(loss), assign=True))


@scene
def parameter_replaced() -> Scene:
    loss, net = gained()
    return Scene(
        loss, lambda: setattr(net.linear, "weight", nn.Parameter(torch.randn(LATENT, OBS)))
    )


@scene
def parameter_data_replaced() -> Scene:
    loss, net = gained()
    return Scene(loss, lambda: setattr(net.linear.weight, "data", torch.randn(LATENT, OBS)))


@scene
def bias_removed() -> Scene:
    loss, net = gained()
    return Scene(loss, lambda: setattr(net.linear, "bias", None))


@scene
def submodule_replaced() -> Scene:
    loss, net = gained()
    other = nn.Linear(OBS, LATENT)
    return Scene(loss, lambda: setattr(net, "linear", other))


@scene
def part_replaced() -> Scene:
    loss, _ = gained()
    module = loss.world_model.reward_head
    return Scene(loss, lambda: setattr(module, "module", nn.Linear(LATENT, 1)))


@scene
def world_model_replaced() -> Scene:
    loss, _ = gained()
    other = make_model("done", decoder=RECON, seed=9)
    return Scene(loss, lambda: setattr(loss, "world_model", other))


@scene
def requires_grad_switched_off() -> Scene:
    loss, net = gained()
    return Scene(loss, lambda: net.requires_grad_(False))


@scene
def everything_frozen() -> Scene:
    loss, _ = gained()
    return Scene(loss, lambda: loss.requires_grad_(False))


@scene
def eval_mode() -> Scene:
    loss, _ = gained(Dropped())
    return Scene(loss, lambda: loss.eval())


@scene
def dropout_probability() -> Scene:
    loss, net = gained(Dropped())
    return Scene(loss, lambda: setattr(net.net[1], "p", 0.1))


class Buffered(Gained):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def gain(self) -> Any:
        return self.scale


@scene
def buffer_written() -> Scene:
    loss, net = gained(Buffered())
    return Scene(loss, lambda: net.scale.fill_(2.0))


@scene
def buffer_that_python_reads() -> Scene:
    class Read(Buffered):
        def gain(self) -> float:
            return self.scale.item()

    loss, net = gained(Read())
    return Scene(loss, lambda: net.scale.data.fill_(2.0))


@scene
def python_attribute_of_a_module() -> Scene:
    class Attribute(Gained):
        factor = 1.0

        def gain(self) -> float:
            return self.factor

    loss, net = gained(Attribute())
    return Scene(loss, lambda: setattr(net, "factor", 2.0))


FACTOR = 1.0


@scene
def global_that_a_module_names() -> Scene:
    class Global(Gained):
        def gain(self) -> float:
            return FACTOR

    return Scene(gained(Global())[0], around=lambda: factor(2.0))


@scene
def global_that_a_method_of_a_subclass_names() -> Scene:
    class Own(WorldModelLoss):
        def _reduce_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._reduce_loss(loss, *args, **kwargs) * FACTOR

    return Scene(gained(cls=Own)[0], around=lambda: factor(2.0))


@contextlib.contextmanager
def factor(value: float) -> Iterator[None]:
    global FACTOR
    FACTOR, before = value, FACTOR
    try:
        yield
    finally:
        FACTOR = before


@scene
def hook_on_a_module() -> Scene:
    loss, net = gained()
    hook = lambda module, args, out: out * 3  # noqa: E731
    return Scene(loss, lambda: net.linear.register_forward_hook(hook), why="a hook on Linear")


@scene
def hook_on_the_loss_itself() -> Scene:
    """It is called around the engine, whichever that is."""
    loss, _ = gained()

    def hook(module: Any, args: Any, out: TensorDictBase) -> TensorDictBase:
        return out.apply(lambda x: x * 3)

    return Scene(loss, lambda: loss.register_forward_hook(hook))


@scene
def weight_of_a_loss() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "reward_weight", 3.0))


@scene
def weight_that_is_a_tensor_written() -> Scene:
    weight = torch.tensor(1.0)
    return Scene(full_loss(reward_weight=weight), lambda: weight.fill_(3.0))


@scene
def distance_of_a_loss() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "latent_loss", "l1"))


@scene
def distance_of_the_done_loss() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "done_loss", LOGITS))


@scene
def losses_replaced() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "losses", ["reward"]))


@scene
def losses_taken_out_in_place() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: loss.losses.remove("done"))


@scene
def reduction() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "reduction", "sum"))


@scene
def no_reduction() -> Scene:
    loss = full_loss()
    return Scene(loss, lambda: setattr(loss, "reduction", "none"))


@scene
def set_keys() -> Scene:
    loss, batch = full_loss(), full_batch(4)
    batch["other"] = torch.randn(4, LATENT)
    return Scene(loss, lambda: loss.set_keys(target_latent="other"), batch)


@scene
def loss_mask_key() -> Scene:
    loss, batch = full_loss(), full_batch(4)
    batch["mine"] = torch.tensor([True, False, True, False])
    return Scene(loss, lambda: setattr(loss, "loss_mask_key", "mine"), batch)


@scene
def mask_of_the_batch() -> Scene:
    loss, batch = full_loss(), full_batch(4)
    mask = batch["shifted_valid"] = torch.ones(4, dtype=torch.bool)
    return Scene(loss, lambda: mask[1:].fill_(False), batch)


@scene
def values_of_the_batch() -> Scene:
    loss, batch = full_loss(), full_batch(4)
    return Scene(loss, lambda: batch["observation"].mul_(2), batch)


@scene
def another_target_in_the_batch() -> Scene:
    loss, batch = full_loss(), full_batch(4)
    return Scene(loss, lambda: batch.set("target_latent", torch.zeros(4, LATENT)), batch)


@scene
def an_entry_that_the_model_looks_for() -> Scene:
    class Looks(TensorDictModuleBase):
        in_keys = ("observation",)
        out_keys = ("latent",)

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            extra = td.get("extra", None)
            latent = td["observation"][..., :LATENT]
            return td.set("latent", latent if extra is None else latent + extra)

    model = make_model("done", decoder=RECON, extra={"encoder": Looks()})
    loss, batch = full_loss(model), full_batch(4)
    return Scene(loss, lambda: batch.set("extra", torch.ones(4, LATENT)), batch)


@scene
def batch_size_inside_the_batch() -> Scene:
    """Of a nested tensordict alone, where the model asks for it."""

    class Asks(TensorDictModuleBase):
        in_keys = ("observation",)
        out_keys = ("latent",)

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            return td.set("latent", td["observation"][..., :LATENT] * td["aside"].ndim)

    loss = full_loss(make_model("done", decoder=RECON, extra={"encoder": Asks()}))
    batch = full_batch(4)
    batch["aside"] = TensorDict({"x": torch.zeros(4, 1)}, [4])
    return Scene(loss, lambda: setattr(batch["aside"], "batch_size", [4, 1]), batch)


@scene
def gradients_off() -> Scene:
    return Scene(full_loss(), around=torch.no_grad)


@scene
def autocast() -> Scene:
    return Scene(
        full_loss(), around=lambda: torch.autocast("cpu", torch.bfloat16), why="autocast is on"
    )


@scene
def exploration_type() -> Scene:
    """A LossModule says what its distributions give."""

    class Asks(Gained):
        def gain(self) -> float:
            from torchrl.envs.utils import exploration_type

            return 2.0 if exploration_type() is ExplorationType.MODE else 1.0

    loss, _ = gained(Asks())
    return Scene(loss, lambda: setattr(loss, "deterministic_sampling_mode", ExplorationType.MODE))


@scene
def default_dtype() -> Scene:
    class Fresh(Gained):
        def gain(self) -> Tensor:
            return torch.tensor(1.0) if torch.get_default_dtype() == torch.float32 else 2.0

    @contextlib.contextmanager
    def double() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return Scene(gained(Fresh())[0], around=double)


@scene
def functional_parameters() -> Scene:
    """``to_module`` swaps other parameters in, for a block."""
    loss, net = gained()
    other = TensorDict.from_module(net).detach().clone().apply_(lambda p: p.data.mul_(3))
    return Scene(loss, around=lambda: TensorDictParams(other).to_module(net))


@scene
def function_mode() -> Scene:
    class Doubles(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.nn.functional.linear else out

    return Scene(full_loss(), around=Doubles, why="dispatch or function mode")


@scene
def global_hook() -> Scene:
    @contextlib.contextmanager
    def hooked() -> Iterator[None]:
        def hook(module: Any, args: Any, out: Any) -> Any:
            return out * 2 if isinstance(out, Tensor) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return Scene(full_loss(), around=hooked, why="global module hooks")


@pytest.mark.parametrize("name", SCENES)
def test_never_stale(name: str) -> None:
    torch.manual_seed(0)
    check(SCENES[name]())


def test_a_hook_that_is_removed_gives_the_engine_back() -> None:
    loss, net = gained()
    batch = full_batch()
    before = run(loss, batch, "captured")
    handle = net.linear.register_forward_hook(lambda *_: None)
    assert "hook" in _captured(loss, batch)
    handle.remove()
    assert not differs(run(loss, batch, "captured"), before)


def test_gradients_go_to_the_parameters_that_are_there_now() -> None:
    loss, net = gained()
    old = net.linear.weight
    with backend("captured"):
        loss(full_batch())
        new = net.linear.weight = nn.Parameter(torch.randn(LATENT, OBS))
        sum(loss(full_batch()).values()).backward()
    assert old.grad is None
    assert new.grad is not None
    assert new.grad.abs().sum() > 0
    assert cache_of(loss).traces == 1


def test_transforms_of_torch_func_run_eagerly() -> None:
    """A gradient by ``torch.func``, and a loss per set of parameters by ``vmap``."""
    loss, batch = WorldModelLoss(make_model()), make_batch()
    parameters = TensorDict.from_module(loss.world_model).detach()
    values, (bias,) = run(loss, batch, "eager", [loss.world_model.reward_head.module.bias])
    want = [values["loss_reward"]]
    loss(batch)
    reasons = []

    def compute(values: TensorDictBase) -> Tensor:
        with values.to_module(loss.world_model):
            reasons.append(_captured(loss, batch))
            return loss(batch)["loss_reward"]

    got = torch.func.grad(compute)(parameters)
    with TensorDictParams(2 * parameters).to_module(loss.world_model):
        want.append(run(loss, batch, "eager")[0]["loss_reward"])
    both = torch.func.vmap(compute)(torch.stack([parameters, 2 * parameters]))
    torch.testing.assert_close(both, torch.stack(want))
    torch.testing.assert_close(got["reward_head", "module", "bias"], bias)
    assert all("torch.func transform" in reason for reason in reasons)


# ---------------------------------------------------------------- plans


def test_kinds_of_batch_have_plans_of_their_own() -> None:
    loss = full_loss()
    for size in [(4,), (5,), (2, 3), (4,), (5,), (2, 3)]:
        assert_parity(loss, full_batch(*size))
    assert cache_of(loss).traces == 3
    loss.double()
    batch = full_batch().apply(lambda x: x.double() if x.is_floating_point() else x)
    assert_parity(loss, batch)
    assert run(loss, batch, "captured")[0]["loss_reward"].dtype is torch.float64


def test_train_and_eval_in_turns_are_traced_once_each() -> None:
    loss, _ = gained(Dropped())
    for mode in (True, False, True, False, True):
        loss.train(mode)
        assert_parity(loss, full_batch())
    assert cache_of(loss).traces == 2


def test_a_loss_and_its_plans_go_when_nobody_holds_them() -> None:
    loss = full_loss()
    loss(full_batch())
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_copies_make_their_own_plans() -> None:
    loss, batch = full_loss(), full_batch()
    want = run(loss, batch, "captured")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(WorldModelLoss(Latents())))):
        twin.backend = "captured"
        twin(batch)
        assert cache_of(twin) is not cache_of(loss)
    twin = copy.deepcopy(loss)
    assert not differs(run(twin, batch, "captured"), want)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert_parity(twin, batch)
    assert not differs(run(loss, batch, "captured"), want)
    assert not any("_plans" in key for key in loss.state_dict())


def test_threads_share_a_loss() -> None:
    loss = full_loss()
    batches = {size: full_batch(size) for size in (2, 3, 4)}
    want = {size: run(loss, batch, "eager")[0] for size, batch in batches.items()}
    problems: list[BaseException] = []

    def work(size: int) -> None:
        try:
            for _ in range(5):
                with backend("captured"):
                    out = loss(batches[size])
                assert_same((dict(out.detach().items()), []), (want[size], []))
        except BaseException as problem:
            problems.append(problem)

    workers = [threading.Thread(target=work, args=(size,)) for size in batches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems, problems
    assert cache_of(loss).traces == 3
