"""Plans: how many are made, how long they live, what is remembered, and that nothing else keeps them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.distributions import Normal
from torch.overrides import BaseTorchFunctionMode

import fastwm
from fastwm import plan_cache
from fastwm.plan import cache_of, plan_for
from fastwm.request import Request
from fastwm.rollout import start_of
from tests.compare import assert_same, run, why_eager
from tests.models import ACTION, LATENT, linear_policy, make_case, module

B, T = 3, 4


def traces(env: Any) -> int:
    return cache_of(env).traces


# ---------------------------------------------------------------- when a trace is made


def test_one_kind_of_call_is_traced_once() -> None:
    case = make_case("mlp_sampled")
    env = case.env([])
    for horizon in (1, 4, 9):
        for _ in range(2):
            run("captured", env, horizon, case.policy, case.start(B))
    assert traces(env) == 1
    run("captured", env, T, case.policy, case.start(B + 1))
    assert traces(env) == 2
    run("captured", env, T, case.policy, case.start(B))
    assert traces(env) == 2


def test_a_refusal_is_remembered() -> None:
    case = make_case("linear")
    env = case.env([B])
    branches = module(
        lambda z: z[..., :ACTION] * (1.0 if z.sum() > 0 else 2.0), ["latent"], ["action"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            run("auto", env, T, branches, case.start(B))
    assert traces(env) == 1
    branches.in_keys.append("latent")  # what the verdict rests on has changed
    why_eager(env, branches, case.start(B))
    assert traces(env) == 2


@pytest.mark.filterwarnings("ignore:fastwm")
@pytest.mark.parametrize("first", ["bad", "good"])
@pytest.mark.parametrize("fault", ["nan", "index"])
def test_one_bad_call_is_no_verdict_on_the_next(first: str, fault: str) -> None:
    """Bad data raises what eager raises, whether or not there is a plan; good data is captured."""
    case, table = make_case("linear"), nn.Embedding(2, ACTION)
    env = case.env([B])
    policies: dict[str, Any] = {
        "nan": lambda td: td.set(
            "action", Normal(td["latent"][..., :ACTION], 1.0, validate_args=True).sample()
        ),
        "index": lambda td: td.set("action", table((td["latent"].abs() > 1e6).sum(-1))),
    }
    errors = {"nan": ValueError, "index": IndexError}
    good, bad = case.start(B), case.start(B)
    bad["latent"][:] = torch.nan if fault == "nan" else 1e9

    def fails() -> None:
        with pytest.raises(errors[fault]):
            run("auto", env, T, policies[fault], bad)

    if first == "bad":
        fails()
    want, _ = run("eager", env, T, policies[fault], good)
    assert_same(run("captured", env, T, policies[fault], good)[0], want)
    fails()
    assert_same(run("captured", env, T, policies[fault], good)[0], want)


def test_a_step_that_changes_python_state_is_asked_twice() -> None:
    """Once might be a cache that fills itself."""
    case, asked = make_case("linear"), []
    env = case.env([B])

    def policy(td: TensorDictBase) -> TensorDictBase:
        asked.append(1)
        return td.set("action", td["latent"][..., :ACTION])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            run("auto", env, T, policy, case.start(B))
    assert traces(env) == 2
    assert len(asked) == 5 * T  # the traces left nothing behind


def test_a_step_that_stops_changing_state_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache.Refusal, "tries", 3)

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.counting = 0, True

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            self.calls += self.counting
            return latent[..., :ACTION]

    case, net = make_case("linear"), Counts()
    env, policy = case.env([B]), module(net, ["latent"], ["action"])
    for _ in range(3):
        assert "Python state" in why_eager(env, policy, case.start(B))
    net.counting = False
    found = [why_eager(env, policy, case.start(B)) for _ in range(plan_cache.RETRY + 1)]
    assert found[-1] == ""


def test_a_new_lambda_over_the_same_things_is_the_same_policy() -> None:
    case = make_case("linear")
    env, net = case.env([B]), nn.Linear(LATENT, ACTION)

    def fresh() -> Any:
        return lambda td: td.set("action", net(td["latent"]))

    for _ in range(20):
        run("captured", env, T, fresh(), case.start(B))
    assert traces(env) == 1


def test_a_policy_that_is_new_at_every_call_ends_on_the_eager_path() -> None:
    case = make_case("linear")
    env, start = case.env([B]), case.start(B)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            env.rollout(2, linear_policy(), tensordict=start)
    assert ["never used twice" in str(w.message) for w in caught] == [True]
    assert traces(env) <= plan_cache.PATIENCE + 3
    # One that stays comes through in the end.
    policy = linear_policy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(plan_cache.PATIENCE + 1):
            env.rollout(2, policy, tensordict=start)
    before = traces(env)
    for _ in range(plan_cache.PATIENCE + 1):
        env.rollout(2, policy, tensordict=start)
    assert traces(env) == before
    assert cache_of(env).unused == 0


def test_engines_asked_for_by_name_are_always_given_a_plan() -> None:
    case = make_case("linear")
    env = case.env([B])
    for _ in range(plan_cache.PATIENCE * 2):
        run("captured", env, 2, linear_policy(), case.start(B))


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "KEYS", 4)
    monkeypatch.setattr(plan_cache, "PATIENCE", 1000)
    case = make_case("linear")
    env = case.env([])
    for batch in range(1, 10):
        run("captured", env, 2, case.policy, case.start(batch))
    assert len(cache_of(env).plans) == 4
    assert len(env._cache["_zero_done"]) <= 4
    # The latest used stay.
    before = traces(env)
    run("captured", env, 2, case.policy, case.start(9))
    assert traces(env) == before
    run("captured", env, 2, case.policy, case.start(1))
    assert traces(env) == before + 1


def test_the_states_remembered_per_kind_of_call_are_bounded() -> None:
    case = make_case("linear")
    env, net = case.env([B]), nn.Dropout(0.1)
    policy = module(nn.Sequential(nn.Linear(LATENT, ACTION), net), ["latent"], ["action"])
    for i in range(plan_cache.VARIANTS + 3):
        net.p = 0.01 * i
        run("captured", env, 2, policy, case.start(B))
    (variants,) = cache_of(env).plans.values()
    assert len(variants) == plan_cache.VARIANTS
    before = traces(env)
    net.p = 0.01 * (plan_cache.VARIANTS + 1)
    run("captured", env, 2, policy, case.start(B))
    assert traces(env) == before


@pytest.mark.parametrize(
    "kind", ["grad", "start", "dtype", "actions", "names", "key order", "compile"]
)
def test_calls_of_another_kind_have_plans_of_their_own(kind: str) -> None:
    case = make_case("linear")
    env, start = case.env([]), case.start(B)
    run("captured", env, T, case.policy, start)
    arguments: dict[str, Any] = {}
    mode: Any = torch.enable_grad()
    policy: Any = case.policy
    if kind == "grad":
        mode = torch.no_grad()
    elif kind == "start":
        start = case.start(B, requires_grad=True)
    elif kind == "dtype":
        start["more"] = torch.ones(B, dtype=torch.int32)
    elif kind == "actions":
        policy, arguments = None, {"actions": torch.randn(T, B, ACTION)}
    elif kind == "names":
        start.names = ["rows"]
    elif kind == "key order":
        start = TensorDict({"more": torch.ones(B), "latent": start["latent"]}, [B])
        run("captured", env, T, case.policy, start)
        start = TensorDict({"latent": start["latent"], "more": torch.ones(B)}, [B])
        cache_of(env).traces = 1
    elif kind == "compile":
        env.compile(backend="eager")
    with mode:
        run("captured", env, T, policy, start, **arguments)
    assert traces(env) == 2


def test_plans_are_found_without_asking_the_policy() -> None:
    """A second call runs no module at all."""
    case = make_case("linear")
    env, start = case.env([B]), case.start(B)
    run("captured", env, T, case.policy, start)
    request = Request(T, case.policy, tensordict=start)
    calls: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda m, a: calls.append(m))
    try:
        plan_for(env, request, start_of(env, request), None)
    finally:
        handle.remove()
    assert not calls


# ---------------------------------------------------------------- warnings


def test_the_reason_is_warned_of_once_at_the_callers_line() -> None:
    case = make_case("linear")
    env = case.env([B])
    with pytest.warns(UserWarning, match="a callback") as caught:
        env.rollout(2, case.policy, lambda *_: None, tensordict=case.start(B))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.rollout(2, case.policy, lambda *_: None, tensordict=case.start(B))
        env.rollout(2, case.policy, tensordict=case.start(B))
    # Another reason is another warning.
    case.policy.module.linear.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook on Linear"):
        env.rollout(2, case.policy, tensordict=case.start(B))


def test_eager_asked_for_by_name_does_not_warn() -> None:
    case = make_case("linear")
    with warnings.catch_warnings(), fastwm.backend("eager"):
        warnings.simplefilter("error")
        case.env([B]).rollout(2, case.policy, lambda *_: None, tensordict=case.start(B))


# ---------------------------------------------------------------- lifetime and copies


@pytest.fixture
def used() -> tuple[Any, Any, Any]:
    case = make_case("rssm_sampled")
    env = case.env([B])
    run("captured", env, T, case.policy, case.start(B))
    run("captured", env, T, None, case.start(B))
    return case, env, case.start(B)


@pytest.mark.parametrize("policy", ["module", "random", "lambda", "holds-the-env"])
def test_an_env_and_its_plans_go_when_nobody_holds_them(policy: str) -> None:
    case = make_case("linear")

    def kinds(env: Any, inner: Any) -> dict[str, Any]:
        return {
            "module": inner,
            "random": None,
            "lambda": lambda td: td.set("action", inner(td.copy())["action"]),
            "holds-the-env": lambda td: td.set("action", env.full_action_spec["action"].zero()),
        }

    env = case.env([B])
    run("captured", env, T, kinds(env, case.policy)[policy], case.start(B))
    assert traces(env) == 1
    gone = [
        weakref.ref(env),
        weakref.ref(cache_of(env).plans and next(iter(env._plans.plans.values()))[0]),
    ]
    del env
    gc.collect()
    assert [r() for r in gone] == [None, None]


def test_a_policy_goes_when_its_plan_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "KEYS", 2)
    case = make_case("linear")
    env = case.env([B])
    first = linear_policy()
    gone = weakref.ref(first)
    run("captured", env, T, first, case.start(B))
    del first
    for _ in range(3):
        run("captured", env, T, linear_policy(), case.start(B))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_of_a_used_env(how: str, used: tuple[Any, Any, Any]) -> None:
    case, env, start = used
    want, _ = run("captured", env, T, case.policy, start)
    if how == "deepcopy":
        other = copy.deepcopy(env)
    elif how == "copy":
        other = copy.copy(env)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(env))
    else:
        buffer = io.BytesIO()
        torch.save(env, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert cache_of(other) is not cache_of(env)
    assert traces(other) == 0
    got, _ = run("captured", other, T, case.policy, start)
    assert_same(got, want)
    if how != "copy":  # a copy of its own: its weights are not the original's
        with torch.no_grad():
            for p in other.world_model.parameters():
                p.zero_()
        changed, _ = run("captured", other, T, case.policy, start)
        assert not changed["next", "reward"].any()
        assert_same(run("captured", env, T, case.policy, start)[0], want)


def test_plans_are_in_no_state_dict(used: tuple[Any, Any, Any]) -> None:
    case, env, _ = used
    assert list(env.state_dict()) == list(case.env([B]).state_dict())
    assert "plan" not in repr(env).lower()


def test_one_policy_on_two_envs() -> None:
    one, two = make_case("linear"), make_case("linear", seed=1)
    envs = [one.env([B]), two.env([B])]
    start = one.start(B)
    for _ in range(2):
        for env in envs:
            want, _ = run("eager", env, T, one.policy, start)
            assert_same(run("captured", env, T, one.policy, start)[0], want)
    assert [traces(env) for env in envs] == [1, 1]


# ---------------------------------------------------------------- threads, transforms


def test_threads_share_an_env() -> None:
    case = make_case("mlp")
    env = case.env([])
    starts = [case.start(batch) for batch in (1, 2, 3)]
    with torch.no_grad():
        wants = [run("eager", env, T, case.policy, s)[0] for s in starts]
    errors: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            with torch.no_grad(), fastwm.backend("captured"):
                for i in range(12):
                    k = (i + offset) % 3
                    out = env.rollout(T, case.policy, tensordict=starts[k])
                    assert_same(out, wants[k])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert traces(env) == 3


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("vmap", "torch.func"),
        ("grad", "torch.func"),
        ("mode", "mode is active"),
        ("jit", "inside torch.jit.trace"),
        ("jvp", "forward-mode"),
    ],
)
def test_inside_transforms_of_pytorch_the_eager_path_runs(where: str, reason: str) -> None:
    case = make_case("linear")
    env, latent = case.env([B]), case.start(B)["latent"]
    run("captured", env, 2, case.policy, case.start(B))
    reasons: list[str] = []

    def rewards(latent: torch.Tensor) -> torch.Tensor:
        start = TensorDict({"latent": latent}, [B])
        reasons.append(why_eager(env, case.policy, start))
        out = env.rollout(2, case.policy, tensordict=start, break_when_any_done=False)
        return out["next", "reward"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = rewards(latent).detach()
        if where == "vmap":
            got = torch.vmap(rewards)(torch.stack([latent, latent + 1]))[0]
            torch.testing.assert_close(got, want)
        elif where == "grad":
            got = torch.func.grad(lambda z: rewards(z).sum())(latent)
            z = latent.clone().requires_grad_()
            (expected,) = torch.autograd.grad(rewards(z).sum(), z)
            torch.testing.assert_close(got, expected)
            reasons.pop()
        elif where == "jit":
            case.world_model.requires_grad_(False)
            case.policy.requires_grad_(False)
            want = rewards(latent)
            traced = torch.jit.trace(rewards, latent + 1, check_trace=False)
            torch.testing.assert_close(traced(latent), want)
        elif where == "mode":
            with BaseTorchFunctionMode():
                torch.testing.assert_close(rewards(latent), want)
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(latent, torch.ones_like(latent))
                tangent = torch.autograd.forward_ad.unpack_dual(rewards(dual)).tangent
            assert tangent is not None
            assert tangent.abs().sum() > 0
    assert reason in reasons[-1]


def test_a_first_call_takes_less_than_a_second() -> None:
    """Generous on purpose; bench/test_plan_overhead.py has the figures."""
    case = make_case("rssm_sampled")
    env, start = case.env([B]), case.start(B)
    begun = time.process_time()
    run("captured", env, T, case.policy, start)
    assert time.process_time() - begun < 5
