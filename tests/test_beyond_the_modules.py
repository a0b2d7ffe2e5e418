"""What a step may depend on besides the attributes of its modules: seen, or left to the eager path."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, set_skip_existing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchrl.envs import StepCounter, TransformedEnv

import fastwm
from fastwm.engines.cuda_graph import GraphedLoop
from fastwm.plan import plan_for
from fastwm.request import Request
from fastwm.rollout import start_of
from tests.compare import run
from tests.models import ACTION, LATENT, linear_policy, linear_world_model, module, spec_env

T, B = 4, 5


def imagined(world_model: Any = None, **kwargs: Any) -> fastwm.WorldModelEnv:
    return fastwm.WorldModelEnv(
        world_model or linear_world_model(), spec_env(latent=LATENT), batch_size=[B], **kwargs
    )


def start() -> TensorDict:
    return TensorDict({"latent": torch.randn(B, LATENT)}, [B])


def assert_seen(env: Any, policy: Any, change: Callable[[], Any]) -> None:
    td = start()
    with torch.no_grad():
        before = run("auto", env, T, policy, td)[0]
        change()
        want, got = (run(name, env, T, policy, td)[0] for name in ("eager", "auto"))
    key = "next", "latent"
    assert not torch.equal(before[key], want[key]), "the change changes nothing"
    torch.testing.assert_close(got[key], want[key])


class Gain(nn.Module):
    """A policy whose gain is asked of ``read`` at every step."""

    def __init__(self, held: Any, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.held = held
        self.read = read

    def forward(self, latent: Tensor) -> Tensor:
        return latent[..., :ACTION].tanh() * self.read(self.held)


def gain(held: Any, read: Callable[[Any], float]) -> TensorDictModule:
    return module(Gain(held, read), ["latent"], ["action"])


@pytest.mark.filterwarnings("ignore:fastwm")
@pytest.mark.parametrize("value", [multiprocessing.Value("d", 1.0), ctypes.c_double(1.0)])
def test_shared_numbers(value: Any) -> None:
    value.value = 1.0
    policy = gain(value, lambda held: held.value)
    assert_seen(imagined(), policy, lambda: setattr(value, "value", 3.0))


@pytest.mark.filterwarnings("ignore:fastwm")
def test_a_view_of_memory() -> None:
    view = memoryview(bytearray(b"\x01"))
    assert_seen(imagined(), gain(view, lambda held: held[0]), lambda: view.__setitem__(0, 3))


def test_a_python_module_that_is_held() -> None:
    settings = types.ModuleType("settings")
    settings.gain = 1.0  # type: ignore[attr-defined]
    policy = gain(settings, lambda held: held.gain)
    assert_seen(imagined(), policy, lambda: setattr(settings, "gain", 3.0))


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTWM_TEST_GAIN", "1.0")
    policy = gain(None, lambda _: float(os.environ["FASTWM_TEST_GAIN"]))
    assert_seen(imagined(), policy, lambda: monkeypatch.setenv("FASTWM_TEST_GAIN", "3.0"))


class OwnStep(TensorDictModuleBase):
    """A world model that is its own step."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["latent", "action"], [("next", "latent"), ("next", "reward")]
        self.scale = 0.5

    @property
    def step_module(self) -> Any:
        return self

    def forward(self, tensordict: Any) -> Any:
        latent = tensordict["latent"] * self.scale
        tensordict["next", "latent"] = latent
        tensordict["next", "reward"] = latent[..., :1]
        return tensordict


