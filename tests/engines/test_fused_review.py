"""Kinds of buffers, early stops, double gradients and memory of the fused engine: what a review found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import fastwm
from fastwm import plan as plans
from fastwm.engines import fused, fused_gradient
from tests.compare import assert_close, assert_parity, assert_same, run, why_not_fused
from tests.engines.test_captured import DISTRIBUTIONS, begin
from tests.models import ACTION, LATENT, OBS, linear_policy, spec_env

B, T = 3, 4
ENGINES = ("eager", "fused")


def env_of(dynamics: nn.Module, done: nn.Module | None = None) -> fastwm.WorldModelEnv:
    torch.manual_seed(0)
    model = fastwm.WorldModel(
        TensorDictModule(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        TensorDictModule(dynamics, ["latent", "action"], [("next", "latent")]),
        TensorDictModule(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
        done_head=done and TensorDictModule(done, [("next", "latent")], [("next", "done")]),
    )
    return fastwm.WorldModelEnv(model, spec_env(), batch_size=[B])


# ---------------------------------------------------------------- kinds of buffers


class Buffered(nn.Module):
    def __init__(self, t: Tensor, use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Linear(LATENT + ACTION, LATENT)
        self.use = use
        self.register_buffer("t", t)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        y = torch.tanh(self.w(torch.cat([latent, action], -1)))
        return self.use(y, latent, self.t)


INT_USES: dict[str, Callable[..., Tensor]] = {
    "mul": lambda y, latent, t: y * t,
    "add to ints": lambda y, latent, t: y * ((y > 0).long() + t),
}
USES: dict[torch.dtype, dict[str, Callable[..., Tensor]]] = {
    torch.bool: {
        "where": lambda y, latent, t: torch.where(t, y, latent),
        "not": lambda y, latent, t: y * ~t,
        "equal": lambda y, latent, t: y * ((y > 0) == t),
    },
    torch.int64: INT_USES,
    torch.int32: INT_USES,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("shape", [(), (LATENT,)], ids=["scalar", "vector"])
@pytest.mark.parametrize(
    ("dtype", "use"), [(d, u) for d, uses in USES.items() for u in uses], ids=str
)
def test_bool_and_int_buffers(dtype: torch.dtype, use: str, shape: Any, grad: bool) -> None:
    """Also when they are written in place after the plan was made."""
    dynamics = Buffered(torch.zeros(shape, dtype=dtype), USES[dtype][use])
    env, policy, start = env_of(dynamics), linear_policy(), begin(B)
    if shape:
        dynamics.t[::2] = 1
    wrt = list(dynamics.parameters()) if grad else []
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert_parity(env, policy, start, T, wrt=wrt, engine="fused")
            dynamics.t.fill_(True)


def test_a_matrix_of_ints() -> None:
    """Products take floats, of whatever kind the buffer is; here it serves both ways."""
    dynamics = Buffered(
        torch.arange(LATENT * LATENT).reshape(LATENT, LATENT) % 3,
        lambda y, latent, t: y * (((y > 0).long() @ t) + t[0]) * 0.1,
    )
    env, policy, start = env_of(dynamics), linear_policy(), begin(B)
    with torch.no_grad():
        engine = "auto" if why_not_fused(env, policy, start) else "fused"
        for _ in range(2):
            assert_parity(env, policy, start, T, engine=engine)
            dynamics.t.add_(1)


def test_a_float_matrix_made_of_a_bool_one() -> None:
    dynamics = Buffered(
        torch.ones(LATENT, LATENT, dtype=torch.bool).tril(),
        lambda y, latent, t: nn.functional.linear(y, t.float()) * 0.1,
    )
    env, policy, start = env_of(dynamics), linear_policy(), begin(B)
    with torch.no_grad():
        assert_parity(env, policy, start, T, engine="fused")
        dynamics.t.logical_not_()
        assert_parity(env, policy, start, T, engine="fused")


# ---------------------------------------------------------------- early stops


class Squares(nn.Module):
    """Beyond the end it is not long until infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((LATENT,), 1.1))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return latent * latent * 4 * self.p + 0 * action.sum(-1, keepdim=True)


class Above(nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, latent: Tensor) -> Tensor:
        return latent.abs().amax(-1, keepdim=True) > self.bound


def ones() -> TensorDict:
    return TensorDict({"latent": torch.ones(B, LATENT)}, [B])


@pytest.mark.parametrize("bound", [2.0, 50.0], ids=["one step", "two steps"])
@pytest.mark.parametrize("policy", ["own", "sampled", "random", "actions"])
def test_gradients_know_nothing_of_steps_past_the_end(policy: str, bound: float) -> None:
    dynamics = Squares()
    env = env_of(dynamics, Above(bound))
    kwargs: dict[str, Any] = {}
    wrt = [dynamics.p]
    if policy == "actions":
        kwargs["actions"] = [torch.randn(B, ACTION, requires_grad=True) for _ in range(20)]
        wrt += kwargs["actions"][: 1 if bound < 10 else 2]
    own = {"own": linear_policy, "sampled": DISTRIBUTIONS["IndependentNormal"]}.get(policy)
    actor = own and own()
    assert_parity(env, actor, ones(), 20, wrt=wrt, engine="fused", **kwargs)
    out, _ = run("fused", env, 20, actor, ones(), **kwargs)
    assert out.shape[-1] == (1 if bound < 10 else 2)
    gradient = torch.autograd.grad(out["next", "reward"].sum(), dynamics.p)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("horizon", [20, 100])
