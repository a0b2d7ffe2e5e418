"""The captured engine against the eager path: values, keys, order, kinds, gradients, random numbers, memory.

Every test here rolls the same thing out twice from the same seed and compares all there is to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Independent, Normal, OneHotCategoricalStraightThrough
from torchrl.data import Composite, Unbounded
from torchrl.envs import set_exploration_type, step_mdp
from torchrl.modules import (
    IndependentNormal,
    OneHotCategorical,
    ProbabilisticActor,
    RSSMPrior,
    TanhDelta,
    TanhNormal,
)
from torchrl.modules.planners import cem, mppi

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_parity, assert_same, gradients, run, why_eager
from tests.models import (
    ACTION,
    BELIEF,
    CASES,
    LATENT,
    OBS,
    Case,
    CatLinear,
    counting_world_model,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    sampled_actor,
    spec_env,
)

B, T = 3, 6


def parameters(case: Case, policy: Any = None) -> list[nn.Parameter]:
    policy = case.policy if policy is None else policy
    own = list(policy.parameters()) if isinstance(policy, nn.Module) else []
    return [*case.world_model.step_module.parameters(), *own]


def begin(*batch: int, latent: int = LATENT, seed: int = 3, **kwargs: Any) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(*batch, latent, generator=generator, **kwargs)
    return TensorDict({"latent": value}, batch)


# ---------------------------------------------------------------- models, batches, horizons


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("policy", ["own", "random", "actions"])
@pytest.mark.parametrize("name", CASES)
def test_every_model_with_every_source_of_actions(name: str, policy: str, grad: bool) -> None:
    case = make_case(name)
    env, start = case.env([B]), case.start(B, requires_grad=grad)
    chosen, extra = (case.policy, {}) if policy == "own" else (None, {})
    if policy == "actions":
        spec = env.full_action_spec
        rand = [spec.rand() for _ in range(T)]
        top = next(iter(spec.keys()))
        extra = {"actions": [a.get(top) for a in rand]}
        if isinstance(rand[0].get(top), TensorDictBase):  # a group of actions is the eager path's
            assert "something else than tensors" in why_eager(env, None, start, **extra)
            return
    wrt = [*parameters(case, chosen), *(start.get(k) for k in case.latents)] if grad else ()
    with torch.set_grad_enabled(grad):
        assert_parity(env, chosen, start, T, wrt=wrt, break_when_any_done=False, **extra)


@pytest.mark.parametrize("batch", [(), (1,), (17,), (129,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", ["mlp_sampled", "multi_agent", "rssm_sampled"])
def test_batches(name: str, batch: tuple[int, ...]) -> None:
    case = make_case(name)
    with torch.no_grad():
        assert_parity(case.env(batch), case.policy, case.start(*batch), 4)


@pytest.mark.parametrize("own", [(), (3,)])
def test_leading_dims(own: tuple[int, ...]) -> None:
    case = make_case("linear_done")
    for lead in [(), (1,), (5,), (2, 4)]:
        assert_parity(case.env(own), case.policy, case.start(*lead, *own), 4)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", ["mlp_sampled", "rssm_sampled"])
def test_horizons_share_one_trace(name: str, grad: bool) -> None:
    case = make_case(name)
    env, start = case.env([B]), case.start(B)
    for horizon in (15, 1, 2):
        with torch.set_grad_enabled(grad):
            assert_parity(env, case.policy, start, horizon, wrt=parameters(case) if grad else ())
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("batch", [16, 4096])
def test_large_steps_are_written_in_place_and_small_ones_stacked(batch: int) -> None:
    """The loop has two ways to collect results; both must give the same."""
    case = make_case("mlp_sampled")
    with torch.no_grad():
        assert_parity(case.env([batch]), case.policy, case.start(batch), 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_dtypes(dtype: torch.dtype, grad: bool) -> None:
    torch.manual_seed(0)
    wm = linear_world_model(done="done").to(dtype)
    policy = linear_policy().to(dtype)
    env = fastwm.WorldModelEnv(wm, spec_env(dtype=dtype), batch_size=[B])
    start = begin(B, dtype=torch.float32).to(dtype)
    wrt = list(policy.parameters()) if grad and dtype is torch.float64 else ()
    with torch.set_grad_enabled(grad):
        out = assert_parity(env, policy, start, 15, wrt=wrt, break_when_any_done=False)
    assert out["next", "latent"].dtype is dtype


# ---------------------------------------------------------------- policies


class Params(nn.Module):
    """Latent to the parameters of a distribution."""

    def __init__(self, out: int, split: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, 2 * out if split else out)
        self.split = NormalParamExtractor() if split else nn.Identity()

    def forward(self, latent: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.split(self.linear(latent))


def actor(distribution: Any, keys: list[str], **kwargs: Any) -> ProbabilisticActor:
    return ProbabilisticActor(
        module(Params(ACTION, len(keys) == 2), ["latent"], keys),
        in_keys=keys,
        distribution_class=distribution,
        default_interaction_type="random",
        **kwargs,
    )


class FloatAction(nn.Module):
    """Dynamics that take an action of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.cat = CatLinear(LATENT + ACTION, LATENT)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.cat(latent, action.to(latent.dtype))


