"""Tracing a step: the graph that comes out, what is refused and why, and that asking leaves no trace."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import fastwm
from fastwm.step_graph import StepGraph
from fastwm.tracing import Untraceable, trace
from tests.compare import assert_same, run, why_eager
from tests.models import (
    ACTION,
    LATENT,
    OBS,
    CatLinear,
    linear_policy,
    make_case,
    module,
    sampled_actor,
    spec_env,
)

B = 3


def traced(
    step: Callable[..., Any], *inputs: Tensor, holds: Callable[[Tensor], bool] = lambda t: True
) -> StepGraph:
    named = {f"x{i}": t for i, t in enumerate(inputs)}
    graph, _, _ = trace(lambda x: {"y": step(*x.values())}, named, holds)
    return graph


def names(graph: StepGraph) -> list[str]:
    return [op.name for op in graph.ops]


# ---------------------------------------------------------------- the graph


def test_a_step_is_its_aten_ops() -> None:
    linear = nn.Linear(4, 2)
    graph = traced(lambda x: torch.tanh(linear(x)) + 1, torch.randn(B, 4))
    assert names(graph) == ["t", "addmm", "tanh", "add.Tensor"]
    assert {id(t) for _, t in graph.constants} == {id(linear.weight), id(linear.bias)}
    assert graph.metas[graph.outputs["y"].index].shape == (B, 2)
    assert "addmm" in str(graph)


def test_what_nobody_reads_is_left_out_but_draws_are_kept() -> None:
    def step(x: Tensor) -> Tensor:
        x.exp()
        torch.randn(3)
        return x * 2

    assert names(traced(step, torch.randn(B))) == ["randn", "mul.Tensor"]


def test_in_place_writes_into_what_is_read_later_are_kept() -> None:
    def step(x: Tensor) -> Tensor:
        y = x * 1
        y[0].fill_(7)
        unread = x * 1
        unread.add_(1)
        return y

    assert names(traced(step, torch.randn(B, 2))) == ["mul.Tensor", "select.int", "fill_.Scalar"]


def test_constants_that_python_makes_are_fresh() -> None:
    graph = traced(lambda x: x * torch.tensor([1.0, 2.0]), torch.randn(2))
    assert len(graph.fresh) == len(graph.constants) == 1


def test_equal_traces_have_equal_signatures_and_others_do_not() -> None:
    x, scale = torch.randn(2), torch.tensor(3.0)

    def signature(value: float, other: Tensor = scale) -> tuple[str, ...]:
        return traced(lambda t: (t * value).add(other) * torch.tensor(value), x).signature()

    assert signature(2.0) == signature(2.0)
    assert signature(2.0) != signature(2.5)
    assert signature(2.0) != signature(2.0, torch.tensor(3.0))


def test_a_custom_function_is_one_op() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp() * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    x = torch.randn(2, requires_grad=True)
    graph = traced(lambda t: Own.apply(t) + 1, x)
    assert [name.split(".")[-1] for name in names(graph)] == ["apply", "Tensor"]
    with torch.no_grad():  # no backward to keep
        assert names(traced(lambda t: Own.apply(t) + 1, x)) == ["exp", "mul.Tensor", "add.Tensor"]


def test_a_function_that_returns_its_input_does_not_make_it_the_steps_own() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(Untraceable, match="not the step's own"):
        traced(lambda t: torch.no_grad()(Same.apply(t).add_)(1), x)
    assert not x.any()


def test_ops_under_no_grad_are_marked() -> None:
    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.exp()
        return y * x

    graph = traced(step, torch.randn(2, requires_grad=True))
    assert [op.detached for op in graph.ops] == [True, False]


def test_one_hot_needs_no_look_at_the_data() -> None:
    index = torch.tensor([2, 0, 1])
    graph = traced(lambda x: torch.nn.functional.one_hot(x, 4), index)
    assert len(graph.checks) == 1
    with pytest.raises(Untraceable, match="validation"):  # which the eager path names better
        traced(lambda x: torch.nn.functional.one_hot(x, 2), index)
    with pytest.raises(Untraceable, match="Python reads"):
        traced(lambda x: torch.nn.functional.one_hot(x), index)


# ---------------------------------------------------------------- refusals

OTHER = torch.ones(2, 2)


def kept_branch(x: Tensor) -> Tensor:
    """The step catches what the tracer raises: it must be refused all the same."""
    try:
        return x * float(x.detach().numpy().mean())
    except Exception:
        return x


def kept_read(x: Tensor) -> Tensor:
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return x


class GradInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().add_(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class NotATensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        return grad


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "if": (lambda x: x if x.sum() > 0 else -x, "Python reads a value that the step computes"),
    "item": (lambda x: x * x[0, 0].item(), "Python reads"),
    "float": (lambda x: x * float(x.sum()), "Python reads"),
    "int-index": (lambda x: x[int(x.argmax() > 9)], "Python reads"),
    "tensor-index": (lambda x: x[x[:, 0].argmax()], "Python reads"),
    "range": (lambda x: sum(x * i for i in range(int(x.sum().abs()) + 1)), "Python reads"),
    "max": (lambda x: x * max(x[0, 0], x[0, 1]), "Python reads"),
    "in": (lambda x: x if 0.5 in x else -x, "Python reads"),
    "equal": (lambda x: x if torch.equal(x, x * 1) else -x, "Python reads"),
    "allclose": (lambda x: x if torch.allclose(x, x * 1) else -x, "Python reads"),
    "format": (lambda x: x * float(f"{x[0, 0]:.3f}"), "Python reads"),
    "repr": (lambda x: x * len(repr(x)), r"repr\(\) of a tensor"),
    "tolist": (lambda x: x * x.tolist()[0][0], r"tolist\(\)"),
    "numpy": (lambda x: x * float(x.detach().numpy().mean()), r"numpy\(\)"),
    "asarray": (lambda x: x * float(np.asarray(x.detach()).mean()), "numpy on a tensor"),
    "dlpack": (lambda x: torch.from_dlpack(x.detach()), "__dlpack__"),
    "storage": (lambda x: x * x.detach().untyped_storage()[0], "untyped_storage"),
    "pointer": (lambda x: x * (x.data_ptr() % 7), "data_ptr"),
    "data": (lambda x: x.data * 2, r"Tensor\.data"),
    "caught-numpy": (kept_branch, r"numpy\(\)"),
    "caught-if": (kept_read, "Python reads"),
    "mask": (lambda x: x[x > 0], "shape of its result depends on data"),
    "nonzero": (lambda x: (x > 0).nonzero(), "shape of its result depends on data"),
    "unique": (torch.unique, "shape of its result depends on data"),
    "masked-select": (lambda x: torch.masked_select(x, x > 0), "shape of its result depends"),
    "random": (lambda x: x * random.random(), "Python's or numpy's random generator"),
    "numpy-random": (lambda x: x * np.random.rand(), "Python's or numpy's random generator"),
    "autograd-grad": (
        lambda x: torch.autograd.grad((y := x.detach().requires_grad_()).square().sum(), y)[0],
        r"torch\.autograd\.grad",
    ),
    "func-grad": (torch.func.grad(lambda x: x.square().sum()), r"torch\.autograd\.grad"),
    "backward": (lambda x: (x.detach().requires_grad_().sum().backward(), x)[1], "backward"),
    "tensor-hook": (
        lambda x: (y := x * 2, y.register_hook(lambda g: g * 2), y)[2],
        "a tensor hook",
    ),
    "in-place-on-the-input": (lambda x: x.detach().add_(1), "not the step's own"),
    "in-place-on-a-parameter": (lambda x: OTHER.add_(1) * x, "not the step's own"),
    "in-place-under-no-grad": (
        lambda x: (y := x * 1, torch.no_grad()(lambda: y.add_(1))(), y)[2],
        "in-place write under no_grad",
    ),
    "in-place-in-a-function": (lambda x: GradInside.apply(x), "in place inside a custom"),
    "function-of-no-tensor": (lambda x: NotATensor.apply(x)[0], "something else than tensors"),
    "sparse": (lambda x: x.to_sparse().to_dense(), "layout torch.sparse_coo"),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    step, reason = REFUSED[name]
    x = torch.rand(2, 2) + 0.1
    kept = OTHER.clone()
    with pytest.raises(Untraceable, match=reason):
        traced(step, x.requires_grad_())
    assert torch.equal(OTHER, kept)  # refused before it was written


def test_unreachable_tensors_are_refused() -> None:
    with pytest.raises(Untraceable, match=r"shape \(2, 2\) that is neither an input nor reachable"):
        traced(lambda x: x @ OTHER, torch.randn(2, 2), holds=lambda t: False)
    with pytest.raises(Untraceable, match="comes from outside the trace"):
        traced(lambda x: OTHER, torch.randn(2, 2), holds=lambda t: False)


def test_tensor_subclasses_are_refused() -> None:
    class Tagged(Tensor):
        pass

    with pytest.raises(Untraceable, match="tensor subclass Tagged"):
        traced(lambda x: x * 2, torch.randn(2).as_subclass(Tagged))


def test_too_many_ops_are_refused() -> None:
    def step(x: Tensor) -> Tensor:
        for _ in range(6000):
            x = x + 1
        return x

    with pytest.raises(Untraceable, match="more than 5000 ops"):
        traced(step, torch.randn(2))


def test_python_may_read_what_no_step_changes() -> None:
    scale = torch.tensor(2.0)
    named = {"x": torch.randn(2)}
    graph, _, read = trace(lambda v: {"y": v["x"] * (scale * 2).item()}, named, lambda t: True)
    assert any(t is scale for t in read)
    assert names(graph) == ["mul.Tensor"]


# ---------------------------------------------------------------- random generators

GENERATOR = torch.Generator()


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x + torch.randn_like(x)


def same_noise_twice(x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    once = torch.randn_like(x)
    torch.set_rng_state(state)
    return x + once - torch.randn_like(x)


SEEDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fork": (forked, "seeds a random generator"),
    "seed": (lambda x: (torch.manual_seed(0), x + torch.randn(2))[1], "seeds a random generator"),
    "seed-last": (lambda x: (x + 1, torch.manual_seed(0))[0], "seeds a random generator"),
    "twice": (same_noise_twice, "seeds a random generator"),
    "own-seed": (
        lambda x: x + torch.randn(2, generator=GENERATOR.manual_seed(0)),
        "seeds a random generator",
    ),
    "new-generator": (
        lambda x: x + torch.randn(2, generator=torch.Generator().manual_seed(0)),
        "a generator that it makes",
    ),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_step_that_seeds_a_generator_is_refused(name: str) -> None:
    """A replay would draw on where the trace began anew."""
    step, reason = SEEDS[name]
    states = torch.get_rng_state(), GENERATOR.get_state()
    with pytest.raises(Untraceable, match=reason):
        trace(lambda v: {"y": step(v["x"])}, {"x": torch.randn(2)}, lambda t: True, [GENERATOR])
    assert torch.equal(GENERATOR.get_state(), states[1])


def test_generators_are_put_back_after_a_trace() -> None:
    state = GENERATOR.get_state()
    graph, _, _ = trace(
        lambda v: {"y": v["x"] + torch.randn(2, generator=GENERATOR) + torch.rand(2)},
        {"x": torch.randn(2)}, lambda t: True, [GENERATOR],
    )  # fmt: skip
    assert sum(op.draws for op in graph.ops) == 2
    assert torch.equal(GENERATOR.get_state(), state)
    assert len(graph.generators()) == 1


# ---------------------------------------------------------------- the env's step


class Dynamics(nn.Module):
    """``tanh(linear(latent, action))`` handed to ``act``, which may look at ``self``."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor] | None = None, **state: Any) -> None:
        super().__init__()
        self.cat = CatLinear(LATENT + ACTION, LATENT)
        self.act = act
        self.state = state

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        x = torch.tanh(self.cat(latent, action))
        return x if self.act is None else self.act(self, x)


