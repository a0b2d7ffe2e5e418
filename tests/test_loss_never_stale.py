"""Never stale: what an eager `WorldModelLoss` would see at the next call a captured one sees, or hands over.

One test for each thing that may change, as in ``test_never_stale.py``: two captured calls, the second on the
first's plan, the change, and the next call against eager's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchrl.envs.utils import ExplorationType, exploration_type

from fastwm.backends import backend
from fastwm.loss import WorldModelLoss
from fastwm.loss_plan import cache_of
from tests.loss_engines import (
    LOGITS,
    Dropped,
    Gained,
    assert_same,
    differs,
    full_batch,
    full_loss,
    gained,
    run,
    why_not_captured,
)
from tests.loss_models import LATENT, OBS, RECON, make_batch, make_model


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


def check(made: Scene) -> None:
    loss, batch = made.loss, made.batch
    before = run(loss, batch, "captured")
    assert not differs(before, run(loss, batch, "captured"))
    assert cache_of(loss).traces == 1, "the second call did not use the first's plan"
    made.change()
    with made.around():
        got = [run(loss, batch, "auto") for _ in range(2)]
        want = run(loss, batch, "eager")
        why = why_not_captured(loss, batch)
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
def exploration_type_of_the_loss() -> Scene:
    """A LossModule says what its distributions give."""

    class Asks(Gained):
        def gain(self) -> float:
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
    assert "hook" in why_not_captured(loss, batch)
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
            reasons.append(why_not_captured(loss, batch))
            return loss(batch)["loss_reward"]

    got = torch.func.grad(compute)(parameters)
    with TensorDictParams(2 * parameters).to_module(loss.world_model):
        want.append(run(loss, batch, "eager")[0]["loss_reward"])
    both = torch.func.vmap(compute)(torch.stack([parameters, 2 * parameters]))
    torch.testing.assert_close(both, torch.stack(want))
    torch.testing.assert_close(got["reward_head", "module", "bias"], bias)
    assert all("torch.func transform" in reason for reason in reasons)
