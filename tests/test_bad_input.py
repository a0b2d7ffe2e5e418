"""Bad input under each engine: the captured engine raises what the eager path raises, before any step.

``test_env_bad_input.py`` says what each error is; here the engines are held against one another, with and
without a plan already made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal

import fastwm
from tests.compare import assert_same, run
from tests.models import (
    ACTION,
    LATENT,
    OBS,
    CatLinear,
    linear_policy,
    linear_world_model,
    make_case,
    module,
    spec_env,
)

B, T = 3, 4

pytestmark = pytest.mark.filterwarnings("ignore:fastwm")


@dataclass
class Call:
    """One rollout that goes wrong; ``good`` are arguments for the same env that go right."""

    env: Any
    arguments: dict[str, Any]
    steps: int = T
    good: dict[str, Any] = field(default_factory=dict)


def linear_env(**kwargs: Any) -> fastwm.WorldModelEnv:
    torch.manual_seed(0)
    return fastwm.WorldModelEnv(
        linear_world_model(**kwargs), spec_env(), batch_size=[B], done_threshold=0.5
    )


def start(*batch: int, latent: int = LATENT, dtype: torch.dtype = torch.float32) -> TensorDict:
    batch = batch or (B,)
    return TensorDict({"latent": torch.ones(*batch, latent).to(dtype)}, batch)


def call(policy: Any = None, begin: Any = None, steps: int = T, **arguments: Any) -> Call:
    policy = linear_policy() if policy is None else policy
    good = {"policy": linear_policy(), "tensordict": start()}
    if begin is None:
        begin = start()
    return Call(linear_env(), {"policy": policy, "tensordict": begin, **arguments}, steps, good)


def context_without_goal() -> Call:
    case = make_case("context")
    begin = case.start(B)
    good = {"policy": case.policy, "tensordict": begin.clone()}
    del begin["goal"]
    return Call(case.env([B]), {"policy": case.policy, "tensordict": begin}, T, good)


class Grows(nn.Module):
    """Dynamics whose latent is wider than the one it read."""

    def __init__(self) -> None:
        super().__init__()
        self.cat = CatLinear(LATENT + ACTION, LATENT + 1)

    def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.cat(latent, action)


def does_not_close() -> Call:
    world_model = fastwm.WorldModel(
        module(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        module(Grows(), ["latent", "action"], [("next", "latent")]),
        module(nn.Linear(LATENT + 1, 1), [("next", "latent")], [("next", "reward")]),
    )
    env = fastwm.WorldModelEnv(world_model, spec_env(), batch_size=[B])
    return Call(env, {"policy": linear_policy(), "tensordict": start()})


def validating(td: Any) -> Any:
    loc = td["latent"][..., :ACTION] * torch.nan
    return td.set("action", Normal(loc, 1.0, validate_args=True).sample())


def no_action(td: Any) -> Any:
    return td.set("other", td["latent"])


def raises(td: Any) -> Any:
    raise ZeroDivisionError("the policy's own error")


CALLS: dict[str, Callable[[], Call]] = {
    "missing-latent": lambda: call(begin=TensorDict({"observation": torch.ones(B, OBS)}, [B])),
    "missing-context": context_without_goal,
    "no-start": lambda: Call(linear_env(), {"policy": linear_policy()}),
    "wrong-batch": lambda: call(begin=start(B + 1)),
    "no-batch": lambda: call(begin=TensorDict({"latent": torch.ones(LATENT)}, [])),
    "wrong-width": lambda: call(begin=start(latent=LATENT + 1)),
    "wrong-width-without-reset": lambda: call(begin=start(latent=LATENT + 1), auto_reset=False),
    "double": lambda: call(begin=start(dtype=torch.float64)),
    "integers": lambda: call(begin=start(dtype=torch.int64)),
    "half": lambda: call(begin=start(dtype=torch.float16)),
    "zero-horizon": lambda: call(steps=0),
    "negative-horizon": lambda: call(steps=-1),
    "wide-action": lambda: call(policy=linear_policy(action=ACTION + 1)),
    "no-action": lambda: call(policy=no_action),
    "policy-raises": lambda: call(policy=raises),
    "policy-reads-what-is-not-there": lambda: call(policy=linear_policy(latent_keys=["belief"])),
    "policy-of-another-width": lambda: call(policy=linear_policy(latent=LATENT + 2)),
    "both-breaks": lambda: call(break_when_any_done=True, break_when_all_done=True),
    "actions-and-policy": lambda: call(actions=[torch.zeros(B, ACTION)]),
    "truncated-without-a-key": lambda: call(set_truncated=True),
    "no-tensordict-no-reset": lambda: Call(
        linear_env(), {"policy": linear_policy(), "auto_reset": False}
    ),
    "does-not-close": does_not_close,
    "validation-fails": lambda: call(policy=validating),
}
# What only the eager path takes is no error of the input but of the choice of engine.
EAGERS_OWN = {"zero-horizon", "negative-horizon", "actions-and-policy", "no-tensordict-no-reset"}


def error_of(engine: str, made: Call) -> BaseException | None:
    torch.manual_seed(0)
    with fastwm.backend(engine):
        try:
            made.env.rollout(made.steps, **made.arguments)
        except Exception as error:
            return error
    return None


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


@pytest.mark.parametrize("planned", [False, True], ids=["first", "planned"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_the_error_is_the_eager_paths(name: str, grad: bool, planned: bool) -> None:
    made = CALLS[name]()
    with torch.set_grad_enabled(grad):
        if planned and made.good:
            run("captured", made.env, T, start=made.good["tensordict"], policy=made.good["policy"])
        want, got = error_of("eager", made), error_of("auto", made)
        assert want is not None, "the eager path takes this"
        assert type(got) is type(want)
        assert first_line(got) == first_line(want)
        if made.good:  # and the env is none the worse
            arguments = {"start": made.good["tensordict"], "policy": made.good["policy"]}
            assert_same(
                run("captured", made.env, T, **arguments)[0],
                run("eager", made.env, T, **arguments)[0],
            )


@pytest.mark.parametrize("name", CALLS)
def test_the_captured_engine_by_name_raises_the_same_or_says_why_it_does_not_run(name: str) -> None:
    made = CALLS[name]()
    want, got = error_of("eager", made), error_of("captured", made)
    assert want is not None
    assert got is not None
    if "backend='captured' cannot run" in str(got):
        assert isinstance(got, RuntimeError)
        assert (
            first_line(want).split(":")[0] in str(got)
            or type(want).__name__ in str(got)
            or name in EAGERS_OWN | {"both-breaks", "validation-fails"}
        )
    else:
        assert type(got) is type(want)
        assert first_line(got) == first_line(want)


@pytest.mark.parametrize("name", ["wrong-width", "double", "wide-action", "does-not-close"])
def test_no_step_is_taken_before_the_error(name: str) -> None:
    """The start is as it was, and no random number was drawn."""
    made = CALLS[name]()
    begin = made.arguments["tensordict"]
    keys, state = list(begin.keys()), torch.get_rng_state()
    with fastwm.backend("auto"), pytest.raises(RuntimeError):
        made.env.rollout(made.steps, **made.arguments)
    assert list(begin.keys()) == keys
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("policy", ["own", None])
def test_empty_batches(batch: tuple[int, ...], policy: str | None) -> None:
    case = make_case("mlp_sampled")
    env, begin = case.env([]), case.start(*batch)
    chosen = case.policy if policy else None
    want, state = run("eager", env, T, chosen, begin)
    got, after = run("auto", env, T, chosen, begin)
    assert_same(got, want)
    assert torch.equal(state, after)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("where", ["weights", "start", "one row"])
def test_values_that_are_not_finite_go_through_as_eagerly(where: str, value: float) -> None:
    case = make_case("mlp")
    env, begin = case.env([B]), case.start(B)
    run("captured", env, T, case.policy, begin)
    with torch.no_grad():
        if where == "weights":
            next(case.world_model.step_module.parameters()).view(-1)[3] = value
        elif where == "start":
            begin["latent"][:] = value
        else:
            begin["latent"][1] = value
        assert_same(
            run("captured", env, T, case.policy, begin)[0],
            run("eager", env, T, case.policy, begin)[0],
        )