def model_of(dynamics: nn.Module | Callable[..., Any], **kwargs: Any) -> fastwm.WorldModel:
    return fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
        **kwargs,
    )


def env_of(dynamics: nn.Module | Callable[..., Any], **kwargs: Any) -> fastwm.WorldModelEnv:
    return fastwm.WorldModelEnv(model_of(dynamics), spec_env(), batch_size=[B], **kwargs)


DISTRIBUTIONS: dict[str, Callable[[], ProbabilisticActor]] = {
    "TanhNormal": lambda: actor(TanhNormal, ["loc", "scale"]),
    "TanhNormal-log-prob": lambda: actor(TanhNormal, ["loc", "scale"], return_log_prob=True),
    "IndependentNormal": lambda: actor(IndependentNormal, ["loc", "scale"], return_log_prob=True),
    "Independent(Normal)": lambda: actor(
        lambda loc, scale: Independent(Normal(loc, scale), 1),
        ["loc", "scale"],
        return_log_prob=True,
    ),
    "Normal-validating": lambda: actor(
        lambda loc, scale: Normal(loc, scale, validate_args=True),
        ["loc", "scale"],
        return_log_prob=True,
    ),
    "OneHot-validating": lambda: actor(
        lambda logits: OneHotCategoricalStraightThrough(logits=logits, validate_args=True),
        ["logits"],
        return_log_prob=True,
    ),
    "OneHotCategorical": lambda: actor(OneHotCategorical, ["logits"], return_log_prob=True),
    "OneHotStraightThrough": lambda: actor(OneHotCategoricalStraightThrough, ["logits"]),
    "TanhDelta": lambda: actor(TanhDelta, ["param"]),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_actors_that_sample(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    policy, env = DISTRIBUTIONS[name](), env_of(FloatAction())
    wrt = [*policy.parameters(), *env.world_model.parameters()] if grad else ()
    with torch.set_grad_enabled(grad):
        out = assert_parity(env, policy, begin(B), T, wrt=wrt)
    if name != "TanhDelta":
        again, _ = run("captured", env, T, policy, begin(B), seed=1)
        assert not torch.equal(again["action"], out["action"])  # the seed is what decides


@pytest.mark.parametrize("kind", ["deterministic", "mode", "mean", "random"])
def test_exploration_types(kind: str) -> None:
    torch.manual_seed(0)
    policy = actor(IndependentNormal, ["loc", "scale"])
    with set_exploration_type(kind):
        out = assert_parity(env_of(FloatAction()), policy, begin(B), T)
    torch.testing.assert_close(out["loc"], out["action"]) if kind != "random" else None


CALLABLES: dict[str, Callable[[nn.Linear], Any]] = {
    "nn-module": lambda net: net,
    "lambda": lambda net: lambda td: td.set("action", net(td["latent"])),
    "returns-its-own": lambda net: (
        lambda td: TensorDict({"action": net(td["latent"])}, td.batch_size)
    ),
    "bound-method": lambda net: Bound(net).act,
    "object": lambda net: Bound(net),
    "in-place": lambda net: lambda td: td.set("action", net(td["latent"]).mul_(2).tanh_()),
}


class Bound:
    def __init__(self, net: nn.Linear) -> None:
        self.net = net
        self.gain = 1.5

    def act(self, td: TensorDictBase) -> TensorDictBase:
        return td.set("action", self.net(td["latent"]) * self.gain)

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        return self.act(td)


@pytest.mark.parametrize("kind", CALLABLES)
def test_plain_callables(kind: str) -> None:
    torch.manual_seed(0)
    case, net = make_case("linear"), nn.Linear(LATENT, ACTION)
    policy = CALLABLES[kind](net)
    trust = kind not in ("nn-module", "lambda", "in-place")
    assert_parity(
        case.env([B]), policy, begin(B), T, wrt=list(net.parameters()), trust_policy=trust
    )


@pytest.mark.parametrize("planner", [cem, mppi], ids=["cem", "mppi"])
def test_planners_setters(planner: Any) -> None:
    case = make_case("linear_done")
    actions = torch.randn(2, B, T, ACTION)
    start = case.start(2, B)
    results = []
    for engine in ("eager", "captured"):
        setter = planner._PrecomputedActionsSequentialSetter(actions)
        first, _ = run(engine, case.env([]), 2, setter, start, break_when_any_done=False)
        # A setter goes on where it stood.
        rest, _ = run(engine, case.env([]), T - 2, setter, start, break_when_any_done=False)
        results.append((first, rest, setter.cmpt))
    for got, want in zip(results[1][:2], results[0][:2], strict=True):
        assert_same(got, want)
    assert results[1][2] == results[0][2] == T
    assert torch.equal(results[1][1]["action"], actions[..., 2:, :])


@pytest.mark.parametrize("form", [list, tuple, torch.stack], ids=["list", "tuple", "tensor"])
def test_given_actions(form: Any) -> None:
    case = make_case("linear")
    actions = [torch.randn(B, ACTION, requires_grad=True) for _ in range(T)]
    start = case.start(B, requires_grad=True)
    wrt = [*actions, start["latent"], *parameters(case)[:2]]
    out = assert_parity(case.env([B]), None, start, T, wrt=wrt, actions=form(actions))
    assert out.shape == (B, T)


def test_given_actions_bound_the_horizon() -> None:
    case = make_case("linear")
    actions = torch.randn(4, B, ACTION)
    assert assert_parity(case.env([B]), None, case.start(B), 9, actions=actions).shape == (B, 4)
    assert assert_parity(case.env([B]), None, case.start(B), 2, actions=actions).shape == (B, 2)


# ---------------------------------------------------------------- gradients


def frozen(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("live", ["policy", "model", "start", "policy+start", "none"])
def test_gradients_of_a_part_alone(live: str) -> None:
    case = make_case("rssm")
    start = case.start(B, requires_grad="start" in live)
    if "model" not in live:
        frozen(case.world_model)
    if "policy" not in live:
        frozen(case.policy)
    wrt = [p for p in parameters(case) if p.requires_grad]
    wrt += [start.get(key) for key in case.latents] if "start" in live else []
    out = assert_parity(case.env([B]), case.policy, start, T, wrt=wrt)
    assert out["next", "reward"].requires_grad == bool(wrt)


def test_gradients_reach_a_start_that_hangs_on_a_graph() -> None:
    case = make_case("linear")
    source = torch.randn(B, LATENT, requires_grad=True)
    grads = []
    for engine in ("eager", "captured"):
        start = TensorDict({"latent": source.exp()}, [B])
        out, _ = run(engine, case.env([B]), T, case.policy, start)
        grads.append(torch.autograd.grad(out["next", "reward"].sum(), source)[0])
    assert_close(grads[1], grads[0], "rollout.gradient", "source")
    assert grads[0].abs().sum() > 0


def test_second_derivatives() -> None:
    case = make_case("mlp")
    start = case.start(B, requires_grad=True)
    found = []
    for engine in ("eager", "captured"):
        out, _ = run(engine, case.env([B]), 3, case.policy, start)
        reward = out["next", "reward"].sum()
        (first,) = torch.autograd.grad(reward, start["latent"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(case.policy.parameters())))
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got, want, "rollout.gradient", "second derivative")


def test_backward_accumulates_into_parameters_and_runs_their_hooks() -> None:
    case = make_case("linear")
    weight = next(case.policy.parameters())
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    with fastwm.backend("captured"):
        out = case.env([B]).rollout(T, case.policy, tensordict=case.start(B))
    out["next", "reward"].sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


def test_gradients_with_respect_to_results_stop_where_eagers_do() -> None:
    """A result is a stack of its own: the reward does not hang on the stacked latents."""
    case = make_case("linear")
    for engine in ("eager", "captured"):
        out, _ = run(engine, case.env([B]), T, case.policy, case.start(B))
        found = torch.autograd.grad(
            out["next", "reward"].sum(), [out["latent"], out["action"]], allow_unused=True
        )
        assert found == (None, None)


# ---------------------------------------------------------------- what modules do


class Dynamics(nn.Module):
    """A linear layer over latent and action, then ``body``."""

    def __init__(self, body: Callable[[Tensor], Tensor] | nn.Module | None = None) -> None:
        super().__init__()
        self.cat = CatLinear(LATENT + ACTION, LATENT)
        self.body = body if body is not None else torch.tanh

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.tanh(self.body(torch.tanh(self.cat(latent, action))))


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, LATENT)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.sum(-1) > 0).long() * 3) + x


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(LATENT, LATENT)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, x.flip(-1))


