"""`fastwm.accelerate`: envs of torchrl's own classes, and of a user's, on the engines; all else as before."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import (
    DreamerEnv,
    GymEnv,
    RewardSum,
    StepCounter,
    TransformedEnv,
    check_env_specs,
    set_exploration_type,
)
from torchrl.objectives import DreamerActorLoss

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_parity, assert_same, run, why_eager
from tests.imagined_envs import (
    BUILDERS,
    STATE,
    Imagined,
    MomentMatching,
    Spring,
    dreamer,
    imagined,
    spring,
    upstream,
)
from tests.models import BELIEF, CatMLP, make_case, module, spec_env

T = 4


@contextmanager
def ignored_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def own(case: Imagined, seed: int = 0, **kwargs: Any) -> tuple[TensorDictBase, Tensor]:
    """What the env's own class makes of the rollout, and the generator's state afterwards."""
    assert not isinstance(case.env, fastwm.fast_env.FastEnv)
    torch.manual_seed(seed)
    out = case.env.rollout(T, case.policy, tensordict=case.start.clone(), **kwargs)
    return out, torch.get_rng_state()


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("engine", ["eager", "captured", "fused"])
@pytest.mark.parametrize("name", BUILDERS)
def test_an_accelerated_rollout_is_the_envs_own(name: str, engine: str) -> None:
    """Values, keys and their order, shapes, samples: against the env before it was accelerated."""
    case = BUILDERS[name]()
    want, want_state = own(case)
    env = fastwm.accelerate(case.env)
    got, state = run(engine, env, T, case.policy, case.start)
    assert_same(got, want)
    assert torch.equal(state, want_state)


@pytest.mark.parametrize("engine", ["captured", "fused"])
@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_of_every_parameter(name: str, engine: str) -> None:
    case = BUILDERS[name]()
    env = fastwm.accelerate(case.env)
    case.start = case.start.apply(lambda t: t.requires_grad_())
    leaves = [*case.parameters(), *case.start.values(True, True)]
    assert_parity(env, case.policy, case.start, T, wrt=leaves, engine=engine)


@pytest.mark.parametrize("name", BUILDERS)
def test_explain_says_which_engine_runs(name: str) -> None:
    case = BUILDERS[name]()
    env = fastwm.accelerate(case.env)
    assert env.explain(T, case.policy, tensordict=case.start).engine == case.engine
    with torch.no_grad():
        assert env.explain(T, case.policy, tensordict=case.start).engine == case.engine


@pytest.mark.parametrize("name", ["dreamer", "spring"])
def test_from_a_start_that_the_env_draws(name: str) -> None:
    """A ``DreamerEnv`` reset by itself also draws a reward, under "next": the step writes it anew."""
    case = BUILDERS[name]()
    for policy in (case.policy, None):
        torch.manual_seed(1)
        want = case.env.rollout(T, policy)
        env = fastwm.accelerate(copy.deepcopy(case.env))
        for engine in ("captured", "fused"):
            got, _ = run(engine, env, T, policy, None, seed=1)
            assert_same(got, want)


def test_what_a_start_holds_under_next_stays_where_no_step_writes_it() -> None:
    """As ``EnvBase.step`` has it: such entries are the first step's alone, and eager's."""
    case = dreamer()
    for key, reason in (("reward", ""), ("extra", "are not there at every step")):
        env = fastwm.accelerate(copy.deepcopy(case.env))
        start = case.start.clone()
        start["next", key] = torch.full((5, 1), 7.0)
        torch.manual_seed(0)
        want = case.env.rollout(T, case.policy, tensordict=start.clone())
        assert reason in why_eager(env, case.policy, start)
        assert (reason == "") == (why_eager(env, case.policy, start) == "")
        with ignored_warnings():
            got, _ = run("auto", env, T, case.policy, start)
        assert type(got) is type(want)
        for ours, theirs in zip(got.unbind(1), want.unbind(1), strict=True):
            assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
            for name in theirs.keys(True, True):
                assert_close(ours[name], theirs[name], "rollout", str(name))


@pytest.mark.parametrize("stops", [True, False])
def test_from_a_start_that_was_reset_before(stops: bool) -> None:
    """As `DreamerActorLoss` does it: ``auto_reset=False``."""
    case = dreamer()
    start = case.env.reset(case.start.clone())
    kwargs: dict[str, Any] = {"auto_reset": False, "break_when_any_done": stops}
    torch.manual_seed(0)
    want = case.env.rollout(T, case.policy, tensordict=start.copy(), **kwargs)
    env = fastwm.accelerate(case.env)
    for engine in ("captured", "fused"):
        got, _ = run(engine, env, T, case.policy, start, **kwargs)
        assert_same(got, want)
    assert "next" not in start, "the start was written into"


def test_the_env_names_its_device_where_steps_go_on() -> None:
    """``step_and_maybe_reset`` moves each step to the env's device: a start may have named none."""
    case, plain = dreamer(), make_case("linear")
    world_model, base = plain.env([5])._world_model, spec_env(device="cpu")
    ours = fastwm.WorldModelEnv(world_model, base, batch_size=[5])
    fast = fastwm.accelerate(case.env)
    for env, policy, start in (
        (fast, case.policy, case.start),
        (ours, plain.policy, plain.start(5)),
    ):
        assert start.device is None
        for horizon, stops, device in ((T, True, None), (T, False, "cpu"), (1, False, None)) * 2:
            for engine in ("captured", "fused"):
                kwargs = {"break_when_any_done": stops}
                out = assert_parity(env, policy, start, horizon, engine=engine, **kwargs)
                assert out.device == (device and torch.device(device))


