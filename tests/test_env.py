"""`fastwm.WorldModelEnv`: specs, reset, step, done flags. Rollouts: ``test_env_rollout.py``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs.utils import check_env_specs
from torchrl.modules import WorldModel as UpstreamWorldModel

import fastwm
from tests.models import (
    ACTION,
    BELIEF,
    CASES,
    LATENT,
    OBS,
    CatLinear,
    SpecEnv,
    counting_world_model,
    flag,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    real_observations,
    rssm_world_model,
    spec_env,
)

B = 3
BATCHES = [(), (B,), (2, B)]


def start(*batch: int, latent: int = LATENT) -> TensorDict:
    return TensorDict({"latent": torch.randn(*batch, latent)}, batch)


def action(env: Any, td: TensorDict) -> TensorDict:
    return env.rand_action(td)


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize("base_batch", [(), (B,), (4,), (2, B)])
@pytest.mark.parametrize("batch", BATCHES)
def test_specs_are_the_base_envs_on_this_envs_batch(
    base_batch: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(base_batch), batch_size=batch)
    assert env.batch_size == batch
    assert env.action_spec.shape == (*batch, ACTION)
    assert env.reward_spec.shape == (*batch, 1)
    assert env.full_done_spec["done"].shape == (*batch, 1)
    assert env.full_done_spec["terminated"].shape == (*batch, 1)
    assert env.observation_spec["latent"].shape == (*batch, LATENT)
    assert env.state_spec["latent"].shape == (*batch, LATENT)


@pytest.mark.parametrize(
    ("base_batch", "given", "want"),
    [((), None, (1,)), ((B,), None, (B,)), ((), 4, (4,)), ((), [2, B], (2, B)), ((B,), [], ())],
)
def test_batch_size_defaults_and_forms(
    base_batch: Sequence[int], given: Any, want: Sequence[int]
) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(base_batch), batch_size=given)
    assert env.batch_size == torch.Size(want)


def test_action_bounds_are_kept() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(bounded=True), batch_size=[B])
    assert isinstance(env.action_spec, Bounded)
    actions = env.rollout(50, tensordict=start(B))["action"]
    assert actions.abs().max() <= 1
    assert actions.abs().max() > 0.9


def test_bounds_that_differ_from_row_to_row_are_kept_on_the_same_batch() -> None:
    base = spec_env([2])
    low = torch.tensor([[-1.0, -1.0], [-5.0, -5.0]])
    base.action_spec = Bounded(low, -low, (2, ACTION))
    env = fastwm.WorldModelEnv(linear_world_model(), base)
    torch.testing.assert_close(env.action_spec.space.low, low)


def test_the_base_env_is_left_as_it_was() -> None:
    base = spec_env([B])
    before = base.specs.clone()
    env = fastwm.WorldModelEnv(linear_world_model(), base, batch_size=[5])
    env.rollout(3, linear_policy(), tensordict=start(5))
    assert base.specs == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_latent_spec_takes_the_encoders_dtype(dtype: torch.dtype) -> None:
    wm = linear_world_model().to(dtype)
    env = fastwm.WorldModelEnv(wm, spec_env(dtype=dtype), batch_size=[B])
    assert env.observation_spec["latent"].dtype is dtype


def test_latent_spec_is_the_base_envs_where_it_has_the_key() -> None:
    base = spec_env([B], latent=LATENT)
    base.observation_spec = Composite(latent=Bounded(-2, 2, (B, LATENT)), shape=[B])
    env = fastwm.WorldModelEnv(linear_world_model(), base, batch_size=[4])
    assert isinstance(env.observation_spec["latent"], Bounded)
    assert env.observation_spec["latent"].shape == (4, LATENT)


def test_every_carried_latent_has_a_spec() -> None:
    env = fastwm.WorldModelEnv(rssm_world_model(), spec_env(), batch_size=[B], latent_key="state")
    assert env.observation_spec["state"].shape == (B, LATENT)
    assert env.observation_spec["belief"].shape == (B, BELIEF)


def test_probing_the_encoder_draws_no_random_numbers_and_runs_no_hooks() -> None:
    class Dropping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5)

    wm = linear_world_model()
    wm.encoder.module = Dropping(OBS, LATENT)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    assert torch.equal(torch.get_rng_state(), before)


def decoding_world_model() -> fastwm.WorldModel:
    wm = linear_world_model()
    return fastwm.WorldModel(
        wm.encoder,
        wm.dynamics,
        wm.reward_head,
        decoder=module(nn.Linear(LATENT, OBS), [("next", "latent")], [("next", "observation")]),
    )


def test_observation_spec_exposes_what_the_decoder_writes(each_backend: str) -> None:
    wm = decoding_world_model()
    spec = Composite(observation=Unbounded((B, OBS)), shape=[B])
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], observation_spec=spec)
    # The carried latent is added, or it would not advance.
    assert set(env.observation_spec.keys()) == {"observation", "latent"}
    assert set(spec.keys()) == {"observation"}
    td = start(B).set("observation", torch.randn(B, OBS))
    rollout = env.rollout(4, linear_policy(), tensordict=td)
    want = wm.decoder.module(rollout["next", "latent"])
    torch.testing.assert_close(rollout["next", "observation"], want)
    torch.testing.assert_close(rollout["observation"][:, 1:], want[:, :-1])


def test_what_the_spec_does_not_name_is_not_returned(each_backend: str) -> None:
    env = fastwm.WorldModelEnv(decoding_world_model(), spec_env(), batch_size=[B])
    rollout = env.rollout(2, linear_policy(), tensordict=start(B))
    assert ("next", "observation") not in rollout.keys(True)


# ---------------------------------------------------------------- specs that wait for data


def lazy_world_model() -> fastwm.WorldModel:
    return fastwm.WorldModel(
        module(nn.LazyLinear(LATENT), ["observation"], ["latent"]),
        module(CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("auto_reset", [True, False])
def test_a_lazy_encoder_leaves_the_spec_to_the_first_data(
    batch: tuple[int, ...], auto_reset: bool, each_backend: str
) -> None:
    wm = lazy_world_model()
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=batch)
    # Building the env must not be what initialises the encoder.
    assert nn.parameter.is_lazy(wm.encoder.module.weight)
    assert "latent" not in set(env.observation_spec.keys())
    td = wm.encode(TensorDict({"observation": torch.randn(*batch, OBS)}, batch))
    td = td.exclude("observation")
    if not auto_reset:
        td.update({k: torch.zeros(*batch, 1, dtype=torch.bool) for k in ("done", "terminated")})
    rollout = env.rollout(4, linear_policy(), tensordict=td, auto_reset=auto_reset)
    assert env.observation_spec["latent"].shape == (*batch, LATENT)
    latents = rollout["latent"]
    assert (latents.diff(dim=len(batch))).abs().amin() > 0
    assert env.fake_tensordict()["next", "latent"].shape == (*batch, LATENT)


def test_a_lazy_encoder_with_initial_state_passes_the_spec_check() -> None:
    wm = lazy_world_model()
    env = fastwm.WorldModelEnv(
        wm,
        spec_env(),
        batch_size=[B],
        initial_state=lambda shape: TensorDict({"observation": torch.randn(*shape, OBS)}, shape),
    )
    assert nn.parameter.is_lazy(wm.encoder.module.weight)
    env.reset()
    check_env_specs(env)


def test_probing_initial_state_draws_no_random_numbers() -> None:
    """The context's shape is known from nowhere else; what follows the construction is as before."""
    case = make_case("context")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    env = case.env([B], initial_state=lambda shape: case.start(*shape))
    assert env.state_spec["goal"].shape == (B, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_initial_state_that_is_not_ready_yet_is_asked_again() -> None:
    case = make_case("context")
    buffer = ReplayBuffer(storage=LazyTensorStorage(10))
    env = case.env([B], initial_state=buffer)  # still empty: no error, no spec
    assert "goal" not in env.state_spec
    buffer.extend(case.start(10))
    assert env.reset()["goal"].shape == (B, 3)
    assert env.state_spec["goal"].shape == (B, 3)


def test_lazy_dynamics_initialise_in_the_first_rollout(each_backend: str) -> None:
    dynamics = nn.LazyLinear(LATENT)

    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(
            lambda latent, action: dynamics(torch.cat([latent, action], -1)),
            ["latent", "action"],
            [("next", "latent")],
        ),
        module(nn.LazyLinear(1), [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    for _ in range(2):
        rollout = env.rollout(3, linear_policy(), tensordict=start(B))
        want = wm.reward_head.module(rollout["next", "latent"])
        torch.testing.assert_close(rollout["next", "reward"], want)


# ---------------------------------------------------------------- reset


@pytest.mark.parametrize("batch", BATCHES)
def test_reset_takes_the_latent_it_is_given(batch: tuple[int, ...]) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=batch)
    td = start(*batch)
    latent = td["latent"].clone()
    out = env.reset(td)
    assert torch.equal(out["latent"], latent)
    for name in ("done", "terminated"):
        assert out[name].shape == (*batch, 1)
        assert out[name].dtype is torch.bool
        assert not out[name].any()


def test_reset_writes_into_the_tensordict_it_is_given_as_every_env_does() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    td = start(B)
    assert env.reset(td) is td
    assert set(td.keys()) == {"latent", "done", "terminated"}


def test_reset_clears_flags_that_were_set() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    td = start(B).set("done", torch.ones(B, 1, dtype=torch.bool))
    assert not env.reset(td)["done"].any()


def test_reset_keeps_what_else_the_tensordict_holds() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    td = start(B).set("observation", torch.randn(B, OBS))
    assert torch.equal(env.reset(td.clone())["observation"], td["observation"])


@pytest.mark.parametrize("td", [None, TensorDict({"observation": torch.zeros(B, OBS)}, [B])])
def test_reset_without_a_latent_says_which_key_and_what_to_do(td: Any) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    with pytest.raises(RuntimeError, match=r"initial latent.*'latent'.*encode.*initial_state"):
        env.reset(td)


def test_reset_names_the_one_latent_of_several_that_is_missing() -> None:
    env = fastwm.WorldModelEnv(rssm_world_model(), spec_env(), batch_size=[B], latent_key="state")
    with pytest.raises(RuntimeError, match="'belief'"):
        env.reset(TensorDict({"state": torch.randn(B, LATENT)}, [B]))


def fixed(*batch: int) -> TensorDict:
    return TensorDict({"latent": torch.full((*batch, LATENT), 7.0)}, batch)


class TestSetState:
    """The three values of ``reset(set_state=...)``, with and without an ``initial_state``."""

    @staticmethod
    def env(**kwargs: Any) -> fastwm.WorldModelEnv:
        return fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B], **kwargs)

    @pytest.mark.parametrize("set_state", [None, True])
    def test_a_given_latent_is_the_start(self, set_state: bool | None) -> None:
        td = start(B)
        out = self.env(initial_state=fixed(B)).reset(td.clone(), set_state=set_state)
        assert torch.equal(out["latent"], td["latent"])

    def test_false_draws_a_fresh_start(self) -> None:
        out = self.env(initial_state=fixed(B)).reset(start(B), set_state=False)
        assert torch.equal(out["latent"], fixed(B)["latent"])

    def test_false_without_initial_state_cannot(self) -> None:
        with pytest.raises(RuntimeError, match="initial latent"):
            self.env().reset(start(B), set_state=False)

    def test_true_without_a_latent_cannot(self) -> None:
        with pytest.raises(RuntimeError, match="initial latent"):
            self.env(initial_state=fixed(B)).reset(TensorDict({}, [B]), set_state=True)

    def test_true_is_refused_for_partial_resets(self) -> None:
        with pytest.raises(ValueError, match="select_reset_only"):
            self.env(initial_state=fixed(B)).reset(start(B), set_state=True, select_reset_only=True)


