"""Never stale: whatever the eager path would see at the next call, the fast engines see, or hand over.

One test for each thing that may change, on the fused and on the captured engine. Each rolls out twice on that
engine (the second time on the first's plan), makes the change, and holds the next rollout against eager's. It
also asks that the change did change the result: a plan that had missed it would have been wrong.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torchrl.data import Composite, Unbounded
from torchrl.envs import set_exploration_type

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_same, run, why_eager, why_not_fused
from tests.models import (
    ACTION,
    LATENT,
    OBS,
    CatLinear,
    linear_policy,
    linear_world_model,
    module,
    sampled_actor,
    spec_env,
)

B, T = 3, 4


class Dynamics(nn.Module):
    """``tanh(linear(latent, action)) * gain()``; the subclasses say where the gain comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.cat = CatLinear(LATENT + ACTION, LATENT)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.tanh(self.cat(latent, action)) * self.gain()

    def gain(self) -> Any:
        return 1.0


def env_of(dynamics: Any, cls: type = fastwm.WorldModelEnv, **kwargs: Any) -> Any:
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    return cls(world_model, spec_env(), batch_size=[B], **kwargs)


def start() -> TensorDict:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(B, LATENT, generator=generator, dtype=torch.float32)
    return TensorDict({"latent": latent}, [B])


def differs(a: TensorDictBase, b: TensorDictBase) -> bool:
    keys = list(a.keys(True, True))
    if keys != list(b.keys(True, True)) or a.shape != b.shape:
        return True
    for key in keys:
        x, y = a.get(key), b.get(key)
        if (x.dtype, x.requires_grad) != (y.dtype, y.requires_grad) or not torch.equal(x, y):
            return True
    return False


@dataclass
class Scene:
    """A rollout, and the one thing about to change.

    ``change`` may return another policy. ``around`` is entered for the rollouts after the change.
    ``eager`` is part of the reason why the rollout then goes to the eager path, "" where it need not.
    """

    dynamics: Any
    change: Callable[[], Any]
    policy: Any = None
    env: Any = None
    around: Callable[[], Any] = contextlib.nullcontext
    eager: str = ""
    trust: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


ENGINES = ("captured", "fused")
# Scenes whose step is no row program, and why; all others run on the fused engine.
UNFUSED = {
    "default_dtype": "a value of dtype float64",
    "tensor_that_a_function_closes_over": "mixes rows",
}