def test_given_and_random_actions() -> None:
    case = spring()
    env = fastwm.accelerate(case.env)
    actions = torch.randn(T, 5, 1)
    for policy, kwargs in ((None, {}), (None, {"actions": actions})):
        for engine in ("captured", "fused"):
            assert_parity(env, policy, case.start, T, engine=engine, **kwargs)


def test_a_covariance_that_mixes_a_rows_own_entries_is_captured() -> None:
    """A matrix inverse is no op of row programs; the captured engine takes it."""

    class Filter(MomentMatching):
        def forward(self, action: Tensor, observation: TensorDictBase) -> tuple[Tensor, Tensor]:
            mean, var = super().forward(action, observation)
            return mean, torch.linalg.inv_ex(
                var + torch.eye(var.shape[-1])
            ).inverse.contiguous().contiguous()

    case = imagined()
    case.env.world_model.module.__class__ = Filter
    want, _ = own(case)
    env = fastwm.accelerate(case.env)
    explanation = env.explain(T, case.policy, tensordict=case.start)
    assert explanation.engine == "captured"
    assert "inv" in explanation.passed_over["fused"]
    assert_same(run("auto", env, T, case.policy, case.start)[0], want)


# ---------------------------------------------------------------- losses that hold the env


def actor_loss(case: Imagined) -> DreamerActorLoss:
    value = module(CatMLP(STATE + BELIEF, 1, 8, 1), ["state", "belief"], ["state_value"])
    loss = DreamerActorLoss(case.policy, value, case.env, imagination_horizon=T)
    loss.make_value_estimator()
    return loss


def test_the_actor_loss_that_holds_the_env_is_accelerated_too() -> None:
    """The env is accelerated in place; the actor's gradients go through the frozen world model."""
    case = dreamer()
    loss = actor_loss(case)
    results = []
    for accelerated in (False, True):
        if accelerated:
            fastwm.accelerate(case.env, "fused")
        case.policy.zero_grad()
        torch.manual_seed(0)
        losses, data = loss(case.start.clone())
        losses["loss_actor"].backward()
        grads = [p.grad.clone() for p in case.policy.parameters()]
        assert all(p.grad is None for p in case.env.parameters())
        results.append((losses["loss_actor"].detach(), data, grads))
    (want, want_data, want_grads), (got, data, grads) = results
    assert cache_of(case.env).traces == 1
    assert_close(got, want, "rollout", "loss_actor")
    assert_same(data, want_data)
    for g, w in zip(grads, want_grads, strict=True):
        assert w.abs().sum() > 0
        assert_close(g, w, "rollout.gradient", "gradient of the actor")