class BoundStep(nn.Module):
    """A world model whose step is a method of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, LATENT)
        self.scale = 0.5
        self.__dict__["step_module"] = module(
            self.dynamics, ["latent", "action"], [("next", "latent"), ("next", "reward")]
        )

    def dynamics(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.linear(latent) * self.scale
        return latent, latent[..., :1]


@pytest.mark.parametrize("make", [OwnStep, BoundStep])
def test_a_step_that_refers_back_to_its_world_model(make: Any) -> None:
    model = make()
    env, policy = imagined(model), linear_policy()
    assert str(env.explain(T, policy, tensordict=start())) == "fused: runs"
    assert_seen(env, policy, lambda: setattr(model, "scale", 2.0))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, True, False, True]))
        self.weight = nn.Parameter(torch.randn(LATENT, LATENT))

    def forward(self, latent: Tensor) -> Tensor:
        rows = self.weight[self.mask]
        return (latent @ rows.t() / rows.shape[0]).sum(-1, keepdim=True).expand(-1, ACTION)


def test_a_shape_that_depends_on_a_buffer() -> None:
    net = Masked()
    mask = torch.tensor([False, False, False, True])
    assert_seen(imagined(), module(net, ["latent"], ["action"]), lambda: net.mask.copy_(mask))


def test_skip_existing_of_tensordict() -> None:
    env, policy, td = imagined(), linear_policy(), start()
    td["action"] = torch.zeros(B, ACTION)
    with torch.no_grad():
        run("auto", env, T, policy, td)
        with set_skip_existing(True):
            want, got = (run(name, env, T, policy, td)[0] for name in ("eager", "auto"))
    torch.testing.assert_close(got["action"], want["action"])


def test_whether_distributions_validate() -> None:
    class Sampled(nn.Module):
        scale = nn.Parameter(torch.ones(ACTION))

        def forward(self, latent: Tensor) -> Tensor:
            return torch.distributions.Normal(latent[..., :ACTION], self.scale).sample()

    net = Sampled()
    env, policy, td = imagined(), module(net, ["latent"], ["action"]), start()
    was = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        run("auto", env, T, policy, td)
        torch.distributions.Distribution.set_default_validate_args(True)
        with torch.no_grad():
            net.scale.fill_(float("nan"))
        with pytest.raises(ValueError, match="scale"), pytest.warns(UserWarning, match="fastwm"):
            run("auto", env, T, policy, td)
    finally:
        torch.distributions.Distribution.set_default_validate_args(was)


def test_a_checkpoint_does_not_see_the_trace() -> None:
    env, policy = imagined(), linear_policy()

    def imagine(latent: Tensor) -> Tensor:
        return env.rollout(T, policy, tensordict=TensorDict({"latent": latent}, [B]))[
            "next", "reward"
        ].sum()

    checkpoint(imagine, torch.randn(B, LATENT, requires_grad=True), use_reentrant=False).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_parity_has_bounds_for_half_precision(dtype: torch.dtype) -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model().to(dtype), spec_env(dtype=dtype), batch_size=[B]
    )
    report = fastwm.check_parity(env, linear_policy().to(dtype), start().to(dtype), T)
    assert report.ok, report


def test_check_parity_of_an_env_without_engines_is_an_error() -> None:
    with pytest.raises(TypeError, match="TransformedEnv"):
        fastwm.check_parity(TransformedEnv(imagined(), StepCounter()), linear_policy(), start(), T)


def test_explain_is_as_patient_as_an_engine_asked_for_by_name() -> None:
    env, td = imagined(backend="captured"), start()
    for _ in range(20):
        env.rollout(2, linear_policy(), tensordict=td)
    assert str(env.explain(2, linear_policy(), tensordict=td)).endswith("captured: runs")


def test_random_actions_of_a_model_that_draws_are_not_drawn_ahead() -> None:
    """A CUDA graph takes all fed actions before its first step: eager draws in turns."""

    class Drawing(nn.Module):
        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return latent + torch.randn_like(latent) + action.sum()

    model = fastwm.WorldModel(
        module(nn.Linear(8, LATENT), ["observation"], ["latent"]),
        module(Drawing(), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    env, td = imagined(model), start()

    class Refuses(GraphedLoop):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the graph is not for this")

    with torch.no_grad():
        request = Request(T, None, tensordict=td)
        begin = start_of(env, request)
        plan, _ = plan_for(env, request, begin, request.feed(env, begin.batch_size))
        plan.graphed = Refuses(plan.loop, None)  # type: ignore[arg-type]
        want, got = (run(name, env, T, None, td)[0] for name in ("eager", "captured"))
    torch.testing.assert_close(got["action"], want["action"])
