"""Keys that nothing provides: named at construction, or at the rollout, on every engine alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

import fastwm
from fastwm.wiring import MissingKeyError, unprovided
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
ENGINES = ("eager", "captured", "fused", "auto")


def world_model(reward: Any, dynamics: Any = None, **kwargs: Any) -> fastwm.WorldModel:
    if dynamics is None:
        dynamics = module(
            CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]
        )
    return fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]), dynamics, reward, **kwargs
    )


def env_of(model: fastwm.WorldModel, **kwargs: Any) -> fastwm.WorldModelEnv:
    return fastwm.WorldModelEnv(model, spec_env(), batch_size=[B], **kwargs)


def start(**more: Tensor) -> TensorDict:
    return TensorDict({"latent": torch.randn(B, LATENT), **more}, [B])


# ---------------------------------------------------------------- the step, at construction


@pytest.mark.parametrize("net", [nn.Linear(LATENT, 1), nn.LazyLinear(1)], ids=["known", "lazy"])
def test_a_head_that_reads_what_nothing_writes(net: nn.Module) -> None:
    model = world_model(module(net, [("next", "state")], [("next", "reward")]))
    with pytest.raises(ValueError, match="world model's reward_head") as error:
        env_of(model)
    assert "('next', 'state')" in str(error.value)
    assert "no module writes: before it, the step writes [('next', 'latent')]" in str(error.value)


def test_a_head_that_comes_too_early() -> None:
    reward = module(nn.Linear(2, 1), [("next", "state")], [("next", "reward")])
    done = module(nn.Linear(LATENT, 2), [("next", "latent")], [("next", "state")])
    with pytest.raises(ValueError, match="only a later module writes"):
        env_of(world_model(reward, done_head=done))


def test_the_part_within_a_sequence_is_found() -> None:
    inner = TensorDictSequential(
        module(nn.Linear(LATENT, 3), [("next", "latent")], ["hidden"]),
        module(nn.Linear(3, 1), [("next", "hidden")], [("next", "reward")]),
    )
    with pytest.raises(ValueError, match=r"reward_head reads \('next', 'hidden'\)"):
        env_of(world_model(inner))


def test_sampled_heads_too() -> None:
    head = TensorDictSequential(
        module(nn.Linear(LATENT, 1), [("next", "latent")], ["loc"]),
        sampled_actor(LATENT, ACTION)[-1],
    )
    found = unprovided(head, ["latent"])
    assert [m.key for m in found] == [("next", "latent"), "scale"]
    assert all(m.certain() for m in found)


# ---------------------------------------------------------------- what works stays


def test_keys_under_next_that_an_earlier_part_writes() -> None:
    dynamics = TensorDictSequential(
        module(CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 2), [("next", "latent")], [("next", "aux", "hidden")]),
    )
    group = module(
        lambda aux: aux.get("hidden").sum(-1, True), [("next", "aux")], [("next", "reward")]
    )
    env = env_of(world_model(group, dynamics))
    assert env.rollout(T, linear_policy(), tensordict=start()).shape == (B, T)


def test_context_comes_with_the_start() -> None:
    dynamics = module(
        CatLinear(LATENT + 1 + ACTION, LATENT), ["latent", "goal", "action"], [("next", "latent")]
    )
    env = env_of(
        world_model(
            module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]), dynamics
        )
    )
    assert env.rollout(T, linear_policy(), tensordict=start(goal=torch.ones(B, 1))).shape == (B, T)


class Optional(nn.Module):
    """A head that does without a bonus."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, 1)

    def forward(self, latent: Tensor, bonus: Tensor | None = None) -> Tensor:
        return self.linear(latent) if bonus is None else self.linear(latent) + bonus


def without_default(latent: Tensor, bonus: Tensor | None) -> Tensor:
    return latent.sum(-1, True) if bonus is None else bonus


class Own(TensorDictModuleBase):
    """A module that asks by itself whether a key is there."""

    in_keys = (("next", "latent"), ("next", "bonus"))
    out_keys = (("next", "reward"),)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        bonus = tensordict.get(("next", "bonus"), None)
        latent = tensordict.get(("next", "latent"))
        return tensordict.set(("next", "reward"), without_default(latent, bonus))