def test_partial_reset_draws_for_the_marked_rows_only() -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=[B], initial_state=fixed(B)
    )
    td = start(B)
    mask = torch.tensor([[True], [False], [True]])
    given = td.clone().set("_reset", mask)
    out = env.reset(given, select_reset_only=True)
    want = torch.where(mask, fixed(B)["latent"], td["latent"])
    assert torch.equal(out["latent"], want)


# ---------------------------------------------------------------- initial_state


INITIAL_STATES = {
    "tensordict": lambda batch: start(*batch),
    "one-for-all": lambda batch: start(),
    "callable": lambda batch: lambda shape: start(*shape),
    "callable-observations": lambda batch: (
        lambda shape: TensorDict({"observation": torch.randn(*shape, OBS)}, shape)
    ),
    "tensordict-observations": lambda batch: TensorDict(
        {"observation": torch.randn(*batch, OBS)}, batch
    ),
    "replay-buffer": lambda batch: real_observations(),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", INITIAL_STATES)
@pytest.mark.parametrize("done", [None, "done"])
def test_check_env_specs(form: str, batch: tuple[int, ...], done: str | None) -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model(done=done),
        spec_env(),
        batch_size=batch,
        initial_state=INITIAL_STATES[form](batch),
    )
    check_env_specs(env)


