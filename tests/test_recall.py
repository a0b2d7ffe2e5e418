"""A call just like one before goes without a tensordict of its own and without reset: nothing may tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal
from torchrl.data import Composite, Unbounded

from fastwm import guarded_trace
from fastwm.plan import cache_of, recall
from fastwm.request import Request
from tests.compare import assert_parity, assert_same, run
from tests.models import ACTION, Case, make_case

B, T = 3, 4


def made(name: str = "linear", batch: list[int] | None = None) -> tuple[Case, Any]:
    case = make_case(name)
    env = case.env([B] if batch is None else batch)
    run("captured", env, T, case.policy, case.start(B))
    return case, env


def recalled(env: Any, policy: Any, start: Any, **kwargs: Any) -> bool:
    return recall(env, Request(T, policy, tensordict=start, **kwargs)) is not None


@pytest.mark.parametrize("name", ["linear", "mlp_sampled", "rssm_sampled"])
def test_the_second_call_is_recalled_and_the_same(name: str) -> None:
    case, env = made(name)
    assert recalled(env, case.policy, case.start(B))
    for _ in range(2):
        assert_parity(env, case.policy, case.start(B), T)
    assert cache_of(env).traces == 1


def test_what_the_start_holds_besides() -> None:
    """Flags are cleared, what is left of another step is dropped, and the start is not written into."""
    case, env = made()
    done = torch.ones(B, 1, dtype=torch.bool)
    for more in (
        {"done": done},
        {"terminated": done.clone(), "done": done},
        {"next": TensorDict({"latent": torch.ones(B, 2)}, [B])},
        {"context": torch.ones(B, 2)},
    ):
        for times in range(3):
            start = case.start(B).update(more)
            before = start.clone()
            assert recalled(env, case.policy, start) == (times > 0 or "next" in more)
            want, _ = run("eager", env, T, case.policy, start)
            got, _ = run("captured", env, T, case.policy, start)
            assert_same(got, want)
            assert_same(start, before)


def test_no_two_results_share_anything() -> None:
    case, env = made()
    start = case.start(B)
    first, _ = run("captured", env, T, case.policy, start)
    second, _ = run("captured", env, T, case.policy, start)
    kept = second.clone()
    first.names = ["rows", "steps"]
    first["extra"] = torch.ones(B, T)
    first["next", "extra"] = torch.ones(B, T)
    for value in first.values(True, True):
        value.detach().zero_()
    assert_same(second, kept)
    third, _ = run("captured", env, T, case.policy, start)
    assert_same(third, kept)
    memory = [v.untyped_storage().data_ptr() for out in (first, second, third)
              for v in out.values(True, True)]  # fmt: skip
    assert len(set(memory)) == len(memory)


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "names": lambda case, start: setattr(start, "names", ["rows"]),
    "dtype": lambda case, start: start.set("latent", start["latent"].double()),
    "gradient": lambda case, start: start["latent"].requires_grad_(),
    "more": lambda case, start: start.set("more", torch.ones(B)),
    "nested": lambda case, start: start.set("more", TensorDict({"a": torch.ones(B)}, [B])),
    "reset mask": lambda case, start: start.set("_reset", torch.ones(B, 1, dtype=torch.bool)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_start_is_not_recalled(kind: str) -> None:
    case, env = made()
    start = case.start(B)
    KINDS[kind](case, start)
    assert not recalled(env, case.policy, start)


def test_names_written_in_place_are_seen() -> None:
    case, env = made()
    start = case.start(B)
    start.names = ["rows"]
    run("captured", env, T, case.policy, start)
    assert recalled(env, case.policy, start)
    start._td_dim_names[0] = "others"  # as rename_ may do
    assert not recalled(env, case.policy, start)


def test_another_call_is_not_recalled() -> None:
    case, env = made()
    start = case.start(B)
    assert not recalled(env, make_case("linear", seed=1).policy, start)
    assert not recalled(env, None, start)
    assert not recalled(env, case.policy, start, trust_policy=True)
    assert not recalled(env, case.policy, start, set_state=False)
    assert not recalled(env, case.policy, start, auto_reset=False)
    assert not recalled(env, case.policy, start, actions=[torch.ones(B, ACTION)] * T)
    assert not recalled(env, case.policy, None)
    with torch.no_grad():
        assert not recalled(env, case.policy, start)
    assert recalled(env, case.policy, start, set_state=True)


def test_what_is_wrong_with_a_start_is_still_said() -> None:
    case, env = made()
    with pytest.raises(RuntimeError, match="shape"):
        run("captured", env, T, case.policy, case.start(B + 1))
    wrong = TensorDict({"latent": torch.ones(B, 99)}, [B])
    with pytest.raises(RuntimeError, match="the env expects"):
        run("captured", env, T, case.policy, wrong)


def test_specs_that_change_are_seen() -> None:
    """What the start must look like is asked of the specs, which are part of what is watched."""
    case, env = made()
    start = case.start(B)
    assert recalled(env, case.policy, start)
    shape = (B, start["latent"].shape[-1] + 1)
    env.state_spec = Composite(latent=Unbounded(shape), shape=(B,))
    assert not recalled(env, case.policy, start)
    with pytest.raises(RuntimeError, match="the env expects"):
        run("captured", env, T, case.policy, start)


def test_a_model_that_changes_is_seen() -> None:
    case, env = made()
    start = case.start(B)
    parameter = next(case.policy.parameters())
    with torch.no_grad():
        parameter.mul_(2)
    assert recalled(env, case.policy, start)  # read where it is
    assert_parity(env, case.policy, start, T)
    for change in (
        lambda p: p.requires_grad_(False),
        lambda p: setattr(p, "data", p.data.clone().t().contiguous().t()),
    ):
        change(parameter)
        assert not recalled(env, case.policy, start)
        assert_parity(env, case.policy, start, T)
        assert recalled(env, case.policy, start)


def test_the_exact_check_alone_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that lacks Dynamo's."""
    monkeypatch.setattr(guarded_trace, "_same_kinds", lambda tensors: guarded_trace.never)
    test_a_model_that_changes_is_seen()


