"""The generated loop: what it hoists, puts off and reuses, and random programs through all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Normal
from torchrl.data import Composite, Unbounded
from torchrl.modules import ProbabilisticActor

import fastwm
from fastwm.engines import captured
from fastwm.engines.captured import CapturedLoop
from fastwm.engines.codegen import binding, loop_source, step_varying
from fastwm.plan import cache_of
from fastwm.step_graph import StepGraph
from fastwm.tracing import trace
from tests.compare import assert_parity, gradients, run
from tests.models import ACTION, LATENT, OBS, CatLinear, linear_policy, make_case, module, spec_env

aten = torch.ops.aten
B, T = 3, 4


def graph_of(step: Callable[[Tensor], Tensor], x: Tensor) -> StepGraph:
    """A step whose only input is carried: ``("state", ("x",))`` feeds ``("x",)``."""
    graph, _, _ = trace(
        lambda v: {("td", ("y",)): (y := step(v["x",])), ("state", ("x",)): y},
        {("x",): x},
        lambda t: True,
    )
    return graph


def loop_of(graph: StepGraph, *, grad: bool = False, dim: int = 1) -> CapturedLoop:
    return CapturedLoop(graph, [("x",)], [], [], dim, grad=grad)


def lines(graph: StepGraph, **kwargs: Any) -> tuple[list[str], list[str]]:
    """The generated calls before the loop and in it, as op names."""
    source = loop_source(
        graph,
        {("x",): ("state", ("x",))},
        [],
        [("td", ("y",))],
        [],
        grad=False,
        write=False,
        **kwargs,
    )
    text = source.text.split("\n\ndef after")[0]
    before, _, inside = text.partition("for step in range(horizon):")

    def named(part: str) -> list[str]:
        calls = [line.split("= ")[-1].split("(")[0] for line in part.splitlines() if "= f" in line]
        return [source.scope[c].__name__ for c in calls]

    return named(before), named(inside)


# ---------------------------------------------------------------- before the loop


def test_what_no_step_changes_stands_before_the_loop() -> None:
    weight, scale = torch.randn(2, 2), torch.tensor(2.0)
    with torch.no_grad():
        graph = graph_of(lambda x: F.linear(x, weight * scale).tanh(), torch.randn(B, 2))
    before, inside = lines(graph)
    assert before == ["mul", "t"]
    assert inside == ["mm", "tanh_"]


def test_draws_and_written_memory_stay_in_the_loop() -> None:
    def step(x: Tensor) -> Tensor:
        noise = torch.randn(2)
        table = torch.zeros(2)
        table[0] = 1.0
        return x + noise + table

    with torch.no_grad():
        before, inside = lines(graph_of(step, torch.randn(B, 2)))
    assert set(before) <= {"lift_fresh.default"}  # of the number 1.0
    assert inside[0] == "randn"
    assert "zeros" in inside


def test_a_parameter_cast_down_is_cast_at_each_step_where_gradients_add_up() -> None:
    weight = torch.randn(2, 2, requires_grad=True)
    graph = graph_of(lambda x: (x.bfloat16() @ weight.bfloat16()).float(), torch.randn(B, 2))
    changing = {("x",)}
    cast = next(op for op in graph.ops if any(v.index for v, _ in graph.constants if v in op.args))
    made = cast.outputs[0]
    assert made is not None
    assert made.index not in step_varying(graph, changing)
    assert made.index in step_varying(graph, changing, grad=True)


def test_a_step_without_any_op() -> None:
    loop = loop_of(graph_of(lambda x: x, torch.randn(B, 2)))
    x = torch.randn(B, 2)
    steps, out = loop.run(3, {("x",): x}, [], None, stop=False)
    assert steps == 3
    assert torch.equal(out["y",], x.unsqueeze(1).expand(B, 3, 2))
    assert out["y",].data_ptr() != x.data_ptr()


def test_a_constant_made_in_the_step() -> None:
    """``torch.tensor`` gives back its own input when traced; it once was an endless loop."""
    graph = graph_of(lambda x: x * torch.tensor([1.0, 2.0]) + torch.tensor(0.5), torch.randn(B, 2))
    x = torch.ones(B, 2)
    _, out = loop_of(graph).run(2, {("x",): x}, [t for _, t in graph.constants], None, stop=False)
    assert out["y",][0].tolist() == [[1.5, 2.5], [2.0, 5.5]]


def test_a_check_that_rests_on_context_alone() -> None:
    """A distribution over what no step changes validates its arguments before the loop."""

    class Params(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, ACTION)

        def forward(self, goal: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(goal), self.linear(goal).exp()

    case = make_case("context")
    policy = ProbabilisticActor(
        module(Params(), ["goal"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=lambda loc, scale: Normal(loc, scale, validate_args=True),
        default_interaction_type="random",
    )
    env = case.env([B])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_parity(env, policy, case.start(B), T)
    bad = case.start(B)
    bad["goal"][0] = torch.nan
    with (
        pytest.raises(ValueError, match="parameter loc"),
        pytest.warns(UserWarning, match="validation"),
    ):
        env.rollout(T, policy, tensordict=bad)


# ---------------------------------------------------------------- in place, reused buffers


@pytest.mark.parametrize(
    ("step", "in_place"),
    [
        (lambda x: (x + 1).tanh(), True),
        (lambda x: x.tanh(), False),  # the state itself
        (lambda x: (y := x + 1).tanh() + y, False),  # read again
        (lambda x: (y := x + 1)[:, :1] * y.tanh(), False),  # a view of it is read
        (lambda x: ((x > 0).long() + 1).exp(), False),  # another dtype
        (lambda x: (x[:, :1] * 2).expand(B, 2).exp(), False),  # one element behind several
    ],
)
def test_ops_overwrite_temporaries_only(step: Callable[[Tensor], Tensor], in_place: bool) -> None:
    with torch.no_grad():
        graph = graph_of(step, torch.randn(B, 2))
        _, inside = lines(graph)
        assert any(name.endswith("_") and not name.startswith("_") for name in inside) is in_place
        x = torch.randn(B, 2)
        kept = x.clone()
        _, out = loop_of(graph).run(
            3, {("x",): x}, [t for _, t in graph.constants], None, stop=False
        )
        for i in range(3):
            x = step(x)
            torch.testing.assert_close(out["y",][:, i], x)
        assert not torch.equal(x, kept)


def test_bindings_reach_the_same_op() -> None:
    x, w, b = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    for target, args in [
        (aten.addmm.default, (b, x, w)), (aten.mm.default, (x, w)), (aten.silu.default, (x,)),
        (aten.cat.default, ([x, x], -1)), (aten.slice.Tensor, (x, 1, 0, 2)), (aten.t.default, (x,)),
        (aten.native_layer_norm.default, (x, [4], None, None, 1e-5)),
        (aten.split.Tensor, (x, 2, -1)), (aten.unsqueeze.default, (x, 0)),
    ]:  # fmt: skip
        got, want = binding(target)(*args), target(*args)
        for g, v in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
            assert torch.equal(g, v), target


# ---------------------------------------------------------------- after the loop


def deferred(env: Any) -> list[str]:
    """Names of the ops that a plan's loop puts off."""
    (variants,) = cache_of(env).plans.values()
    loop = variants[0].loop
    put_off = set(loop._loop(stop=True, defer=True).source.put_off)
    return [op.name for op in loop.graph.ops if any(o and o.index in put_off for o in op.outputs)]


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [1, B])
def test_heads_wait_for_all_steps(batch: int, grad: bool) -> None:
    case = make_case("mlp")
    env = case.env([batch])
    wrt = [*case.world_model.step_module.parameters()] if grad else ()
    with torch.set_grad_enabled(grad):
        assert_parity(env, case.policy, case.start(batch), T, wrt=wrt)
    assert [n for n in deferred(env) if n in ("addmm", "silu")] == ["addmm", "silu", "addmm"]