# ---------------------------------------------------------------- never stale


def changed_weight(case: Imagined) -> None:
    with torch.no_grad():
        next(case.env.world_model.parameters()).mul_(3)


def changed_attribute(case: Imagined) -> None:
    case.env.dt = 0.25


def replaced_module(case: Imagined) -> None:
    torch.manual_seed(9)
    case.env.world_model = Spring().world_model


def another_method(case: Imagined) -> None:
    def pull(self: Any, force: Tensor, position: Tensor) -> Tensor:
        return 2 * force - position

    case.undo = lambda method=Spring.pull: setattr(Spring, "pull", method)  # type: ignore[attr-defined]
    Spring.pull = pull  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [changed_weight, changed_attribute, replaced_module, another_method]
)
@pytest.mark.parametrize("engine", ["captured", "fused"])
def test_never_stale(engine: str, change: Callable[[Imagined], None]) -> None:
    case = spring()
    env = fastwm.accelerate(case.env)
    try:
        before, _ = run(engine, env, T, case.policy, case.start)
        run(engine, env, T, case.policy, case.start)
        assert cache_of(env).traces == 1
        change(case)
        got, _ = run("auto", env, T, case.policy, case.start)
        want, _ = run("eager", env, T, case.policy, case.start)
        assert_same(got, want)
        assert not torch.equal(before["next", "reward"], want["next", "reward"])
    finally:
        getattr(case, "undo", lambda: None)()


def test_the_exploration_type_is_seen() -> None:
    case = dreamer()
    env = fastwm.accelerate(case.env)
    for kind in ("RANDOM", "DETERMINISTIC", "RANDOM"):
        with set_exploration_type(kind):
            assert_parity(env, case.policy, case.start, T, engine="fused")


# ---------------------------------------------------------------- flags


def test_a_finished_row_ends_the_rollout() -> None:
    case = spring()
    case.env.limit = 1.5
    want, _ = own(case)
    assert want.shape[1] < T
    env = fastwm.accelerate(case.env)
    for engine in ("captured", "fused"):
        assert_same(run(engine, env, T, case.policy, case.start)[0], want)


def test_rows_that_would_be_reset_are_left_to_the_env() -> None:
    case = spring()
    case.env.limit = 1.5
    want, _ = own(case, break_when_any_done=False)
    assert want["next", "done"].any()
    assert want.shape[1] == T
    env = fastwm.accelerate(case.env)
    assert why_eager(env, case.policy, case.start, break_when_any_done=False) == (
        "finished rows are reset"
    )
    with pytest.warns(UserWarning, match="finished rows are reset"):
        got, _ = run("auto", env, T, case.policy, case.start, break_when_any_done=False)
    assert_same(got, want)


def test_a_dreamer_env_never_resets_a_row() -> None:
    """Its ``maybe_reset`` does nothing, even where the model says done."""
    case = dreamer()
    head = module(lambda state: state[..., :1] > 0, ["state"], ["done"])
    case.env.world_model.module.append(head)
    want, _ = own(case, break_when_any_done=False)
    assert want["next", "done"].any()
    assert not want["next", "done"].all()
    env = fastwm.accelerate(case.env)
    for engine in ("captured", "fused"):
        got, _ = run(engine, env, T, case.policy, case.start, break_when_any_done=False)
        assert_same(got, want)
    case.env.world_model.module.pop(-1)


def test_a_start_that_is_done_is_not_reset_twice() -> None:
    """The eager path goes on from the reset that was made, and a reset may leave a row done."""

    class Done(Spring):
        def _reset(self, tensordict: Any = None, **kwargs: Any) -> TensorDictBase:
            self.resets += 1
            out = super()._reset(tensordict, **kwargs)
            return out.set("done", torch.ones(*out.batch_size, 1, dtype=torch.bool))

        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            if tensordict.get("position").sum() == 0:  # the trace refuses
                raise AssertionError
            return super()._step(tensordict)

    results = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        env = Done((5,))
        env._allow_done_after_reset = True
        if accelerated:
            fastwm.accelerate(env)
        env.resets = 0
        torch.manual_seed(1)
        with ignored_warnings():
            out = env.rollout(T, spring().policy, break_when_any_done=True)
        results.append((out, env.resets))
    (want, resets), (got, resets_too) = results
    assert resets == resets_too == 1
    assert_same(got, want)


