"""`WorldModelLoss` on the captured engine: eager's values and gradients, and nothing goes unseen that eager
would see."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule as Mod
from torch import Tensor, nn
from torchrl.envs.utils import set_exploration_type
from torchrl.modules.tensordict_module.rnn import set_recurrent_mode

from fastwm.backends import backend
from fastwm.loss import WorldModelLoss
from fastwm.loss_plan import cache_of
from tests.loss_engines import (
    LOGITS,
    Dropped,
    assert_parity,
    assert_same,
    differs,
    full_batch,
    full_loss,
    gained,
    run,
    why_not_captured,
)
from tests.loss_models import (
    ALL,
    LATENT,
    NEXT_REWARD,
    OBS,
    Latents,
    make_batch,
    make_model,
)

# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("size", [(5,), (1,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_parity(distance: str, reduction: str, size: tuple[int, ...]) -> None:
    distances = {f"{name}_loss": distance for name in ALL if name != "done"}
    loss = full_loss(reduction=reduction, done_loss=LOGITS, latent_weight=0.3, **distances)
    for seed in range(3):
        assert_parity(loss, full_batch(*size, seed=seed))
    assert cache_of(loss).traces == 1
    with torch.no_grad():
        assert_parity(loss, full_batch(*size))
    assert cache_of(loss).traces == 2


@pytest.mark.parametrize("mask", ["steps", "column", "nothing counts", "two"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parity_with_masks(reduction: str, mask: str) -> None:
    loss = full_loss(reduction=reduction)
    for seed in range(2):
        batch = full_batch(3, 4, seed=seed)
        counts = torch.rand(3, 4) < (-1 if mask == "nothing counts" else 0.5)
        batch["collector", "mask"] = counts if mask == "steps" else counts[..., None]
        if mask == "two":
            batch["shifted_valid"] = torch.rand(3, 4) < 0.5
        batch[NEXT_REWARD][~counts] = 1e3
        assert_parity(loss, batch)
    assert cache_of(loss).traces == 1


def test_gradients_reach_a_batch_that_hangs_on_a_graph() -> None:
    loss, source = full_loss(), torch.randn(5, OBS, requires_grad=True)
    batch = full_batch()
    found = []
    for engine in ("captured", "captured", "eager"):
        batch["observation"] = source.exp()
        found.append(run(loss, batch, engine, [source, *loss.parameters()]))
    for got in found[:2]:
        assert_same(got, found[2])


def test_a_batch_that_is_not_contiguous() -> None:
    loss, batch = full_loss(), full_batch(4, 6)
    assert_parity(loss, batch[:, 1:4])
    assert_parity(loss, batch.transpose(0, 1))


def test_each_loss_trains_what_eagers_does() -> None:
    """No gradient, and not one of zeros, for the heads of the others."""
    loss, batch = full_loss(), full_batch()
    trained = []
    for engine in ("captured", "eager"):
        loss.zero_grad()
        with backend(engine):
            loss(batch)["loss_reward"].backward()
        trained.append({n for n, p in loss.named_parameters() if p.grad is not None})
    assert trained[0] == trained[1]
    assert not any("done_head" in name for name in trained[0])


def test_second_derivatives() -> None:
    loss, batch = full_loss(), full_batch()
    parameters = [*loss.world_model.reward_head.parameters()]
    results = []
    for engine in ("captured", "eager"):
        with backend(engine):
            out = loss(batch)["loss_reward"]
        first = torch.autograd.grad(out, parameters, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), parameters)
        results.append([*first, *second])
    torch.testing.assert_close(*results)


def test_two_calls_in_one_graph() -> None:
    loss, one, two = full_loss(), full_batch(seed=1), full_batch(seed=2)
    found = []
    for engine in ("captured", "eager"):
        loss.zero_grad()
        with backend(engine):
            total = sum(loss(one).values()) - 2 * sum(loss(two).values())
        total.backward()
        found.append([p.grad.clone() for p in loss.parameters()])
    torch.testing.assert_close(*found)


def test_training_ends_at_eagers_weights() -> None:
    ends = []
    for engine in ("captured", "eager"):
        loss, batch = full_loss(), full_batch(16)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for _ in range(6):
            optimizer.zero_grad()
            with backend(engine):
                sum(loss(batch).values()).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in loss.parameters()])
        assert engine == "eager" or cache_of(loss).traces == 1
    torch.testing.assert_close(*ends)


def test_the_batch_is_left_as_it_was_and_results_are_the_callers() -> None:
    loss, batch = full_loss(reduction="none"), full_batch(3, 4).lock_()
    before = batch.clone()
    with backend("captured"):
        first = loss(batch)
        kept = first.clone()
        loss(full_batch(3, 4, seed=5))
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))
    assert (first == kept).all()
    assert first.batch_size == (3, 4)


def test_a_loss_that_hands_back_what_it_read_hands_back_a_copy() -> None:
    """A reduction of the user's own may return a parameter, or the same tensor for two losses."""
    shared = nn.Parameter(torch.ones(()))

    class Own(WorldModelLoss):
        def _reduce_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return shared

    loss = Own(make_model("done"), losses=["reward", "done"], reward_weight=1, done_weight=1)
    loss._weight = lambda pair: _One()  # type: ignore[method-assign]
    with backend("captured"):
        out = loss(make_batch())
    places = {v.data_ptr() for v in (*out.values(), shared)}
    assert len(places) == 3
    assert all(v == 1 for v in out.values())