def env_of(dynamics: nn.Module, **kwargs: Any) -> fastwm.WorldModelEnv:
    torch.manual_seed(0)
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(dynamics, ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    return fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B], **kwargs)


def start() -> TensorDict:
    return TensorDict({"latent": torch.linspace(-1, 1, B * LATENT).view(B, LATENT)}, [B])


def count(net: Any, x: Tensor) -> Tensor:
    net.state["n"] += 1
    return x * net.state["n"]


def remember(net: Any, x: Tensor) -> Tensor:
    net.last = x.detach()
    return x


def remember_in_a_list(net: Any, x: Tensor) -> Tensor:
    net.state["seen"].append(x.detach())
    return x


def recurrent(net: Any, x: Tensor) -> Tensor:
    net.hidden = torch.tanh(net.hidden + x)
    return net.hidden


def every_other(net: Any, x: Tensor) -> Tensor:
    net.state["odd"] = not net.state["odd"]
    return x if net.state["odd"] else -x


def batch_norm(net: Any, x: Tensor) -> Tensor:
    return net.norm(x)


def numpy_generator(net: Any, x: Tensor) -> Tensor:
    return x * float(net.state["rng"].normal())


def iterator(net: Any, x: Tensor) -> Tensor:
    return x * next(net.state["it"])


