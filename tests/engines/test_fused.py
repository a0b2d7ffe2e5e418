"""The fused engine against the eager path: values, gradients, random numbers, early stop, refusals.

Where a step has a row program these tests ask for ``"fused"`` by name, so that nothing else can run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import set_exploration_type

import fastwm
from fastwm.engines import fused
from fastwm.plan import cache_of
from fastwm.row_program.lowering import lower
from tests.compare import assert_parity, assert_same, run, why_eager, why_not_fused
from tests.engines.test_captured import (
    CALLABLES,
    DISTRIBUTIONS,
    MODULES,
    Double,
    Dynamics,
    FloatAction,
    actor,
    begin,
    begin_of,
    counting_env,
    counts,
    env_of,
    model_of,
    parameters,
)
from tests.models import (
    ACTION,
    BELIEF,
    CASES,
    LATENT,
    Case,
    counting_world_model,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    sampled_actor,
    spec_env,
)

B, T = 3, 6


def held(env: Any, policy: Any, start: Any, horizon: int, **kwargs: Any) -> TensorDictBase:
    """Fused against eager."""
    return assert_parity(env, policy, start, horizon, engine="fused", **kwargs)


def wanted(case: Case, start: TensorDictBase) -> list[Tensor]:
    return [*parameters(case), *(start.get(key) for key in case.latents)]


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
        top = next(iter(spec.keys()))
        rand = [spec.rand().get(top) for _ in range(T)]
        if isinstance(rand[0], TensorDictBase):  # a group of actions is the eager path's
            reason = why_not_fused(env, None, start, actions=rand)
            assert reason == why_eager(env, None, start, actions=rand) != ""
            return
        extra = {"actions": rand}
    wrt = [*parameters(case, chosen), *(start.get(k) for k in case.latents)] if grad else ()
    with torch.set_grad_enabled(grad):
        held(env, chosen, start, T, wrt=wrt, break_when_any_done=False, **extra)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (17,), (2, 3), (2, 1, 3), (129,)])
@pytest.mark.parametrize("name", ["mlp_sampled", "multi_agent", "rssm_sampled", "context"])
def test_batches(name: str, batch: tuple[int, ...], grad: bool) -> None:
    case = make_case(name)
    start = case.start(*batch, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        held(case.env(batch), case.policy, start, 4, wrt=wanted(case, start) if grad else ())


@pytest.mark.parametrize("own", [(), (3,)])
def test_leading_dims(own: tuple[int, ...]) -> None:
    case = make_case("linear_done")
    for lead in [(), (1,), (5,), (2, 4)]:
        held(case.env(own), case.policy, case.start(*lead, *own), 4)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", ["linear", "rssm_sampled"])
def test_horizons_share_one_trace(name: str, grad: bool) -> None:
    case = make_case(name)
    env, start = case.env([B]), case.start(B, requires_grad=grad)
    for horizon in (15, 1, 2, 100):
        with torch.set_grad_enabled(grad):
            held(env, case.policy, start, horizon, wrt=wanted(case, start) if grad else ())
    assert cache_of(env).traces == 1


def test_ten_thousand_steps_of_one_row() -> None:
    case = make_case("rssm")
    env, start = case.env([1]), case.start(1)
    with torch.no_grad():
        out, _ = run("fused", env, 10_000, case.policy, start)
        want, _ = run("captured", env, 10_000, case.policy, start)  # eager takes 15 s
    assert out.shape == (1, 10_000)
    assert_same(out, want)


def test_no_rows_are_the_next_engines() -> None:
    case = make_case("linear")
    assert why_not_fused(case.env([0]), case.policy, case.start(0)) == "an empty batch"
    with fastwm.backend("auto"):
        assert case.env([0]).rollout(T, case.policy, tensordict=case.start(0)).shape == (0, T)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_float64(grad: bool) -> None:
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(
        linear_world_model(done="done").double(), spec_env(dtype=torch.float64), batch_size=[B]
    )
    policy, start = linear_policy().double(), begin(B, dtype=torch.float64)
    wrt = list(policy.parameters()) if grad else ()
    with torch.set_grad_enabled(grad):
        out = held(env, policy, start, 15, wrt=wrt, break_when_any_done=False)
    assert out["next", "latent"].dtype is torch.float64


def test_half_precision_is_handed_on() -> None:
    """Of bfloat16: test_fused_bfloat16.py."""
    dtype = torch.float16
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(
        linear_world_model().to(dtype), spec_env(dtype=dtype), batch_size=[B]
    )
    policy, start = linear_policy().to(dtype), begin(B).to(dtype)
    assert why_not_fused(env, policy, start) == f"{str(dtype)[6:]} inputs"
    found = env.explain(T, policy, tensordict=start)
    assert found.engine == "captured"
    with pytest.raises(
        RuntimeError, match=f"backend='fused' cannot run.*: {str(dtype)[6:]} inputs"
    ):
        run("fused", env, T, policy, start)
    with torch.no_grad():
        assert_same(run("auto", env, T, policy, start)[0], run("eager", env, T, policy, start)[0])


def test_under_another_default_dtype() -> None:
    """A float32 model stays one; noise is drawn in the default dtype, by whichever engine."""
    case = make_case("mlp_sampled")
    env, start = case.env([B]), case.start(B)
    held(env, case.policy, start, T)
    torch.set_default_dtype(torch.float64)
    try:
        want, _ = run("eager", env, T, case.policy, start)
        assert_same(run("auto", env, T, case.policy, start)[0], want)
    finally:
        torch.set_default_dtype(torch.float32)
    held(env, case.policy, start, T)


# ---------------------------------------------------------------- policies, modules


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_actors_that_sample(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    policy, env = DISTRIBUTIONS[name](), env_of(FloatAction())
    wrt = [*policy.parameters(), *env.world_model.parameters()] if grad else ()
    with torch.set_grad_enabled(grad):
        out = held(env, policy, begin(B), T, wrt=wrt)
    if name != "TanhDelta":
        again, _ = run("fused", env, T, policy, begin(B), seed=1)
        assert not torch.equal(again["action"], out["action"])  # the seed is what decides


@pytest.mark.parametrize("kind", ["deterministic", "mode", "mean", "random"])
def test_exploration_types(kind: str) -> None:
    torch.manual_seed(0)
    with set_exploration_type(kind):
        held(
            env_of(FloatAction()),
            actor(torch.distributions.Normal, ["loc", "scale"]),
            begin(B),
            T,
        )


@pytest.mark.parametrize("kind", CALLABLES)
def test_plain_callables(kind: str) -> None:
    torch.manual_seed(0)
    case, net = make_case("linear"), nn.Linear(LATENT, ACTION)
    policy, trust = CALLABLES[kind](net), kind not in ("nn-module", "lambda", "in-place")
    held(case.env([B]), policy, begin(B), T, wrt=list(net.parameters()), trust_policy=trust)


#: Modules without a row program, and the op that rules it out; all others run on the fused engine.
UNFUSED = {
    "LSTM": "aten.mkldnn_rnn_layer: no row-wise form",
    "attention": "aten.bmm: a product of two row values mixes rows of the batch",
    "autocast-block": "aten._to_copy: a value of dtype bfloat16 in a step of float32",
    "in-place": "aten.select.int: reads a value that another view of it wrote in place",
    "in-place-view": "aten.add.Tensor: reads a value that another view of it wrote in place",
    "complex": "complex64 values",
    "double-and-back": "aten._to_copy: a value of dtype float64 in a step of float32",
    "randperm": "aten.randperm: no row-wise form",
}
#: These have a row program, but their gradients are not those of their ops.
UNFUSED_WITH_GRADIENTS = {
    "custom-function": "custom autograd.Function Double: its backward has no row-wise form",
    "custom-function-many": "custom autograd.Function Scaled: its backward has no row-wise form",
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", MODULES)
def test_what_modules_do(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    world_model = model_of(Dynamics(MODULES[name]()))
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B])
    policy, start = linear_policy(), begin(B)
    start["latent"].requires_grad_(grad)
    live = [*world_model.parameters(), *policy.parameters()]
    with torch.set_grad_enabled(grad):
        reason = {**UNFUSED, **(UNFUSED_WITH_GRADIENTS if grad else {})}.get(name)
        if reason is not None:
            assert why_not_fused(env, policy, start) == reason
            assert env.explain(T, policy, tensordict=start).engine == "captured"
            return
        if name == "GroupNorm":  # of two channels each: it magnifies rounding beyond any tolerance
            env = fastwm.WorldModelEnv(
                world_model.double(), spec_env(dtype=torch.float64), batch_size=[B]
            )
            policy, start = policy.double(), begin(B, dtype=torch.float64)
            start["latent"].requires_grad_(grad)
        held(env, policy, start, T, wrt=[*live, start["latent"]] if grad else ())


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(1)).squeeze(1)


FIRST_REASONS = {
    "conv": (Convolved, "convolution"),
    "sort": (lambda: lambda x: x.sort(-1).values, "aten.sort: no row-wise form"),
    "lstm": (MODULES["LSTM"], "aten.mkldnn_rnn_layer"),
    "attention-over-the-batch": (MODULES["attention"], "mixes rows of the batch"),
    "mean-over-the-batch": (lambda: lambda x: x - x.mean(0, keepdim=True), "over the batch"),
    "first-of-two": (lambda: lambda x: x.cumsum(-1).sort(-1).values.cummax(-1)[0], "aten."),
    "custom-function": (lambda: Double.apply, "custom autograd.Function Double"),
}


@pytest.mark.parametrize("name", FIRST_REASONS)
def test_the_first_op_that_ruled_it_out_is_named(name: str) -> None:
    make, reason = FIRST_REASONS[name]
    torch.manual_seed(0)
    env, policy, start = env_of(Dynamics(make())), linear_policy(), begin(B)
    found = env.explain(T, policy, tensordict=start)
    assert reason in found.passed_over["fused"]
    assert found.engine == "captured"
    with pytest.raises(RuntimeError) as caught:
        run("fused", env, T, policy, start)
    said = f"backend='fused' cannot run this rollout: {found.passed_over['fused']}."
    assert str(caught.value) == said
    assert_parity(env, policy, start, T, engine="auto")


def test_without_the_cpp_library_the_reason_is_its_absence(monkeypatch: Any) -> None:
    from fastwm.ops import CpuLibrary

    monkeypatch.setattr(fused, "cpu_library", lambda: CpuLibrary(None, False, "it is not built"))
    case = make_case("linear")
    assert why_not_fused(case.env([B]), case.policy, case.start(B)) == "it is not built"
    assert_parity(case.env([B]), case.policy, case.start(B), T, engine="auto")


# ---------------------------------------------------------------- indices


def test_where_it_is_not_measured_it_is_made_when_asked_for_by_name(monkeypatch: Any) -> None:
    """As on CUDA, where kernels take seconds to compile."""
    monkeypatch.setattr("fastwm.plan._fuses_at_once", lambda results: False)
    case = make_case("linear")
    env, policy, start = case.env([3]), case.policy, case.start(3)
    assert env.explain(3, policy, tensordict=start).engine == "captured"
    run("auto", env, 3, policy, start)
    ((plan,),) = cache_of(env).plans.values()
    assert plan.fused is None
    assert "not measured on a GPU" in why_not_fused(env, policy, start)
    # It is held to the weights and the random numbers of now, not to those of when the plan was made.
    with torch.no_grad():
        next(iter(env.world_model.parameters())).add_(0.3)
    start["latent"].mul_(2.0)
    torch.manual_seed(7)
    want, _ = run("eager", env, 3, policy, start)
    got, _ = run("fused", env, 3, policy, start)
    assert plan.fused is not None
    assert_same(got, want)


def test_a_sampled_policy_put_off(monkeypatch: Any) -> None:
    monkeypatch.setattr("fastwm.plan._fuses_at_once", lambda results: False)
    case = make_case("linear")
    env, policy, start = case.env([3]), sampled_actor(), case.start(3)
    run("auto", env, 3, policy, start)
    torch.rand(5)
    assert_parity(env, policy, start, T, engine="fused")


def looked_up(kind: str, table: nn.Embedding) -> Any:
    """Actions out of a table, by positions that are those of the latent, truncated."""

    def at(td: TensorDictBase) -> Tensor:
        return td["latent"][..., 0].long()

    def gathered(td: TensorDictBase) -> Tensor:
        rows = table.weight.expand(*td.batch_size, *table.weight.shape)
        index = at(td)[..., None, None].expand(*td.batch_size, 1, ACTION)
        return rows.gather(-2, index).squeeze(-2)

    def scattered(td: TensorDictBase) -> Tensor:
        return torch.zeros(*td.batch_size, ACTION).scatter(-1, at(td)[..., None], 1.0)

    ways = {
        "embedding": lambda td: table(at(td)),
        "index": lambda td: table.weight[at(td)],
        "gather": gathered,
        "scatter": scattered,
        "one_hot": lambda td: nn.functional.one_hot(at(td), ACTION).float(),
    }
    return lambda td: td.set("action", ways[kind](td))


@pytest.mark.filterwarnings("ignore:fastwm")
@pytest.mark.parametrize("kind", ["embedding", "index", "gather", "scatter", "one_hot"])
def test_positions_out_of_range_raise_what_eager_raises(kind: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(ACTION, ACTION)
    env, policy = env_of(lambda z, a: z + 0 * a.sum(-1, keepdim=True)), looked_up(kind, table)
    good, low, high = (begin(B) for _ in range(3))
    good["latent"][:] = torch.tensor([0.0, 1.0, 1.0])[:, None]
    low["latent"][:] = torch.tensor([0.0, 0.0, -1.0])[:, None]
    high["latent"][:] = torch.tensor([1.0, ACTION, 1.0])[:, None]
    with torch.no_grad():
        held(env, policy, good, T)
        for bad in (low, high):
            if kind == "index" and bad is low:  # counted from the end
                held(env, policy, bad, T)
                continue
            errors = []
            for engine in ("eager", "auto"):
                with pytest.raises((RuntimeError, IndexError)) as caught:
                    run(engine, env, T, policy, bad)
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1]
            with pytest.raises(RuntimeError, match="an argument check fails"):
                run("fused", env, T, policy, bad)
        held(env, policy, good, T)


def test_what_is_not_finite_in_a_table_stays_where_it_is() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(4, ACTION)
    env, policy = env_of(lambda z, a: z + a.sum(-1, keepdim=True)), looked_up("embedding", table)
    start = TensorDict({"latent": torch.tensor([[0.5], [2.0], [0.0]]).expand(B, LATENT)}, [B])
    with torch.no_grad():
        table.weight[:] = 0.0
        table.weight[1], table.weight[3] = torch.nan, torch.inf
        table.weight[2] = 0.25
        out = held(env, policy, start, 2)
    assert out["next", "latent"].isfinite().all()


def test_an_embedding_with_a_padding_row_keeps_it_without_gradient() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(3, ACTION, padding_idx=1)
    env, start = env_of(FloatAction()), begin(B)

    def policy(td: TensorDictBase) -> TensorDictBase:
        return td.set("action", table((td["latent"].sum(-1) > 0).long()))

    assert why_not_fused(env, policy, start) == "an embedding with padding_idx"
    assert_parity(env, policy, start, T, wrt=[table.weight], engine="auto")


# ---------------------------------------------------------------- starts


def test_starts_that_are_not_contiguous() -> None:
    case = make_case("rssm")
    state = torch.randn(LATENT, B).t().requires_grad_()
    belief = torch.randn(1, BELIEF, requires_grad=True)
    start = TensorDict({"state": state, "belief": belief.expand(B, BELIEF)}, [B])
    held(case.env([B]), case.policy, start, T, wrt=[state, belief])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["start", "weights"])
@pytest.mark.parametrize("name", ["mlp", "rssm", "linear_done"])
def test_what_is_not_finite_goes_where_eager_lets_it(name: str, where: str, bad: float) -> None:
    case = make_case(name)
    start = case.start(B)
    env = case.env([B])
    held(env, case.policy, start, T)  # with a plan from before
    with torch.no_grad():
        if where == "start":
            start.get(next(iter(case.latents)))[1] = bad
        else:
            next(case.policy.parameters())[0, 0] = bad
        out = held(env, case.policy, start, T, break_when_any_done=False)
    assert not out["next", "reward"][1].isfinite().all()
    if where == "start":
        assert out["next", "reward"][0].isfinite().all()  # no row sees another's


# ---------------------------------------------------------------- early stop


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("kind", ["float", "int", "bool"])
@pytest.mark.parametrize("at", [1, 3, T, T + 1])
def test_early_stop(at: int, kind: str, stop: bool, grad: bool) -> None:
    env, policy = counting_env(at, kind=kind), linear_policy(1)
    with torch.set_grad_enabled(grad):
        wrt = list(policy.parameters()) if grad else ()
        start = counts(0.0, -9.0, -9.0)
        out = held(env, policy, start, T, wrt=wrt, break_when_any_done=stop)
    assert out.shape[-1] == (min(at, T) if stop else T)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("policy", ["sampled", "random", "deterministic"])
@pytest.mark.parametrize("at", [1, 63, 64, 65, 128, 200])
def test_stops_at_and_over_the_blocks_of_steps(at: int, policy: str, grad: bool) -> None:
    """Flags are looked at once per block of 64 steps; values and generator are eager's."""
    assert fused._BLOCK == 64
    wm = counting_world_model(done_at=float(at))
    env = fastwm.WorldModelEnv(wm, spec_env(), batch_size=[B])
    chosen = {"sampled": sampled_actor(1), "random": None, "deterministic": linear_policy(1)}
    with torch.set_grad_enabled(grad):
        out = held(env, chosen[policy], counts(0.0, -999.0, -5.0), 140)
    assert out.shape == (B, min(at, 140))