@pytest.mark.parametrize("name", CASES)
def test_check_env_specs_for_every_family(name: str) -> None:
    case = make_case(name)
    check_env_specs(case.env([B], initial_state=lambda shape: case.start(*shape)))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_callable_is_asked_for_the_batch(batch: tuple[int, ...]) -> None:
    asked = []

    def draw(shape: torch.Size) -> TensorDict:
        asked.append(shape)
        return start(*shape)

    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=batch, initial_state=draw
    )
    env.reset()
    assert asked == [torch.Size(batch)]
    assert isinstance(asked[0], torch.Size)


def test_a_callable_is_asked_for_the_batch_of_the_tensordict() -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=[], initial_state=lambda s: start(*s)
    )
    assert env.reset(TensorDict({}, [5]))["latent"].shape == (5, LATENT)


def test_a_replay_buffer_gives_real_observations_encoded() -> None:
    wm, buffer = linear_world_model(), real_observations()
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[2, B], initial_state=buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the buffer's own batch size, 8, is the training's
        drawn = env.reset()
    assert set(drawn.keys()) == {"latent", "done", "terminated"}
    known = wm.encoder.module(buffer[:]["observation"])
    distance = (drawn["latent"].unsqueeze(-2) - known).abs().amax(-1).amin(-1)
    assert distance.shape == (2, B)
    assert distance.max() < 1e-6
    assert not torch.equal(env.reset()["latent"], drawn["latent"])