def test_a_head_that_may_stop_the_rollout_does_not_wait() -> None:
    case = make_case("linear_done")
    env = case.env([B])
    assert_parity(env, case.policy, case.start(B), T)
    (variants,) = cache_of(env).plans.values()
    loop = variants[0].loop
    put_off = {stop: loop._loop(stop=stop, defer=True).source.put_off for stop in (True, False)}
    assert len(put_off[False]) > len(put_off[True]) > 0


class Head(nn.Module):
    """A reward head around ``body``: ``[*B, Z] -> [*B, 1]``."""

    def __init__(self, body: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.one, self.body, self.two = nn.Linear(LATENT, LATENT), body, nn.Linear(LATENT, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.two(self.body(self.one(z)))


ROWS = torch.randn(B, LATENT)
HEADS: dict[str, Callable[[], Any]] = {
    # By rows, so they may wait.
    "unary": lambda: lambda x: x.exp().neg().clamp(-2, 2).abs().sqrt(),
    "binary": lambda: lambda x: x * torch.sigmoid(x) + torch.maximum(x, x * 2),
    "vector": lambda: lambda x: x * torch.arange(LATENT) - torch.ones(1),
    "cat-slice": lambda: lambda x: torch.cat([x, x.tanh()], -1)[:, 2 : 2 + LATENT],
    # Rows that know of one another, or of their place in the batch: they may not.
    "batch-mean": lambda: lambda x: x - x.mean(0),
    "batch-max": lambda: lambda x: x / x.abs().amax(),
    "softmax-over-rows": lambda: lambda x: x.softmax(0),
    "row-weights": lambda: lambda x: x * ROWS,
    "row-column": lambda: lambda x: x * ROWS[:, :1],
    "row-slice": lambda: lambda x: torch.cat([x[1:], x[:1]], 0),
    "first-rows": lambda: lambda x: x[:B] * 2,
    "flip-rows": lambda: lambda x: x.flip(0),
    "cumsum-rows": lambda: lambda x: x.cumsum(0),
    "gram": lambda: lambda x: x @ x.t() @ x,
    "transposed": lambda: lambda x: (x.t() * torch.arange(B)).t(),
    "square": lambda: lambda x: x @ torch.eye(LATENT) + torch.arange(LATENT).expand(B, LATENT),
    "noise": lambda: lambda x: x + torch.randn_like(x),
    "one-noise": lambda: lambda x: x + torch.randn(LATENT),
    "no-grad": lambda: lambda x: torch.no_grad()(torch.exp)(x) + x,
    "batch-norm": lambda: nn.BatchNorm1d(LATENT).eval(),
    "layer-norm": lambda: nn.LayerNorm(LATENT),
    "in-place": lambda: lambda x: (y := x * 1, y[0].zero_(), y)[2],
    "detached": lambda: lambda x: x.detach() * x,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_all_kinds(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    head = Head(HEADS[name]())
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(CatLinear(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]),
        module(head, [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B])
    start = TensorDict({"latent": torch.randn(B, LATENT)}, [B])
    wrt = list(head.parameters()) if grad else ()
    with torch.set_grad_enabled(grad):
        for horizon in (1, B, T):  # B steps of B rows: the two dims are easily mistaken
            assert_parity(env, linear_policy(), start, horizon, wrt=wrt)


def test_nothing_waits_where_it_would_no_longer_fit_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case("mlp")
    env, start = case.env([B]), case.start(B)
    asked: list[bool] = []
    loop = CapturedLoop._loop

    def watched(self: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("defer", False))
        return loop(self, **kwargs)

    monkeypatch.setattr(CapturedLoop, "_loop", watched)
    for limit in (1 << 20, 0):
        monkeypatch.setattr(captured, "_DEFER_BYTES", {"cpu": limit})
        with torch.no_grad():
            assert_parity(env, case.policy, start, T)
    assert any(asked)


# ---------------------------------------------------------------- random programs

WIDTH = 4


def instructions(rng: random.Random, count: int) -> list[tuple[str, list[int], float]]:
    names = sorted(PROGRAM)
    found = []
    for position in range(count):
        operands = [rng.randrange(position + 2) for _ in range(2)]
        found.append((rng.choice(names), operands, rng.choice([0.5, -1.5, 2.0])))
    return found


def write_slice(x: Tensor, y: Tensor, c: float) -> Tensor:
    out = x.clone()
    out[:, :2].mul_(c)
    out[:, 2] = y[:, 0]
    return out


def write_view(x: Tensor, y: Tensor, c: float) -> Tensor:
    out = (x * 1).contiguous()
    view = out.view(-1)
    view += c
    return out + y


PROGRAM: dict[str, Callable[[Any, Tensor, Tensor, float], Tensor]] = {
    "silu": lambda net, x, y, c: F.silu(x + c),
    "relu_": lambda net, x, y, c: F.relu(x * c, inplace=True),
    "tanh": lambda net, x, y, c: (x - y).tanh(),
    "sigmoid": lambda net, x, y, c: torch.sigmoid(x) * c,
    "elu": lambda net, x, y, c: F.elu(x, inplace=False),
    "gelu": lambda net, x, y, c: F.gelu(net.linear(x)),
    "exp": lambda net, x, y, c: x.tanh().exp(),
    "linear": lambda net, x, y, c: net.linear(x) + y,
    "linear2": lambda net, x, y, c: F.linear(x, net.other * net.scale),
    "matmul": lambda net, x, y, c: F.silu(x @ net.other),
    "add": lambda net, x, y, c: torch.add(x, y, alpha=c),
    "maximum": lambda net, x, y, c: torch.maximum(x, y),
    "cat": lambda net, x, y, c: torch.cat([x, y], -1)[:, 1 : 1 + WIDTH],
    "chunk": lambda net, x, y, c: torch.cat(x.chunk(2, -1)[::-1], -1),
    "transpose": lambda net, x, y, c: (x.t() + c).t(),
    "contiguous": lambda net, x, y, c: x.t().contiguous().t(),
    "view": lambda net, x, y, c: (x + y).reshape(-1).view(-1, WIDTH),
    "same": lambda net, x, y, c: x,
    "slice-all": lambda net, x, y, c: x[:, :],
    "alias": lambda net, x, y, c: x.view_as(x),
    "detach": lambda net, x, y, c: x.detach() + y,
    "write-slice": lambda net, x, y, c: write_slice(x, y, c),
    "write-view": lambda net, x, y, c: write_view(x, y, c),
    "layer-norm": lambda net, x, y, c: F.layer_norm(x, [WIDTH]),
    "softmax": lambda net, x, y, c: x.softmax(-1),
    "sum": lambda net, x, y, c: x.sum(-1, keepdim=True).expand(-1, WIDTH) * 0.2,
    "rows": lambda net, x, y, c: x - x.mean(0),
    "noise": lambda net, x, y, c: x + 0.1 * torch.randn_like(x),
    "where": lambda net, x, y, c: torch.where(y > 0, x, c),
    "round": lambda net, x, y, c: x + (x.round() - x).detach(),
    "constant": lambda net, x, y, c: x * torch.tensor([1.0, 0.5, -1.0, c]),
    "buffer": lambda net, x, y, c: x * net.scale,
    "powers": lambda net, x, y, c: x.pow(2) * c,
}


class Program(nn.Module):
    """A random straight line of ops; its last values are the results."""

    def __init__(self, seed: int, results: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.results = results
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.steps = instructions(rng, rng.randrange(3, 14))
        self.takes = [rng.randrange(len(self.steps) + 2) for _ in range(results)]

    def forward(self, latent: Tensor, action: Tensor) -> Sequence[Tensor]:
        values = [latent, torch.cat([action, action], -1)]
        for name, (i, j), c in self.steps:
            values.append(PROGRAM[name](self, values[i], values[j], c))
        # Of the start's own strides, without which the first step would not be like the others.
        state = torch.tanh(values[-1] + 0.5 * values[len(values) // 2]).contiguous()
        return (state, *(values[i] for i in self.takes))

    def __repr__(self) -> str:
        return "\n".join(map(str, self.steps)) + f"\n-> {self.takes}"


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int) -> None:
    torch.manual_seed(seed)
    names = ["a", "b", "c"]
    program = Program(seed, len(names))
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, WIDTH), ["observation"], ["latent"]),
        TensorDictModule(
            program, ["latent", "action"], [("next", "latent"), *(("next", n) for n in names)]
        ),
        module(nn.Linear(WIDTH, 1), [("next", "a")], [("next", "reward")]),
    )
    spec = Composite({n: Unbounded((B, WIDTH)) for n in ["latent", *names]}, shape=[B])
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B], observation_spec=spec)
    start = TensorDict({n: torch.randn(B, WIDTH) for n in ["latent", *names]}, [B])
    policy = linear_policy()
    try:
        with torch.no_grad():
            want = assert_parity(env, policy, start, T)
            results, _ = run("captured", env, T, policy, start)
            memories = [v.untyped_storage().data_ptr() for v in results.values(True, True)]
            assert len(set(memories)) == len(memories)
        reference = gradients(run("eager", env, T, policy, start)[0], [*program.parameters()])
        if all(g is None or g.isfinite().all() for g in reference):
            assert_parity(env, policy, start, T, wrt=[*program.parameters(), *policy.parameters()])
    except AssertionError as error:
        raise AssertionError(f"{error}\n{program}") from error
    assert want["next", "latent"].isfinite().all()
