"""TorchRL's value estimators on an imagined rollout as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator

import fastwm
from tests.models import LATENT, counting_world_model, linear_policy, make_case, spec_env

pytestmark = pytest.mark.usefixtures("each_backend")

T, GAMMA, LMBDA = 6, 0.9, 0.8


def imagined(batch: tuple[int, ...]) -> TensorDict:
    case = make_case("linear")
    return case.env(batch).rollout(T, case.policy, tensordict=case.start(*batch))


def finishing() -> TensorDict:
    """Rows that are done in their second and fourth step and imagined beyond it; one that is not."""
    wm = counting_world_model(done_at=4, flags=["terminated"])
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[3])
    start = TensorDict({"latent": torch.tensor([[2.0], [0.0], [-99.0]])}, [3])
    return env.rollout(T, linear_policy(1), tensordict=start, break_when_any_done=False)


def critic(width: int = LATENT) -> ValueOperator:
    return ValueOperator(nn.Linear(width, 1), in_keys=["latent"])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: GAE(gamma=GAMMA, lmbda=LMBDA, value_network=v),
        lambda v: TDLambdaEstimator(gamma=GAMMA, lmbda=LMBDA, value_network=v),
        lambda v: TD0Estimator(gamma=GAMMA, value_network=v),
        lambda v: TD1Estimator(gamma=GAMMA, value_network=v),
    ],
    ids=["GAE", "TDLambda", "TD0", "TD1"],
)
def test_every_estimator_runs(make: Any, batch: tuple[int, ...]) -> None:
    out = make(critic())(imagined(batch))
    assert out["advantage"].shape == (*batch, T, 1)
    assert out["value_target"].shape == (*batch, T, 1)
    assert out["advantage"].isfinite().all()


@torch.no_grad()
def by_hand(td: TensorDict, value: ValueOperator) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE's advantage and the TD(lambda) return, backwards in time."""
    v, v_next = value.module(td["latent"]), value.module(td["next", "latent"])
    reward = td["next", "reward"]
    not_done, not_terminated = ~td["next", "done"], ~td["next", "terminated"]
    advantage, target = torch.zeros_like(v), torch.zeros_like(v)
    a, g = torch.zeros_like(v[:, 0]), v_next[:, -1]
    for t in reversed(range(T)):
        delta = reward[:, t] + GAMMA * not_terminated[:, t] * v_next[:, t] - v[:, t]
        a = delta + GAMMA * LMBDA * not_done[:, t] * a
        bootstrap = v_next[:, t] * not_terminated[:, t]
        g = torch.where(not_done[:, t], (1 - LMBDA) * bootstrap + LMBDA * g, bootstrap)
        g = reward[:, t] + GAMMA * g
        advantage[:, t], target[:, t] = a, g
    return advantage, target


@pytest.mark.parametrize("name", ["running", "finishing"])
def test_the_numbers_are_those_of_the_recursion(name: str) -> None:
    td, value = (imagined((3,)), critic()) if name == "running" else (finishing(), critic(1))
    assert td["next", "terminated"].any() == (name == "finishing")
    td = td.detach()
    advantage, target = by_hand(td, value)
    gae = GAE(gamma=GAMMA, lmbda=LMBDA, value_network=value)(td.copy())
    torch.testing.assert_close(gae["advantage"], advantage, rtol=1e-4, atol=1e-4)
    td_lambda = TDLambdaEstimator(gamma=GAMMA, lmbda=LMBDA, value_network=value)(td.copy())
    torch.testing.assert_close(td_lambda["value_target"], target, rtol=1e-4, atol=1e-4)
