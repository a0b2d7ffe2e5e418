"""The CUDA graph engine: its staging on any machine, through a recorder that replays on the CPU as a graph
does on a GPU (same ops, same memory), and the real thing where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import fastwm
from fastwm.engines.cuda_graph import CaptureFailed, GraphedLoop
from fastwm.plan import plan_for
from fastwm.request import Request
from fastwm.rollout import start_of
from fastwm.tolerances import tolerance
from tests.engines.recorder import CpuRecorder
from tests.models import counting_world_model, make_case, sampled_actor, spec_env

STEPS = 6


def graphed(env, policy, td, recorder=None):
    """The engine over the env's plan, and what a call of it takes."""
    request = Request(STEPS, policy, tensordict=td)
    begin = start_of(env, request)
    plan, inputs = plan_for(env, request, begin, request.feed(env, begin.batch_size))
    return GraphedLoop(plan.loop, recorder or CpuRecorder()), plan, inputs


def run(engine, plan, inputs, *, stop=False, feed=None):
    return engine.run(STEPS, inputs, plan.constants, feed, stop=stop)


def close(got, want, what="rollout"):
    torch.testing.assert_close(got, want, **tolerance(what, want.dtype).kwargs())


def assert_same(results, want):
    for path, value in results.items():
        key = path if len(path) > 1 else path[0]
        if want[key].is_floating_point():
            close(value.detach(), want[key].detach())
        else:
            assert torch.equal(value, want[key])


@pytest.mark.parametrize(
    "name", ["linear", "mlp_sampled", "rssm_sampled", "context", "linear_done"]
)
def test_replays_give_eager_results_for_fresh_starts(name):
    case = make_case(name)
    env, policy = case.env([5]), case.policy
    with torch.no_grad():
        engine, plan, _ = graphed(env, policy, case.start(5))
        for seed in range(3):
            td = case.start(5)
            request = Request(STEPS, policy, tensordict=td)
            _, inputs = plan_for(env, request, start_of(env, request), None)
            torch.manual_seed(seed)
            _, results = run(engine, plan, inputs)
            torch.manual_seed(seed)
            want = env.rollout(STEPS, policy, tensordict=td, break_when_any_done=False)
            assert_same(results, want)
    assert len(engine.graphs) == 1


def test_results_are_not_written_by_a_later_replay():
    case = make_case("linear")
    env = case.env([5])
    with torch.no_grad():
        engine, plan, inputs = graphed(env, case.policy, case.start(5))
        _, first = run(engine, plan, inputs)
        kept = {k: v.clone() for k, v in first.items()}
        _, second = run(engine, plan, {k: torch.randn_like(v) if v.is_floating_point() else v
                                       for k, v in inputs.items()})  # fmt: skip
    for key, value in first.items():
        assert torch.equal(value, kept[key])
    assert not torch.equal(second["latent",], first["latent",])


def test_a_parameter_updated_in_place_is_seen_and_a_moved_one_captured_anew():
    case = make_case("linear")
    env = case.env([5])
    with torch.no_grad():
        engine, plan, inputs = graphed(env, case.policy, case.start(5))
        _, before = run(engine, plan, inputs)
        parameter = next(case.world_model.dynamics.parameters())
        parameter.mul_(2)
        _, after = run(engine, plan, inputs)
        assert not torch.equal(before["next", "latent"], after["next", "latent"])
        graph = engine.graphs[STEPS][1]
        parameter.data = parameter.data * 0.5
        _, moved = run(engine, plan, inputs)
        assert engine.graphs[STEPS][1] is not graph
    close(moved["next", "latent"], before["next", "latent"])


def gradients(results, targets):
    total = sum((v * torch.linspace(-1, 1, v.numel()).view(v.shape)).sum()
                for v in results if v.requires_grad)  # fmt: skip
    return torch.autograd.grad(total, targets, allow_unused=True)


@pytest.mark.parametrize("name", ["linear", "mlp_sampled", "rssm_sampled"])
def test_gradients_are_those_of_the_eager_path(name):
    case = make_case(name)
    env, policy = case.env([3]), case.policy
    td = case.start(3, requires_grad=True)
    engine, plan, inputs = graphed(env, policy, td)
    targets = [*policy.parameters(), *env.world_model.parameters()]
    leaves = [td[k] for k in case.latents]
    torch.manual_seed(1)
    _, results = run(engine, plan, inputs)
    torch.manual_seed(1)
    with fastwm.backend("eager"):
        want = env.rollout(STEPS, policy, tensordict=td)
    keys = [p if len(p) > 1 else p[0] for p in results]
    got = gradients(results.values(), [*targets, *leaves])
    expected = gradients([want[k] for k in keys], [*targets, *leaves])
    for g, w in zip(got, expected, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            close(g, w, "rollout.gradient")


@pytest.mark.parametrize("name", ["linear", "mlp_sampled"])
def test_a_backward_after_another_forward_is_still_its_own(name):
    case = make_case(name)
    env, policy = case.env([3]), case.policy
    engine, plan, inputs = graphed(env, policy, case.start(3))
    targets = list(policy.parameters())
    other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in inputs.items()}
    torch.manual_seed(2)
    _, first = run(engine, plan, inputs)
    want = gradients(first.values(), targets)
    torch.manual_seed(2)
    _, first = run(engine, plan, inputs)
    run(engine, plan, other)
    state = torch.get_rng_state()
    got = gradients(first.values(), targets)
    assert torch.equal(state, torch.get_rng_state())
    for g, w in zip(got, want, strict=True):
        close(g, w, "rollout.gradient")