def test_checks_past_the_end_do_not_count(horizon: int, grad: bool) -> None:
    """The distribution would refuse infinity, but eager never gets there."""
    env, policy = env_of(Squares(), Above(50.0)), DISTRIBUTIONS["Normal-validating"]()
    with torch.set_grad_enabled(grad):
        out = assert_parity(env, policy, ones(), horizon, engine="fused")
    assert out.shape[-1] == 2


def test_checks_before_the_end_do_count() -> None:
    env, policy = env_of(Squares(), Above(float("inf"))), DISTRIBUTIONS["Normal-validating"]()
    with pytest.raises(RuntimeError, match="argument check"):
        run("fused", env, 20, policy, ones())


# ---------------------------------------------------------------- gradients of gradients


class Mixed(nn.Module):
    """Some of it is frozen where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(LATENT + ACTION, LATENT)
        self.v = nn.Parameter(torch.randn(LATENT, LATENT) * 0.3)
        self.u = nn.Parameter(torch.rand(LATENT))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        y = self.w(torch.cat([latent, action], -1)) + nn.functional.linear(latent, self.v.detach())
        return torch.tanh(y + self.u.detach() * latent)


def test_create_graph_counts_a_start_made_of_a_weight_once() -> None:
    dynamics = Mixed()
    env, policy, found = env_of(dynamics), linear_policy(), []
    w = dynamics.w.weight
    for engine in ENGINES:
        start = TensorDict({"latent": torch.ones(B, LATENT) * w.tanh().sum(1)}, [B])
        out, _ = run(engine, env, T, policy, start)
        loss = out["next", "reward"].mean()
        (first,) = torch.autograd.grad(loss, w, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w)
        found.append((first.detach(), second))
    for want, got in zip(*found, strict=True):
        assert_close(got, want, "rollout.gradient", "gradient")


@pytest.mark.parametrize("create", [False, True])
def test_what_is_detached_gets_no_gradients(create: bool) -> None:
    dynamics = Mixed()
    out, _ = run("fused", env_of(dynamics), T, linear_policy(), begin(B))
    v, u, w = torch.autograd.grad(
        out["next", "reward"].mean(), [dynamics.v, dynamics.u, dynamics.w.weight],
        create_graph=create, allow_unused=True,
    )  # fmt: skip
    assert v is None
    assert u is None
    assert w is not None


# ---------------------------------------------------------------- memory, faults


def test_memory_goes_back_with_the_backward_pass() -> None:
    """Not only with the graph, unless that is kept."""
    env, policy = env_of(Mixed()), linear_policy()
    out, _ = run("fused", env, T, policy, begin(B))
    loss = out["next", "reward"].sum()
    node = out["next", "reward"].grad_fn
    while "Rollout" not in type(node).__name__:
        node = node.next_functions[0][0]
    lease = weakref.ref(node.lease)
    loss.backward(retain_graph=True)
    assert lease() is not None
    loss.backward()
    gc.collect()
    assert lease() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_lease_from_a_pool_that_others_empty() -> None:
    class Emptied(list):
        def __bool__(self) -> bool:
            return True

    lease = fused_gradient.Lease(Emptied(), 1, 1, [(4,)], torch.float32)
    assert lease.tape.memory.numel() == 4


def test_the_tape_is_counted_in_bytes(monkeypatch: Any) -> None:
    dynamics = Buffered(torch.rand(LATENT), lambda y, latent, t: torch.sin(y * 2) * t)
    env, policy = env_of(dynamics), linear_policy().double()
    env.world_model.double()
    start = TensorDict({"latent": torch.randn(B, LATENT, dtype=torch.float64)}, [B])
    run("fused", env, T, policy, start)
    (loop,) = [p.fused for found in plans.cache_of(env).plans.values() for p in found]
    width = loop._mode(save_all=True).tape_width
    assert width
    monkeypatch.setattr(fused, "_TAPE_BYTES", width * T * B * 8 - 1)
    assert not loop._save_all(T)


def test_a_fault_in_lowering_leaves_the_step_to_the_captured_engine(monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("x" * 300)

    monkeypatch.setattr(fused, "lower", broken)
    env, policy, start = env_of(Mixed()), linear_policy(), begin(B)
    want, _ = run("captured", env, T, policy, start)
    assert_same(run("auto", env, T, policy, start)[0], want)
    assert why_not_fused(env, policy, start) == "lowering failed: ZeroDivisionError: " + "x" * 200


def test_after_a_failed_check_auto_takes_the_captured_engine(monkeypatch: Any) -> None:
    env, policy = env_of(Mixed()), DISTRIBUTIONS["Normal-validating"]()
    want, state = run("captured", env, T, policy, begin(B))
    run("auto", env, T, policy, begin(B))

    def fails(*args: Any, **kwargs: Any) -> Any:
        torch.rand(3)
        raise fused.ChecksFailed

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("eager")

    monkeypatch.setattr(fused.FusedLoop, "run", fails)
    monkeypatch.setattr(type(env), "eager_rollout", never)
    got, after = run("auto", env, T, policy, begin(B))
    assert_same(got, want)
    assert torch.equal(after, state)