def own_global(net: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return x


CALLS = 0

STATEFUL: dict[str, tuple[Callable[[], Dynamics], str]] = {
    "counter": (lambda: Dynamics(count, n=0), "different things|Python state"),
    "last-activation": (lambda: with_last(), "Python state"),
    "log": (lambda: Dynamics(remember_in_a_list, seen=[]), "Python state"),
    "hidden-state": (lambda: with_hidden(), ""),
    "alternating": (lambda: Dynamics(every_other, odd=False), "different things|Python state"),
    "batch-norm": (lambda: with_norm(), "in place|Python state"),
    "numpy-generator": (
        lambda: Dynamics(numpy_generator, rng=np.random.default_rng(0)),
        "holds a Generator, whose state is hidden",
    ),
    "iterator": (
        lambda: Dynamics(iterator, it=iter(range(1, 99))),
        "holds a range_iterator, whose state is hidden",
    ),
    "global": (lambda: Dynamics(own_global), "Python state"),
}


def with_last() -> Dynamics:
    net = Dynamics(remember)
    net.last = torch.zeros(B, LATENT)
    return net


def with_hidden() -> Dynamics:
    net = Dynamics(recurrent)
    net.hidden = torch.zeros(B, LATENT)
    return net


def with_norm() -> Dynamics:
    net = Dynamics(batch_norm)
    net.norm = nn.BatchNorm1d(LATENT)
    return net


def state_of(net: Dynamics) -> list[Any]:
    found = [CALLS, net.state.get("n"), net.state.get("odd"), len(net.state.get("seen", []))]
    found += [t.tolist() for t in (*net.buffers(),)]
    found += [
        t.tolist()
        for t in (getattr(net, "last", None), getattr(net, "hidden", None))
        if t is not None
    ]
    if "rng" in net.state:
        found.append(net.state["rng"].bit_generator.state)
    return found


@pytest.mark.filterwarnings("ignore:fastwm")
@pytest.mark.parametrize("name", STATEFUL)
def test_steps_with_python_state_run_eagerly_as_if_nothing_had_asked(name: str) -> None:
    """Results and the state afterwards are those of two eager rollouts, though a trace was tried."""
    make, reason = STATEFUL[name]
    global CALLS
    ends = []
    for engine in ("eager", "auto"):
        CALLS = 0
        torch.manual_seed(0)
        net = make()
        env, policy = env_of(net), linear_policy()
        torch.manual_seed(1)
        policy.module.linear.reset_parameters()
        outs = []
        with fastwm.backend(engine):
            for _ in range(2):
                if engine == "auto" and not outs:
                    with pytest.warns(UserWarning, match=reason):
                        outs.append(env.rollout(3, policy, tensordict=start()))
                else:
                    outs.append(env.rollout(3, policy, tensordict=start()))
        ends.append((outs, state_of(net)))
    for got, want in zip(ends[1][0], ends[0][0], strict=True):
        assert_same(got, want)
    assert ends[1][1] == ends[0][1]


def test_a_refused_step_is_as_it_was_before_it_was_asked() -> None:
    net = Dynamics(count, n=5)
    env, policy = env_of(net), linear_policy()
    before = copy.deepcopy(net.state)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert why_eager(env, policy, start())
    assert net.state == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states[1:]


def test_a_cache_that_fills_itself_costs_one_eager_rollout() -> None:
    def cached(net: Any, x: Tensor) -> Tensor:
        if "table" not in net.state:
            net.state["table"] = torch.arange(LATENT, dtype=x.dtype)
        return x + net.state["table"]

    env, policy = env_of(Dynamics(cached)), linear_policy()
    with pytest.warns(UserWarning, match="runs on the eager engine"):
        first, _ = run("auto", env, 3, policy, start())
    second, _ = run("captured", env, 3, policy, start())
    assert_same(second, first)


def test_lazy_modules_run_eagerly_once() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(LATENT)

        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return torch.tanh(self.linear(torch.cat([latent, action], -1)))

    env, policy = env_of(Lazy()), linear_policy()
    with pytest.warns(UserWarning, match="eager engine: "):
        first, _ = run("auto", env, 3, policy, start())
    second, _ = run("captured", env, 3, policy, start())
    assert_same(second, first)


def test_keys_that_only_later_steps_have_are_refused() -> None:
    """A policy that writes an entry from the second step on."""

    def policy(td: TensorDictBase) -> TensorDictBase:
        if "seen" in td:
            td = td.set("twice", td["seen"] * 2)
        return td.set("seen", td["latent"]).set("action", td["latent"][..., :ACTION])

    assert "not there at every step" in why_eager(env_of(Dynamics()), policy, start())


def test_a_latent_of_another_dtype_after_the_first_step_is_refused() -> None:
    class Doubles(Dynamics):
        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return super().forward(latent.float(), action.float()).double()

    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(Doubles(), ["latent", "action"], [("next", "latent")]),
        module(
            lambda z: z.float().mean(-1, keepdim=True), [("next", "latent")], [("next", "reward")]
        ),
    )
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B])
    reason = why_eager(env, None, start())
    assert "float32" in reason
    assert "float64" in reason