# ---------------------------------------------------------------- what an env does by itself


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("rollout", {}),
        ("_rollout_stop_early", {}),
        ("maybe_reset", {"break_when_any_done": False}),
        ("step_and_maybe_reset", {"break_when_any_done": False}),
    ],
)
def test_a_method_of_its_own_in_the_engines_place(name: str, kwargs: dict[str, Any]) -> None:
    calls: list[str] = []

    def method(self: Any, *args: Any, **kw: Any) -> Any:
        calls.append(name)
        return getattr(super(OwnSpring, self), name)(*args, **kw)

    OwnSpring = type("OwnSpring", (Spring,), {name: method})
    env = fastwm.accelerate(OwnSpring())
    case = spring()
    assert why_eager(env, case.policy, case.start, **kwargs) == f"OwnSpring has a {name} of its own"
    with pytest.warns(UserWarning, match=f"a {name} of its own"):
        run("auto", env, T, case.policy, case.start, **kwargs)
    assert calls


def test_an_own_rand_action_counts_only_without_a_policy() -> None:
    class OwnSpring(Spring):
        def rand_action(self, tensordict: Any = None) -> Any:
            return tensordict.set("action", torch.full((*tensordict.batch_size, 1), 0.5))

    env, case = fastwm.accelerate(OwnSpring()), spring()
    assert why_eager(env, case.policy, case.start) == ""
    assert why_eager(env, None, case.start) == "OwnSpring has a rand_action of its own"
    with pytest.warns(UserWarning, match="rand_action"):
        out, _ = run("auto", env, T, None, case.start)
    assert (out["action"] == 0.5).all()


def test_a_step_that_counts_runs_eagerly_and_counts_once_a_step() -> None:
    class Counting(Spring):
        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            self.steps = getattr(self, "steps", 0) + 1
            return super()._step(tensordict)

    env, case = fastwm.accelerate(Counting()), spring()
    with ignored_warnings():
        for times in range(1, 4):
            run("auto", env, T, case.policy, case.start)
            assert env.steps == times * T


# ---------------------------------------------------------------- errors


def same_error(act: Callable[[Any], Any], case: Imagined) -> Exception:
    """What the env raises by itself, after it was seen to raise the same accelerated."""
    with pytest.raises(Exception) as want:  # noqa: PT011 (whatever it is)
        act(case.env)
    env = fastwm.accelerate(copy.deepcopy(case.env))
    with ignored_warnings(), pytest.raises(type(want.value)) as got:
        act(env)
    assert type(got.value) is type(want.value)
    assert str(got.value) == str(want.value)
    return want.value


def test_the_errors_are_the_envs_own() -> None:
    case = spring()
    lost = module(nn.Linear(1, 1), ["nowhere"], ["action"])
    error = same_error(lambda env: env.rollout(T, lost, tensordict=case.start.clone()), case)
    assert "nowhere" in str(error)
    wide = TensorDict({k: torch.randn(5, 2) for k in ("position", "velocity")}, [5])
    same_error(lambda env: env.rollout(T, case.policy, tensordict=wide.clone()), case)
    same_error(lambda env: env.rollout(T, case.policy, auto_reset=False), case)
    same_error(
        lambda env: env.rollout(T, case.policy, tensordict=case.start.clone(), set_truncated=True),
        case,
    )
    same_error(lambda env: env.rollout(T, tensordict=TensorDict({}, [3])), imagined())
    without = upstream()
    error = same_error(lambda env: env.rollout(T, without.policy), without)
    assert "requires a tensordict carrying the initial latent" in str(error)


