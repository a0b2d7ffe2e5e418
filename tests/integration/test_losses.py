"""TorchRL's losses on imagined batches: forward, backward, gradients where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss
from torchrl.objectives.dreamer import DreamerActorLoss
from torchrl.objectives.value import GAE

import fastwm
from tests.models import (
    ACTION,
    BELIEF,
    LATENT,
    OBS,
    CatLinear,
    make_case,
    module,
    rssm_world_model,
    sampled_actor,
    spec_env,
)

pytestmark = pytest.mark.usefixtures("each_backend")

B, T = 4, 5


def gradient(net: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None)


def imagined(actor: ProbabilisticActor) -> tuple[Any, Any]:
    case = make_case("linear")
    with torch.no_grad():
        batch = case.env([B]).rollout(T, actor, tensordict=case.start(B))
    return batch, case.world_model


@pytest.mark.parametrize("loss", [A2CLoss, ClipPPOLoss, ReinforceLoss])
def test_policy_gradient_on_an_imagined_batch(loss: Any) -> None:
    actor = sampled_actor(return_log_prob=True)
    critic = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
    batch, world_model = imagined(actor)
    GAE(gamma=0.99, lmbda=0.95, value_network=critic)(batch)
    out = loss(actor, critic)(batch)
    total = sum(value for key, value in out.items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    assert gradient(actor) > 0
    assert gradient(critic) > 0
    assert gradient(world_model) == 0


def test_a_step_on_the_imagined_return_raises_it() -> None:
    """Pathwise: the gradient of the return through the dynamics, as SVG and Dreamer take it."""
    torch.manual_seed(0)
    case, actor = make_case("linear"), sampled_actor()
    env, begin = case.env([64]), case.start(64)
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.05)
    returns = []
    for _ in range(20):
        torch.manual_seed(1)
        rollout = env.rollout(T, actor, tensordict=begin.clone())
        value = rollout["next", "reward"].sum(1).mean()
        returns.append(float(value))
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    assert returns[-1] > returns[0] + 0.05


def test_dreamers_actor_loss_drives_our_env() -> None:
    """TorchRL's own Dreamer loss, with fastwm's env where it expects a DreamerEnv."""
    wm = rssm_world_model(sampled=True)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[], latent_key="state")
    actor = sampled_actor(LATENT + BELIEF, latent_keys=["state", "belief"])
    value = module(CatLinear(LATENT + BELIEF, 1), ["state", "belief"], ["state_value"])
    loss = DreamerActorLoss(actor, value, env, imagination_horizon=T)
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    start = wm.encode(TensorDict({"observation": torch.randn(B, OBS)}, [B]))
    # The loss's reset takes the state it is given.
    out, fake = loss(start.detach())
    assert fake.shape == (B, T)
    assert fake["next", "reward"].shape == (B, T, 1)
    out["loss_actor"].backward()
    assert gradient(actor) > 0
    # The world model is held out of this loss.
    assert gradient(wm) == 0
    assert all(p.requires_grad for p in wm.parameters())


def test_actions_of_the_batch_are_the_actors() -> None:
    actor = sampled_actor(return_log_prob=True)
    batch, _ = imagined(actor)
    assert batch["action"].shape == (B, T, ACTION)
    again = actor.get_dist(batch.select("latent")).log_prob(batch["action"])
    torch.testing.assert_close(again, batch["action_log_prob"], rtol=1e-3, atol=1e-4)