def test_an_own_generator_stands_where_eager_leaves_it_after_a_stop() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            noise = torch.rand(latent.shape, generator=self.generator)
            return latent + 1 + 0 * noise * action.sum(-1, keepdim=True)

    own = Own()
    done = module(lambda z: z[..., :1] >= 3, [("next", "latent")], [("next", "done")])
    env = fastwm.WorldModelEnv(model_of(own, done_head=done), spec_env(), batch_size=[B])
    start, policy, found = TensorDict({"latent": torch.zeros(B, LATENT)}, [B]), linear_policy(), []
    for engine in ("eager", "fused", "fused"):
        own.generator.manual_seed(4)
        out, _ = run(engine, env, T, policy, start)
        assert out.shape == (B, 3)
        found.append((out, own.generator.get_state()))
    for out, state in found[1:]:
        assert_same(out, found[0][0])
        assert torch.equal(state, found[0][1])


def test_flags_that_are_never_true_are_not_looked_at() -> None:
    case = make_case("linear")
    env = case.env([B])
    run("fused", env, T, case.policy, case.start(B))
    (plans,) = cache_of(env).plans.values()
    assert plans[0].fused.live == []  # type: ignore[union-attr]
    case = make_case("linear_done")
    env = case.env([B])
    run("fused", env, T, case.policy, case.start(B))
    (plans,) = cache_of(env).plans.values()
    assert plans[0].fused.live != []  # type: ignore[union-attr]


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize("name", ["mlp_sampled", "rssm_sampled"])
def test_same_seed_same_trajectory(name: str) -> None:
    case = make_case(name)
    env, start = case.env([B]), case.start(B)
    one, _ = run("fused", env, T, case.policy, start, seed=1)
    two, _ = run("fused", env, T, case.policy, start, seed=1)
    other, _ = run("fused", env, T, case.policy, start, seed=2)
    assert all(torch.equal(one.get(k), two.get(k)) for k in one.keys(True, True))
    assert not torch.equal(one["action"], other["action"])


def test_planning_draws_nothing_from_the_generators() -> None:
    case = make_case("rssm_sampled")
    env, start = case.env([B]), begin_of(case)
    first, state = run("fused", env, T, case.policy, start)
    second, again = run("fused", env, T, case.policy, start)
    assert torch.equal(state, again)
    assert torch.equal(first["action"], second["action"])


# ---------------------------------------------------------------- what is trusted


def test_a_row_program_that_computes_something_else_is_not_taken(monkeypatch: Any) -> None:
    """The plan is held against the traced steps; a wrong lowering leaves the step to captured."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        lowered = lower(*args, **kwargs)
        program = lowered.program
        for i, instr in enumerate(program.instrs):
            if instr.op == "linear":
                from dataclasses import replace

                program.instrs[i] = replace(instr, attrs={**instr.attrs, "act": "relu"})
        return lowered

    monkeypatch.setattr(fused, "lower", wrong)
    case = make_case("linear")
    env, start = case.env([B]), case.start(B)
    assert "does not give what the step gave" in why_not_fused(env, case.policy, start)
    assert_parity(env, case.policy, start, T, engine="auto")
