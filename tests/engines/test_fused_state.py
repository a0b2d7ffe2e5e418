"""What the fused engine keeps and shares: packed weights, memory, plans, threads, copies of an env."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import fastwm
from fastwm.plan import cache_of
from tests.compare import assert_close, assert_parity, assert_same, run, why_not_fused
from tests.engines.test_captured import memories, parameters, views_case, views_env
from tests.models import LATENT, Case, linear_policy, linear_world_model, make_case, spec_env

B, T = 3, 4
KINDS = (Tensor, nn.Parameter)


def seen(case: Case, env: Any, start: Any) -> None:
    """What the fused engine gives now is what eager gives now."""
    want, _ = run("eager", env, T, case.policy, start)
    assert_same(run("fused", env, T, case.policy, start)[0], want)


# ---------------------------------------------------------------- weights


def flip_signs(case: Case) -> None:
    for p in parameters(case):
        p.data.neg_()


def write_one(case: Case) -> None:
    parameters(case)[0].data.view(-1)[7] += 0.5


def swap_rows(case: Case) -> None:
    """The same numbers in other places."""
    weight = parameters(case)[0].data
    weight[[0, 1]] = weight[[1, 0]]


def swap_matrices(case: Case) -> None:
    """Two layers of one shape change places."""
    one, two = case.world_model.dynamics.module.net[2], case.world_model.reward_head.module.net[0]
    kept = one.weight.data[:, :64].clone()
    one.weight.data[:, :64] = two.weight.data
    two.weight.data[:] = kept


def zeros(case: Case) -> None:
    for p in parameters(case):
        p.data.zero_()


def through_numpy(case: Case) -> None:
    parameters(case)[2].detach().numpy()[3] *= 2.0


def small_steps(case: Case) -> None:
    """As little as an optimizer may do: one unit in the last place of a few weights."""
    weight = parameters(case)[2].data
    weight.copy_(weight * (1 + 2e-7))
    weight.view(-1)[:3] *= 1.5


def data_swapped(case: Case) -> None:
    weight = parameters(case)[0]
    weight.data = torch.randn_like(weight)


WRITES: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (flip_signs, write_one, swap_rows, swap_matrices, zeros, through_numpy, small_steps,
              data_swapped)
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("name", WRITES)
def test_any_write_to_weights_is_seen(name: str, batch: int, grad: bool) -> None:
    """Weights are packed; whether they must be again is told by what they hold."""
    case = make_case("mlp")
    env, start = case.env([batch]), case.start(batch)
    with torch.set_grad_enabled(grad):
        before, _ = run("fused", env, T, case.policy, start)
        WRITES[name](case)
        seen(case, env, start)
        after, _ = run("fused", env, T, case.policy, start)
        assert not torch.equal(after["next", "reward"], before["next", "reward"])
        WRITES[name](case)  # there, or further on, or back
        seen(case, env, start)
    assert cache_of(env).traces == 1


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_optimizer_steps_between_rollouts(batch: int) -> None:
    ends = []
    for engine in ("eager", "fused"):
        case = make_case("rssm_sampled")
        env, start = case.env([batch]), case.start(batch)
        start["state"].fill_(0.3)
        start["belief"].fill_(0.1)
        optimizer = torch.optim.SGD(parameters(case), lr=1e-2, momentum=0.5)
        torch.manual_seed(7)
        for _ in range(4):
            with fastwm.backend(engine):
                out = env.rollout(T, case.policy, tensordict=start)
            optimizer.zero_grad()
            (-out["next", "reward"].mean() + out["next", "state"].square().mean()).backward()
            optimizer.step()
        ends.append([p.detach() for p in parameters(case)])
    for got, want in zip(ends[1], ends[0], strict=True):
        assert_close(got, want, "rollout.gradient", "trained weights")


def test_hooks_and_modes_that_come_and_go() -> None:
    case = make_case("linear")
    net = nn.Sequential(nn.Linear(LATENT, LATENT), nn.Dropout(0.5))
    case.policy.module = nn.Sequential(net, case.policy.module)
    env, start = case.env([B]), case.start(B)
    for mode in (True, False, True, False):
        case.policy.train(mode)
        seen(case, env, start)
    handle = net[0].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(
        RuntimeError, match="backend='fused' cannot run this rollout: a hook on Linear"
    ):
        run("fused", env, T, case.policy, start)
    with pytest.warns(UserWarning, match="a hook on Linear"):
        got, _ = run("auto", env, T, case.policy, start)
    assert_same(got, run("eager", env, T, case.policy, start)[0])
    handle.remove()
    seen(case, env, start)
    assert cache_of(env).traces <= 3


# ---------------------------------------------------------------- whose memory it is


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [1, B, 300])
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
            out, _ = run("fused", env, horizon, case.policy, start, break_when_any_done=stop)
        mine = memories(out)
        shared = mine.keys() & everything.keys()
        assert not shared, [(mine[m], everything[m]) for m in shared]
        everything |= mine
        kept.append(out)
        copies.append(out.clone())
    for out, copied in zip(kept, copies, strict=True):
        assert (out == copied).all()  # no later rollout wrote into it


def test_views_among_the_results() -> None:
    case = views_case()
    for batch in (1, B):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_parity(views_env(case), case.policy, case.start(batch), T, engine="fused")


def test_the_start_is_not_written_into() -> None:
    case = make_case("linear_done")
    start = case.start(B)
    keys, kept = list(start.keys()), start.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, _ = run("fused", case.env([B]), T, case.policy, start)
        out.apply_(lambda x: x.data.zero_())
        assert list(start.keys()) == keys
        assert (start == kept).all()


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_memory_does_not_grow(grad: bool) -> None:
    case = make_case("rssm_sampled")
    env, start = case.env([512]), case.start(512)

    def rollouts(n: int) -> None:
        for _ in range(n):
            out = env.rollout(15, case.policy, tensordict=start)
            if grad:
                out["next", "reward"].sum().backward()
                case.policy.zero_grad()
                case.world_model.zero_grad()

    with torch.set_grad_enabled(grad), fastwm.backend("fused"):
        rollouts(30)
        gc.collect()
        tensors = sum(type(o) in KINDS for o in gc.get_objects())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rollouts(200)
        gc.collect()
        assert sum(type(o) in KINDS for o in gc.get_objects()) <= tensors
        # 200 results of 1 MB would be 200 MB, and so would their graphs.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


def test_a_graph_frees_what_it_saved_without_the_garbage_collector() -> None:
    case = make_case("mlp_sampled")
    env, start = case.env([64]), case.start(64)
    out, _ = run("fused", env, 15, case.policy, start)
    gc.collect()
    gc.disable()
    try:
        node = out["next", "reward"].grad_fn
        while not hasattr(node, "given_out"):
            node = node.next_functions[0][0]
        alive = weakref.ref(node)
        del node, out
        assert alive() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- threads, copies


def test_two_threads_on_one_env() -> None:
    case = make_case("mlp")
    env, starts = case.env([B]), [case.start(B) for _ in range(2)]
    want = [run("eager", env, T, case.policy, start)[0] for start in starts]
    found: list[list[Any]] = [[], []]
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with fastwm.backend("fused"):
                for _ in range(30):
                    out = env.rollout(T, case.policy, tensordict=starts[i])
                    grads = torch.autograd.grad(
                        out["next", "reward"].sum(), list(case.policy.parameters())
                    )
                    found[i].append((out.detach(), grads))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    for i in range(2):
        grads = torch.autograd.grad(want[i]["next", "reward"].sum(), list(case.policy.parameters()))
        for out, got in found[i]:
            assert_same(out, want[i].detach())
            for g, w in zip(got, grads, strict=True):
                assert_close(g, w, "rollout.gradient", "gradient")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_an_env_with_a_plan(how: Any) -> None:
    case = make_case("mlp")
    env, start = case.env([B]), case.start(B)
    want, _ = run("fused", env, T, case.policy, start)
    other, policy = how((env, case.policy))
    assert_same(run("fused", other, T, policy, start)[0], want)
    with torch.no_grad():
        for p in other.world_model.parameters():
            p.mul_(2.0)
    changed, _ = run("fused", other, T, policy, start)
    assert not torch.equal(changed["next", "reward"], want["next", "reward"])
    assert_same(changed, run("eager", other, T, policy, start)[0])
    assert_same(run("fused", env, T, case.policy, start)[0], want)


# ---------------------------------------------------------------- bfloat16 weights


def plain(env: Any, case: Case, start: Any, engine: str = "fused") -> Any:
    with torch.no_grad():
        return run(engine, env, 15, case.policy, start)[0]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (200,)])
@pytest.mark.parametrize("name", ["mlp", "mlp_sampled", "rssm", "multi_agent"])
def test_bfloat16_weights(name: str, batch: tuple[int, ...]) -> None:
    case = make_case(name)
    start = case.start(*batch)
    env = case.env(batch, fused_weights=torch.bfloat16)
    with torch.no_grad():
        found = env.explain(T, case.policy, tensordict=start)
    assert found.engine == "fused"
    assert str(found) == "fused: runs, with bfloat16 weights"
    got, want = plain(env, case, start), plain(env, case, start, "eager")
    assert list(got.keys(True, True)) == list(want.keys(True, True))
    for key in got.keys(True, True, sort=False):
        assert got[key].dtype is want[key].dtype
        if got[key].is_floating_point():
            assert_close(got[key], want[key], "rollout.bf16_weights", str(key))
    reward = (
        "next",
        *((case.reward_key,) if isinstance(case.reward_key, str) else case.reward_key),
    )
    assert not torch.equal(got[reward], plain(case.env(batch), case, start)[reward])


def test_bfloat16_weights_are_off_by_default_and_may_be_switched() -> None:
    case = make_case("mlp")
    env, start = case.env([B]), case.start(B)
    assert env.fused_weights is None
    want = plain(env, case, start)
    with torch.no_grad():
        assert str(env.explain(T, case.policy, tensordict=start)) == "fused: runs"
    for _ in range(2):
        env.fused_weights = torch.bfloat16
        rounded = plain(env, case, start)
        assert not torch.equal(rounded["next", "reward"], want["next", "reward"])
        env.fused_weights = None
        assert torch.equal(plain(env, case, start)["next", "reward"], want["next", "reward"])


def test_bfloat16_weights_see_writes() -> None:
    case = make_case("mlp")
    env, start = case.env([B], fused_weights=torch.bfloat16), case.start(B)
    plain(env, case, start)
    flip_signs(case)
    got, want = plain(env, case, start), plain(env, case, start, "eager")
    assert_close(
        got["next", "reward"], want["next", "reward"], "rollout.bf16_weights", "the reward"
    )


def test_bfloat16_weights_have_no_gradients() -> None:
    case = make_case("mlp")
    env, start = case.env([B], fused_weights=torch.bfloat16), case.start(B)
    reason = "bfloat16 weights have no gradients"
    assert why_not_fused(env, case.policy, start) == reason
    assert env.explain(T, case.policy, tensordict=start).engine == "captured"
    with pytest.raises(RuntimeError, match=f"backend='fused' cannot run this rollout: {reason}"):
        run("fused", env, T, case.policy, start)
    assert_parity(env, case.policy, start, T, wrt=parameters(case), engine="auto")
    for p in parameters(case):
        p.requires_grad_(False)
    assert why_not_fused(env, case.policy, start) == ""


def test_bfloat16_weights_of_a_float64_model_are_refused() -> None:
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(
        linear_world_model().double(), spec_env(dtype=torch.float64), batch_size=[B],
        fused_weights=torch.bfloat16,
    )  # fmt: skip
    policy = linear_policy().double()
    start = TensorDict({"latent": torch.randn(B, LATENT, dtype=torch.float64)}, [B])
    with torch.no_grad():
        assert why_not_fused(env, policy, start) == "bfloat16 weights in a step of float64"
        assert_parity(env, policy, start, T, engine="auto")


def test_other_dtypes_of_weights_are_unknown() -> None:
    with pytest.raises(
        ValueError, match=r"fused_weights=torch.float16; choose None or torch.bfloat16"
    ):
        make_case("linear").env([B], fused_weights=torch.float16)
