"""The faults of torchrl 0.14.1's world-model env that fastwm puts right, one check for each.

Every check is one function of the classes it is run on. It must pass on fastwm's and, so that we
know that it checks something, fail on torchrl's with the error (or the wrong value) that is named
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchrl
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.model_based import WorldModelEnv as UpstreamEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import CEMPlanner, MPPIPlanner, ValueOperator
from torchrl.modules import WorldModel as UpstreamWorldModel
from torchrl.objectives.value import GAE, TDLambdaEstimator

import fastwm
from tests.models import (
    ACTION,
    LATENT,
    counting_world_model,
    linear_policy,
    linear_world_model,
    spec_env,
)

MEASURED_ON = "0.14.1"
B, T = 3, 5


@dataclass(frozen=True)
class Kit:
    """The classes under test and the way to make an env of them."""

    world_model: Any
    env_class: Any

    def env(self, world_model: Any, base_env: EnvBase, **kwargs: Any) -> Any:
        if self.env_class is UpstreamEnv:
            # torchrl's env has no such argument: its reset never has a start of its own.
            kwargs.pop("initial_state", None)
        return self.env_class(world_model, base_env, **kwargs)


FASTWM = Kit(fastwm.WorldModel, fastwm.WorldModelEnv)
TORCHRL = Kit(UpstreamWorldModel, UpstreamEnv)


@dataclass(frozen=True)
class Fault:
    check: Callable[[Kit], None]
    raises: type[Exception]
    match: str


FAULTS: dict[str, Fault] = {}


def fault(raises: type[Exception], match: str) -> Callable[[Any], Any]:
    """Register a check with how it fails on torchrl (AssertionError: a wrong value, silently)."""

    def register(check: Callable[[Kit], None]) -> Callable[[Kit], None]:
        FAULTS[check.__name__] = Fault(check, raises, match)
        return check

    return register


def start(latent: int = LATENT, batch: Sequence[int] = (B,)) -> TensorDict:
    return TensorDict({"latent": torch.randn(*batch, latent)}, batch)


def batched_env(kit: Kit, world_model: Any, latent: int = LATENT, **kwargs: Any) -> Any:
    """The one set-up that torchrl can build: a batched base env whose specs hold the latent."""
    return kit.env(world_model, spec_env([B], latent=latent), **kwargs)


# ---------------------------------------------------------------- specs


@fault(ValueError, "expand")
def unbatched_base_env_takes_a_batch_size(kit: Kit) -> None:
    env = kit.env(linear_world_model(kit.world_model), spec_env(), batch_size=[B])
    assert env.rollout(T, linear_policy(), tensordict=start()).shape == (B, T)


@fault(AssertionError, "last dim lost")
def specs_keep_their_last_dim(kit: Kit) -> None:
    env = batched_env(kit, linear_world_model(kit.world_model))
    assert env.reward_spec.shape == (B, 1), "last dim lost"
    assert env.action_spec.shape == (B, ACTION), "last dim lost"


@fault(AssertionError, "trailing dim lost")
def imagined_reward_has_a_trailing_dim(kit: Kit) -> None:
    env = batched_env(kit, linear_world_model(kit.world_model))
    rollout = env.rollout(T, linear_policy(), tensordict=start())
    assert rollout["next", "reward"].shape == (B, T, 1), "trailing dim lost"


def value_operator() -> ValueOperator:
    return ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])


@fault(RuntimeError, "must share a unique shape")
def gae_takes_an_imagined_rollout(kit: Kit) -> None:
    env = batched_env(kit, linear_world_model(kit.world_model))
    rollout = env.rollout(T, linear_policy(), tensordict=start())
    gae = GAE(gamma=0.9, lmbda=0.9, value_network=value_operator())
    assert gae(rollout)["advantage"].shape == (B, T, 1)


@fault(RuntimeError, "must share a unique shape")
def td_lambda_takes_an_imagined_rollout(kit: Kit) -> None:
    env = batched_env(kit, linear_world_model(kit.world_model))
    rollout = env.rollout(T, linear_policy(), tensordict=start())
    estimator = TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value_operator())
    assert estimator(rollout)["advantage"].shape == (B, T, 1)


@fault(RuntimeError, "same number of dimensions")
def rollout_without_a_policy_takes_random_actions(kit: Kit) -> None:
    env = batched_env(kit, linear_world_model(kit.world_model))
    rollout = env.rollout(T, tensordict=start())
    assert rollout["action"].shape == (B, T, ACTION)
    assert rollout["action"].std() > 0


@fault(AssertionError, "the latent stands still")
def latent_advances_without_being_in_the_specs(kit: Kit) -> None:
    """The observation spec holds no latent: upstream imagines the same state T times, silently."""
    env = kit.env(linear_world_model(kit.world_model), spec_env([B]))
    rollout = env.rollout(T, linear_policy(), tensordict=start())
    latents = rollout["latent"]
    assert (latents[:, 1:] - latents[:, :-1]).abs().amin() > 0, "the latent stands still"


@fault(AssertionError, "not the latent")
def observation_spec_is_the_latent_by_default(kit: Kit) -> None:
    env = kit.env(linear_world_model(kit.world_model), spec_env([B]))
    assert list(env.observation_spec.keys(True, True)) == ["latent"], "not the latent"
    assert env.observation_spec["latent"].shape == (B, LATENT)


# ---------------------------------------------------------------- done flags


@fault(NotImplementedError, "bitwise_or")
def float_done_head_counts_from_the_threshold_on(kit: Kit) -> None:
    world_model = counting_world_model(kit.world_model, done_at=2, kind="float")
    env = batched_env(kit, world_model, latent=1)
    rollout = env.rollout(
        T, linear_policy(1), tensordict=TensorDict({"latent": torch.zeros(B, 1)}, [B])
    )
    assert rollout.shape == (B, 2)  # latents 1, 2: done at the second step
    assert rollout["next", "done"].dtype is torch.bool
    assert rollout["next", "done"][..., 0].tolist() == [[False, True]] * B


@fault(AssertionError, "not boolean")
def integer_done_head_gives_boolean_flags(kit: Kit) -> None:
    world_model = counting_world_model(kit.world_model, done_at=2, kind="int")
    env = batched_env(kit, world_model, latent=1)
    out = env.rollout(
        T, linear_policy(1), tensordict=TensorDict({"latent": torch.zeros(B, 1)}, [B])
    )
    assert out["next", "done"].dtype is torch.bool, "not boolean"


@fault(AssertionError, "terminated, yet not done")
def terminated_alone_makes_done(kit: Kit) -> None:
    world_model = counting_world_model(kit.world_model, done_at=2, flags=["terminated"])
    env = batched_env(kit, world_model, latent=1)
    out = env.rollout(
        T, linear_policy(1), tensordict=TensorDict({"latent": torch.zeros(B, 1)}, [B])
    )
    assert out["next", "terminated"][:, -1].all()
    assert out["next", "done"][:, -1].all(), "terminated, yet not done"


@fault(RuntimeError, "initial latent")
def fixed_horizon_goes_on_past_done(kit: Kit) -> None:
    world_model = counting_world_model(kit.world_model, done_at=2)
    env = batched_env(kit, world_model, latent=1)
    begin = TensorDict({"latent": torch.tensor([[0.0], [1.0], [-9.0]])}, [B])
    rollout = env.rollout(T, linear_policy(1), tensordict=begin, break_when_any_done=False)
    # Each step its own flag, and no row starts anew.
    assert rollout["next", "done"][..., 0].tolist() == [
        [False, True, True, True, True],
        [True, True, True, True, True],
        [False, False, False, False, False],
    ]
    assert rollout["next", "latent"][0, :, 0].tolist() == [1, 2, 3, 4, 5]


@fault(RuntimeError, "initial latent")
def finished_row_restarts_from_initial_state(kit: Kit) -> None:
    world_model = counting_world_model(kit.world_model, done_at=2)
    env = batched_env(
        kit,
        world_model,
        latent=1,
        initial_state=TensorDict({"latent": torch.full((B, 1), -1.0)}, [B]),
    )
    begin = TensorDict({"latent": torch.tensor([[0.0], [1.0], [-9.0]])}, [B])
    rollout = env.rollout(T, linear_policy(1), tensordict=begin, break_when_any_done=False)
    assert rollout["latent"][..., 0].tolist() == [
        [0, 1, -1, 0, 1],
        [1, -1, 0, 1, -1],
        [-9, -8, -7, -6, -5],
    ]


# ---------------------------------------------------------------- reset


def with_initial_state(kit: Kit) -> Any:
    return batched_env(kit, linear_world_model(kit.world_model), initial_state=start())


@fault(RuntimeError, "initial latent")
def reset_draws_from_initial_state(kit: Kit) -> None:
    assert with_initial_state(kit).reset()["latent"].shape == (B, LATENT)


@fault(RuntimeError, "initial latent")
def check_env_specs_passes(kit: Kit) -> None:
    check_env_specs(with_initial_state(kit))


@fault(RuntimeError, "initial latent")
def collector_starts(kit: Kit) -> None:
    collector = Collector(
        with_initial_state(kit), linear_policy(), frames_per_batch=2 * B, total_frames=2 * B
    )
    try:
        (batch,) = list(collector)
    finally:
        collector.shutdown()
    assert batch.shape == (B, 2)


# ---------------------------------------------------------------- planners


def planner_env(kit: Kit, batch: Sequence[int]) -> Any:
    """For torchrl its only buildable batch, the start's; for fastwm an env of any batch."""
    base = spec_env(batch, latent=LATENT)
    batch_size = {} if kit is TORCHRL else {"batch_size": []}
    return kit.env(linear_world_model(kit.world_model), base, **batch_size)