def test_gradients_flow_to_the_encoder_of_a_drawn_start(each_backend: str) -> None:
    wm = linear_world_model()
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], initial_state=real_observations())
    env.rollout(3, linear_policy())["next", "reward"].sum().backward()
    assert wm.encoder.module.weight.grad.abs().sum() > 0


def test_a_rollout_does_not_write_into_initial_state(each_backend: str) -> None:
    state = start(B)
    before = state.clone()
    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=[B], initial_state=state
    )
    for _ in range(2):
        rollout = env.rollout(3, linear_policy())
        rollout.apply_(lambda x: x.zero_() if x.dtype.is_floating_point else x)
    assert set(state.keys()) == {"latent"}
    assert (state == before).all()


@pytest.mark.parametrize("batch", [(B,), ()])
def test_a_reset_hands_out_a_copy_of_initial_state(batch: tuple[int, ...]) -> None:
    state = start(*batch)
    before = state.clone()
    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=[B], initial_state=state
    )
    env.reset()["latent"].zero_()
    assert (state == before).all()


def test_initial_state_of_another_batch_is_refused() -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model(), spec_env(), batch_size=[B], initial_state=start(B + 1)
    )
    with pytest.raises(RuntimeError, match=r"initial_state.*\(4,\).*\(3,\)"):
        env.reset()