class Lstm(nn.Module):
    """A whole LSTM over a sequence of one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(LATENT, LATENT, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1))[0].squeeze(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            LATENT, 2, 8, dropout=0.2, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(0)).squeeze(0)


class Double(torch.autograd.Function):
    """A function whose gradient is not the one of its ops: three instead of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Scaled(torch.autograd.Function):
    """Several inputs, saved tensors, an input that is no tensor, two outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, power: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale)
        return x * scale**power, x.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        return grad * scale + other, (grad * x).sum(), None


class WithScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y, total = Scaled.apply(x, self.scale, 2)
        return y + total


class NoGradBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(LATENT, LATENT), nn.Linear(LATENT, LATENT)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.inner(x)
        return self.outer(x) + target


class AutocastBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, LATENT)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float()


class Powers(nn.Module):
    """Buffers, constants made on the fly, and products that no step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, LATENT))
        self.weight = nn.Parameter(torch.eye(LATENT))

    def forward(self, x: Tensor) -> Tensor:
        offset = torch.tensor([0.1, 0.2, 0.3, 0.4]) + torch.arange(LATENT)
        return x @ (self.weight * self.scale).t() + offset


def straight_through(x: Tensor) -> Tensor:
    return x.round() + x - x.detach()


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y += 1
    y[:, 0] *= 3
    y[y > 1] = 0.5
    return y


