"""`WorldModelEnv.rollout`: values, gradients, and every argument of `EnvBase.rollout`.

All tests run twice: on the eager path, which is the definition, and on whatever engine takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, set_interaction_type
from torch import nn
from torchrl.envs import step_mdp

import fastwm
from tests.compare import assert_same
from tests.models import (
    ACTION,
    CASES,
    LATENT,
    OBS,
    counting_world_model,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    plain_rollout,
    sampled_actor,
    spec_env,
)

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 3, 6
BATCHES = [(), (B,), (2, B)]
ALL = ("done", "terminated", "truncated")


def start(*batch: int, latent: int = LATENT) -> TensorDict:
    return TensorDict({"latent": torch.randn(*batch, latent)}, batch)


def linear_env(*batch: int, **kwargs: Any) -> fastwm.WorldModelEnv:
    torch.manual_seed(0)
    return fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=batch, **kwargs)


def counting_env(
    done_at: float,
    *,
    spec: Sequence[str] = ("done", "terminated"),
    flags: Sequence[str] = ("done",),
) -> fastwm.WorldModelEnv:
    """Latents go up by one a step; a row is done from ``done_at`` on."""
    wm = counting_world_model(done_at=done_at, flags=flags)
    return fastwm.WorldModelEnv(wm, spec_env(done=spec), batch_size=[B])


def counts(*values: float) -> TensorDict:
    return TensorDict(
        {"latent": torch.tensor(values, dtype=torch.float32).unsqueeze(-1)}, [len(values)]
    )


def listed(td: TensorDictBase, *key: str) -> list:
    return td[key].squeeze(-1).tolist()


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_a_loop_over_the_parts(name: str, batch: tuple[int, ...]) -> None:
    case = make_case(name)
    begin = case.start(*batch)
    torch.manual_seed(1)
    want = plain_rollout(case, begin, T)
    torch.manual_seed(1)
    got = case.env(batch).rollout(T, case.policy, tensordict=begin, break_when_any_done=False)
    assert got.batch_size == (*batch, T)
    for key, value in want.items():
        assert got.get(key).shape == value.shape, key
        torch.testing.assert_close(got.get(key), value, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_loop_over_the_parts(name: str) -> None:
    case = make_case(name)
    wanted = [*case.world_model.step_module.parameters(), *case.policy.parameters()]

    def gradients(run: Any) -> list[torch.Tensor | None]:
        torch.manual_seed(1)
        begin = case.start(B, requires_grad=True)
        total = run(begin)
        leaves = [begin.get(key) for key in case.latents] + wanted
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    reward = (
        "next",
        *((case.reward_key,) if isinstance(case.reward_key, str) else case.reward_key),
    )
    env = case.env([B])
    got = gradients(
        lambda begin: (
            env.rollout(T, case.policy, tensordict=begin.copy(), break_when_any_done=False)[reward]
            .square()
            .sum()
        )
    )
    want = gradients(lambda begin: plain_rollout(case, begin, T)[_unravel(reward)].square().sum())
    assert any(g is not None and g.abs().sum() > 0 for g in want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))


def _unravel(key: tuple[str, ...]) -> Any:
    return ("next", key[1]) if len(key) == 2 else key


def test_no_grad_gives_no_graph() -> None:
    with torch.no_grad():
        out = linear_env(B).rollout(T, linear_policy(), tensordict=start(B))
    assert not any(v.requires_grad for v in out.values(True, True))


def test_keys_and_names_are_those_of_every_env() -> None:
    out = linear_env(2, B).rollout(T, linear_policy(), tensordict=start(2, B))
    assert set(out.keys(True, True)) == {
        "latent",
        "action",
        "done",
        "terminated",
        ("next", "latent"),
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
    }
    assert out.names == [None, None, "time"]
    assert out["next"].batch_size == (2, B, T)
    assert out.device == torch.device("cpu") or out.device is None


def test_each_latent_is_the_one_before_advanced() -> None:
    out = linear_env(B).rollout(T, linear_policy(), tensordict=start(B))
    assert torch.equal(out["latent"][:, 1:], out["next", "latent"][:, :-1])
    assert torch.equal(out["done"][:, 1:], out["next", "done"][:, :-1])


def test_context_stays_as_it_was() -> None:
    case = make_case("context")
    begin = case.start(B)
    out = case.env([B]).rollout(T, case.policy, tensordict=begin.clone())
    assert torch.equal(out["goal"], begin["goal"].unsqueeze(1).expand(B, T, 3))


def test_a_rollout_is_the_callers() -> None:
    """A later rollout writes into none of an earlier one's tensors, nor do they share memory."""
    env, policy = linear_env(B), linear_policy()
    first = env.rollout(T, policy, tensordict=start(B))
    kept = first.clone()
    second = env.rollout(T, policy, tensordict=start(B))
    assert (first == kept).all()
    second.apply_(lambda x: x.data.zero_() if x.dtype.is_floating_point else x)
    assert (first == kept).all()