def test_a_step_that_raises_is_left_to_the_eager_path() -> None:
    def broken(net: Any, x: Tensor) -> Tensor:
        raise KeyError("no such thing")

    env = env_of(Dynamics(broken))
    assert "KeyError" in why_eager(env, linear_policy(), start())
    with (
        pytest.raises(KeyError, match="no such thing"),
        pytest.warns(UserWarning, match="KeyError"),
    ):
        env.rollout(3, linear_policy(), tensordict=start())


def test_data_that_is_no_tensor_is_refused() -> None:
    case = make_case("linear")
    begin = case.start(B).set_non_tensor("note", "hello")
    assert "note" in why_eager(case.env([B]), case.policy, begin)


# ---------------------------------------------------------------- threads


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_trace_does_not_see_what_other_threads_do() -> None:
    """Custom functions are recorded by replacing a method that all threads share."""
    tracing, done = threading.Event(), threading.Event()
    found: list[Any] = []

    def other() -> None:
        tracing.wait(10)
        try:
            x = torch.ones(2, requires_grad=True)
            y = Doubling.apply(x)
            (grad,) = torch.autograd.grad(y.sum(), x)
            found.append(grad.tolist())
        finally:
            done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def step(x: Tensor) -> Tensor:
        y = x.exp()
        tracing.set()
        assert done.wait(10)
        return Doubling.apply(y) + 1

    graph = traced(step, torch.randn(2, requires_grad=True), holds=lambda t: False)
    thread.join()
    assert found == [[2.0, 2.0]]
    assert len(graph.ops) == 3