def test_gradients_do_not_alias_the_graph():
    case = make_case("linear")
    env, policy = case.env([3]), case.policy
    engine, plan, inputs = graphed(env, policy, case.start(3))
    _, results = run(engine, plan, inputs)
    results["next", "reward"].sum().backward()
    kept = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    _, results = run(engine, plan, inputs)
    torch.autograd.grad((results["next", "reward"] ** 2).sum(), list(policy.parameters()))
    assert kept
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter.grad, kept[name])


def test_a_parameter_written_between_forward_and_backward_raises():
    case = make_case("linear")
    env, policy = case.env([3]), case.policy
    engine, plan, inputs = graphed(env, policy, case.start(3))
    _, results = run(engine, plan, inputs)
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results["next", "reward"].sum().backward()


def test_a_done_flag_cuts_the_horizon_and_sets_the_generator_back():
    # The latent counts up by one a step; 0.5 + 3 reaches the flag at 3.
    env = fastwm.WorldModelEnv(counting_world_model(done_at=3.0), spec_env(), batch_size=[5])
    td = TensorDict({"latent": torch.full((5, 1), 0.5)}, [5])
    policy = sampled_actor(1)
    with torch.no_grad():
        engine, plan, inputs = graphed(env, policy, td)
        torch.manual_seed(0)
        steps, results = run(engine, plan, inputs, stop=True)
        torch.manual_seed(0)
        want = env.rollout(STEPS, policy, tensordict=td)
    assert steps == want.shape[1] == 3
    assert_same(results, want)
    assert engine.recorder.advanced == (3, STEPS)


def test_fed_actions_are_copied_in():
    case = make_case("linear")
    env = case.env([5])
    actions = torch.randn(STEPS, 5, *env.action_spec.shape[1:])
    request = Request(STEPS, actions=list(actions), tensordict=case.start(5))
    with torch.no_grad():
        begin = start_of(env, request)
        plan, inputs = plan_for(env, request, begin, request.feed(env, begin.batch_size))
        engine = GraphedLoop(plan.loop, CpuRecorder())
        for _ in range(2):
            actions = torch.randn_like(actions)
            request.actions = list(actions)
            feed = request.feed(env, begin.batch_size)
            _, results = engine.run(STEPS, inputs, plan.constants, feed.next, stop=False)
            torch.testing.assert_close(results["action",], actions.movedim(0, 1))


def test_a_failing_capture_is_named_and_not_tried_again():
    class Failing(CpuRecorder):
        tried = 0

        def record(self, work, warmups):
            Failing.tried += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    case = make_case("linear")
    with torch.no_grad():
        engine, plan, inputs = graphed(case.env([5]), case.policy, case.start(5), Failing())
        for _ in range(2):
            with pytest.raises(CaptureFailed, match="out of memory"):
                run(engine, plan, inputs)
    assert Failing.tried == 1


def test_horizons_kept_are_bounded():
    case = make_case("linear")
    with torch.no_grad():
        engine, plan, inputs = graphed(case.env([2]), case.policy, case.start(2))
        for horizon in range(1, 20):
            engine.run(horizon, inputs, plan.constants, None, stop=False)
    assert len(engine.graphs) <= 8


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["linear", "mlp_sampled", "rssm_sampled", "context", "linear_done"]
)
@pytest.mark.parametrize("grad", [False, True])
def test_parity_on_the_gpu(name, grad):
    case = make_case(name)
    case.world_model.cuda()
    case.policy.cuda()
    env = case.env([5], device="cuda")
    with torch.set_grad_enabled(grad):
        report = fastwm.check_parity(env, case.policy, case.start(5).to("cuda"), STEPS)
    assert report.ok, report


@pytest.mark.gpu
def test_an_out_of_memory_error_in_capture_leaves_the_loop_usable():
    case = make_case("linear")
    case.world_model.cuda()
    case.policy.cuda()
    env = case.env([5], device="cuda")
    td = case.start(5).to("cuda")
    with torch.no_grad():
        want = env.eager_rollout(Request(STEPS, case.policy, tensordict=td))
        taken = torch.cuda.memory_reserved() + (1 << 20)
        torch.cuda.set_per_process_memory_fraction(
            taken / torch.cuda.get_device_properties(0).total_memory
        )
        try:
            out = env.rollout(STEPS, case.policy, tensordict=td)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    close(out["next", "latent"], want["next", "latent"])