def test_the_starts_latent_is_not_written_to() -> None:
    begin = start(B)
    latent, before = begin["latent"], begin["latent"].clone()
    out = linear_env(B).rollout(T, linear_policy(), tensordict=begin)
    out["latent"].data.zero_()
    assert torch.equal(latent, before)


def test_new_weights_are_seen() -> None:
    env, policy = linear_env(B), linear_policy()
    begin = start(B)
    env.rollout(T, policy, tensordict=begin.clone())
    with torch.no_grad():
        for p in [*policy.parameters(), *env.world_model.parameters()]:
            p.zero_()
    out = env.rollout(T, policy, tensordict=begin.clone())
    assert not out["action"].any()
    assert not out["next", "latent"].any()


@pytest.mark.parametrize("batch", [(1,), (17,), (129,)])
@pytest.mark.parametrize("horizon", [1, 2, 15])
def test_any_batch_and_horizon_on_one_env(batch: tuple[int, ...], horizon: int) -> None:
    case = make_case("linear")
    env, begin = case.env([]), case.start(*batch)
    want = plain_rollout(case, begin, horizon)
    got = env.rollout(horizon, case.policy, tensordict=begin)
    assert got.batch_size == (*batch, horizon)
    torch.testing.assert_close(got["next", "reward"], want["next", "reward"])


# ---------------------------------------------------------------- policy, trust_policy


def test_without_a_policy_actions_come_from_the_spec() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(bounded=True), batch_size=[B])
    out = env.rollout(T, tensordict=start(B))
    assert out["action"].shape == (B, T, ACTION)
    assert out["action"].std(1).amin() > 0
    assert out["action"].abs().max() <= 1


@pytest.mark.parametrize("kind", ["tensordict-module", "nn-module", "td-callable", "function"])
def test_kinds_of_policy(kind: str) -> None:
    net = nn.Linear(LATENT, ACTION)
    policies: dict[str, Any] = {
        "tensordict-module": module(net, ["latent"], ["action"]),
        # torchrl feeds it the observation entries, here the latent
        "nn-module": net,
        "td-callable": lambda td: td.set("action", net(td["latent"])),
        # a callable that returns a tensordict of its own
        "function": lambda td: TensorDict({"action": net(td["latent"])}, td.batch_size),
    }
    out = linear_env(B).rollout(
        T, policies[kind], tensordict=start(B), trust_policy=kind in ("td-callable", "function")
    )
    torch.testing.assert_close(out["action"], net(out["latent"]))


def test_trust_policy_hands_the_tensordict_to_any_callable() -> None:
    seen = []

    def policy(td: Any) -> Any:
        seen.append(type(td))
        return td.set("action", torch.zeros(B, ACTION))

    linear_env(B).rollout(2, policy, tensordict=start(B), trust_policy=True)
    assert seen
    assert all(issubclass(t, TensorDictBase) for t in seen)