def test_threads_may_trace_at_once() -> None:
    errors: list[BaseException] = []
    cases = [make_case("mlp") for _ in range(4)]  # not in the threads: seeds are the process's
    want, _ = run("eager", cases[0].env([B]), 3, cases[0].policy, fixed_start())

    def work(case: Any) -> None:
        try:
            with fastwm.backend("captured"):
                for _ in range(3):
                    out = case.env([B]).rollout(3, case.policy, tensordict=fixed_start())
                    assert_same(out, want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def fixed_start() -> TensorDict:
    return TensorDict({"latent": torch.linspace(-1, 1, B * 64).view(B, 64)}, [B])


def test_functions_are_as_they_were_after_a_trace() -> None:
    before = dict(vars(torch.autograd.function._SingleLevelFunction))
    traced(lambda x: Doubling.apply(x), torch.randn(2, requires_grad=True))
    with pytest.raises(Untraceable):
        traced(lambda x: Doubling.apply(x).item(), torch.randn((), requires_grad=True))
    assert dict(vars(torch.autograd.function._SingleLevelFunction)) == before


def test_sampled_steps_trace_on_what_they_draw() -> None:
    """Two traces of one step draw other numbers and are still the same graph."""
    case = make_case("rssm_sampled")
    assert why_eager(case.env([B]), case.policy, case.start(B)) == ""
    assert why_eager(env_of(Dynamics()), sampled_actor(), start()) == ""