class _One:
    def __mul__(self, other: Tensor) -> Tensor:
        return other


def test_dispatch_by_name_and_selected_keys() -> None:
    loss, batch = WorldModelLoss(make_model("done"), losses=["reward", "done"]), make_batch()
    named = {
        "observation": batch["observation"],
        "action": batch["action"],
        "next_reward": batch["next", "reward"],
        "next_done": batch["next", "done"],
    }
    with backend("captured"):
        reward, done = loss(**named)
        out = loss(batch)
        assert (reward, done) == (out["loss_reward"], out["loss_done"])
        loss.select_out_keys("loss_done")
        assert list(loss(batch).keys()) == ["loss_done"]
        assert loss(**named) == done


def test_draws_are_eagers() -> None:
    model = make_model(extra={"encoder": Mod(Dropped(), ["observation"], ["latent"])})
    loss, batch = WorldModelLoss(model), make_batch(64)
    states = []
    for engine in ("captured", "captured", "eager"):
        got = run(loss, batch, engine, seed=7)
        states.append((got, torch.get_rng_state()))
    for got, state in states[:2]:
        assert_same(got, states[2][0])
        assert torch.equal(state, states[2][1])


def test_entries_that_no_loss_reads_do_not_matter_to_the_engine() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    batch["index"] = torch.arange(5)
    batch["empty"] = TensorDict({}, [5])
    assert_parity(loss, batch)
    ((plan,),) = cache_of(loss).plans.values()
    assert set(plan.loop.inputs) == {("observation",), ("action",), NEXT_REWARD}


# ---------------------------------------------------------------- what is handed on, and errors


def refused(
    loss: WorldModelLoss, batch: TensorDictBase, why: str, expected: TensorDictBase | None = None
) -> None:
    """By name an error that says why; with "auto" eager's result."""
    with backend("captured"):
        with pytest.raises(RuntimeError, match=f"'captured' was asked for.*{why}"):
            loss(batch)
        assert loss.explain(batch).engine is None
    assert why in why_not_captured(loss, batch)
    assert loss.explain(batch).engine in ("fused", "eager")
    with backend("eager"):
        want = loss(batch) if expected is None else expected
    torch.testing.assert_close(loss(batch).to_dict(), want.to_dict())


def test_explain() -> None:
    loss, batch = full_loss(), full_batch()
    state = torch.get_rng_state()
    found = loss.explain(batch)
    assert found.engine == "captured"
    assert not found.passed_over
    assert "addmm" in found.program
    assert "def run" in found.source
    for name, engine in {"captured": "captured", "fused": "fused", "eager": "eager"}.items():
        with backend(name):
            assert loss.explain(batch).engine == engine
    loss.reduction = "none"
    assert "reduction='none'" in loss.explain(batch).note
    with backend("fused"):
        assert loss.explain(batch).engine is None
        assert "reduction='none'" in loss.explain(batch).passed_over["fused"]
    assert torch.equal(state, torch.get_rng_state())


def test_what_holds_no_plain_tensors() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    refused(loss, TensorDict.lazy_stack([batch, batch]), "LazyStackedTensorDict")
    batch["info"] = NonTensorData("text", batch_size=[5])
    refused(loss, batch, "NonTensorData")


def test_no_losses() -> None:
    refused(WorldModelLoss(make_model(), losses=[]), make_batch(), "no losses")


def test_lazy_parameters_are_captured_once_they_are_there() -> None:
    model = make_model(extra={"encoder": Mod(nn.LazyLinear(LATENT), ["observation"], ["latent"])})
    loss = WorldModelLoss(model)
    assert "LazyLinear" in why_not_captured(copy.deepcopy(loss), make_batch())
    loss(make_batch())
    assert why_not_captured(loss, make_batch()) == ""
    assert_parity(loss, make_batch())


def test_a_model_that_reads_what_it_computes() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)

    model = make_model(extra={"encoder": Mod(Reads(OBS, LATENT), ["observation"], ["latent"])})
    loss, batch = WorldModelLoss(model), make_batch()
    refused(loss, batch, "Python reads a value")
    traces = cache_of(loss).traces
    batch["observation"].neg_()
    refused(loss, batch, "Python reads a value")
    assert cache_of(loss).traces == traces


def test_a_model_that_counts() -> None:
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    net = Counts(OBS, LATENT)
    model = make_model(extra={"encoder": Mod(net, ["observation"], ["latent"])})
    loss = WorldModelLoss(model)
    for i in range(1, 5):
        loss(make_batch())
        assert net.calls == i


def test_a_model_that_is_new_at_every_call_ends_on_the_other_engines() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    for _ in range(40):
        loss.world_model = make_model()
        loss(batch)
    assert cache_of(loss).traces < 20
    assert "never used twice" in why_not_captured(loss, batch)