def test_a_check_that_fails_gives_eagers_error_and_random_numbers() -> None:
    case, env = made()

    def policy(td: Any) -> Any:
        return td.set(
            "action", Normal(td["latent"][..., :ACTION], 1.0, validate_args=True).sample()
        )

    good, bad = case.start(B), case.start(B)
    bad["latent"][:] = torch.nan
    run("captured", env, T, policy, good)
    assert recalled(env, policy, bad)
    states = []
    for engine in ("eager", "auto"):
        with pytest.raises(ValueError, match="Normal"):
            run(engine, env, T, policy, bad)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert_parity(env, policy, good, T)


def test_attributes_of_a_hook_dict() -> None:
    """The many empty ordered dicts of a module have no attributes until somebody gives them some."""
    from fastwm.watch import Watch

    net = nn.Tanh()
    watch = Watch([net])
    assert watch.unchanged()
    assert vars(net._forward_hooks) == {}  # asking makes one
    assert watch.unchanged()
    assert watch.reconcile() == (True, None)
    restore = watch.snapshot()
    for hooks in (net._forward_hooks, net._forward_pre_hooks):
        hooks.tag = 1  # type: ignore[attr-defined]
        assert not watch.unchanged()
        assert not watch.reconcile()[0]
        restore()
        assert not vars(hooks)
        assert watch.unchanged()
    assert isinstance(net._forward_hooks, OrderedDict)


def test_equal_is_not_the_same() -> None:
    from fastwm.watch import Watch

    held = {"a": 1, "b": [1], "c": torch.ones(1)}
    for key, other in (("a", True), ("a", 1.0), ("b", [1]), ("c", torch.ones(1))):
        watch = Watch([held])
        kept, held[key] = held[key], other
        assert not watch.unchanged(), key
        held[key] = kept
        assert watch.unchanged()


def test_nothing_passes_from_one_container_to_the_next() -> None:
    from fastwm.watch import Watch

    a, b = object(), object()
    first, second = [a, b], [b]
    watch = Watch([first, second])
    second.insert(0, first.pop())
    assert not watch.unchanged()


def test_a_module_held_without_any_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.models as models
    from fastwm.watch import Watch

    watch = Watch([[models]])
    assert watch.unchanged()
    monkeypatch.setattr(models, "ACTION", ACTION + 1)
    assert not watch.unchanged()