def check(scene: Scene, engine: str = "captured", unfused: str = "") -> None:
    policy = linear_policy() if scene.policy is None else scene.policy
    env = env_of(scene.dynamics) if scene.env is None else scene.env
    extra = {"trust_policy": scene.trust, **scene.extra}
    if engine == "fused":
        why_not = why_not_fused(env, policy, start(), **extra)
        assert (unfused in why_not) if unfused else (why_not == "")
        if why_not:
            return
    before, _ = run(engine, env, T, policy, start(), **extra)
    again, _ = run(engine, env, T, policy, start(), **extra)
    assert not differs(before, again)
    assert cache_of(env).traces == 1, "the second rollout did not use the first's plan"
    new = scene.change()
    policy = policy if new is None else new
    with scene.around(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, got_state = run("auto", env, T, policy, start(), **extra)
        twice, _ = run("auto", env, T, policy, start(), **extra)
        want, want_state = run("eager", env, T, policy, start(), **extra)
        reason = why_eager(env, policy, start(), **extra)
        by_name = []
        if not (
            scene.eager or (engine == "fused" and why_not_fused(env, policy, start(), **extra))
        ):
            by_name.append(run(engine, env, T, policy, start(), **extra)[0])
    for out in (got, twice, *by_name):
        assert_same(out, want)
    assert torch.equal(got_state, want_state)
    assert differs(before, want), "the change did nothing, so this test shows nothing"
    assert (scene.eager in reason) if scene.eager else (reason == "")


SCENES: dict[str, Callable[[], Scene]] = {}


def scene(build: Callable[[], Scene]) -> Callable[[], Scene]:
    SCENES[build.__name__] = build
    return build


# ---------------------------------------------------------------- parameters and buffers


def weights(net: Dynamics) -> nn.Linear:
    return net.cat.linear


@scene
def optimizer_step() -> Scene:
    net = Dynamics()

    def change() -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        net(torch.ones(1, LATENT), torch.ones(1, ACTION)).sum().backward()
        optimizer.step()

    return Scene(net, change)


@scene
def load_state_dict() -> Scene:
    net = Dynamics()
    return Scene(net, lambda: net.load_state_dict(doubled(net)) and None)


@scene
def load_state_dict_assign() -> Scene:
    net = Dynamics()
    return Scene(net, lambda: net.load_state_dict(doubled(net), assign=True) and None)


def doubled(net: nn.Module) -> dict[str, Tensor]:
    return {key: value * 2 for key, value in net.state_dict().items()}


@scene
def load_state_dict_assign_of_frozen_tensors() -> Scene:
    """Assigned tensors keep their own gradient flag: here none is left that wants gradients."""
    net, policy = Dynamics(), linear_policy()

    def change() -> None:
        for part in (net, policy):
            for name, p in list(part.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                frozen = nn.Parameter(p.detach() * 2, requires_grad=False)
                setattr(part.get_submodule(owner), leaf, frozen)

    return Scene(net, change, policy)


@scene
def parameter_replaced() -> Scene:
    net = Dynamics()

    def change() -> None:
        weights(net).weight = nn.Parameter(torch.randn(LATENT, LATENT + ACTION))

    return Scene(net, change)


@scene
def parameter_data_replaced() -> Scene:
    net = Dynamics()

    def change() -> None:
        weights(net).weight.data = torch.randn(LATENT, LATENT + ACTION)

    return Scene(net, change)


@scene
def parameter_data_of_other_strides() -> Scene:
    net = Dynamics()

    def change() -> None:
        weights(net).weight.data = torch.randn(LATENT + ACTION, LATENT).t()

    return Scene(net, change)


@scene
def parameter_data_written() -> Scene:
    net = Dynamics()
    return Scene(net, lambda: _run(lambda: weights(net).weight.data.mul_(2)))


def _run(act: Callable[[], Any]) -> None:
    act()


@scene
def bias_removed() -> Scene:
    net = Dynamics()

    def change() -> None:
        weights(net).bias = None

    return Scene(net, change)


@scene
def policy_parameters() -> Scene:
    policy = linear_policy()

    def change() -> None:
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(3)

    return Scene(Dynamics(), change, policy)


@scene
def requires_grad_switched_off() -> Scene:
    net, policy = Dynamics(), linear_policy()
    env = env_of(net)

    def change() -> None:
        env.requires_grad_(False)
        policy.requires_grad_(False)

    return Scene(net, change, policy, env)


@scene
def requires_grad_switched_on() -> Scene:
    net, policy = Dynamics(), linear_policy().requires_grad_(False)
    env = env_of(net).requires_grad_(False)

    def change() -> None:
        net.requires_grad_(True)

    return Scene(net, change, policy, env)


@scene
def module_double() -> Scene:
    """Everything in double but the start, whose latent only the first step reads in single."""

    class Cast(Dynamics):
        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            kind = self.cat.linear.weight.dtype
            return super().forward(latent.to(kind), action.to(kind)).float()

    net = Cast()
    return Scene(net, lambda: _run(net.double))


@scene
def tied_weights_come_apart() -> Scene:
    class Tied(Dynamics):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(LATENT, LATENT), nn.Linear(LATENT, LATENT)
            self.two.weight = self.one.weight

        def gain(self) -> Tensor:
            ones = torch.ones(LATENT)
            return self.one(ones) - 2 * self.two(ones)

    net = Tied()

    def change() -> None:
        net.two.weight = nn.Parameter(torch.randn(LATENT, LATENT))

    return Scene(net, change)


@scene
def functional_parameters() -> Scene:
    """``to_module`` swaps other parameters in, for a block."""
    policy = linear_policy()
    other = TensorDict.from_module(policy).detach().clone().apply_(lambda p: p.data.mul_(3))

    return Scene(
        Dynamics(), lambda: None, policy, around=lambda: TensorDictParams(other).to_module(policy)
    )


@scene
def functional_parameters_after_the_block() -> Scene:
    policy = linear_policy()
    other = TensorDictParams(TensorDict.from_module(policy).detach().clone())
    env, net = None, Dynamics()
    env = env_of(net)

    def change() -> None:
        with other.to_module(policy):
            run("captured", env, T, policy, start())
        cache_of(env).traces = 1
        with torch.no_grad():
            policy.module.linear.weight.add_(1.0)
            other.apply_(lambda p: p.data.zero_())

    return Scene(net, change, policy, env)


class Buffered(Dynamics):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def gain(self) -> Tensor:
        return self.scale


@scene
def buffer_written() -> Scene:
    net = Buffered()
    return Scene(net, lambda: _run(lambda: net.scale.fill_(2.0)))


@scene
def buffer_replaced() -> Scene:
    net = Buffered()

    def change() -> None:
        net.scale = torch.tensor(2.0)

    return Scene(net, change)


class ReadByPython(Buffered):
    """The buffer's value becomes a Python number, which a trace bakes in."""

    def gain(self) -> float:
        return self.scale.item() + (1.0 if self.scale > 1.5 else 0.0)


@scene
def buffer_that_python_reads_written() -> Scene:
    net = ReadByPython()
    return Scene(net, lambda: _run(lambda: net.scale.fill_(2.0)))


@scene
def buffer_that_python_reads_written_behind_its_version() -> Scene:
    net = ReadByPython()
    return Scene(net, lambda: _run(lambda: net.scale.data.fill_(2.0)))


@scene
def buffer_that_python_reads_replaced() -> Scene:
    net = ReadByPython()

    def change() -> None:
        net.scale = torch.tensor(2.0)

    return Scene(net, change)


@scene
def buffer_that_python_reads_gets_other_data() -> Scene:
    net = ReadByPython()

    def change() -> None:
        net.scale.data = torch.tensor(2.0)

    return Scene(net, change)


@scene
def tensor_in_a_list() -> Scene:
    class Net(Dynamics):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [torch.tensor(1.0), {"one": torch.tensor(1.0)}]

        def gain(self) -> Tensor:
            return self.scales[0] * self.scales[1]["one"]

    net = Net()

    def change() -> None:
        net.scales[1]["one"] = torch.tensor(2.0)

    return Scene(net, change)


# ---------------------------------------------------------------- Python attributes


def holding(make: Callable[[], Any], read: Callable[[Any], Any]) -> Any:
    """Dynamics whose attribute ``held`` gives the gain through ``read``."""

    class Holding(Dynamics):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def gain(self) -> Any:
            return read(self.held)

    return Holding()


def changed(
    make: Callable[[], Any], read: Callable[[Any], Any], change: Callable[[Any], Any]
) -> Scene:
    net = holding(make, read)
    return Scene(net, lambda: _run(lambda: change(net)))


def attribute(net: Any, name: str, value: Any) -> None:
    setattr(net, name, value)


@scene
def float_attribute() -> Scene:
    return changed(lambda: 1.0, lambda h: h, lambda n: attribute(n, "held", 2.0))


@scene
def float_attribute_changes_sign_of_zero() -> Scene:
    return changed(
        lambda: 0.0,
        lambda h: 0.5 if str(h) == "0.0" else 0.25,
        lambda n: attribute(n, "held", -0.0),
    )


@scene
def int_becomes_an_equal_float() -> Scene:
    return changed(
        lambda: 1, lambda h: 2.0 if isinstance(h, int) else 0.5, lambda n: attribute(n, "held", 1.0)
    )


@scene
def string_attribute() -> Scene:
    return changed(
        lambda: "tanh",
        lambda h: 1.0 if h == "tanh" else 2.0,
        lambda n: attribute(n, "held", "relu"),
    )


@scene
def function_attribute() -> Scene:
    return changed(lambda: abs, lambda h: h(-1.0), lambda n: attribute(n, "held", float))


@scene
def list_item() -> Scene:
    return changed(lambda: [1.0, 1.0], sum, lambda n: n.held.__setitem__(1, 3.0))


@scene
def list_grows() -> Scene:
    return changed(lambda: [1.0], sum, lambda n: n.held.append(1.0))


@scene
def item_moves_from_one_list_to_the_next() -> Scene:
    return changed(
        lambda: ([1.0, 2.0], [3.0]),
        lambda h: sum(h[0]),
        lambda n: n.held[1].insert(0, n.held[0].pop()),
    )


@scene
def dict_item() -> Scene:
    return changed(lambda: {"a": 1.0}, lambda h: h["a"], lambda n: n.held.update(a=2.0))


@scene
def dict_key_renamed() -> Scene:
    return changed(
        lambda: {"relu": 1},
        lambda h: 2.0 if "relu" in h else 1.0,
        lambda n: n.held.update(tanh=n.held.pop("relu")),
    )


@scene
def dict_reordered() -> Scene:
    return changed(
        lambda: {"a": 1.0, "b": 2.0},
        lambda h: next(iter(h.values())),
        lambda n: n.held.update(a=n.held.pop("a")),
    )


@scene
def ordered_dict_reordered() -> Scene:
    return changed(
        lambda: OrderedDict(a=1.0, b=2.0),
        lambda h: next(iter(h.values())),
        lambda n: n.held.move_to_end("a"),
    )


@scene
def set_member() -> Scene:
    return changed(lambda: {"a"}, lambda h: 2.0 if "b" in h else 1.0, lambda n: n.held.add("b"))


@scene
def deque_turns() -> Scene:
    return changed(lambda: deque([1.0, 2.0]), lambda h: h[0], lambda n: n.held.rotate(1))


@scene
def numpy_array() -> Scene:
    return changed(lambda: np.ones(2), lambda h: float(h[0]), lambda n: n.held.__setitem__(0, 2.0))


@scene
def bytearray_item() -> Scene:
    return changed(lambda: bytearray(b"\1"), lambda h: h[0], lambda n: n.held.__setitem__(0, 2))


@dataclass
class Inner:
    gain: float = 1.0


@dataclass
class Config:
    inner: Inner = field(default_factory=Inner)


@scene
def nested_config() -> Scene:
    return changed(Config, lambda h: h.inner.gain, lambda n: attribute(n.held.inner, "gain", 2.0))


@scene
def nested_config_replaced_by_an_equal_one_that_changes() -> Scene:
    def change(net: Any) -> None:
        net.held.inner = Inner()
        net.held.inner.gain = 2.0

    return changed(Config, lambda h: h.inner.gain, change)


class Slotted:
    __slots__ = ("__private", "gain")

    def __init__(self) -> None:
        self.gain = 1.0
        self.__private = 1.0

    def set_private(self, value: float) -> None:
        self.__private = value

    def product(self) -> float:
        return self.gain * self.__private


@scene
def slot() -> Scene:
    return changed(Slotted, lambda h: h.gain, lambda n: attribute(n.held, "gain", 2.0))


@scene
def private_slot() -> Scene:
    return changed(Slotted, Slotted.product, lambda n: n.held.set_private(2.0))


@scene
def simple_namespace() -> Scene:
    return changed(
        lambda: types.SimpleNamespace(gain=1.0),
        lambda h: h.gain,
        lambda n: attribute(n.held, "gain", 2.0),
    )


@scene
def dict_subclass_with_attributes() -> Scene:
    class Settings(dict):
        gain = 1.0

    return changed(Settings, lambda h: h.gain, lambda n: attribute(n.held, "gain", 2.0))


@scene
def partial_keywords() -> Scene:
    def power(gain: float) -> float:
        return gain**2

    return changed(
        lambda: functools.partial(power, gain=1.0),
        lambda h: h(),
        lambda n: n.held.keywords.update(gain=2.0),
    )


CONTEXT: ContextVar[float] = ContextVar("gain", default=1.0)


@scene
def context_variable() -> Scene:
    class Net(Dynamics):
        def gain(self) -> float:
            return CONTEXT.get()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        token = CONTEXT.set(2.0)
        yield
        CONTEXT.reset(token)

    return Scene(Net(), lambda: None, around=around)


# ---------------------------------------------------------------- code


GAIN = 1.0
OTHER = types.ModuleType("settings")
OTHER.GAIN = 1.0  # type: ignore[attr-defined]


class Namespace:
    gain = 1.0


def helper() -> float:
    return GAIN


class ReadsGlobal(Dynamics):
    def gain(self) -> float:
        return GAIN


class ReadsThroughHelper(Dynamics):
    def gain(self) -> float:
        return helper()


class ReadsNamespace(Dynamics):
    def gain(self) -> float:
        return Namespace.gain


class ReadsModule(Dynamics):
    def gain(self) -> float:
        return OTHER.GAIN  # type: ignore[attr-defined]


class ClassAttribute(Dynamics):
    factor = 1.0

    def gain(self) -> float:
        return self.factor


class ThroughProperty(Dynamics):
    hidden = 1.0

    @property
    def factor(self) -> float:
        return type(self).hidden

    def gain(self) -> float:
        return self.factor


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


PATCHES: dict[str, tuple[Callable[[], Any], Callable[[pytest.MonkeyPatch, Any], None]]] = {
    "global": (ReadsGlobal, lambda m, n: m.setitem(globals(), "GAIN", 2.0)),
    "global-through-a-helper": (ReadsThroughHelper, lambda m, n: m.setitem(globals(), "GAIN", 2.0)),
    "helper-replaced": (
        ReadsThroughHelper,
        lambda m, n: m.setitem(globals(), "helper", lambda: 2.0),
    ),
    "class-as-namespace": (ReadsNamespace, lambda m, n: m.setattr(Namespace, "gain", 2.0)),
    "constant-of-another-module": (ReadsModule, lambda m, n: m.setattr(OTHER, "GAIN", 2.0)),
    "class-attribute": (ClassAttribute, lambda m, n: m.setattr(ClassAttribute, "factor", 2.0)),
    "class-attribute-shadowed": (ClassAttribute, lambda m, n: m.setattr(n, "factor", 2.0, raising=False)),
    "class-attribute-of-a-property": (
        ThroughProperty,
        lambda m, n: m.setattr(ThroughProperty, "hidden", 2.0),
    ),
    "method-of-the-class": (
        ClassAttribute,
        lambda m, n: m.setattr(ClassAttribute, "gain", lambda self: 2.0),
    ),
    "method-of-a-base-class": (
        ReadsGlobal,
        lambda m, n: m.setattr(
            Dynamics, "forward", lambda self, latent, action: self.cat(latent, action)
        ),
    ),
    "forward-of-the-instance": (
        Dynamics,
        lambda m, n: m.setattr(n, "forward", lambda latent, action: n.cat(latent, action)),
    ),
    "forward-of-a-library-class": (
        Dynamics,
        lambda m, n: m.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.t()),
    ),
    "code-of-a-function": (
        ReadsThroughHelper,
        lambda m, n: m.setattr(helper, "__code__", (lambda: 2.0).__code__),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_code_and_what_it_names(name: str, swap: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, change = PATCHES[name]
    net = make()
    check(Scene(net, lambda: change(swap, net)))


@scene
def closure_variable() -> Scene:
    gain = 1.0

    class Net(Dynamics):
        def gain(self) -> float:
            return gain

    def change() -> None:
        nonlocal gain
        gain = 2.0

    return Scene(Net(), change)


@scene
def default_argument() -> Scene:
    def gain(h: Any, value: float = 1.0) -> float:
        return value

    net = holding(lambda: None, gain)
    return Scene(net, lambda: attribute(gain, "__defaults__", (2.0,)))


@scene
def keyword_default() -> Scene:
    def gain(h: Any, *, value: float = 1.0) -> float:
        return value

    net = holding(lambda: None, gain)
    return Scene(net, lambda: gain.__kwdefaults__.update(value=2.0))  # type: ignore[union-attr]


# ---------------------------------------------------------------- modules


class Chain(Dynamics):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, LATENT), nn.Tanh(), nn.Linear(LATENT, LATENT))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.net(super().forward(latent, action))


@scene
def submodule_replaced() -> Scene:
    net, other = Dynamics(), CatLinear(LATENT + ACTION, LATENT)
    return Scene(net, lambda: attribute(net, "cat", other))


@scene
def activation_replaced() -> Scene:
    net = Chain()
    return Scene(net, lambda: net.net.__setitem__(1, nn.ReLU()))


@scene
def layer_appended() -> Scene:
    net = Chain()
    return Scene(net, lambda: _run(lambda: net.net.append(nn.Tanh())))


@scene
def layers_swapped() -> Scene:
    net = Chain()

    def change() -> None:
        net.net[1], net.net[2] = net.net[2], net.net[1]

    return Scene(net, change)


@scene
def part_of_the_world_model_replaced() -> Scene:
    net = Dynamics()
    env = env_of(net)
    head = module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")])
    return Scene(net, lambda: env.world_model.module.__setitem__(1, head), env=env)


class WithDropout(Dynamics):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.dropout(super().forward(latent, action))


@scene
def train_to_eval() -> Scene:
    net = WithDropout()
    return Scene(net, lambda: _run(net.eval))


@scene
def eval_to_train() -> Scene:
    net = WithDropout()
    net.eval()
    return Scene(net, lambda: _run(net.train))


@scene
def dropout_rate() -> Scene:
    net = WithDropout()
    return Scene(net, lambda: attribute(net.dropout, "p", 0.1))


@scene
def batch_norm_to_train_mode() -> Scene:
    class Net(Dynamics):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(LATENT, momentum=None)

        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return self.norm(super().forward(latent, action))

    class Resets(Net):
        """Train mode without its memory, so that rollouts can be compared."""

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.momentum = 0.0
            return self

    net = Resets()
    net.eval()
    return Scene(net, lambda: _run(net.train), eager="in place")


@scene
def weight_norm_added() -> Scene:
    net = Dynamics()

    def change() -> None:
        parametrizations.weight_norm(weights(net))
        with torch.no_grad():
            weights(net).parametrizations.weight.original0.mul_(2)

    return Scene(net, change)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@scene
def parametrization_added() -> Scene:
    net = Dynamics()
    return Scene(
        net,
        lambda: _run(
            lambda: parametrize.register_parametrization(weights(net), "weight", Double())
        ),
    )


@scene
def parametrization_removed() -> Scene:
    net = Dynamics()
    parametrize.register_parametrization(weights(net), "weight", Double())

    def change() -> None:
        parametrize.remove_parametrizations(weights(net), "weight", leave_parametrized=False)

    return Scene(net, change)


def tripled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 3


@scene
def forward_hook() -> Scene:
    net = Dynamics()
    return Scene(
        net,
        lambda: _run(lambda: weights(net).register_forward_hook(tripled)),
        eager="hook on Linear",
    )


@scene
def forward_pre_hook() -> Scene:
    net = Dynamics()

    def change() -> None:
        weights(net).register_forward_pre_hook(lambda m, args: (args[0] * 3,))

    return Scene(net, change, eager="hook on Linear")


@scene
def hook_after_an_equal_parameter() -> Scene:
    """A change that a plan survives must not make it blind to the next one."""
    net = Dynamics()

    def change() -> None:
        env = scene_.env
        weights(net).weight = nn.Parameter(weights(net).weight.detach().clone())
        run("captured", env, T, scene_.policy, start())
        assert cache_of(env).traces == 1
        weights(net).register_forward_hook(tripled)

    scene_ = Scene(net, change, linear_policy(), env_of(net), eager="hook on Linear")
    return scene_


@scene
def compiled_in_place() -> Scene:
    net = Dynamics()

    def change() -> None:
        net.cat.linear.weight.data.mul_(2)
        net.compile(backend="eager")

    return Scene(net, change, eager="compiled already")


# ---------------------------------------------------------------- modes


@scene
def autocast() -> Scene:
    return Scene(
        Dynamics(),
        lambda: None,
        around=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        eager="autocast",
    )


@scene
def no_grad() -> Scene:
    return Scene(Dynamics(), lambda: None, around=torch.no_grad)


@scene
def inference_mode() -> Scene:
    return Scene(Dynamics(), lambda: None, around=torch.inference_mode)


@scene
def exploration_type() -> Scene:
    policy = sampled_actor()
    return Scene(
        Dynamics(), lambda: None, policy, around=lambda: set_exploration_type("deterministic")
    )


@scene
def default_dtype() -> Scene:
    class Net(Dynamics):
        def gain(self) -> Tensor:
            return (torch.ones(()) / 3).to(torch.float64).float()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        yield
        torch.set_default_dtype(torch.float32)

    return Scene(Net(), lambda: None, around=around)


@scene
def default_device() -> Scene:
    net = Dynamics()

    def change() -> None:
        net.cat.linear.weight.data.mul_(2)

    return Scene(net, change, around=lambda: torch.device("cpu"))


class Triples(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 3 if func is torch.tanh else out


@scene
def function_mode() -> Scene:
    return Scene(Dynamics(), lambda: None, around=Triples, eager="mode is active")


@scene
def forward_mode_ad() -> Scene:
    net = Dynamics()

    def change() -> None:
        net.cat.linear.weight.data.mul_(2)

    return Scene(net, change, around=torch.autograd.forward_ad.dual_level, eager="forward-mode")


@scene
def global_forward_hook() -> Scene:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            return out * 3 if isinstance(module, nn.Linear) else None

        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        yield
        handle.remove()

    return Scene(Dynamics(), lambda: None, around=around, eager="global module hooks")


# ---------------------------------------------------------------- the env


class Shaped(fastwm.WorldModelEnv):
    """A subclass that shapes the reward by attributes of its own."""

    weight = 1.0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        own = self.__dict__.get("own", 1.0)
        return out.set("reward", out["reward"] * self.weight * own * self.shaping().factor)

    def shaping(self) -> Any:
        return self.__dict__.setdefault("config", types.SimpleNamespace(factor=1.0))


def shaped() -> tuple[Dynamics, Any]:
    net = Dynamics()
    env = env_of(net, Shaped)
    env.own = 1.0
    env.shaping()
    return net, env


@scene
def attribute_of_a_subclassed_env() -> Scene:
    net, env = shaped()
    return Scene(net, lambda: attribute(env, "own", 2.0), env=env)


@scene
def nested_attribute_of_a_subclassed_env() -> Scene:
    net, env = shaped()
    return Scene(net, lambda: attribute(env.config, "factor", 2.0), env=env)


def test_class_attribute_of_a_subclassed_env(swap: pytest.MonkeyPatch) -> None:
    net, env = shaped()
    check(Scene(net, lambda: swap.setattr(Shaped, "weight", 2.0), env=env))


@scene
def step_of_the_env_patched() -> Scene:
    net = Dynamics()
    env = env_of(net)

    def patched(self: Any, tensordict: TensorDictBase) -> TensorDictBase:
        out = type(self)._step(self, tensordict)
        return out.set("reward", out["reward"] * 2)

    return Scene(net, lambda: attribute(env, "_step", types.MethodType(patched, env)), env=env)


@scene
def world_model_replaced() -> Scene:
    net = Dynamics()
    env, other = env_of(net), env_of(Dynamics())
    return Scene(net, lambda: attribute(env, "world_model", other.world_model), env=env)


@scene
def done_threshold() -> Scene:
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(
        linear_world_model(done="done"), spec_env(), batch_size=[B], done_threshold=1e9
    )
    return Scene(None, lambda: attribute(env, "done_threshold", -1e9), env=env)


@scene
def done_keys() -> Scene:
    net = Dynamics()
    env = env_of(net)
    return Scene(net, lambda: _run(env.add_truncated_keys), env=env)


@scene
def observation_spec() -> Scene:
    """What the env exposes: an entry that the model writes anyway, shown from now on."""

    class Two(Dynamics):
        def forward(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
            out = super().forward(latent, action)
            return out, out * 2

    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(Two(), ["latent", "action"], [("next", "latent"), ("next", "twice")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B])
    latent = Unbounded((B, LATENT))

    def change() -> None:
        env.observation_spec = Composite(latent=latent, twice=latent.clone(), shape=[B])

    return Scene(None, change, env=env, eager="not there at every step")


@scene
def reward_spec() -> Scene:
    """The reward takes the spec's shape."""
    net = Dynamics()
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(net, ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 4), [("next", "latent")], [("next", "reward")]),
    )
    base = spec_env()
    base.reward_spec = Unbounded((4,))
    env = fastwm.WorldModelEnv(world_model, base, batch_size=[B])
    return Scene(net, lambda: attribute(env, "reward_spec", Unbounded((B, 2, 2))), env=env)


@scene
def env_backend() -> Scene:
    net = Dynamics()
    env = env_of(net)

    def change() -> None:
        env.backend = "eager"
        net.cat.linear.weight.data.mul_(2)

    return Scene(net, change, env=env, eager="asked for")


# ---------------------------------------------------------------- the policy


@scene
def another_policy() -> Scene:
    return Scene(Dynamics(), linear_policy)


def constant_policy(value: float) -> Callable[[TensorDictBase], TensorDictBase]:
    return lambda td: td.set("action", torch.full((B, ACTION), value))


@scene
def the_same_function_over_another_closure() -> Scene:
    return Scene(Dynamics(), lambda: constant_policy(2.0), constant_policy(1.0))


@scene
def the_same_function_over_other_globals() -> Scene:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return td.set("action", torch.full((B, ACTION), GAIN))

    other = types.FunctionType(policy.__code__, {**globals(), "GAIN": 2.0})
    return Scene(Dynamics(), lambda: other, policy)


@scene
def the_same_function_with_other_defaults() -> Scene:
    def make(value: float) -> Any:
        def policy(td: TensorDictBase, value: float = value) -> TensorDictBase:
            return td.set("action", torch.full((B, ACTION), value))

        return policy

    return Scene(Dynamics(), lambda: make(2.0), make(1.0), trust=True)


@scene
def the_same_function_with_other_keyword_defaults() -> Scene:
    def make(value: float) -> Any:
        def policy(td: TensorDictBase, *, value: float = value) -> TensorDictBase:
            return td.set("action", torch.full((B, ACTION), value))

        return policy

    return Scene(Dynamics(), lambda: make(2.0), make(1.0), trust=True)


class Agent:
    def __init__(self, value: float) -> None:
        self.value = value

    def act(self, td: TensorDictBase) -> TensorDictBase:
        return td.set("action", torch.full((B, ACTION), self.value))


@scene
def the_method_of_another_object() -> Scene:
    return Scene(Dynamics(), lambda: Agent(2.0).act, Agent(1.0).act)


@scene
def attribute_of_a_methods_object() -> Scene:
    agent = Agent(1.0)
    return Scene(Dynamics(), lambda: attribute(agent, "value", 2.0), agent.act)


@scene
def attribute_of_the_env_that_the_policy_reads() -> Scene:
    net = Dynamics()
    env = env_of(net)
    env.exploration = 1.0

    def policy(td: TensorDictBase) -> TensorDictBase:
        return td.set("action", torch.full((B, ACTION), env.exploration))

    return Scene(net, lambda: attribute(env, "exploration", 2.0), policy, env)


@scene
def tensor_that_a_function_closes_over() -> Scene:
    noise = torch.ones(B, ACTION)

    def policy(td: TensorDictBase) -> TensorDictBase:
        return td.set("action", noise * 1)

    def change() -> Any:
        nonlocal noise
        noise = torch.zeros(B, ACTION)

    return Scene(Dynamics(), change, policy)


def test_a_function_is_not_taken_for_one_whose_closure_once_held_the_same() -> None:
    """Two functions of one code; the first's cell moves on, the second holds what the first held."""

    def make(noise: Tensor) -> tuple[Any, Any]:
        def policy(td: TensorDictBase) -> TensorDictBase:
            return td.set("action", noise * 1)

        def move(other: Tensor) -> None:
            nonlocal noise
            noise = other

        return policy, move

    torch.manual_seed(0)
    env, ones = env_of(Dynamics()), torch.ones(B, ACTION)
    one, move = make(ones)
    two, _ = make(ones)
    assert run("captured", env, T, one, start())[0]["action"].eq(1).all()
    move(torch.zeros(B, ACTION))
    assert run("captured", env, T, one, start())[0]["action"].eq(0).all()
    assert run("captured", env, T, two, start())[0]["action"].eq(1).all()
    assert run("captured", env, T, one, start())[0]["action"].eq(0).all()


@scene
def trust_policy() -> Scene:
    """A module that takes tensors or tensordicts: ``trust_policy`` says which it is given."""

    class Either(nn.Module):
        def forward(self, x: Any) -> Any:
            if isinstance(x, TensorDictBase):
                return x.set("action", torch.ones(B, ACTION))
            return torch.zeros(B, ACTION)

    policy, net = Either(), Dynamics()
    scene_ = Scene(net, lambda: None, policy)
    scene_.change = lambda: scene_.extra.update(trust_policy=True)
    return scene_


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SCENES)
def test_change_of(name: str, engine: str) -> None:
    torch.manual_seed(0)
    built = SCENES[name]()
    if name == "trust_policy":
        check_trust(built, engine)
    else:
        check(built, engine, UNFUSED.get(name, ""))


def check_trust(built: Scene, engine: str) -> None:
    env = env_of(built.dynamics)
    for trust, value in ((False, 0), (True, 1), (False, 0), (True, 1)):
        out, _ = run(engine, env, T, built.policy, start(), trust_policy=trust)
        assert out["action"].eq(value).all()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("engine", ENGINES)
def test_plans_of_both_modes_are_kept(engine: str) -> None:
    """train() and eval() in turns: each traced once, each right."""
    torch.manual_seed(0)
    net, policy = WithDropout(), linear_policy()
    env = env_of(net)
    for mode in (True, False, True, False, True):
        net.train(mode)
        assert_same(
            run(engine, env, T, policy, start())[0], run("eager", env, T, policy, start())[0]
        )
    assert cache_of(env).traces == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_that_is_removed_gives_the_engine_back(engine: str) -> None:
    torch.manual_seed(0)
    net, policy = Dynamics(), linear_policy()
    env = env_of(net)
    before, _ = run(engine, env, T, policy, start())
    handle = weights(net).register_forward_hook(tripled)
    with pytest.warns(UserWarning, match="hook on Linear"):
        run("auto", env, T, policy, start())
    handle.remove()
    assert not differs(run(engine, env, T, policy, start())[0], before)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_values_and_new_tensors_of_the_same_kind_need_no_new_trace(engine: str) -> None:
    torch.manual_seed(0)
    net, policy = holding(lambda: 1.5, lambda h: h), linear_policy()
    env = env_of(net)
    run(engine, env, T, policy, start())
    net.held = float("1.5")
    net.load_state_dict(doubled(net), assign=False)
    weights(net).weight = nn.Parameter(torch.randn(LATENT, LATENT + ACTION))
    got, _ = run(engine, env, T, policy, start())
    assert cache_of(env).traces == 1
    assert_same(got, run("eager", env, T, policy, start())[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_go_to_the_parameters_that_are_there_now(engine: str) -> None:
    torch.manual_seed(0)
    net, policy = Dynamics(), linear_policy()
    env = env_of(net)
    old = weights(net).weight
    run(engine, env, T, policy, start())
    new = weights(net).weight = nn.Parameter(torch.randn(LATENT, LATENT + ACTION))
    out, _ = run(engine, env, T, policy, start())
    out["next", "reward"].sum().backward()
    assert old.grad is None
    assert new.grad is not None
    assert new.grad.abs().sum() > 0


def test_training_in_between_rollouts() -> None:
    """A few optimizer steps on imagined returns, by each engine: the same weights at the end."""
    ends = []
    for engine in ("eager", *ENGINES):
        torch.manual_seed(0)
        net, policy = Dynamics(), linear_policy()
        env = env_of(net)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for _ in range(4):
            with fastwm.backend(engine):
                out = env.rollout(T, policy, tensordict=start())
            optimizer.zero_grad()
            (-out["next", "reward"].mean()).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in policy.parameters()])
    for end in ends[1:]:
        for got, want in zip(end, ends[0], strict=True):
            assert_close(got, want, "rollout.gradient", "trained weights")


def test_a_policy_module_made_in_a_function_of_the_step() -> None:
    """TensorDictModule around a function: what the function names is watched through it."""
    torch.manual_seed(0)
    table = {"gain": 1.0}
    policy = TensorDictModule(
        lambda z: torch.ones(B, ACTION) * table["gain"], in_keys=["latent"], out_keys=["action"]
    )
    check(Scene(Dynamics(), lambda: table.update(gain=2.0), policy))
