"""`fastwm.imagine` against Dreamer's equations written out, and against torchrl's Dreamer losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import DreamerActorLoss, DreamerV3ActorLoss, DreamerValueLoss

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_same
from tests.imagined_envs import STATE, Imagined, Spring, dreamer, spring, upstream
from tests.models import BELIEF, CatMLP, linear_policy, linear_world_model, module, spec_env

H, GAMMA, LAMBDA = 6, 0.9, 0.8
LATENTS = ["state", "belief"]


def value_module() -> TensorDictModule:
    torch.manual_seed(5)
    return module(CatMLP(STATE + BELIEF, 1, 8, 1), LATENTS, ["state_value"])


def continue_module(key: str = "continue_pred", prefix: bool = True) -> TensorDictModule:
    torch.manual_seed(6)
    keys = [("next", k) for k in LATENTS] if prefix else LATENTS
    return module(CatMLP(STATE + BELIEF, 1, 8, 1), keys, [("next", key) if prefix else key])


def dreaming(case: Imagined, seed: int = 0, **kwargs: Any) -> TensorDictBase:
    torch.manual_seed(seed)
    kwargs = {"gamma": GAMMA, "lmbda": LAMBDA, **kwargs}
    return fastwm.imagine(case.env, case.policy, case.start, H, **kwargs)


def written_out(case: Imagined, seed: int = 0, stop: bool = False) -> dict[str, list[Tensor]]:
    """Dreamer's imagination as a loop over the networks: states 0 to H, rewards 1 to H, actions."""
    prior, reward = case.env.world_model.module[0].module[0].module, case.env.world_model.module[1]
    torch.manual_seed(seed)
    state, belief = case.start["state"], case.start["belief"]
    found: dict[str, list[Tensor]] = {
        "state": [state],
        "belief": [belief],
        "reward": [],
        "action": [],
    }
    for _ in range(H):
        seen = TensorDict({"state": state, "belief": belief}, case.start.batch_size)
        action = case.policy.get_dist(seen.detach() if stop else seen).rsample()
        _, _, state, belief = prior(state, belief, action)
        found["state"].append(state)
        found["belief"].append(belief)
        found["action"].append(action)
        found["reward"].append(reward.module(state, belief))
    return found


def values_of(value: TensorDictModule, found: dict[str, list[Tensor]]) -> list[Tensor]:
    return [value.module(s, b) for s, b in zip(found["state"], found["belief"], strict=True)]


def stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values, -2)


