"""Bad input to `WorldModelEnv`: a clear error that names the key and the shapes, or what eager does.

Each error is the same whichever engine runs, and comes before any step is taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based import WorldModelEnv as UpstreamEnv
from torchrl.modules import WorldModel as UpstreamWorldModel

import fastwm
from tests.models import (
    ACTION,
    LATENT,
    OBS,
    CatLinear,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    sampled_actor,
    spec_env,
)

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 3, 4


def start(*batch: int, latent: int = LATENT, dtype: torch.dtype = torch.float32) -> TensorDict:
    return TensorDict({"latent": torch.randn(*batch, latent).to(dtype)}, batch)


def linear_env(*batch: int, **kwargs: Any) -> fastwm.WorldModelEnv:
    return fastwm.WorldModelEnv(linear_world_model(), spec_env(), batch_size=batch, **kwargs)


def upstream_env() -> UpstreamEnv:
    return UpstreamEnv(linear_world_model(UpstreamWorldModel), spec_env([B], latent=LATENT))


def model(dynamics: nn.Module, *out_keys: Any, latent: int = LATENT) -> fastwm.WorldModel:
    return fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], list(out_keys)),
        module(nn.Linear(latent, 1), [out_keys[0]], [("next", "reward")]),
    )


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("how", ["reset", "rollout"])
def test_missing_latent(how: str) -> None:
    env, td = linear_env(B), TensorDict({"observation": torch.randn(B, OBS)}, [B])
    with pytest.raises(RuntimeError, match=r"initial latent under key 'latent'"):
        env.reset(td) if how == "reset" else env.rollout(T, linear_policy(), tensordict=td)


def test_missing_latent_without_auto_reset_is_what_eager_raises() -> None:
    td = TensorDict({"observation": torch.randn(B, OBS)}, [B])
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(KeyError, match="'latent'"):
            env.rollout(T, linear_policy(), tensordict=td.clone(), auto_reset=False)


@pytest.mark.parametrize("auto_reset", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (B, 4)])
def test_wrong_batch_names_both(batch: tuple[int, ...], auto_reset: bool) -> None:
    shapes = rf"\[{', '.join(map(str, batch))}\].*\[{B}\]"
    with pytest.raises(RuntimeError, match=r"shape==env.batch_size.*" + shapes):
        linear_env(B).rollout(T, linear_policy(), tensordict=start(*batch), auto_reset=auto_reset)


@pytest.mark.parametrize("how", ["reset", "rollout"])
def test_wrong_latent_width_names_key_and_shapes(how: str) -> None:
    env, td = linear_env(B), start(B, latent=LATENT + 1)
    with pytest.raises(RuntimeError, match=r"'latent'.*\(3, 5\).*\(3, 4\)"):
        env.reset(td) if how == "reset" else env.rollout(T, linear_policy(), tensordict=td)


def test_wrong_latent_width_without_auto_reset_is_what_eager_raises() -> None:
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied"):
            env.rollout(
                T, linear_policy(), tensordict=start(B, latent=LATENT + 1), auto_reset=False
            )


def test_wrong_context_width_names_key_and_shapes() -> None:
    case = make_case("context")
    env = case.env([B], initial_state=lambda shape: case.start(*shape))
    td = case.start(B).set("goal", torch.randn(B, 7))
    with pytest.raises(RuntimeError, match=r"'goal'.*\(3, 7\).*\(3, 3\)"):
        env.reset(td)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("auto_reset", [True, False])
def test_wrong_dtype_is_what_eager_raises(dtype: torch.dtype, auto_reset: bool) -> None:
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(RuntimeError, match="same dtype"):
            env.rollout(T, linear_policy(), tensordict=start(B, dtype=dtype), auto_reset=auto_reset)


def test_a_bad_call_leaves_the_env_usable() -> None:
    env = linear_env(B)
    for td in (start(4), start(B, latent=9), start(B, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            env.rollout(T, linear_policy(), tensordict=td)
    assert env.rollout(T, linear_policy(), tensordict=start(B)).shape == (B, T)


# ---------------------------------------------------------------- numbers


def test_nan_weights_propagate_as_eager_has_them() -> None:
    env, policy, td = linear_env(B), linear_policy(), start(B)
    with torch.no_grad():
        env.world_model.module[0].module.linear.weight[0, 0] = torch.nan
    out = env.rollout(T, policy, tensordict=td.clone(), break_when_any_done=False)
    with fastwm.backend("eager"):
        want = env.rollout(T, policy, tensordict=td.clone(), break_when_any_done=False)
    # The first latent of the row is lost at once, and with it the rest a step later.
    assert out["next", "latent"][:, 0, 0].isnan().all()
    assert not out["next", "latent"][:, 0, 1:].isnan().any()
    assert out["next", "latent"][:, 1:].isnan().all()
    for key in ("latent", "action", ("next", "latent"), ("next", "reward")):
        torch.testing.assert_close(out[key], want[key], equal_nan=True)


def test_nan_and_inf_in_one_row_stay_in_that_row() -> None:
    env, policy, td = linear_env(B), linear_policy(), start(B)
    td["latent"][1, 0] = torch.inf
    clean = env.rollout(T, policy, tensordict=start(B).update(td.clone()))
    for row in (0, 2):
        assert clean["next", "reward"][row].isfinite().all()
    assert not clean["next", "reward"][1].isfinite().any()


def test_nan_weights_in_a_validating_actor_raise_as_eager_does() -> None:
    env, actor = linear_env(B), sampled_actor()
    td = start(B)
    env.rollout(T, actor, tensordict=td.clone())
    with torch.no_grad():
        for p in actor.parameters():
            p.fill_(torch.nan)
    errors = []
    for name in ("eager", None):
        with fastwm.backend(name or "auto"):
            try:
                env.rollout(T, actor, tensordict=td.clone())
                errors.append(None)
            except ValueError as error:
                errors.append(str(error).split("\n")[0])
    assert errors[0] == errors[1]


def test_nan_done_logits_are_not_done() -> None:
    wm = linear_world_model(done="done")
    with torch.no_grad():
        wm.done_head.module.linear.bias.fill_(torch.nan)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    out = env.rollout(T, linear_policy(), tensordict=start(B))
    assert out.shape == (B, T)
    assert not out["next", "done"].any()


# ---------------------------------------------------------------- horizon and batch of nothing


@pytest.mark.parametrize("horizon", [0, -1])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_zero_horizon_is_what_eager_raises(horizon: int, stop: bool, contiguous: bool) -> None:
    match = "stack expects a non-empty" if contiguous else "cannot be empty"
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(RuntimeError, match=match):
            env.rollout(
                horizon,
                linear_policy(),
                tensordict=start(B),
                break_when_any_done=stop,
                return_contiguous=contiguous,
            )


def test_no_actions_is_a_zero_horizon() -> None:
    with pytest.raises(RuntimeError, match="cannot be empty"):
        linear_env(B).rollout(T, actions=[], tensordict=start(B))


@pytest.mark.parametrize("base", [(), (0,)])
@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("policy", [linear_policy(), sampled_actor(), None])
def test_empty_batch(batch: tuple[int, ...], policy: Any, base: tuple[int, ...]) -> None:
    if base and base != batch:
        batch = (0,)
    env = fastwm.WorldModelEnv(linear_world_model(done="done"), spec_env(base), batch_size=batch)
    out = env.rollout(T, policy, tensordict=start(*batch))
    assert out.shape == (*batch, T)
    assert out["latent"].shape == (*batch, T, LATENT)
    assert out["action"].shape == (*batch, T, ACTION)
    assert out["next", "reward"].shape == (*batch, T, 1)


def test_empty_batch_on_an_env_of_any_batch() -> None:
    env = linear_env()
    assert env.rollout(T, linear_policy(), tensordict=start(0)).shape == (0, T)
    assert env.rollout(T, linear_policy(), tensordict=start(2)).shape == (2, T)


# ---------------------------------------------------------------- the model


def test_a_step_that_never_writes_its_latent_is_refused_at_construction() -> None:
    wm = model(CatLinear(LATENT + ACTION, LATENT), ("next", "other"))
    with pytest.raises(ValueError, match=r"'latent'.*\('next', 'latent'\).*never advance"):
        fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])


def test_a_nested_latent_that_is_never_written_is_refused() -> None:
    latent = ("hidden", "latent")
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], [latent]),
        module(CatLinear(LATENT + ACTION, LATENT), [latent, "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    with pytest.raises(ValueError, match=r"\('next', 'hidden', 'latent'\)"):
        fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], latent_key=latent)


@pytest.mark.parametrize("horizon", [1, T])
def test_a_latent_of_another_width_after_the_step_names_key_and_shapes(horizon: int) -> None:
    wm = model(CatLinear(LATENT + ACTION, LATENT + 1), ("next", "latent"), latent=LATENT + 1)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    with pytest.raises(
        RuntimeError, match=r"'latent' of shape \(3, 4\).*'next', 'latent'.*\(3, 5\).*not close"
    ):
        env.rollout(horizon, linear_policy(), tensordict=start(B))


def test_a_latent_announced_as_changing_may_change() -> None:
    """A history that grows, its spec's dim -1, as torchrl writes dynamic shapes."""

    class Grow(nn.Module):
        def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return torch.cat([latent, latent[..., -1:] + 0 * action.sum(-1, keepdim=True)], -1)

    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(Grow(), ["latent", "action"], [("next", "latent")]),
        module(lambda z: z.sum(-1, keepdim=True), [("next", "latent")], [("next", "reward")]),
    )
    spec = Composite(latent=Unbounded((-1,)))
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[], observation_spec=spec)
    out = env.rollout(
        T, actions=list(torch.zeros(T, ACTION)), tensordict=start(), return_contiguous=False
    )
    assert [out[t]["next", "latent"].shape[-1] for t in range(T)] == [5, 6, 7, 8]