class Schedule:
    """A policy with Python state: its action is the number of times it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        return td.set("action", self.next(td.batch_size))

    def next(self, batch: torch.Size) -> torch.Tensor:
        self.asked += 1
        return torch.full((*batch, ACTION), float(self.asked))


class ScheduleModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule()

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.schedule.next(latent.shape[:-1])


class ScheduleBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return self.asked.expand(*latent.shape[:-1], ACTION).clone()


def schedule_iterator() -> Any:
    numbers = iter(range(1, 99))
    return lambda td: td.set("action", torch.full((*td.batch_size, ACTION), float(next(numbers))))


def schedule_list() -> Any:
    asked: list[int] = []

    def policy(td: TensorDictBase) -> TensorDictBase:
        asked.append(1)
        return td.set("action", torch.full((*td.batch_size, ACTION), float(len(asked))))

    return policy


@pytest.mark.parametrize(
    "make",
    [
        Schedule,
        lambda: module(ScheduleModule(), ["latent"], ["action"]),
        lambda: module(ScheduleBuffer(), ["latent"], ["action"]),
        schedule_iterator,
        schedule_list,
    ],
    ids=["callable", "module", "buffer", "iterator", "list"],
)
def test_a_policy_with_state_is_asked_once_a_step(make: Any) -> None:
    env, policy = linear_env(B), make()
    for rollout in range(3):
        out = env.rollout(4, policy, tensordict=start(B), trust_policy=True)
        want = [4.0 * rollout + i for i in (1, 2, 3, 4)]
        assert out["action"][0, :, 0].tolist() == want


def test_sampled_actions_follow_the_seed() -> None:
    env, actor, begin = linear_env(B), sampled_actor(), start(B)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(env.rollout(T, actor, tensordict=begin.clone())["action"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_what_the_policy_writes_besides_the_action_is_returned() -> None:
    out = linear_env(B).rollout(T, sampled_actor(return_log_prob=True), tensordict=start(B))
    assert out["loc"].shape == out["scale"].shape == (B, T, ACTION)
    assert out["action_log_prob"].shape == (B, T)
    assert not {"loc", "scale", "action_log_prob"} & set(out["next"].keys())


def test_exploration_type_reaches_the_policy() -> None:
    env, actor, begin = linear_env(B), sampled_actor(), start(B)
    env.rollout(T, actor, tensordict=begin.clone())
    with set_interaction_type("deterministic"):
        one, two = (env.rollout(T, actor, tensordict=begin.clone())["action"] for _ in range(2))
    assert torch.equal(one, two)


# ---------------------------------------------------------------- actions


@pytest.mark.parametrize("form", ["list", "tensor", "generator"])
def test_actions_drive_the_rollout(form: str) -> None:
    actions = torch.randn(T, B, ACTION)
    forms = {"list": list(actions), "tensor": actions, "generator": (a for a in actions)}
    out = linear_env(B).rollout(T, actions=forms[form], tensordict=start(B))
    assert torch.equal(out["action"], actions.transpose(0, 1))


def test_a_sized_sequence_of_actions_bounds_the_horizon() -> None:
    actions = list(torch.randn(4, B, ACTION))
    assert linear_env(B).rollout(9, actions=actions, tensordict=start(B)).shape == (B, 4)
    assert linear_env(B).rollout(2, actions=actions, tensordict=start(B)).shape == (B, 2)


def test_actions_and_a_policy_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"both `policy` and `actions`"):
        linear_env(B).rollout(T, linear_policy(), actions=[], tensordict=start(B))


def test_nested_actions_are_given_as_the_group_that_holds_them() -> None:
    case = make_case("nested")
    actions = [TensorDict({"action": torch.randn(B, ACTION)}, [B]) for _ in range(T)]
    out = case.env([B]).rollout(
        T, actions=actions, tensordict=case.start(B), break_when_any_done=False
    )
    want = torch.stack([a["action"] for a in actions], 1)
    assert torch.equal(out["control", "action"], want)


# ---------------------------------------------------------------- callback


def test_callback_sees_the_env_and_every_step_but_the_last() -> None:
    env, seen = linear_env(B), []

    def callback(caller: Any, td: TensorDictBase) -> None:
        assert caller is env
        seen.append(td["latent"].clone())

    out = env.rollout(T, linear_policy(), callback, tensordict=start(B))
    assert len(seen) == T - 1
    # It is shown the state after the step.
    assert torch.equal(torch.stack(seen, 1), out["latent"][:, 1:])


def test_callback_in_a_rollout_that_never_stops_sees_the_step_itself() -> None:
    env, seen = linear_env(B), []
    out = env.rollout(
        T,
        linear_policy(),
        lambda _, td: seen.append(td["next", "latent"].clone()),
        tensordict=start(B),
        break_when_any_done=False,
    )
    assert torch.equal(torch.stack(seen, 1), out["next", "latent"][:, :-1])


# ---------------------------------------------------------------- auto_reset


@pytest.mark.parametrize("stop", [True, False])
def test_without_auto_reset_a_rollout_goes_on_where_the_last_one_ended(stop: bool) -> None:
    env, policy, begin = linear_env(B), linear_policy(), start(B)
    whole = env.rollout(T, policy, tensordict=begin.clone(), break_when_any_done=stop)
    first = env.rollout(2, policy, tensordict=begin.clone(), break_when_any_done=stop)
    rest = env.rollout(
        T - 2,
        policy,
        tensordict=step_mdp(first[:, -1]),
        auto_reset=False,
        break_when_any_done=stop,
    )
    for key in ("latent", "action", ("next", "reward")):
        torch.testing.assert_close(torch.cat([first[key], rest[key]], 1), whole[key])


def test_without_auto_reset_a_start_without_flags_is_taken() -> None:
    out = linear_env(B).rollout(T, linear_policy(), tensordict=start(B), auto_reset=False)
    assert out.shape == (B, T)


def test_without_auto_reset_a_tensordict_must_be_given() -> None:
    with pytest.raises(RuntimeError, match="tensordict must be provided"):
        linear_env(B).rollout(T, linear_policy(), auto_reset=False)


# ---------------------------------------------------------------- auto_cast_to_device


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("policy", [linear_policy(), None], ids=["policy", "random"])
def test_auto_cast_to_device_on_one_device_changes_nothing(stop: bool, policy: Any) -> None:
    env, begin = linear_env(B), start(B)
    runs = []
    for cast in (False, True):
        torch.manual_seed(5)
        runs.append(
            env.rollout(
                T,
                policy,
                tensordict=begin.clone(),
                auto_cast_to_device=cast,
                break_when_any_done=stop,
            )
        )
    assert_same(*runs)


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("argument", [{}, {"break_when_any_done": True}], ids=["default", "True"])
def test_break_when_any_done(argument: dict) -> None:
    out = counting_env(3).rollout(T, linear_policy(1), tensordict=counts(0, 1, -9), **argument)
    assert out.shape == (B, 2)  # the second row is done in its second step
    assert listed(out, "next", "done") == [[False, False], [False, True], [False, False]]
    assert listed(out, "next", "latent") == [[1, 2], [2, 3], [-8, -7]]


def test_done_in_the_first_step_gives_one_step() -> None:
    out = counting_env(3).rollout(T, linear_policy(1), tensordict=counts(0, 2, 0))
    assert out.shape == (B, 1)


def test_done_in_the_last_step_gives_all_steps() -> None:
    out = counting_env(3).rollout(3, linear_policy(1), tensordict=counts(0, 0, 0))
    assert out.shape == (B, 3)
    assert out["next", "done"][:, -1].all()


def test_without_breaks_every_step_reports_its_own_flags() -> None:
    out = counting_env(3).rollout(
        4, linear_policy(1), tensordict=counts(0, 1, -9), break_when_any_done=False
    )
    assert listed(out, "next", "done") == [
        [False, False, True, True],
        [False, True, True, True],
        [False, False, False, False],
    ]
    assert listed(out, "done") == [
        [False, False, False, True],
        [False, False, True, True],
        [False, False, False, False],
    ]
    assert listed(out, "latent") == [[0, 1, 2, 3], [1, 2, 3, 4], [-9, -8, -7, -6]]


def test_with_initial_state_finished_rows_restart() -> None:
    wm = counting_world_model(done_at=3)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], initial_state=counts(1, 1, 1))
    out = env.rollout(4, linear_policy(1), tensordict=counts(0, 1, -9), break_when_any_done=False)
    assert listed(out, "latent") == [[0, 1, 2, 1], [1, 2, 1, 2], [-9, -8, -7, -6]]
    assert listed(out, "next", "latent") == [[1, 2, 3, 2], [2, 3, 2, 3], [-8, -7, -6, -5]]
    assert listed(out, "done") == [[False] * 4] * B
    assert listed(out, "next", "done") == [
        [False, False, True, False],
        [False, True, False, True],
        [False] * 4,
    ]


def test_break_when_all_done_freezes_rows_that_finished() -> None:
    out = counting_env(3).rollout(
        T, linear_policy(1), tensordict=counts(0, 1, -1), break_when_all_done=True
    )
    assert out.shape == (B, 4)  # the last row is done in its fourth step
    assert out["next", "done"][:, -1].all()
    # A row that is done repeats its last step.
    assert listed(out, "latent") == [[0, 1, 2, 2], [1, 2, 2, 2], [-1, 0, 1, 2]]


def test_break_when_all_done_runs_on_while_one_row_does() -> None:
    out = counting_env(3).rollout(
        T, linear_policy(1), tensordict=counts(0, 1, -99), break_when_all_done=True
    )
    assert out.shape == (B, T)


def test_the_two_breaks_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="Cannot have both"):
        linear_env(B).rollout(
            T,
            linear_policy(),
            tensordict=start(B),
            break_when_any_done=True,
            break_when_all_done=True,
        )


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_any_flag_stops_the_rollout(flag: str) -> None:
    env = counting_env(3, spec=ALL, flags=[flag])
    out = env.rollout(T, linear_policy(1), tensordict=counts(0, 1, -9))
    assert out.shape == (B, 2)
    assert out["next", "done"][1, 1]


# ---------------------------------------------------------------- form of the result


@pytest.mark.parametrize("contiguous", [True, False, None])
@pytest.mark.parametrize("stop", [True, False])
def test_return_contiguous(contiguous: bool | None, stop: bool) -> None:
    out = linear_env(B).rollout(
        T,
        linear_policy(),
        tensordict=start(B),
        return_contiguous=contiguous,
        break_when_any_done=stop,
    )
    # Steps of one form always stack densely.
    assert not isinstance(out, LazyStackedTensorDict)
    assert out.shape == (B, T)
    assert out.names == [None, "time"]
    assert out["latent"].is_contiguous()


def test_out_is_written_and_returned() -> None:
    env, policy, begin = linear_env(B), linear_policy(), start(B)
    with torch.no_grad():
        want = env.rollout(T, policy, tensordict=begin.clone())
        out = want.clone().apply_(lambda x: x.fill_(torch.nan) if x.is_floating_point() else x)
        got = env.rollout(T, policy, tensordict=begin.clone(), out=out, return_contiguous=True)
    assert got is out
    assert_same(out, want)


def test_storing_device() -> None:
    env, policy = linear_env(B), linear_policy()
    for stop in (True, False):
        out = env.rollout(
            T,
            policy,
            tensordict=start(B),
            storing_device="meta",
            break_when_any_done=stop,
        )
        assert out.device.type == "meta"
        assert {v.device.type for v in out.values(True, True)} == {"meta"}
    assert env.rollout(T, policy, tensordict=start(B), storing_device="cpu").device.type == "cpu"


def test_set_truncated_ends_every_trajectory() -> None:
    env = counting_env(99, spec=ALL)
    out = env.rollout(T, linear_policy(1), tensordict=counts(0, 1, 2), set_truncated=True)
    assert listed(out, "next", "truncated") == [[False] * (T - 1) + [True]] * B
    assert listed(out, "next", "done") == [[False] * (T - 1) + [True]] * B
    assert not out["next", "terminated"].any()


def test_set_truncated_without_such_a_flag_says_so() -> None:
    with pytest.raises(RuntimeError, match="no truncated key"):
        linear_env(B).rollout(T, linear_policy(), tensordict=start(B), set_truncated=True)


def test_truncated_keys_can_be_added() -> None:
    env = linear_env(B)
    env.add_truncated_keys()
    out = env.rollout(T, linear_policy(), tensordict=start(B), set_truncated=True)
    assert out["next", "truncated"][:, -1].all()


# ---------------------------------------------------------------- set_state


def test_set_state_chooses_between_the_given_and_a_fresh_start() -> None:
    fresh = TensorDict({"latent": torch.full((B, LATENT), 7.0)}, [B])
    env, given = linear_env(B, initial_state=fresh), start(B)
    for set_state, want in ((None, given), (True, given), (False, fresh)):
        out = env.rollout(2, linear_policy(), tensordict=given.clone(), set_state=set_state)
        assert torch.equal(out["latent"][:, 0], want["latent"])


def test_without_a_tensordict_the_start_is_initial_state() -> None:
    fresh = start(B)
    out = linear_env(B, initial_state=fresh).rollout(2, linear_policy())
    assert torch.equal(out["latent"][:, 0], fresh["latent"])


def test_observations_alone_are_no_start() -> None:
    with pytest.raises(RuntimeError, match="initial latent"):
        linear_env(B).rollout(
            T, linear_policy(), tensordict=TensorDict({"observation": torch.randn(B, OBS)}, [B])
        )


# ---------------------------------------------------------------- the tensordict given


def test_more_leading_dims_than_the_envs() -> None:
    case = make_case("linear")
    begin = case.start(5, 2, B)
    want = plain_rollout(case, begin, T)
    got = case.env([B]).rollout(T, case.policy, tensordict=begin)
    assert got.batch_size == (5, 2, B, T)
    torch.testing.assert_close(got["next", "reward"], want["next", "reward"])


def test_a_non_contiguous_start() -> None:
    case = make_case("linear")
    latent = torch.randn(LATENT, 2 * B).t()[::2]
    begin = TensorDict({"latent": latent}, [B])
    want = plain_rollout(case, begin, T)
    got = case.env([B]).rollout(T, case.policy, tensordict=begin)
    torch.testing.assert_close(got["next", "reward"], want["next", "reward"])


def test_other_entries_of_the_start_belong_to_the_first_step_alone() -> None:
    """What no spec names and no module writes is not carried; results that lack a key stack lazily,
    as in every env."""
    begin = start(B).set("note", torch.arange(B))
    out = linear_env(B).rollout(T, linear_policy(), tensordict=begin)
    assert torch.equal(out[:, 0]["note"], torch.arange(B))


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("auto_reset", [True, False])
def test_the_tensordict_given_is_not_written_into(auto_reset: bool, stop: bool) -> None:
    begin = linear_env(B).reset(start(B))
    before = begin.clone()
    linear_env(B).rollout(
        T, linear_policy(), tensordict=begin, auto_reset=auto_reset, break_when_any_done=stop
    )
    assert set(begin.keys(True)) == set(before.keys(True))
    assert (begin == before).all()


def test_the_same_start_can_be_given_twice() -> None:
    env, policy, begin = linear_env(B), linear_policy(), start(B)
    one = env.rollout(T, policy, tensordict=begin)
    two = env.rollout(T, policy, tensordict=begin)
    assert (one == two).all()


def test_a_module_with_buffers_and_dropout() -> None:
    torch.manual_seed(0)
    wm = linear_world_model()
    wm.reward_head.module = nn.Sequential(nn.Dropout(0.5), wm.reward_head.module)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    policy, begin = linear_policy(), start(B)
    one, two = (env.rollout(T, policy, tensordict=begin.clone()) for _ in range(2))
    assert not torch.equal(one["next", "reward"], two["next", "reward"])
    wm.eval()
    env.eval()
    one, two = (env.rollout(T, policy, tensordict=begin.clone()) for _ in range(2))
    assert torch.equal(one["next", "reward"], two["next", "reward"])


def test_a_stochastic_policy_module_of_plain_torch_follows_the_seed() -> None:
    class Noisy(nn.Module):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return torch.randn(*latent.shape[:-1], ACTION) + torch.rand(())

    env, begin = linear_env(B), start(B)
    policy = TensorDictModule(Noisy(), ["latent"], ["action"])
    torch.manual_seed(9)
    with fastwm.backend("eager"):
        want = env.rollout(T, policy, tensordict=begin.clone())
    torch.manual_seed(9)
    got = env.rollout(T, policy, tensordict=begin.clone())
    assert torch.equal(got["action"], want["action"])