@pytest.mark.parametrize(
    ("head", "lazy"),
    [(head, lazy) for head in ("default", "own", "tolerant") for lazy in (False, True)]
    + [("without_default", False)],
)
def test_a_head_that_does_without(head: str, lazy: bool) -> None:
    """torchrl hands None for a key that is not there: what can do without it works, as it does there."""
    keys = [("next", "latent"), ("next", "bonus")]
    if head == "own":
        reward: Any = Own()
    elif head == "tolerant":
        skipped = module(nn.Linear(LATENT, 1), [("next", "bonus")], [("next", "reward")])
        reward = TensorDictSequential(skipped, partial_tolerant=True)
    else:
        net = Optional() if head == "default" else without_default
        reward = module(net, keys, [("next", "reward")])
    dynamics = None
    if lazy:
        net = nn.Sequential(nn.LazyLinear(LATENT))
        cat = module(lambda *x: torch.cat(x, -1), ["latent", "action"], ["both"])
        dynamics = TensorDictSequential(cat, module(net, ["both"], [("next", "latent")]))
    env = env_of(world_model(reward, dynamics))
    assert env.rollout(T, linear_policy(), tensordict=start()).shape == (B, T)


def test_the_dry_run_leaves_the_generator_alone() -> None:
    def noise(latent: Tensor, bonus: Tensor | None) -> Tensor:
        return torch.randn_like(latent[..., :1])

    model = world_model(
        module(noise, [("next", "latent"), ("next", "bonus")], [("next", "reward")])
    )
    state = torch.get_rng_state()
    env_of(model)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- the policy, at the rollout


@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_that_reads_what_is_not_there(engine: str) -> None:
    env, policy = env_of(linear_world_model()), linear_policy(latent_keys=["state"])
    with (
        fastwm.backend(engine),
        pytest.raises(MissingKeyError, match="The policy reads 'state'") as error,
    ):
        env.rollout(T, policy, tensordict=start())
    assert "a step begins with ['done', 'latent', 'terminated']" in str(error.value)
    assert isinstance(error.value, KeyError)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_in_parts(engine: str) -> None:
    policy = TensorDictSequential(
        module(nn.Linear(LATENT, 3), ["latent"], ["hidden"]),
        module(CatLinear(4, ACTION), ["hidden", "task"], ["action"]),
    )
    env = env_of(linear_world_model(), initial_state=start())
    with (
        fastwm.backend(engine),
        pytest.raises(MissingKeyError, match="reads 'task', which is not there"),
    ):
        env.rollout(T, policy)
    with fastwm.backend(engine):
        assert env.rollout(T, policy, tensordict=start(task=torch.ones(B, 1))).shape == (B, T)


def test_a_step_taken_alone_names_what_it_lacks() -> None:
    dynamics = module(
        CatLinear(LATENT + 1 + ACTION, LATENT), ["latent", "goal", "action"], [("next", "latent")]
    )
    reward = module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")])
    env = env_of(world_model(reward, dynamics))
    with pytest.raises(
        MissingKeyError, match=r"The step reads 'goal', .* there is \['action', 'latent'\]"
    ):
        env.step(start(action=torch.ones(B, ACTION)))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_that_is_no_missing_key_stays_what_it_is(engine: str) -> None:
    """The latent is lost before the policy's own wiring is."""
    env, policy = env_of(linear_world_model()), linear_policy(latent_keys=["state"])
    with fastwm.backend(engine):
        with pytest.raises(RuntimeError, match="initial latent under key 'latent'"):
            env.rollout(T, linear_policy(), tensordict=TensorDict({}, [B]))
        with pytest.raises(RuntimeError, match=r"shape==env\.batch_size"):
            env.rollout(T, linear_policy(), tensordict=start().expand(2, B)[0, :1])
        with pytest.raises(RuntimeError, match="initial latent under key 'latent'"):
            env.rollout(T, linear_policy())
        with pytest.raises(MissingKeyError, match="'state'"):
            env.rollout(T, policy, tensordict=start(), auto_reset=False)