def in_place_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    view = y[:, 1:]
    view.mul_(2)
    return y + view.sum(-1, keepdim=True)


def chunks(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([two, one], -1) + torch.stack(x.unbind(-1), -1)


def rotated(x: Tensor) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(x) * (1 + 2j)).real


MODULES: dict[str, Callable[[], Any]] = {
    "SiLU": nn.SiLU,
    "SiLU-in-place": lambda: nn.Sequential(nn.Linear(LATENT, LATENT), nn.SiLU(inplace=True)),
    "ReLU-in-place": lambda: nn.Sequential(nn.Linear(LATENT, LATENT), nn.ReLU(inplace=True)),
    "chain": lambda: nn.Sequential(
        nn.Linear(LATENT, 9), nn.ELU(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 9), nn.LeakyReLU(),
        nn.Linear(9, 9), nn.Sigmoid(), nn.Linear(9, LATENT),
    ),
    "LayerNorm": lambda: nn.LayerNorm(LATENT),
    "GroupNorm": lambda: nn.GroupNorm(2, LATENT),
    "GRUCell": Gru,
    "LSTM": Lstm,
    "Embedding": Embed,
    "attention": Attention,
    "Dropout": lambda: nn.Dropout(0.4),
    "AlphaDropout": lambda: nn.AlphaDropout(0.4),
    "BatchNorm-eval": lambda: nn.BatchNorm1d(LATENT).eval(),
    "no-grad-block": NoGradBlock,
    "autocast-block": AutocastBlock,
    "buffers-and-constants": Powers,
    "custom-function": lambda: Double.apply,
    "custom-function-many": WithScaled,
    "straight-through": lambda: straight_through,
    "detach": lambda: lambda x: x.detach() * x,
    "in-place": lambda: in_place,
    "in-place-view": lambda: in_place_through_a_view,
    "chunk": lambda: chunks,
    "complex": lambda: rotated,
    "transpose": lambda: lambda x: x.t().contiguous().view(-1).view(LATENT, B).t(),
    "expand": lambda: lambda x: torch.exp(x[:, :1].expand(B, LATENT)),
    "integers": lambda: lambda x: x * torch.exp((x > 0).long()) + torch.sigmoid(x > 0),
    "where-mask": lambda: lambda x: torch.where(x > 0, x, -x) + x.masked_fill(x > 0, 0.0),
    "double-and-back": lambda: lambda x: x.double().sin().float(),
    "vmap": lambda: torch.vmap(lambda row: row * row.sum()),
    "checkpoint": lambda: lambda x: torch.utils.checkpoint.checkpoint(
        torch.sin, x, use_reentrant=False
    ),
    "multinomial": lambda: lambda x: x * torch.multinomial(torch.softmax(x, -1), 1),
    "bernoulli": lambda: lambda x: x * torch.bernoulli(torch.sigmoid(x)),
    "gumbel": lambda: lambda x: torch.nn.functional.gumbel_softmax(x, hard=True),
    "randint": lambda: lambda x: x * torch.randint(1, 5, (B, 1)),
    "randperm": lambda: lambda x: x[torch.randperm(B)],
    "normal_": lambda: lambda x: x + torch.empty_like(x).normal_() + torch.rand(LATENT),
    "draw-nobody-reads": lambda: lambda x: (torch.randn(7), x)[1],
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", MODULES)
def test_what_modules_do(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    env, policy = env_of(Dynamics(MODULES[name]())), linear_policy()
    start = begin(B)
    start["latent"].requires_grad_(grad)
    live = [*env.world_model.parameters(), *policy.parameters()]
    wrt = [*live, start["latent"]] if grad else ()
    with torch.set_grad_enabled(grad):
        assert_parity(env, policy, start, T, wrt=wrt)


def test_a_custom_functions_own_backward_is_kept() -> None:
    """The gradient is the one that the function states, not that of the ops in it."""
    torch.manual_seed(0)
    env, start = env_of(lambda z, a: Double.apply(z) + 0 * a.sum()), begin(B)
    start["latent"].requires_grad_()
    with fastwm.backend("captured"):
        out = env.rollout(2, linear_policy(), tensordict=start)
    (grad,) = torch.autograd.grad(out["next", "latent"][:, 1].sum(), start["latent"])
    torch.testing.assert_close(grad, torch.full_like(grad, 9.0))


def test_torchrls_rssm_prior() -> None:
    torch.manual_seed(0)
    prior = RSSMPrior(
        action_spec=spec_env().action_spec, hidden_dim=7, rnn_hidden_dim=7, state_dim=LATENT
    )
    step = TensorDictModule(
        prior,
        in_keys=["state", "belief", "action"],
        out_keys=[
            ("next", "prior_mean"),
            ("next", "prior_std"),
            ("next", "state"),
            ("next", "belief"),
        ],
    )
    reward = module(CatLinear(LATENT, 1), [("next", "state")], [("next", "reward")])
    encoder = module(nn.Linear(OBS, LATENT), ["observation"], ["state"])
    wm = fastwm.WorldModel(encoder, step, reward)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], latent_key="state")
    start = TensorDict({"state": torch.randn(B, LATENT), "belief": torch.randn(B, 7)}, [B])
    policy = sampled_actor(LATENT + 7, latent_keys=["state", "belief"])
    run("eager", env, 1, policy, start)  # its layers are lazy
    wrt = [*prior.parameters(), *policy.parameters()]
    out = assert_parity(env, policy, start, 15, wrt=wrt)
    assert out["next", "state"].std() > 0