@pytest.mark.parametrize(("key", "width"), [("reward", 3), ("done", 2)], ids=["reward", "done"])
def test_a_head_of_the_wrong_width_names_key_and_shapes(key: str, width: int) -> None:
    wm = linear_world_model()
    head = module(nn.Linear(LATENT, width), [("next", "latent")], [("next", key)])
    wm = fastwm.WorldModel(
        wm.encoder,
        wm.dynamics,
        head if key == "reward" else wm.reward_head,
        done_head=head if key == "done" else None,
    )
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    with pytest.raises(RuntimeError, match=rf"'{key}'.*\(3, {width}\).*\(3, 1\)"):
        env.rollout(T, linear_policy(), tensordict=start(B))


# ---------------------------------------------------------------- policy and actions


def test_a_policy_that_reads_what_is_not_there_names_it() -> None:
    with pytest.raises(KeyError, match="'elsewhere'"):
        linear_env(B).rollout(T, linear_policy(latent_keys=["elsewhere"]), tensordict=start(B))


def test_a_policy_that_writes_no_action_names_it() -> None:
    with pytest.raises(KeyError, match="'action'"):
        linear_env(B).rollout(T, linear_policy(action_key="act"), tensordict=start(B))


def test_an_action_of_the_wrong_width_is_what_eager_raises() -> None:
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(RuntimeError, match=r"3x9 and 6x4"):
            env.rollout(T, linear_policy(action=5), tensordict=start(B))


def test_given_actions_of_the_wrong_batch_are_what_eager_raises() -> None:
    actions = list(torch.randn(T, B + 1, ACTION))
    for env in (linear_env(B), upstream_env()):
        with pytest.raises(RuntimeError, match=r"action|batch"):
            env.rollout(T, actions=actions, tensordict=start(B))


# ---------------------------------------------------------------- construction


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'warp'.*auto.*eager"):
        linear_env(B, backend="warp")


def test_a_base_env_whose_batch_does_not_fit_is_rebatched_not_refused() -> None:
    env = fastwm.WorldModelEnv(linear_world_model(), spec_env([7]), batch_size=[B])
    assert env.rollout(T, linear_policy(), tensordict=start(B)).shape == (B, T)


def test_an_initial_state_of_the_wrong_width_names_key_and_shapes() -> None:
    env = linear_env(B, initial_state=start(B, latent=9))
    with pytest.raises(RuntimeError, match=r"'latent'.*\(3, 9\).*\(3, 4\)"):
        env.rollout(T, linear_policy())