def planned(planner: Any, batch: Sequence[int]) -> None:
    flags = {name: torch.zeros(*batch, 1, dtype=torch.bool) for name in ("done", "terminated")}
    out = planner(start(batch=batch).update(flags))
    assert out["action"].shape == (*batch, ACTION)
    assert out["action"].isfinite().all()


@fault(RuntimeError, r"shape==env.batch_size")
def cem_planner_takes_any_batch(kit: Kit) -> None:
    for batch in ([B], [2, B]):
        env = planner_env(kit, batch)
        planned(
            CEMPlanner(env, planning_horizon=4, optim_steps=2, num_candidates=7, top_k=3), batch
        )


@fault(RuntimeError, r"shape==env.batch_size")
def mppi_planner_takes_any_batch(kit: Kit) -> None:
    for batch in ([B], [2, B]):
        env = planner_env(kit, batch)
        advantage = TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value_operator())
        planner = MPPIPlanner(
            env,
            advantage,
            temperature=1.0,
            planning_horizon=4,
            optim_steps=2,
            num_candidates=7,
            top_k=3,
        )
        planned(planner, batch)


# ---------------------------------------------------------------- the two sides


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", FAULTS)
def test_fastwm_is_right(name: str, backend: str) -> None:
    torch.manual_seed(0)
    with fastwm.backend(backend):
        FAULTS[name].check(FASTWM)


@pytest.mark.skipif(
    torchrl.__version__.split("+")[0] != MEASURED_ON,
    reason=f"the faults are those of torchrl {MEASURED_ON}; here is {torchrl.__version__}",
)
@pytest.mark.parametrize("name", FAULTS)
def test_torchrl_is_not(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(FAULTS[name].raises, match=FAULTS[name].match):
        FAULTS[name].check(TORCHRL)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_where_upstream_works_both_agree(backend: str) -> None:
    """So that the checks above fail for their own reasons, not for another model or start."""

    def rollout(kit: Kit) -> TensorDict:
        torch.manual_seed(0)
        env = batched_env(kit, linear_world_model(kit.world_model))
        return env.rollout(T, linear_policy(), tensordict=start())

    with fastwm.backend(backend):
        ours = rollout(FASTWM)
    theirs = rollout(TORCHRL)
    for key in ("latent", "action", "done", "terminated", ("next", "latent"), ("next", "done")):
        torch.testing.assert_close(ours[key], theirs[key])
    torch.testing.assert_close(ours["next", "reward"].squeeze(-1), theirs["next", "reward"])