# ---------------------------------------------------------------- starts


@pytest.mark.parametrize("extra", ["observation", "action", "everything"])
def test_entries_of_the_start_that_the_step_does_not_read(extra: str) -> None:
    case = make_case("linear")
    start = case.start(B)
    start["observation"] = torch.randn(B, OBS)
    if extra != "observation":
        start["action"] = torch.randn(B, ACTION)
    if extra == "everything":  # as a replay buffer returns it
        start["done"] = torch.zeros(B, 1, dtype=torch.bool)
        start["next"] = TensorDict({"reward": torch.randn(B, 1)}, [B])
        start["index"] = torch.arange(B)
    assert_parity(case.env([B]), case.policy, start, T)


def test_starts_that_are_not_contiguous() -> None:
    case = make_case("rssm")
    state = torch.randn(LATENT, B).t()
    belief = torch.randn(1, BELIEF).expand(B, BELIEF)
    start = TensorDict({"state": state, "belief": belief}, [B])
    assert_parity(case.env([B]), case.policy, start, T)


def test_starts_whose_entries_share_memory() -> None:
    case = make_case("linear")
    both = torch.randn(B, LATENT)
    start = TensorDict({"latent": both, "copy": both}, [B])
    assert_parity(case.env([B]), case.policy, start, T)


def test_names_of_dims_are_kept() -> None:
    case = make_case("linear")
    start = case.start(2, B)
    start.names = ["ensemble", "batch"]
    out = assert_parity(case.env([B]), case.policy, start, T)
    assert out.names == ["ensemble", "batch", "time"]


def test_a_memory_mapped_start(tmp_path: Any) -> None:
    case = make_case("linear")
    start = case.start(B).memmap_(tmp_path)
    with fastwm.backend("eager"):
        want = case.env([B]).rollout(T, case.policy, tensordict=start)
    with fastwm.backend("auto"):
        got = case.env([B]).rollout(T, case.policy, tensordict=start)
    assert_same(got, want)