def test_an_engine_asked_for_by_name_that_cannot_run_says_why() -> None:
    case = imagined()
    case.env.world_model.module.register_forward_hook(lambda *args: None)
    env = fastwm.accelerate(case.env, "fused")
    with pytest.raises(RuntimeError, match="cannot run this rollout: a hook on MomentMatching"):
        env.rollout(T, case.policy, tensordict=case.start)


def test_a_transformed_env_is_refused() -> None:
    env = TransformedEnv(dreamer().env, RewardSum())
    with pytest.raises(TypeError, match=r"TransformedEnv.*fastwm\.accelerate\(env\.base_env\)"):
        fastwm.accelerate(env)


def test_a_real_env_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a model-based env .*, not a GymEnv"):
        fastwm.accelerate(GymEnv("Pendulum-v1"))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        fastwm.accelerate(spring().env, "fast")
    with pytest.raises(ValueError, match="fused_weights"):
        fastwm.accelerate(spring().env, fused_weights=torch.float16)
    env = spring().env
    with pytest.raises(ValueError, match="fused_noise"):
        fastwm.accelerate(env, fused_noise="mine")
    assert type(env) is Spring, "refused, and changed all the same"


# ---------------------------------------------------------------- the object


def test_it_is_the_same_object_of_a_class_below_its_own() -> None:
    case = dreamer()
    assert fastwm.accelerate(case.env) is case.env
    assert isinstance(case.env, DreamerEnv)
    assert issubclass(type(case.env), DreamerEnv)
    assert type(case.env) is type(fastwm.accelerate(dreamer().env))
    assert not isinstance(dreamer().env, fastwm.fast_env.FastEnv), "another env was changed too"


def test_twice_changes_the_backend_alone() -> None:
    case = spring()
    cls = type(fastwm.accelerate(case.env))
    run("auto", case.env, T, case.policy, case.start)
    fastwm.accelerate(case.env, "captured")
    assert type(case.env) is cls
    assert case.env.backend == "captured"
    assert case.env.explain(T, case.policy, tensordict=case.start).engine == "captured"
    fastwm.accelerate(case.env, "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.env.rollout(T, case.policy, tensordict=case.start)


def test_an_env_of_ours_gets_the_backend() -> None:
    env = make_case("linear").env([3])
    cls = type(env)
    assert fastwm.accelerate(env, "captured") is env
    assert type(env) is cls
    assert env.backend == "captured"


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_are_accelerated_too(name: str, copied: Callable[[Any], Any]) -> None:
    case = BUILDERS[name]()
    env = fastwm.accelerate(case.env, "captured")
    want, _ = run("fused", env, T, case.policy, case.start)
    other = copied(env)
    assert type(other) is type(env)
    assert other.backend == "captured"
    assert cache_of(other) is not cache_of(env)
    assert_same(run("fused", other, T, case.policy, case.start)[0], want)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert_same(run("fused", env, T, case.policy, case.start)[0], want)


def test_step_and_reset_are_the_envs_own() -> None:
    case = spring()
    start = case.env.reset(case.start.clone())
    start.set("action", torch.ones(5, 1))
    want = case.env.step(start.clone())
    fastwm.accelerate(case.env)
    assert_same(case.env.step(start.clone()), want)


def test_what_torchrl_does_with_an_env_it_does_with_this_one() -> None:
    """Its own check of the specs, a shallow copy, and a transform around the env."""
    case = dreamer()
    wrapped = copy.deepcopy(case.env).append_transform(StepCounter(max_steps=5))
    torch.manual_seed(0)
    want = wrapped.rollout(T, case.policy, tensordict=case.start.clone())

    env = fastwm.accelerate(case.env)
    check_env_specs(env)
    assert cache_of(copy.copy(env)) is not cache_of(env)
    torch.manual_seed(0)
    wrapped = env.append_transform(StepCounter(max_steps=5))
    assert_same(wrapped.rollout(T, case.policy, tensordict=case.start.clone()), want)


def test_check_parity_takes_it() -> None:
    case = dreamer()
    report = fastwm.check_parity(fastwm.accelerate(case.env), case.policy, case.start, T)
    assert report.ok, report
    assert [e.refused for e in report.engines] == ["", ""]
