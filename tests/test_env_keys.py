"""`WorldModelEnv` with keys of any form: nested, multi-agent, several latents, context."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.utils import check_env_specs

import fastwm
from tests.models import (
    ACTION,
    AGENTS,
    BELIEF,
    LATENT,
    OBS,
    CatLinear,
    SpecEnv,
    flag,
    linear_policy,
    make_case,
    module,
    multi_agent_spec_env,
    multi_agent_world_model,
    nested_spec_env,
    spec_env,
)

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 3, 4
BATCHES = [(), (B,), (2, B)]


# ---------------------------------------------------------------- nested


def nested_counting_env(*batch: int, initial: float | None = None) -> fastwm.WorldModelEnv:
    """Every key nested, no done flag at the root; done from a latent of 3 on."""
    latent = ("hidden", "deep", "latent")
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, 1), [("sensors", "observation")], [latent]),
        module(
            lambda z, a: z + 1 + 0 * a.sum(-1, keepdim=True),
            [latent, ("control", "action")],
            [("next", *latent)],
        ),
        module(nn.Identity(), [("next", *latent)], [("next", "gain", "reward")]),
        done_head=module(lambda z: z >= 3, [("next", *latent)], [("next", "status", "done")]),
    )
    start = None if initial is None else nested_counts(*[initial] * B)
    return fastwm.WorldModelEnv(
        wm, nested_spec_env(), batch_size=batch, latent_key=latent, initial_state=start
    )


def nested_counts(*values: float) -> TensorDict:
    latent = torch.tensor(values, dtype=torch.float32).unsqueeze(-1)
    td = TensorDict({}, [len(values)])
    return td.set(("hidden", "deep", "latent"), latent)


POLICY = linear_policy(
    1, latent_keys=[("hidden", "deep", "latent")], action_key=("control", "action")
)


@pytest.mark.parametrize("batch", BATCHES)
def test_nested_rollout_holds_the_keys_of_the_specs(batch: tuple[int, ...]) -> None:
    case = make_case("nested")
    out = case.env(batch).rollout(
        T, case.policy, tensordict=case.start(*batch), break_when_any_done=False
    )
    assert set(out.keys(True, True)) == {
        ("hidden", "deep", "latent"),
        ("control", "action"),
        ("status", "done"),
        ("status", "terminated"),
        ("next", "hidden", "deep", "latent"),
        ("next", "gain", "reward"),
        ("next", "status", "done"),
        ("next", "status", "terminated"),
    }
    assert out["next", "gain", "reward"].shape == (*batch, T, 1)
    assert out["next", "status", "done"].dtype is torch.bool
    time = len(batch)
    before = out["hidden", "deep", "latent"].narrow(time, 1, T - 1)
    after = out["next", "hidden", "deep", "latent"].narrow(time, 0, T - 1)
    assert torch.equal(before, after)
    assert (before - out["hidden", "deep", "latent"].narrow(time, 0, T - 1)).abs().amin() > 0


def test_nested_done_stops_the_rollout() -> None:
    out = nested_counting_env(B).rollout(9, POLICY, tensordict=nested_counts(0, 1, -9))
    assert out.shape == (B, 2)
    assert out["next", "status", "done"][:, -1, 0].tolist() == [False, True, False]


def test_nested_done_without_breaks_goes_on() -> None:
    out = nested_counting_env(B).rollout(
        4, POLICY, tensordict=nested_counts(0, 1, -9), break_when_any_done=False
    )
    assert out["next", "status", "done"][..., 0].tolist() == [
        [False, False, True, True],
        [False, True, True, True],
        [False] * 4,
    ]


def test_nested_rows_restart_from_initial_state() -> None:
    """The latent lies outside the group that holds the done flag, and restarts all the same."""
    out = nested_counting_env(B, initial=1).rollout(
        4, POLICY, tensordict=nested_counts(0, 1, -9), break_when_any_done=False
    )
    latent = out["hidden", "deep", "latent"][..., 0]
    assert latent.tolist() == [[0, 1, 2, 1], [1, 2, 1, 2], [-9, -8, -7, -6]]
    assert not out["status", "done"].any()


def test_nested_reset_takes_a_start_without_the_done_group() -> None:
    env = nested_counting_env(B)
    out = env.reset(nested_counts(0, 1, 2))
    assert out["status", "done"].shape == (B, 1)
    assert not out["status", "done"].any()


def test_nested_reset_draws_into_a_tensordict_without_a_latent() -> None:
    env = nested_counting_env(B, initial=1)
    out = env.reset(TensorDict({}, [B]))
    assert out["hidden", "deep", "latent"][:, 0].tolist() == [1, 1, 1]


def test_nested_random_actions() -> None:
    out = nested_counting_env(B).rollout(2, tensordict=nested_counts(0, 0, 0))
    assert out["control", "action"].shape == (B, 2, ACTION)
    assert out["control", "action"].std() > 0


def test_a_nested_latent_key_that_is_missing_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"'hidden', 'deep', 'latent'"):
        nested_counting_env(B).rollout(2, POLICY, tensordict=TensorDict({}, [B]))


# ---------------------------------------------------------------- multi-agent

LATENTS = ("agents", "latent")
AGENT_POLICY = linear_policy(latent_keys=[LATENTS], action_key=("agents", "action"))


def agents_start(*batch: int, sized: bool = True) -> TensorDict:
    """With the batch size of the group as ``[*B, N]``, or as ``[*B]``."""
    inner = TensorDict(
        {"latent": torch.randn(*batch, AGENTS, LATENT)}, (*batch, AGENTS) if sized else batch
    )
    return TensorDict({"agents": inner}, batch)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("done", [None, "team", "agents"])
@pytest.mark.parametrize("agent_done", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_multi_agent_rollout(
    batch: tuple[int, ...], agent_done: bool, done: str | None, sized: bool
) -> None:
    base = multi_agent_spec_env(agent_done=agent_done)
    env = fastwm.WorldModelEnv(
        multi_agent_world_model(done=done), base, batch_size=batch, latent_key=LATENTS
    )
    out = env.rollout(
        T, AGENT_POLICY, tensordict=agents_start(*batch, sized=sized), break_when_any_done=False
    )
    assert out.batch_size == (*batch, T)
    assert out["agents", "latent"].shape == (*batch, T, AGENTS, LATENT)
    assert out["agents", "action"].shape == (*batch, T, AGENTS, ACTION)
    assert out["next", "agents", "reward"].shape == (*batch, T, AGENTS, 1)
    assert out["next", "done"].shape == (*batch, T, 1)
    if agent_done:
        assert out["next", "agents", "done"].shape == (*batch, T, AGENTS, 1)
    torch.testing.assert_close(
        out["agents", "action"], AGENT_POLICY.module(out["agents", "latent"])
    )
    assert out["agents", "latent"].diff(dim=len(batch)).abs().amin() > 0


def test_multi_agent_specs_keep_the_agent_dim() -> None:
    env = fastwm.WorldModelEnv(
        multi_agent_world_model(), multi_agent_spec_env(), batch_size=[2, B], latent_key=LATENTS
    )
    assert env.full_action_spec["agents"].shape == (2, B, AGENTS)
    assert env.full_action_spec["agents", "action"].shape == (2, B, AGENTS, ACTION)
    assert env.full_reward_spec["agents", "reward"].shape == (2, B, AGENTS, 1)
    assert env.full_done_spec["agents", "done"].shape == (2, B, AGENTS, 1)
    assert env.observation_spec["agents", "latent"].shape == (2, B, AGENTS, LATENT)


@pytest.mark.parametrize("done", [None, "team", "agents"])
def test_multi_agent_specs_check(done: str | None) -> None:
    env = fastwm.WorldModelEnv(
        multi_agent_world_model(done=done),
        multi_agent_spec_env(),
        batch_size=[B],
        latent_key=LATENTS,
        initial_state=lambda shape: agents_start(*shape),
    )
    check_env_specs(env)


def test_agents_flags_do_not_set_the_teams() -> None:
    wm = multi_agent_world_model()
    always = module(
        lambda z: torch.ones(*z.shape[:-1], 1), [("next", *LATENTS)], [("next", "agents", "done")]
    )
    env = fastwm.WorldModelEnv(
        fastwm.WorldModel(wm.encoder, wm.dynamics, wm.reward_head, done_head=always),
        multi_agent_spec_env(),
        batch_size=[B],
        latent_key=LATENTS,
    )
    out = env.rollout(T, AGENT_POLICY, tensordict=agents_start(B))
    assert out["next", "agents", "done"].all()
    assert out["next", "agents", "terminated"].all()
    # The flags at the root prevail, and nothing sets them.
    assert out.shape == (B, T)
    assert not out["next", "done"].any()


def test_multi_agent_random_actions() -> None:
    env = fastwm.WorldModelEnv(
        multi_agent_world_model(), multi_agent_spec_env(), batch_size=[B], latent_key=LATENTS
    )
    out = env.rollout(T, tensordict=agents_start(B))
    assert out["agents", "action"].shape == (B, T, AGENTS, ACTION)
    assert out["agents", "action"].std(2).amin() > 0


def agents_only_env(initial: float) -> fastwm.WorldModelEnv:
    """Done flags per agent and none at the root; latents count, done from 3 on."""
    base = SpecEnv(
        Composite(agents=Composite(observation=Unbounded((AGENTS, OBS)), shape=(AGENTS,))),
        Composite(agents=Composite(action=Unbounded((AGENTS, ACTION)), shape=(AGENTS,))),
        Composite(agents=Composite(reward=Unbounded((AGENTS, 1)), shape=(AGENTS,))),
        Composite(agents=Composite(done=flag(AGENTS), terminated=flag(AGENTS), shape=(AGENTS,))),
    )
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, 1), [("agents", "observation")], [LATENTS]),
        module(
            lambda z, a: z + 1 + 0 * a.sum(-1, keepdim=True),
            [LATENTS, ("agents", "action")],
            [("next", *LATENTS)],
        ),
        module(nn.Identity(), [("next", *LATENTS)], [("next", "agents", "reward")]),
        done_head=module(lambda z: z >= 3, [("next", *LATENTS)], [("next", "agents", "done")]),
    )
    start = TensorDict({"agents": {"latent": torch.full((2, AGENTS, 1), initial)}}, [2])
    return fastwm.WorldModelEnv(wm, base, batch_size=[2], latent_key=LATENTS, initial_state=start)


def test_each_agent_restarts_for_itself_where_flags_are_the_agents() -> None:
    env = agents_only_env(initial=1.0)
    latent = torch.tensor([[0.0, 1.0, 2.0], [-9.0, -9.0, 0.0]]).unsqueeze(-1)
    begin = TensorDict({"agents": TensorDict({"latent": latent}, [2, AGENTS])}, [2])
    out = env.rollout(
        4,
        linear_policy(1, latent_keys=[LATENTS], action_key=("agents", "action")),
        tensordict=begin,
        break_when_any_done=False,
    )
    assert out["agents", "latent"][..., 0].transpose(1, 2).tolist() == [
        [[0, 1, 2, 1], [1, 2, 1, 2], [2, 1, 2, 1]],
        [[-9, -8, -7, -6], [-9, -8, -7, -6], [0, 1, 2, 1]],
    ]


# ---------------------------------------------------------------- several latents, context


def test_all_latents_advance_together() -> None:
    case = make_case("rssm")
    out = case.env([B]).rollout(T, case.policy, tensordict=case.start(B))
    assert out["state"].shape == (B, T, LATENT)
    assert out["belief"].shape == (B, T, BELIEF)
    for key in ("state", "belief"):
        assert torch.equal(out[key][:, 1:], out["next", key][:, :-1])
        assert out[key].diff(dim=1).abs().amax() > 0


def test_context_is_returned_at_the_root_only() -> None:
    case = make_case("context")
    env = case.env([B])
    begin = case.start(B)
    out = env.rollout(T, case.policy, tensordict=begin.clone())
    assert torch.equal(out["goal"], begin["goal"].unsqueeze(1).expand(B, T, 3))
    assert ("next", "goal") not in out.keys(True)
    assert "goal" in env.state_spec
    assert "goal" not in env.observation_spec


def test_context_matters_to_each_step() -> None:
    case = make_case("context")
    begin = case.start(B)
    other = begin.clone().set("goal", begin["goal"] + 1)
    one, two = (case.env([B]).rollout(T, case.policy, tensordict=td) for td in (begin, other))
    assert (one["next", "reward"] - two["next", "reward"]).abs().amin() > 0


def test_context_survives_restarts_with_the_rows_own_value() -> None:
    """A row that restarts takes its context from initial_state, with its latent."""
    wm = fastwm.WorldModel(
        module(nn.Linear(OBS, 1), ["observation"], ["latent"]),
        module(
            lambda z, g, a: z + g + 0 * a.sum(-1, keepdim=True),
            ["latent", "pace", "action"],
            [("next", "latent")],
        ),
        module(nn.Identity(), [("next", "latent")], [("next", "reward")]),
        done_head=module(lambda z: z >= 3, [("next", "latent")], [("next", "done")]),
    )
    fresh = TensorDict({"latent": torch.zeros(2, 1), "pace": torch.full((2, 1), 2.0)}, [2])
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[2], initial_state=fresh)
    begin = TensorDict(
        {"latent": torch.tensor([[1.0], [-9.0]]), "pace": torch.tensor([[1.0], [1.0]])}, [2]
    )
    out = env.rollout(5, linear_policy(1), tensordict=begin, break_when_any_done=False)
    assert out["latent"][..., 0].tolist() == [[1, 2, 0, 2, 0], [-9, -8, -7, -6, -5]]
    assert out["pace"][..., 0].tolist() == [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]


def test_an_encoder_that_writes_the_context_supplies_it() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x[..., :LATENT], x[..., LATENT : LATENT + 2]

    wm = fastwm.WorldModel(
        module(Two(), ["observation"], ["latent", "task"]),
        module(
            CatLinear(LATENT + 2 + ACTION, LATENT),
            ["latent", "task", "action"],
            [("next", "latent")],
        ),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    observations = TensorDict({"observation": torch.randn(B, OBS)}, [B])
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], initial_state=observations)
    check_env_specs(env)
    out = env.rollout(T, linear_policy())
    want = observations["observation"][:, LATENT : LATENT + 2]
    assert torch.equal(out["task"], want.unsqueeze(1).expand(B, T, 2))