def test_starts_from_initial_state() -> None:
    case = make_case("linear_done")
    starts = case.start(B)
    env = case.env([B], initial_state=lambda batch: starts)
    assert_parity(env, case.policy, None, T)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_start_is_asked_for_once_whichever_engine_runs(engine: str) -> None:
    """Also when the captured engine gives the rollout back after the start was drawn."""
    asked: list[torch.Size] = []

    def starts(batch: torch.Size) -> TensorDict:
        asked.append(batch)
        return TensorDict({"latent": torch.full((*batch, LATENT), float(len(asked)))}, batch)

    env = env_of(lambda z, a: z if z.sum() > -1e9 else -z, initial_state=starts)
    asked.clear()  # the env looked at one for its specs
    with fastwm.backend(engine), pytest.warns() if engine == "auto" else torch.no_grad():
        out = env.rollout(2, linear_policy())
    assert len(asked) == 1
    assert out["latent"].eq(1).all()


# ---------------------------------------------------------------- early stop


def counting_env(done_at: float | None, **kwargs: Any) -> fastwm.WorldModelEnv:
    """Latents go up by one a step; a row is done from ``done_at`` on."""
    wm = counting_world_model(done_at=done_at, kind=kwargs.pop("kind", "bool"))
    return fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B], **kwargs)


def counts(*values: float) -> TensorDict:
    latent = torch.tensor(values, dtype=torch.float32).unsqueeze(-1)
    return TensorDict({"latent": latent}, [len(values)])


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("stop", [None, True, False])
@pytest.mark.parametrize("kind", ["float", "int", "bool"])
@pytest.mark.parametrize("at", [1, 3, T, T + 1])
def test_early_stop(at: int, kind: str, stop: bool | None, grad: bool) -> None:
    """In the first step, in the middle, in the last, never."""
    env, policy = counting_env(at, kind=kind), linear_policy(1)
    with torch.set_grad_enabled(grad):
        out = assert_parity(
            env,
            policy,
            counts(0.0, -9.0, -9.0),
            T,
            wrt=list(policy.parameters()) if grad else (),
            break_when_any_done=stop,
        )
    assert out.shape[-1] == (T if stop is False else min(at, T))


@pytest.mark.parametrize("batch", [B, 4096])
def test_after_an_early_stop_the_generator_stands_where_eager_leaves_it(batch: int) -> None:
    wm = counting_world_model(done_at=3.0)
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[batch])
    start = TensorDict({"latent": torch.zeros(batch, 1)}, [batch])
    with torch.no_grad():
        out = assert_parity(env, sampled_actor(1), start, 9)
        assert out.shape == (batch, 3)
        assert assert_parity(env, None, start, 9).shape == (batch, 3)


@pytest.mark.parametrize("flags", [True, False])
def test_flags_that_no_step_changes(flags: bool) -> None:
    """A done head that always says the same is computed once and still stops in the first step."""
    done = module(lambda z: torch.full((B, 1), flags), [("next", "latent")], [("next", "done")])
    env = fastwm.WorldModelEnv(model_of(FloatAction(), done_head=done), spec_env(), batch_size=[B])
    for stop in (True, False):
        out = assert_parity(env, linear_policy(), begin(B), T, break_when_any_done=stop)
        assert out.shape == (B, 1 if flags and stop else T)


ALL = ("done", "terminated", "truncated")


@pytest.mark.parametrize(
    ("flag", "spec"), [("done", ALL[:2]), ("terminated", ALL[:2]), *((flag, ALL) for flag in ALL)]
)
def test_each_flag_stops(flag: str, spec: tuple[str, ...]) -> None:
    wm = counting_world_model(done_at=2.0, flags=[flag])
    env = fastwm.WorldModelEnv(wm, spec_env(done=spec), batch_size=[B])
    assert assert_parity(env, linear_policy(1), counts(0, -9, 0), T).shape == (B, 2)


@pytest.mark.parametrize("done", ["team", "agents"])
@pytest.mark.parametrize("stop", [True, False])
def test_nested_done_groups(done: str, stop: bool) -> None:
    from tests.models import multi_agent_spec_env, multi_agent_world_model

    case = make_case("multi_agent")
    torch.manual_seed(0)
    wm = multi_agent_world_model(done=done)
    env = fastwm.WorldModelEnv(
        wm, multi_agent_spec_env(), batch_size=[B], latent_key=case.latent_key
    )
    for seed in range(4):
        start = case.start(B) * (seed + 1)
        assert_parity(env, case.policy, start, T, break_when_any_done=stop)


def test_nonstop_rows_that_finish_restart_from_initial_state_on_the_eager_path() -> None:
    fresh = counts(1, 1, 1)
    env, policy = counting_env(3.0, initial_state=fresh), linear_policy(1)
    results = []
    for engine in ("eager", "auto"):
        with fastwm.backend(engine):
            out = env.rollout(5, policy, tensordict=counts(0, 1, -9), break_when_any_done=False)
        results.append(out)
    assert_same(results[1], results[0])
    assert results[0]["latent"].squeeze(-1)[0].tolist() == [0, 1, 2, 1, 2]
    assert "restart" in why_eager(env, policy, counts(0, 1, -9), break_when_any_done=False)