@pytest.mark.parametrize("engine", ["captured", "auto"])
def test_errors_are_eagers(engine: str) -> None:
    good, loss = full_batch(), full_loss(done_loss="binary_cross_entropy")
    with backend(engine):
        for _ in range(2):
            loss(good)
            lacking = full_batch().exclude(NEXT_REWARD)
            with pytest.raises(KeyError, match=r"'reward' loss needs \('next', 'reward'\)"):
                loss(lacking)
            other = full_batch()
            other["target_latent"] = torch.randn(5, 1)
            with pytest.raises(RuntimeError, match=r"\(5, 4\).*'target_latent'.*\(5, 1\)"):
                loss(other)
            loss.world_model.done_head.module.fn = lambda x: x + 3
            with pytest.raises(RuntimeError, match=r"\('next', 'done'\) as probabilities"):
                loss(good)
            loss.world_model.done_head.module.fn = torch.sigmoid
        loss.reward_loss = "l3"
        with pytest.raises(ValueError, match="'l3' for reward_loss"):
            loss(good)
        with pytest.raises(ValueError, match="'l3' for reward_loss"):
            loss.explain(good)


def test_probabilities_are_checked_at_every_call() -> None:
    """The check is part of the plan: the very values that it was made for may leave [0, 1]."""
    head = Mod(lambda x: x, ["p"], [("next", "done")])
    model = make_model(extra={"done_head": head})
    loss = WorldModelLoss(model, losses=["done"], done_loss="binary_cross_entropy")
    batch = make_batch()
    batch["p"] = torch.rand(5, 1)
    assert_parity(loss, batch)
    batch["p"][2] = 1.5
    for engine in ("captured", "auto"):
        with backend(engine), pytest.raises(RuntimeError, match=r"values from .* to 1.5"):
            loss(batch)
    batch["p"][2] = torch.nan
    assert run(loss, batch, "captured")[0]["loss_done"].isnan()
    assert cache_of(loss).traces == 1


def test_a_check_that_fails_leaves_the_generator_where_eager_does() -> None:
    loss, _ = gained(Dropped())
    loss.done_loss = "binary_cross_entropy"
    loss.world_model.done_head.module.fn = lambda x: x.detach() * 0 + p
    p, batch = torch.full((4, 1), 0.5), full_batch(4)
    assert_parity(loss, batch)
    p[0] = 2.0
    states = []
    for engine in ("captured", "auto", "eager"):
        torch.manual_seed(5)
        with backend(engine), pytest.raises(RuntimeError, match="as probabilities"):
            loss(batch)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[2])
    assert torch.equal(states[1], states[2])
    assert cache_of(loss).traces == 1


# ---------------------------------------------------------------- plans


def test_kinds_of_batch_have_plans_of_their_own() -> None:
    loss = full_loss()
    for size in [(4,), (5,), (2, 3), (4,), (5,), (2, 3)]:
        assert_parity(loss, full_batch(*size))
    assert cache_of(loss).traces == 3
    loss.double()
    batch = full_batch().apply(lambda x: x.double() if x.is_floating_point() else x)
    assert_parity(loss, batch)
    assert run(loss, batch, "captured")[0]["loss_reward"].dtype is torch.float64


def test_train_and_eval_in_turns_are_traced_once_each() -> None:
    loss, _ = gained(Dropped())
    for mode in (True, False, True, False, True):
        loss.train(mode)
        assert_parity(loss, full_batch())
    assert cache_of(loss).traces == 2


def test_a_loss_and_its_plans_go_when_nobody_holds_them() -> None:
    loss = full_loss()
    loss(full_batch())
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_copies_make_their_own_plans() -> None:
    loss, batch = full_loss(), full_batch()
    want = run(loss, batch, "captured")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(WorldModelLoss(Latents())))):
        twin.backend = "captured"
        twin(batch)
        assert cache_of(twin) is not cache_of(loss)
    twin = copy.deepcopy(loss)
    assert not differs(run(twin, batch, "captured"), want)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert_parity(twin, batch)
    assert not differs(run(loss, batch, "captured"), want)
    assert not any("_plans" in key for key in loss.state_dict())


def test_threads_share_a_loss() -> None:
    loss = full_loss()
    batches = {size: full_batch(size) for size in (2, 3, 4)}
    want = {size: run(loss, batch, "eager")[0] for size, batch in batches.items()}
    problems: list[BaseException] = []

    def work(size: int) -> None:
        try:
            for _ in range(5):
                with backend("captured"):
                    out = loss(batches[size])
                assert_same((dict(out.detach().items()), []), (want[size], []))
        except BaseException as problem:
            problems.append(problem)

    workers = [threading.Thread(target=work, args=(size,)) for size in batches]
    # torchrl's losses set these for the whole process, and threads would leave them set.
    with set_exploration_type(loss.deterministic_sampling_mode), set_recurrent_mode(True):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not problems, problems
    assert cache_of(loss).traces == 3
