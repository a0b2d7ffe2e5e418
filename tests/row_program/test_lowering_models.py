"""Whole models: the lowered step rolls out to what eager gives, noise for noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import RSSMPrior
from torchrl.modules.models.model_based import RSSMPriorV3

import fastwm
from fastwm.row_program.lowering import NotLowerable, lower
from tests.engines.test_captured import (
    DISTRIBUTIONS,
    MODULES,
    Dynamics,
    FloatAction,
    begin,
    env_of,
    model_of,
)
from tests.models import (
    ACTION,
    CASES,
    LATENT,
    OBS,
    CatLinear,
    counting_world_model,
    linear_policy,
    make_case,
    module,
    sampled_actor,
    spec_env,
)  # fmt: skip
from tests.row_program.lowered import assert_lowers, traced


@pytest.mark.parametrize(
    ("batch", "grad"), [((), False), ((3,), True), ((1, 4), False), ((2, 3), False)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_every_model(name: str, batch: tuple[int, ...], grad: bool) -> None:
    case = make_case(name)
    lowered = assert_lowers(case.env(batch), case.policy, case.start(*batch), grad=grad)
    assert lowered.plain  # its uniforms are the parameters themselves


@pytest.mark.parametrize("name", CASES)
def test_a_batch_as_large_as_the_features(name: str) -> None:
    case = make_case(name)
    for size in (2, 4, 5):
        assert_lowers(case.env([size]), case.policy, case.start(size))


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_actors(name: str, batch: int, grad: bool) -> None:
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(model_of(FloatAction()), spec_env(), batch_size=[batch])
    assert_lowers(env, DISTRIBUTIONS[name](), begin(batch), grad=grad)


#: what none of the modules below can be: the words of its refusal
REFUSED = {
    "LSTM": "mkldnn_rnn_layer",
    "attention": "mixes rows",  # it attends from row to row
    "autocast-block": "bfloat16",
    "complex": "complex64",
    "double-and-back": "float64",
    "in-place": "another view of it wrote in place",
    "in-place-view": "another view of it wrote in place",
    "randperm": "randperm",
    "custom-function": "custom autograd.Function Double",  # with gradients: else it is its ops
    "custom-function-many": "custom autograd.Function Scaled",
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", MODULES)
def test_what_modules_do(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    env = env_of(Dynamics(MODULES[name]()))
    if name in REFUSED and (grad or not name.startswith("custom")):
        with torch.set_grad_enabled(grad):
            step, _, _ = traced(env, linear_policy(), begin(3))
            with pytest.raises(NotLowerable, match=REFUSED[name]):
                lower(step.graph, step.carried, step.fed, step.dim)
        return
    assert_lowers(env, linear_policy(), begin(3), grad=grad)


# ---------------------------------------------------------------- recurrent state-space models


def rssm_env(prior: nn.Module, state: int, batch: list[int], outs: list[str]) -> Any:
    step = module(prior, ["state", "belief", "action"], [("next", k) for k in outs])
    model = fastwm.WorldModel(
        module(nn.Linear(OBS, state), ["observation"], ["state"]),
        step,
        module(CatLinear(state, 1), [("next", "state")], [("next", "reward")]),
    )
    return fastwm.WorldModelEnv(model, spec_env(), batch_size=batch, latent_key="state")


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_torchrls_rssm_prior(grad: bool) -> None:
    prior = RSSMPrior(
        action_spec=spec_env().action_spec, hidden_dim=7, rnn_hidden_dim=7, state_dim=LATENT
    )
    env = rssm_env(prior, LATENT, [3], ["prior_mean", "prior_std", "state", "belief"])
    start = TensorDict({"state": torch.randn(3, LATENT), "belief": torch.randn(3, 7)}, [3])
    policy = sampled_actor(LATENT + 7, latent_keys=["state", "belief"])
    with fastwm.backend("eager"):
        env.rollout(1, policy, tensordict=start)  # its layers are lazy
    lowered = assert_lowers(env, policy, start, 15, grad=grad)
    assert lowered.plain


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [3, 4, 8])
@pytest.mark.parametrize("kind", ["gru", "block_gru"])
def test_torchrls_rssm_prior_v3(kind: str, batch: int, grad: bool) -> None:
    block: dict[str, Any] = {"num_blocks": 2, "unimix": 0.01} if kind == "block_gru" else {}
    prior = RSSMPriorV3(
        action_shape=torch.Size([ACTION]), hidden_dim=16, rnn_hidden_dim=8, num_categoricals=4,
        num_classes=4, action_dim=ACTION, recurrent_model=kind, **block,
    )  # fmt: skip
    env = rssm_env(prior, 16, [batch], ["logits", "state", "belief"])
    start = TensorDict({"state": torch.randn(batch, 16), "belief": torch.randn(batch, 8)}, [batch])
    policy = sampled_actor(24, latent_keys=["state", "belief"])
    lowered = assert_lowers(env, policy, start, 5, grad=grad)
    groups = [i for i in lowered.program.instrs if i.op == "grouped_linear"]
    assert len(groups) == (2 if block else 0)
    assert all(i.args[2] is not None for i in groups)


# ---------------------------------------------------------------- other families


class SimNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)


class TwoHot(nn.Module):
    """TD-MPC2's and DreamerV3's reward: bins of symlog values."""

    def __init__(self, latent: int, bins: int = 11) -> None:
        super().__init__()
        self.net = nn.Linear(latent, bins)
        self.register_buffer("bins", torch.linspace(-3, 3, bins))

    def forward(self, latent: Tensor) -> Tensor:
        value = (self.net(latent).softmax(-1) * self.bins).sum(-1, keepdim=True)
        return value.sign() * (value.abs().exp() - 1)


def test_a_model_like_td_mpc2() -> None:
    dynamics = nn.Sequential(
        CatLinear(8 + ACTION, 16), nn.LayerNorm(16), nn.Mish(), nn.Linear(16, 8), SimNorm()
    )

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dynamics

        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return self.net[1:](self.net[0](latent, action))

    class Continue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 1)

        def forward(self, latent: Tensor) -> Tensor:
            return torch.bernoulli(self.net(latent).sigmoid()) > 0

    model = fastwm.WorldModel(
        module(nn.Linear(OBS, 8), ["observation"], ["latent"]),
        module(Step(), ["latent", "action"], [("next", "latent")]),
        module(TwoHot(8), [("next", "latent")], [("next", "reward")]),
        done_head=module(Continue(), [("next", "latent")], [("next", "done")]),
    )
    for batch in ((3,), (8,), (2, 3)):
        env = fastwm.WorldModelEnv(model, spec_env(), batch_size=batch)
        start = TensorDict({"latent": torch.randn(*batch, 8)}, batch)
        lowered = assert_lowers(env, sampled_actor(8), start)
        assert lowered.plain
        assert {i.op for i in lowered.program.instrs} >= {"layer_norm", "mish", "softmax"}


class Ensemble(nn.Module):
    """Seven Gaussian members, one drawn for each row, as MBPO rolls out."""

    def __init__(self, members: int = 7, hidden: int = 12) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(members, LATENT + ACTION, hidden) * 0.3)
        self.b1 = nn.Parameter(torch.randn(members, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(members, hidden, 2 * LATENT) * 0.3)
        self.b2 = nn.Parameter(torch.randn(members, 1, 2 * LATENT))
        self.low, self.high = nn.Parameter(-torch.ones(LATENT)), nn.Parameter(torch.ones(LATENT))

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([latent, action], -1)
        h = F.silu(torch.baddbmm(self.b1, x.expand(len(self.w1), *x.shape), self.w1))
        mean, log_var = torch.baddbmm(self.b2, h, self.w2).chunk(2, -1)
        log_var = self.high - F.softplus(self.high - log_var)
        log_var = self.low + F.softplus(log_var - self.low)
        rows = torch.arange(len(x))
        member = torch.randint(len(self.w1), (len(x),))
        mean, std = mean[member, rows], log_var.mul(0.5).exp()[member, rows]
        return latent + mean + std * torch.randn_like(mean)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 17])
def test_an_ensemble_computes_the_member_it_draws(batch: int, grad: bool) -> None:
    env = fastwm.WorldModelEnv(model_of(Ensemble()), spec_env(), batch_size=[batch])
    lowered = assert_lowers(env, sampled_actor(), begin(batch), 5, grad=grad)
    assert lowered.plain
    names = [i.op for i in lowered.program.instrs]
    assert names.count("member_linear") == 2
    assert "grouped_linear" not in names
    assert "take" not in names


class StateIndependent(nn.Module):
    """An actor whose spread is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(LATENT, ACTION), nn.Parameter(torch.randn(ACTION))

    def forward(self, latent: Tensor) -> Tensor:
        mean = self.mean(latent)
        return torch.distributions.Normal(mean, self.log_std.exp().expand_as(mean)).rsample()


def test_what_depends_on_parameters_alone_goes_to_the_prologue() -> None:
    case = make_case("linear")
    policy = module(StateIndependent(), ["latent"], ["action"])
    lowered = assert_lowers(case.env([3]), policy, case.start(3))
    assert not lowered.plain
    assert [u.constant for u in lowered.uniforms].count(None) == 1
    assert "exp" not in [i.op for i in lowered.program.instrs]


def test_given_and_random_actions() -> None:
    case = make_case("linear_done")
    actions = [torch.randn(3, ACTION) for _ in range(4)]
    lowered = assert_lowers(case.env([3]), None, case.start(3), actions=actions)
    assert ("feed", ("action",)) in lowered.program.inputs
    assert_lowers(case.env([3]), None, case.start(3))


def test_flags_that_a_head_sets() -> None:
    env = fastwm.WorldModelEnv(counting_world_model(done_at=3.0), spec_env(), batch_size=[3])
    start = TensorDict({"latent": torch.tensor([[0.0], [1.0], [2.0]])}, [3])
    lowered = assert_lowers(env, linear_policy(1), start)
    assert lowered.casts["td", ("next", "done")] == ((1,), torch.bool)
