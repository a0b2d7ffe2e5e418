"""A captured `WorldModelLoss` behind CUDA graphs: its staging on any machine, by a recorder that replays on
the CPU; and the real thing where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastwm import loss_plan
from fastwm.backends import backend
from fastwm.engines.cuda_graph import GraphedLoop
from fastwm.loss import WorldModelLoss
from fastwm.loss_plan import cache_of
from tests.engines.recorder import CpuRecorder
from tests.loss_engines import (
    Dropped,
    assert_parity,
    assert_same,
    differs,
    full_batch,
    full_loss,
    gained,
    run,
)
from tests.loss_models import Latents, make_batch


@pytest.fixture(autouse=True)
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[GraphedLoop]:
    """Every plan made from here on has graphs, and this is all of them."""
    made: list[GraphedLoop] = []
    if request.node.get_closest_marker("gpu") is None:

        def graphed(loop: Any, device: Any, *, separate: bool) -> GraphedLoop:
            made.append(GraphedLoop(loop, CpuRecorder(), separate=separate))
            return made[-1]

        monkeypatch.setattr(loss_plan, "graphed_loop", graphed)
    return made


def gradients(loss: WorldModelLoss, total: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(total, list(loss.parameters()), allow_unused=True))


@pytest.mark.parametrize("size", [(5,), (3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_replays_give_eagers_losses_and_gradients(
    reduction: str, size: tuple[int, ...], graphs: list[GraphedLoop]
) -> None:
    loss = full_loss(reduction=reduction, done_loss="binary_cross_entropy_with_logits")
    for seed in range(3):
        assert_parity(loss, full_batch(*size, seed=seed))
    with torch.no_grad():
        for seed in range(2):
            assert_parity(loss, full_batch(*size, seed=seed))
    assert [len(g.graphs) for g in graphs] == [1, 1]


def test_masks_and_latents_of_parts() -> None:
    torch.manual_seed(0)
    loss = WorldModelLoss(Latents(), losses=["latent", "reward"])
    for seed in range(2):
        batch = make_batch(3, 4, seed=seed)
        batch["collector", "mask"] = torch.rand(3, 4, 1) < 0.5
        assert_parity(loss, batch)


def test_a_batch_that_takes_gradients() -> None:
    loss, source = full_loss(), torch.randn(5, 6, requires_grad=True)
    found = []
    for engine in ("captured", "captured", "eager"):
        batch = full_batch()
        batch["observation"] = source.exp()
        found.append(run(loss, batch, engine, [source, *loss.parameters()]))
    for got in found[:2]:
        assert_same(got, found[2])


def test_results_are_not_written_by_a_later_replay() -> None:
    loss = full_loss(reduction="none")
    with torch.no_grad(), backend("captured"):
        first = loss(full_batch(seed=1))
        kept = first.clone()
        second = loss(full_batch(seed=2))
    assert (first == kept).all()
    assert not (first == second).all()


def test_two_forwards_and_then_both_backwards() -> None:
    """In either order: the graph's memory holds the latest forward's activations alone."""
    loss, one, two = full_loss(), full_batch(seed=1), full_batch(seed=2)
    want = [run(loss, batch, "eager") for batch in (one, two)]
    for order in ((0, 1), (1, 0)):
        with backend("captured"):
            totals = [
                sum((i + 1.0) * v for i, v in enumerate(loss(batch).values()))
                for batch in (one, two)
            ]
        for i in order:
            bound = {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(gradients(loss, totals[i]), want[i][1], **bound)


def test_two_calls_summed_in_one_graph() -> None:
    loss, one, two = full_loss(), full_batch(seed=1), full_batch(seed=2)
    found = []
    for engine in ("captured", "eager"):
        with backend(engine):
            total = sum(loss(one).values()) - 2 * sum(loss(two).values())
        found.append(gradients(loss, total))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_two_losses_alive_at_once(graphs: list[GraphedLoop]) -> None:
    """Over one model, with other settings, and each with a backward still to come."""
    one = full_loss()
    two = full_loss(one.world_model, reward_loss="l1", latent_weight=3.0)
    batch = full_batch()
    want = [run(loss, batch, "eager") for loss in (one, two)]
    with backend("captured"):
        outs = [loss(batch) for loss in (one, two)]
    totals = [sum((i + 1.0) * v for i, v in enumerate(out.values())) for out in outs]
    for loss, total, (_, expected) in zip((two, one), totals[::-1], want[::-1], strict=True):
        torch.testing.assert_close(gradients(loss, total), expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2


def test_parameters_updated_in_place_and_moved_between_replays(graphs: list[GraphedLoop]) -> None:
    loss, net = gained()
    batch = full_batch()
    assert_parity(loss, batch)
    before = run(loss, batch, "captured")
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with backend("captured"):
            sum(loss(batch).values()).backward()
        optimizer.step()
        assert_parity(loss, batch)
    assert differs(before, run(loss, batch, "captured"))
    ((_, graph),) = graphs[0].graphs.values()
    net.linear.weight.data = net.linear.weight.data * 2
    assert_parity(loss, batch)
    assert graphs[0].graphs[1][1] is not graph
    assert cache_of(loss).traces == 1


def test_a_parameter_written_between_forward_and_backward_raises() -> None:
    loss, net = gained()
    with backend("captured"):
        total = sum(loss(full_batch()).values())
    with torch.no_grad():
        net.linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_backward_of_one_loss_trains_what_eagers_does() -> None:
    """No gradients of zeros for the heads of the others, and none of NaN where another loss is not finite."""
    batch = full_batch()
    batch["target_latent"][0] = torch.inf
    trained = []
    for engine in ("captured", "eager"):
        loss = full_loss()
        with backend(engine):
            out = loss(batch)
            assert not out["loss_latent"].isfinite()
            out["loss_reward"].backward()
        trained.append({n: p.grad for n, p in loss.named_parameters() if p.grad is not None})
    assert not any("done_head" in name for name in trained[0])
    assert all(g.isfinite().all() for g in trained[0].values())
    torch.testing.assert_close(*trained)


def test_gradients_of_gradients() -> None:
    found = []
    for engine in ("captured", "eager"):
        loss = full_loss()
        source = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        batch = full_batch()
        # Hangs on a parameter, which must not be counted twice.
        batch["observation"] = source * loss.world_model.reward_head.module.bias.exp()
        with backend(engine):
            total = sum(loss(batch).values())
        wrt = [source, *loss.parameters()]
        first = torch.autograd.grad(total, wrt, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wrt, allow_unused=True)
        found.append([*first, *second])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [False, True], ids=["all losses", "one loss"])
def test_draws_follow_the_seed_and_a_late_backward_has_its_own(part: bool) -> None:
    loss, _ = gained(Dropped())
    batch = full_batch(64)
    totals = []
    torch.manual_seed(3)
    with backend("captured"):
        for _ in range(2):
            out = loss(batch)
            totals.append(out["loss_reward"] if part else sum(out.values()))
    state = torch.get_rng_state()
    found = [gradients(loss, total) for total in totals]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    with backend("eager"):
        for got, total in zip(found, totals, strict=True):
            out = loss(batch)
            want = out["loss_reward"] if part else sum(out.values())
            torch.testing.assert_close(total, want)
            torch.testing.assert_close(gradients(loss, want), got, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_after_a_failed_capture_the_trace_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def record(self: Any, work: Any, warmups: int) -> Any:
        tried.append(torch.rand(1))  # a warm-up that draws, before memory runs out
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(CpuRecorder, "record", record)
    loss, _ = gained(Dropped())
    batch = full_batch()
    for _ in range(2):
        assert_parity(loss, batch)
    assert len(tried) == 1
    ((plan,),) = cache_of(loss).plans.values()
    assert plan.graphed is not None
    assert "out of memory" in plan.graphed.failed[1]


def test_graphs_kept_are_bounded(graphs: list[GraphedLoop]) -> None:
    loss = full_loss()
    with backend("captured"):
        kept = loss(full_batch(1))
        for size in range(2, 14):
            loss(full_batch(size))
    assert sum(len(g.graphs) for g in graphs) <= loss_plan._GRAPHS
    sum(kept.values()).backward()  # of a graph that was let go
    assert_parity(loss, full_batch(1))


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("engine", ["captured", "auto"])
def test_parity_on_the_gpu(engine: str, reduction: str) -> None:
    loss = full_loss(reduction=reduction).to("cuda")
    with backend(engine):
        assert "CUDA graph" in str(loss.explain(full_batch(16).to("cuda")).engine)
    for seed in range(3):
        batch = full_batch(16, seed=seed).to("cuda")
        assert_same(run(loss, batch, engine), run(loss, batch, "eager"))
    ((plan,),) = cache_of(loss).plans.values()
    assert plan.uncaptured() == ""