def test_initial_state_without_what_the_step_reads_is_named() -> None:
    case = make_case("context")
    env = case.env([B], initial_state=start(B))
    with pytest.raises(RuntimeError, match=r"initial_state gave no 'goal'.*'latent'"):
        env.reset()


# ---------------------------------------------------------------- step


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_step_is_the_world_models_step(name: str, batch: tuple[int, ...]) -> None:
    case = make_case(name)
    env = case.env(batch)
    td = action(env, env.reset(case.start(*batch)))
    torch.manual_seed(1)
    want = case.world_model.step(td.clone())
    torch.manual_seed(1)
    got = env.step(td.clone())
    for key in case.latents:
        path = ("next", *((key,) if isinstance(key, str) else key))
        assert torch.equal(got[path], want[path])
        assert torch.equal(got[key], td[key])
    reward = (
        "next",
        *((case.reward_key,) if isinstance(case.reward_key, str) else case.reward_key),
    )
    assert torch.equal(got[reward], want[reward])


def test_step_takes_extra_leading_dims() -> None:
    wm = linear_world_model()
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    td = start(5, 2, B).set("action", torch.randn(5, 2, B, ACTION))
    got = env.step(td.clone())
    assert got["next"].batch_size == (5, 2, B)
    assert torch.equal(got["next", "latent"], wm.step(td)["next", "latent"])
    assert got["next", "done"].shape == (5, 2, B, 1)


def test_step_ignores_a_next_left_over_from_another_step() -> None:
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        # Writes only the latent; the reward head is fed from elsewhere.
        module(CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "unused")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    td = start(B).set("action", torch.zeros(B, ACTION))
    td["next"] = TensorDict({"reward": torch.full((B, 1), 9.0)}, [B])
    assert not env._step(td)["reward"].any()


@pytest.mark.parametrize("batch", [(B,), (2, B)])
def test_a_partial_step_leaves_the_unmarked_rows_as_they_are(batch: tuple[int, ...]) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    td = env.reset(start(*batch)).set("action", torch.randn(*batch, ACTION))
    td["done"][..., 1, :] = True
    whole = env.step(td.clone())
    mask = torch.zeros(*batch, 1, dtype=torch.bool)
    mask[..., 0, :] = True
    got = env.step(td.clone().set("_step", mask))
    assert "_step" not in got.keys(True)
    for key in ("latent", "reward", "done"):
        old = td[key] if key in td else torch.zeros_like(whole["next", key])
        assert torch.equal(got["next", key], torch.where(mask, whole["next", key], old)), key


def test_without_a_reward_the_reward_is_zero(each_backend: str) -> None:
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "value")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    for batch in [(B,), (2, B)]:
        rollout = env.rollout(3, linear_policy(), tensordict=start(*batch))
        assert torch.equal(rollout["next", "reward"], torch.zeros(*batch, 3, 1))


@pytest.mark.parametrize("batch", BATCHES)
def test_rand_action_and_rand_step(batch: tuple[int, ...]) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(bounded=True), batch_size=batch)
    assert env.rand_action()["action"].shape == (*batch, ACTION)
    td = start(4, *batch)
    assert env.rand_action(td) is td
    assert td["action"].shape == (4, *batch, ACTION)
    assert env.rand_step(start(4, *batch))["next", "reward"].shape == (4, *batch, 1)