def gradients_of(loss: Tensor, policy: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def assert_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert w.abs().sum() > 0
        assert_close(g, w, "rollout.gradient", f"gradient of shape {tuple(w.shape)}")


# ---------------------------------------------------------------- Dreamer's equations


def dreamer_v1_targets(rewards: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Equations 5 and 6 of arXiv:1912.01603 for every state but the last, term by term.

    ``V_N^k`` sums the rewards of k steps (no further than the horizon) and the value after them; ``V_lambda``
    is their exponentially weighted average. Here the reward of a step is that of the state it leads to.
    """
    targets = []
    for t in range(H):

        def n_step(k: int, t: int = t) -> Tensor:
            h = min(t + k, H)
            total = sum(GAMMA ** (n - t) * rewards[n] for n in range(t, h))
            return total + GAMMA ** (h - t) * values[h]

        left = H - t
        average = (1 - LAMBDA) * sum(LAMBDA ** (n - 1) * n_step(n) for n in range(1, left))
        targets.append(average + LAMBDA ** (left - 1) * n_step(left))
    return targets


def dreamer_v3_targets(
    rewards: list[Tensor], values: list[Tensor], going_on: list[Tensor]
) -> list[Tensor]:
    """Equation 4 of arXiv:2010.02193, with its predicted discount; equation 5 of arXiv:2301.04104."""
    following, targets = values[H], []
    for t in reversed(range(H)):
        mixed = (1 - LAMBDA) * values[t + 1] + LAMBDA * following
        following = rewards[t] + GAMMA * going_on[t] * mixed
        targets.append(following)
    return targets[::-1]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("engine", ["eager", "captured", "fused"])
def test_dreamers_equations(engine: str, stop: bool) -> None:
    case, value = dreamer(), value_module()
    found = written_out(case, stop=stop)
    values = values_of(value, found)
    want = stacked(dreamer_v1_targets(found["reward"], values))
    weight = (GAMMA ** torch.arange(H)).reshape(H, 1)
    want_gradients = gradients_of(-(weight * want).mean(), case.policy)

    fastwm.accelerate(case.env, engine)
    dream = dreaming(case, value=value, stop_policy_inputs=stop)
    assert_close(dream["lambda_target"], want, "rollout", "lambda_target")
    assert_close(dream["state_value"], stacked(values[:-1]), "rollout", "state_value")
    assert_close(dream["next", "state_value"], stacked(values[1:]), "rollout", "next value")
    assert_close(dream["discount_weight"], weight.expand_as(want), "rollout", "discount_weight")
    loss = -(dream["discount_weight"] * dream["lambda_target"]).mean()
    assert_gradients(gradients_of(loss, case.policy), want_gradients)
    assert not dream["advantage"].requires_grad
    assert torch.equal(dream["advantage"], (dream["lambda_target"] - dream["state_value"]).detach())


def test_stopped_inputs_change_the_gradient_and_make_one_plan() -> None:
    case, value = dreamer(), value_module()
    fastwm.accelerate(case.env, "fused")
    losses = {}
    for stop in (False, True, False, True):
        dream = dreaming(case, value=value, stop_policy_inputs=stop)
        losses[stop] = gradients_of(dream["lambda_target"].mean(), case.policy)
    assert not torch.allclose(losses[False][0], losses[True][0])
    assert cache_of(case.env).traces == 2


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("key", ["continue_pred", "continuation"])
def test_a_predicted_continuation(key: str, prefix: bool) -> None:
    case, value = dreamer(), value_module()
    head = continue_module(key, prefix)
    if key == "continuation":
        head.module = nn.Sequential(head.module, nn.Sigmoid())
        head.module.forward = lambda *x: head.module[1](head.module[0](*x))
    case.start["continuation"] = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0]).reshape(5, 1)
    found = written_out(case)
    values = values_of(value, found)
    going_on = [
        head.module(s, b) if key == "continuation" else head.module(s, b).sigmoid()
        for s, b in zip(found["state"], found["belief"], strict=True)
    ]
    want = stacked(dreamer_v3_targets(found["reward"], values, going_on[1:]))
    weights, weight = [], case.start["continuation"]
    for t in range(H):
        weights.append(weight)
        weight = weight * GAMMA * going_on[t + 1]
    want_gradients = gradients_of(want.mean(), case.policy)

    dream = dreaming(case, value=value, continuation=head)
    assert_close(dream["lambda_target"], want, "rollout", "lambda_target")
    assert_close(dream["discount_weight"], stacked(weights), "rollout", "discount_weight")
    assert_close(dream["next", "continuation"], stacked(going_on[1:]), "rollout", "next")
    root = [case.start["continuation"], *going_on[1:-1]]
    assert_close(dream["continuation"], stacked(root), "rollout", "continuation")
    assert not dream["discount_weight"].requires_grad
    assert_gradients(gradients_of(dream["lambda_target"].mean(), case.policy), want_gradients)


@pytest.mark.parametrize("engine", ["eager", "captured", "fused"])
def test_reinforce(engine: str) -> None:
    """The score function at stopped states and actions, times the stopped advantage."""
    case, value = dreamer(), value_module()
    found = {k: [x.detach() for x in v] for k, v in written_out(case).items()}
    values = [v.detach() for v in values_of(value, found)]
    target = stacked(dreamer_v1_targets(found["reward"], values))
    total = torch.zeros(())
    for t in range(H):
        seen = TensorDict({k: found[k][t] for k in LATENTS}, case.start.batch_size)
        log_prob = case.policy.get_dist(seen).log_prob(found["action"][t])
        total = total - GAMMA**t * (log_prob * (target[:, t] - values[t]).squeeze(-1)).sum()
    want = gradients_of(total, case.policy)

    fastwm.accelerate(case.env, engine)
    dream = dreaming(case, value=value, gradient="reinforce")
    differentiable = {k for k in dream.keys(True, True) if dream[k].requires_grad}
    assert differentiable == {"action_log_prob", "entropy"}
    assert_close(dream["lambda_target"], target, "rollout", "lambda_target")
    loss = -(dream["discount_weight"] * dream["action_log_prob"] * dream["advantage"]).sum()
    assert_gradients(gradients_of(loss, case.policy), want)


def test_entropies() -> None:
    """In closed form where there is one; else by a sample, whose mean over many is the entropy."""
    case = dreamer()
    net = module(lambda s, b: (s[..., :1], s[..., 1:2].exp()), LATENTS, ["loc", "scale"])
    case.policy = TensorDictSequential(
        ProbabilisticActor(
            net,
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
            return_log_prob=False,
        )
    )[0]
    case.env.world_model.module[0].module[0].module.action_state_projector[0] = nn.Linear(
        STATE + 1, BELIEF
    )
    dream = dreaming(case)
    want = 0.5 * (1 + torch.log(2 * torch.pi * dream["scale"].square()))
    assert_close(dream["entropy"], want, "rollout", "entropy")

    sampled = dreamer(rows=1)  # a TanhNormal
    sampled.start = sampled.start.expand(4000).contiguous()
    dream = fastwm.imagine(sampled.env, sampled.policy, sampled.start, 1)
    distribution = sampled.policy.get_dist(sampled.start[:1])
    want = -rsample_and_log_prob(distribution, (40_000,))[1]
    error = 4 * want.std() / 4000**0.5
    assert abs(dream["entropy"].mean() - want.mean()) < error


# ---------------------------------------------------------------- torchrl's losses


@pytest.mark.parametrize("time_dim", [-2, None])
def test_torchrls_dreamer_losses(time_dim: int | None) -> None:
    """Loss and gradient of the actor, and the critic's loss on what was imagined.

    Left to itself torchrl's actor loss takes the last dimension for the time, so lambda does nothing.
    """
    case, value = dreamer(), value_module()
    actor_loss = DreamerActorLoss(case.policy, value, case.env, imagination_horizon=H)
    actor_loss.make_value_estimator(gamma=GAMMA, lmbda=LAMBDA, time_dim=time_dim)
    torch.manual_seed(0)
    losses, data = actor_loss(case.start.clone())
    want = gradients_of(losses["loss_actor"], case.policy)

    lmbda = 0.0 if time_dim is None else LAMBDA
    dream = dreaming(case, value=value, lmbda=lmbda)
    loss = -(dream["discount_weight"] * dream["lambda_target"]).sum((-2, -1)).mean()
    assert_close(loss, losses["loss_actor"], "rollout", "loss_actor")
    assert_gradients(gradients_of(loss, case.policy), want)
    assert_close(dream["lambda_target"], data["lambda_target"], "rollout", "lambda_target")

    value_loss = DreamerValueLoss(value, gamma=GAMMA)
    want_value = value_loss(data)[0]["loss_value"]
    got_value = value_loss(dream.data)[0]["loss_value"]
    assert_close(got_value, want_value, "rollout", "loss_value")
    error = value(dream.select(*LATENTS).detach())["state_value"] - dream["lambda_target"].detach()
    # torchrl's distance is the squared error without the half of the paper's equation 8.
    own = (dream["discount_weight"] * error.square()).sum((-2, -1)).mean()
    assert_close(own, want_value, "rollout", "loss_value")
    assert gradients_of(own, value)[0].abs().sum() > 0


@pytest.mark.parametrize("reinforce", [False, True])
def test_torchrls_dreamer_v3_actor_loss(reinforce: bool) -> None:
    case, value = dreamer(), value_module()
    head = continue_module("continuation", prefix=False)
    head.module = _Sigmoid(head.module)
    theirs = DreamerV3ActorLoss(
        case.policy, value, case.env, continuation_model=head, imagination_horizon=H,
        use_reinforce=reinforce, entropy_bonus=3e-4, return_normalization=False,
    )  # fmt: skip
    theirs.make_value_estimator(gamma=GAMMA, lmbda=LAMBDA)
    torch.manual_seed(0)
    losses, data = theirs(case.start.clone())
    want = gradients_of(losses["loss_actor"], case.policy)

    # Theirs starts from the continuation of the start itself.
    case.start["continuation"] = head(case.start.clone())["continuation"].detach()
    gradient = "reinforce" if reinforce else "dynamics"
    dream = dreaming(case, value=value, continuation=head, gradient=gradient)
    for key in ("discount_weight", "lambda_target", "continuation", ("next", "continuation")):
        assert_close(dream[key], data[key], "rollout", str(key))
    weight = dream["discount_weight"]
    if reinforce:
        loss = -(weight * dream["action_log_prob"] * dream["advantage"]).mean()
    else:
        loss = -(weight * dream["lambda_target"]).mean()
    loss = loss - 3e-4 * (weight * dream["entropy"]).mean()
    assert_close(loss, losses["loss_actor"], "rollout", "loss_actor")
    assert_gradients(gradients_of(loss, case.policy), want)


class _Sigmoid(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs).sigmoid()


# ---------------------------------------------------------------- ends of episodes


def spring_value() -> TensorDictModule:
    return module(CatMLP(2, 1, 8, 1), ["position", "velocity"], ["state_value"])


def test_rows_that_are_finished_go_on_with_no_weight() -> None:
    case = dreamer()
    head = module(lambda state: state[..., :1] > 0.3, ["state"], ["terminated"])
    case.env.world_model.module.append(head)
    value = value_module()
    dream = dreaming(case, value=value)
    terminated = dream["next", "terminated"]
    assert terminated.any()
    assert not terminated.all()
    values, rewards = dream["next", "state_value"].unbind(1), dream["next", "reward"].unbind(1)
    ended = [flag.float() for flag in terminated.unbind(1)]
    want = dreamer_v3_targets(list(rewards), [values[0], *values], [1 - e for e in ended])
    assert_close(dream["lambda_target"], stacked(want), "rollout", "lambda_target")
    before = torch.cat((torch.zeros(5, 1, 1), terminated.float()), 1)[:, :-1].cumsum(1) > 0
    assert torch.equal(dream["discount_weight"] == 0, before)


def test_rows_that_the_env_restarts_begin_anew() -> None:
    case = spring()
    case.env.limit = 1.5
    fastwm.accelerate(case.env, "eager")
    dream = dreaming(case, value=spring_value())
    done = dream["next", "done"]
    assert done[:, :-1].any()
    weight = torch.ones(5, 1)
    for t in range(H):
        assert torch.allclose(dream["discount_weight"][:, t], weight)
        weight = torch.where(done[:, t], torch.ones_like(weight), weight * GAMMA)
    # The return of a step that ends an episode is its reward alone.
    assert torch.equal(dream["lambda_target"][done], dream["next", "reward"][done])


# ---------------------------------------------------------------- what it leaves alone


def test_parameters_are_frozen_only_meanwhile_and_the_policys_own_never() -> None:
    case, value = dreamer(), value_module()
    frozen = next(case.env.world_model.parameters()).requires_grad_(False)
    own = case.env.world_model.module[1].module
    case.policy.register_module("shared", own)
    dream = dreaming(case, value=value)
    for module_ in (case.env, value):
        for p in module_.parameters():
            assert p.requires_grad == (p is not frozen)
    dream["lambda_target"].sum().backward()
    shared = {id(p) for p in own.parameters()}
    for p in case.env.parameters():
        assert (p.grad is not None) == (id(p) in shared)
    assert all(p.grad is None for p in value.parameters())


def test_parameters_are_thawed_after_an_error() -> None:
    case = dreamer()
    with pytest.raises(KeyError, match="state_value"):
        dreaming(case, value=module(nn.Linear(STATE, 1), ["state"], ["other"]))
    assert all(p.requires_grad for p in case.env.parameters())


def test_the_start_is_cut_off_and_left_as_it_was() -> None:
    case = dreamer()
    case.start = case.start.apply(lambda t: t.requires_grad_())
    before = case.start.clone()
    dream = dreaming(case, value=value_module())
    dream["lambda_target"].sum().backward()
    assert all(t.grad is None for t in case.start.values())
    assert_same(case.start.detach(), before.detach())


def test_without_a_value_or_a_distribution() -> None:
    case = spring()
    dream = dreaming(case)
    assert set(dream.keys()) == {
        "position", "velocity", "action", "done", "terminated", "next", "continuation",
        "discount_weight",
    }  # fmt: skip
    assert dream.names == [None, "time"]
    assert dream.shape == (5, H)
    assert "action_log_prob" not in dreaming(dreamer(), policy_terms=False)


def test_a_world_model_env_of_several_batch_dims() -> None:
    world_model = linear_world_model(done="terminated")
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[])
    start = TensorDict({"latent": torch.randn(2, 3, 4)}, [2, 3])
    value = module(nn.Linear(4, 1), ["latent"], ["state_value"])
    dream = fastwm.imagine(env, linear_policy(), start, H, value=value)
    assert dream["lambda_target"].shape == (2, 3, H, 1)
    assert dream["next", "terminated"].any()


# ---------------------------------------------------------------- bad input


def test_bad_arguments_are_named() -> None:
    case = dreamer()
    with pytest.raises(ValueError, match="gradient='both'; choose one of dynamics, reinforce"):
        dreaming(case, gradient="both")
    with pytest.raises(ValueError, match=r"gamma=1\.5 is not between 0 and 1"):
        fastwm.imagine(case.env, case.policy, case.start, H, gamma=1.5)
    with pytest.raises(ValueError, match="lmbda=-1"):
        fastwm.imagine(case.env, case.policy, case.start, H, lmbda=-1)
    with pytest.raises(ValueError, match=r"writes \['logit'\]: neither the probability"):
        dreaming(case, continuation=module(nn.Linear(STATE, 1), ["state"], ["logit"]))
    with pytest.raises(RuntimeError, match=r"the value 'state_value' has shape \(5, 7, 2\)"):
        dreaming(case, value=module(nn.Linear(STATE, 2), ["state"], ["state_value"]))
    with pytest.raises(KeyError, match=r"reward is not under \('next', 'gain'\)"):
        dreaming(case, reward_key="gain")


def test_a_reward_without_its_last_dim_is_refused() -> None:
    """As torchrl's ``WorldModelEnv`` makes it."""
    case = upstream()
    with pytest.raises(
        RuntimeError, match=r"the env's reward .* has shape \(5, 6\), it needs \(5, 6, 1\)"
    ):
        fastwm.imagine(case.env, case.policy, case.start, H)


def test_spring_is_not_accelerated_by_imagining() -> None:
    env = Spring()
    case = spring()
    case.env = env
    dreaming(case)
    assert type(env) is Spring