def test_nonstop_with_initial_state_is_captured_as_long_as_no_row_finishes() -> None:
    env = counting_env(99.0, initial_state=counts(1, 1, 1))
    assert_parity(env, linear_policy(1), counts(0, 1, -9), 5, break_when_any_done=False)
    assert_parity(env, linear_policy(1), None, 5, break_when_any_done=False)


@pytest.mark.parametrize("where", ["set_truncated", "storing_device", "auto_reset", "set_state"])
def test_other_arguments(where: str) -> None:
    case = make_case("linear_done")
    env = fastwm.WorldModelEnv(
        case.world_model, spec_env(done=("done", "terminated", "truncated")), batch_size=[B],
        initial_state=case.start(B),
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "set_truncated": {"set_truncated": True},
        "storing_device": {"storing_device": "cpu"},
        "auto_reset": {"auto_reset": False},
        "set_state": {"set_state": False},
    }[where]
    start = case.start(B)
    if where == "auto_reset":
        start = env.reset(start)
    with torch.no_grad():
        assert_parity(env, case.policy, start, T, **arguments)


def test_rollouts_that_go_on_where_the_last_one_ended() -> None:
    case = make_case("rssm_sampled")
    env = case.env([B])
    results = []
    for engine in ("eager", "captured"):
        first, _ = run(engine, env, 3, case.policy, begin_of(case))
        last = step_mdp(first[:, -1])
        rest, _ = run(engine, env, 3, case.policy, last, auto_reset=False)
        again, _ = run(engine, env, 3, case.policy, last)
        results.append((first, rest, again))
    for got, want in zip(results[1], results[0], strict=True):
        assert_same(got, want)


def begin_of(case: Case) -> TensorDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return case.start(B)


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize("name", ["mlp_sampled", "rssm_sampled"])
def test_same_seed_same_trajectory(name: str) -> None:
    case = make_case(name)
    env, start = case.env([B]), case.start(B)
    one, _ = run("captured", env, T, case.policy, start, seed=1)
    two, _ = run("captured", env, T, case.policy, start, seed=1)
    other, _ = run("captured", env, T, case.policy, start, seed=2)
    assert_same(two, one)
    assert all(torch.equal(one.get(k), two.get(k)) for k in one.keys(True, True))
    assert not torch.equal(one["action"], other["action"])


def test_tracing_draws_nothing_from_the_generators() -> None:
    """The first call, which traces, and the second leave the same state and give the same."""
    case = make_case("rssm_sampled")
    env, start = case.env([B]), case.start(B)
    first, state = run("captured", env, T, case.policy, start)
    second, again = run("captured", env, T, case.policy, start)
    assert torch.equal(state, again)
    assert torch.equal(first["action"], second["action"])


def test_a_modules_own_generator() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator)

    torch.manual_seed(0)
    own = Own()
    env, policy, results = env_of(Dynamics(own)), linear_policy(), []
    for engine in ("eager", "captured", "captured"):
        own.generator.manual_seed(4)
        out, _ = run(engine, env, T, policy, begin(B))
        results.append((out, own.generator.get_state()))
    for out, state in results[1:]:
        assert_same(out, results[0][0])
        assert torch.equal(state, results[0][1])


# ---------------------------------------------------------------- whose memory it is


def memories(td: TensorDictBase) -> dict[int, str]:
    found: dict[int, str] = {}
    for key in td.keys(True, True):
        pointer = td.get(key).untyped_storage().data_ptr()
        assert pointer not in found, f"{key} shares memory with {found[pointer]}"
        found[pointer] = str(key)
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [1, B, 4096])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", ["linear_done", "context", "rssm_sampled", "mlp", "views"])
def test_no_result_shares_memory(name: str, stop: bool, batch: int, grad: bool) -> None:
    """Neither among its keys, nor with another rollout, the start, a parameter or a buffer."""
    case = views_case() if name == "views" else make_case(name)
    env, start = views_env(case) if name == "views" else case.env([]), case.start(batch)
    everything: dict[int, str] = memories(start)
    for p in parameters(case):
        everything[p.untyped_storage().data_ptr()] = "a parameter"
    kept, copies = [], []
    for horizon in (1, 2, 3):
        with torch.set_grad_enabled(grad):
            out, _ = run("captured", env, horizon, case.policy, start, break_when_any_done=stop)
        mine = memories(out)
        shared = mine.keys() & everything.keys()
        assert not shared, [(mine[m], everything[m]) for m in shared]
        everything |= mine
        kept.append(out)
        copies.append(out.clone())
    for out, copy in zip(kept, copies, strict=True):
        assert (out == copy).all()  # no later rollout wrote into it


def halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:, :2], x[:, 2:], x[:, 0:]


def views_case() -> Case:
    """Results of the step that are views of one another and of what the next step reads."""
    case = make_case("linear")
    torch.manual_seed(0)
    head = nn.Linear(LATENT, 4)
    names = {"one": 2, "two": 2, "same": LATENT, "cut": LATENT, "left": 2, "right": 2, "whole": 4}
    views = TensorDictModule(
        lambda z: (*head(z).chunk(2, -1), z, z.detach(), *halves(head(z) * 2)),
        in_keys=[("next", "latent")],
        out_keys=[("next", name) for name in names],
    )
    dynamics = module(FloatAction(), ["latent", "action"], [("next", "latent")])
    reward = module(lambda a: a.sum(-1, keepdim=True), [("next", "one")], [("next", "reward")])
    encoder = module(nn.Linear(OBS, LATENT), ["observation"], ["latent"])
    case.world_model = fastwm.WorldModel(encoder, TensorDictSequential(dynamics, views), reward)
    # What a step adds to the state has to be there from the first step on.
    case.context = {name: (size,) for name, size in names.items()}
    case.base_env = spec_env(latent=LATENT)
    case.base_env.observation_spec = Composite(
        {"latent": Unbounded((LATENT,)), **{k: Unbounded((n,)) for k, n in names.items()}}
    )
    return case


def views_env(case: Case) -> fastwm.WorldModelEnv:
    return case.env([], observation_spec=case.base_env.full_observation_spec)


def test_views_among_the_results() -> None:
    case = views_case()
    for batch in (1, B):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_parity(views_env(case), case.policy, case.start(batch), T)


def test_outputs_that_repeat_a_parameter_are_copies() -> None:
    """A policy that hands out its parameter, dynamics that hand on what they got."""
    bias = nn.Parameter(torch.ones(B, ACTION))
    policy = TensorDictModule(lambda z: bias, in_keys=["latent"], out_keys=["action"])
    env = env_of(lambda z, a: z)
    with torch.no_grad():
        out = assert_parity(env, policy, begin(B), T)
        got, _ = run("captured", env, T, policy, begin(B))
    memories(got)
    got["action"].zero_()
    assert bias.eq(1).all()
    assert out["next", "latent"].eq(out["latent"]).all()


def test_the_start_is_not_written_into() -> None:
    case = make_case("linear_done")
    start = case.start(B)
    keys, kept = list(start.keys()), start.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, _ = run("captured", case.env([B]), T, case.policy, start)
        out.apply_(lambda x: x.data.zero_())
        assert list(start.keys()) == keys
        assert (start == kept).all()


def test_results_may_be_written_into_and_used_in_a_graph() -> None:
    case = make_case("mlp")
    with torch.no_grad():
        out, _ = run("captured", case.env([B]), T, case.policy, case.start(B))
    out["next", "reward"].add_(1)
    latent = out["latent"].requires_grad_()
    latent.square().sum().backward()
    assert torch.equal(latent.grad, 2 * latent.detach())


# ---------------------------------------------------------------- modes


def test_inference_mode() -> None:
    case = make_case("mlp_sampled")
    with torch.inference_mode():
        out = assert_parity(case.env([B]), case.policy, case.start(B), T)
        assert out["action"].is_inference()
    env = case.env([B])
    start = case.start(B)
    with torch.inference_mode():
        run("captured", env, T, case.policy, start)
    # A plan made in inference mode is no good outside.
    assert_parity(env, case.policy, start, T, wrt=parameters(case))


def test_under_anomaly_detection() -> None:
    case = make_case("linear")
    with torch.autograd.set_detect_anomaly(True):
        assert_parity(case.env([B]), case.policy, case.start(B), T, wrt=parameters(case))


def test_nan_weights_give_eagers_nans() -> None:
    case = make_case("mlp")
    with torch.no_grad():
        next(case.world_model.dynamics.parameters())[0] = torch.nan
        out = assert_parity(case.env([B]), case.policy, case.start(B), T)
    assert out["next", "reward"].isnan().any()


def test_gradients_helper_is_no_constant() -> None:
    """The comparison above can fail: other weights give other gradients."""
    case = make_case("linear")
    out, _ = run("eager", case.env([B]), T, case.policy, case.start(B))
    (grad,) = gradients(out, [next(case.policy.parameters())])
    assert grad is not None
    assert grad.abs().sum() > 0