def test_random_actions_follow_the_seed() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    begin = start(B)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(env.rollout(3, tensordict=begin.clone())["action"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_set_seed_does_nothing_and_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=[B])
    env.set_seed(0)
    assert not [w for w in recwarn if "seed" in str(w.message).lower()]


# ---------------------------------------------------------------- done flags


def done_env(
    emitted: Sequence[str],
    spec: Sequence[str],
    *,
    kind: str = "bool",
    batch: Sequence[int] = (B,),
    **kwargs: Any,
) -> fastwm.WorldModelEnv:
    wm = counting_world_model(done_at=1, flags=emitted, kind=kind)
    return fastwm.WorldModelEnv(wm, spec_env(done=spec), batch_size=batch, **kwargs)


BOTH, ALL = ("done", "terminated"), ("done", "terminated", "truncated")


@pytest.mark.parametrize(
    ("spec", "emitted", "want"),
    [
        # what the spec has, what the model writes, which flags are set where it says so
        (("done",), ("done",), {"done", "terminated"}),
        (BOTH, ("done",), {"done", "terminated"}),
        (BOTH, ("terminated",), {"done", "terminated"}),
        (BOTH, ("done", "terminated"), {"done", "terminated"}),
        (ALL, ("done",), {"done", "terminated"}),
        (ALL, ("terminated",), {"done", "terminated"}),
        (ALL, ("truncated",), {"done", "truncated"}),
        (ALL, ("terminated", "truncated"), {"done", "terminated", "truncated"}),
        (ALL, ("done", "truncated"), {"done", "truncated"}),
        (ALL, ("done", "terminated", "truncated"), {"done", "terminated", "truncated"}),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int", "bool"])
def test_done_flags_complete_each_other(
    spec: Sequence[str], emitted: Sequence[str], want: set[str], kind: str
) -> None:
    env = done_env(emitted, spec, kind=kind)
    td = TensorDict({"latent": torch.tensor([[0.0], [-5.0], [3.0]])}, [B])
    out = env.step(action(env, env.reset(td)))["next"]
    assert set(env.done_keys) == set(spec) | {"done", "terminated"}
    for name in env.done_keys:
        assert out[name].dtype is torch.bool
        expected = [True, False, True] if name in want else [False] * B
        assert out[name][:, 0].tolist() == expected, name


def test_without_a_done_head_no_flag_is_set(each_backend: str) -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env(done=ALL), batch_size=[B])
    rollout = env.rollout(4, linear_policy(), tensordict=start(B))
    for name in ALL:
        assert rollout["next", name].shape == (B, 4, 1)
        assert not rollout["next", name].any()


@pytest.mark.parametrize(
    ("emitted", "threshold", "want"),
    [
        (torch.tensor([0.4, 0.5, 0.6]), 0.5, [False, False, True]),
        (torch.tensor([0.4, 0.5, 0.6]), 0.45, [False, True, True]),
        (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 0.0, [False, False, True]),
        (torch.tensor([0.4, 0.5, 0.75], dtype=torch.bfloat16), 0.5, [False, False, True]),
        (torch.tensor([torch.nan, torch.inf, -torch.inf]), 0.5, [False, True, False]),
        (torch.tensor([0, 1, 2]), 0.5, [False, True, True]),
        (torch.tensor([0, -1, 2], dtype=torch.int8), 5.0, [False, True, True]),
        (torch.tensor([0, 1, 255], dtype=torch.uint8), 0.5, [False, True, True]),
        (torch.tensor([True, False, True]), 5.0, [True, False, True]),
    ],
)
def test_done_threshold(
    emitted: torch.Tensor, threshold: float, want: list[bool], each_backend: str
) -> None:
    wm = counting_world_model(done_at=0)
    env = fastwm.WorldModelEnv(
        fastwm.WorldModel(
            wm.encoder,
            wm.dynamics,
            wm.reward_head,
            done_head=module(
                lambda x: emitted.unsqueeze(-1).expand((*x.shape[:-1], 1)),
                [("next", "latent")],
                [("next", "done")],
            ),
        ),
        spec_env(),
        batch_size=[B],
        done_threshold=threshold,
    )
    out = env.rollout(1, linear_policy(1), tensordict=start(B, latent=1))
    assert out["next", "done"][:, 0, 0].tolist() == want


def test_a_flag_without_its_trailing_dim_is_given_one(each_backend: str) -> None:
    wm = counting_world_model(done_at=0)
    wm = fastwm.WorldModel(
        wm.encoder,
        wm.dynamics,
        module(lambda x: x.sum(-1), [("next", "latent")], [("next", "reward")]),
        done_head=module(lambda x: x.sum(-1) > 2, [("next", "latent")], [("next", "done")]),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    td = TensorDict({"latent": torch.tensor([[0.0], [1.0], [2.0]])}, [B])
    out = env.rollout(1, linear_policy(1), tensordict=td)
    assert out["next", "done"].shape == (B, 1, 1)
    assert out["next", "done"][:, 0, 0].tolist() == [False, False, True]
    assert out["next", "reward"][:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("emitted", ["done", "terminated", "truncated"])
def test_done_flags_in_the_result_do_not_share_memory(emitted: str) -> None:
    env = done_env((emitted,), ALL)
    td = TensorDict({"latent": torch.zeros(B, 1)}, [B])
    out = env.step(action(env, env.reset(td)))["next"]
    flags = {name: out[name].clone() for name in ALL}
    for name in ALL:
        out[name].logical_not_()
        assert all(torch.equal(out[other], flags[other]) for other in ALL if other != name)
        out[name].logical_not_()


def test_done_is_terminated_or_truncated_row_by_row() -> None:
    wm = counting_world_model()
    wm = fastwm.WorldModel(
        wm.encoder,
        wm.dynamics,
        wm.reward_head,
        done_head=module(
            lambda z: (z == 1, z == 2),
            [("next", "latent")],
            [("next", "terminated"), ("next", "truncated")],
        ),
    )
    env = fastwm.WorldModelEnv(wm, spec_env(done=ALL), batch_size=[B])
    td = TensorDict({"latent": torch.tensor([[0.0], [1.0], [5.0]])}, [B])
    out = env.step(action(env, env.reset(td)))["next"]
    assert out["terminated"][:, 0].tolist() == [True, False, False]
    assert out["truncated"][:, 0].tolist() == [False, True, False]
    assert out["done"][:, 0].tolist() == [True, True, False]


# ---------------------------------------------------------------- world models of other makes


def test_torchrls_own_world_model_can_be_given(each_backend: str) -> None:
    torch.manual_seed(0)
    theirs = linear_world_model(UpstreamWorldModel, done="done")
    torch.manual_seed(0)
    ours = linear_world_model(done="done")
    begin, policy = start(B), linear_policy()
    got, want = (
        fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B]).rollout(
            4, policy, tensordict=begin.clone(), break_when_any_done=False
        )
        for wm in (theirs, ours)
    )
    assert (got == want).all()


def test_torchrls_own_world_model_with_a_buffer_of_observations() -> None:
    env = fastwm.WorldModelEnv(
        linear_world_model(UpstreamWorldModel),
        spec_env(),
        batch_size=[B],
        initial_state=real_observations(),
    )
    check_env_specs(env)


class Bare(nn.Module):
    """No `WorldModel`: only a ``step_module``."""

    def __init__(self) -> None:
        super().__init__()
        self.step_module = linear_world_model().step_module


def test_a_step_module_is_all_that_is_asked_for(each_backend: str) -> None:
    env = fastwm.WorldModelEnv(Bare(), spec_env(), batch_size=[B])
    rollout = env.rollout(3, linear_policy(), tensordict=start(B))
    assert rollout["latent"].diff(dim=1).abs().amin() > 0


def test_done_spec_in_a_group_of_its_own_with_a_root_one() -> None:
    """Two done groups: the flags of each come from what the model writes there."""
    base = SpecEnv(
        Composite(observation=Unbounded((OBS,))),
        Unbounded((ACTION,)),
        Unbounded((1,)),
        Composite(done=flag(), terminated=flag(), safety=Composite(done=flag(), terminated=flag())),
    )
    counting = counting_world_model(done_at=1)
    counting.done_head.out_keys = [("next", "safety", "done")]
    wm = fastwm.WorldModel(
        counting.encoder, counting.dynamics, counting.reward_head, done_head=counting.done_head
    )
    env = fastwm.WorldModelEnv(wm, base, batch_size=[B])
    td = TensorDict({"latent": torch.zeros(B, 1)}, [B])
    out = env.step(action(env, env.reset(td)))["next"]
    assert out["safety", "done"].all()
    assert out["safety", "terminated"].all()
    assert not out["done"].any()
    assert not out["terminated"].any()
