"""`WorldModelLoss`: torchrl's values, and what torchrl 0.14.1's class does not do."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchrl
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.modules import WorldModel as TorchRLWorldModel
from torchrl.objectives import LossModule
from torchrl.objectives.world_model_loss import WorldModelLoss as TorchRLLoss

from fastwm.backends import backend
from fastwm.loss import WorldModelLoss
from fastwm.ops import CpuLibrary, cpu_library
from fastwm.tolerances import tolerance
from fastwm.world_model import WorldModel
from tests.loss_models import (
    ALL,
    CASES,
    LATENT,
    NEXT_LATENT,
    NEXT_REWARD,
    OBS,
    RECON,
    Concat,
    Latents,
    build,
    case_nested_keys,
    case_time,
    make_batch,
    make_model,
)

# The check passes here and fails on torchrl 0.14.1, which is what makes it an improvement.
_FAULTY = torchrl.__version__.startswith("0.14.1")
improvement = pytest.mark.parametrize(
    "cls",
    [
        pytest.param(WorldModelLoss, id="fastwm"),
        pytest.param(
            TorchRLLoss,
            id="torchrl",
            marks=pytest.mark.xfail(strict=True, reason="a fault of torchrl 0.14.1")
            if _FAULTY
            else pytest.mark.skip(reason=f"torchrl is {torchrl.__version__}, not 0.14.1"),
        ),
    ],
)


# ---------------------------------------------------------------- torchrl's values


@pytest.mark.parametrize("engine", ["eager", "fused", "captured"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("case", CASES)
def test_same_values_and_gradients_as_torchrl(case: str, distance: str, engine: str) -> None:
    if engine == "fused" and not cpu_library().loaded:
        pytest.skip(cpu_library().reason)
    if engine == "captured" and case in ("lazy_stack", "no_losses"):
        engine = "auto"  # captured does not take them
    model, batch, kwargs = CASES[case]()
    kwargs.update({f"{name}_loss": distance for name in ALL})
    results = []
    for cls in (TorchRLLoss, WorldModelLoss):
        model.zero_grad()
        with backend(engine):
            out = build(cls, model, kwargs)(batch)
        total = sum(out.values(True, True))
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        results.append((out, grads))
    (expected, expected_grads), (got, got_grads) = results
    assert list(got.keys(True, True)) == list(expected.keys(True, True))
    assert got.batch_size == expected.batch_size == torch.Size([])
    dtype = torch.float64 if case == "float64" else torch.float32
    for what, a, b in (
        ("loss", got.to_dict(), expected.to_dict()),
        ("loss.gradient", got_grads, expected_grads),
    ):
        # Eager runs the same ops in the same order: not close, equal. (The done loss is float32.)
        bound = tolerance(what, torch.float32 if what == "loss" else dtype).kwargs()
        exact = {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(a, b, equal_nan=True, **(exact if engine == "eager" else bound))
    if case not in ("no_losses", "bool_head"):
        assert any(g is not None for g in got_grads.values())


@pytest.mark.parametrize("model_cls", [WorldModel, TorchRLWorldModel])
def test_takes_either_world_model_and_shares_checkpoints(model_cls: type) -> None:
    batch = make_batch()
    theirs = TorchRLLoss(make_model("done", cls=TorchRLWorldModel, seed=5))
    ours = WorldModelLoss(make_model("done", cls=model_cls, seed=6))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours(batch)["loss_reward"] != theirs(batch)["loss_reward"]
    ours.load_state_dict(theirs.state_dict())
    assert ours(batch)["loss_reward"] == theirs(batch)["loss_reward"]


def test_defaults_are_torchrls() -> None:
    ours, theirs = WorldModelLoss(make_model()), TorchRLLoss(make_model())
    for name in [f"{n}_{what}" for n in ALL for what in ("loss", "weight")] + ["losses"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert vars(ours.tensor_keys) == vars(theirs.tensor_keys)
    assert ours.reduction == "mean"
    assert isinstance(ours, LossModule)


def test_takes_the_batch_by_the_name_tensordict() -> None:
    loss, batch = WorldModelLoss(make_model()), make_batch()
    assert loss(tensordict=batch)["loss_reward"] == loss(batch)["loss_reward"]


def test_world_model_finds_the_truth_at_the_true_keys() -> None:
    seen: list[Any] = []

    class Spy(TensorDictModuleBase):
        in_keys = ("observation",)
        out_keys = (NEXT_REWARD, ("next", "done"))

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            seen.append(set(td["next"].keys()))
            td["next"].update({"reward": torch.zeros(5, 1), "done": torch.zeros(5, 1)})
            return td

    WorldModelLoss(Spy(), losses=["reward", "done"])(make_batch())
    assert seen == [{"observation", "true_reward", "true_done", "true_terminated"}]


# ---------------------------------------------------------------- reduction


@improvement
def test_reductions(cls: type) -> None:
    model, batch, kwargs = case_time()
    none = build(cls, model, {**kwargs, "reduction": "none", "done_weight": 3.0})(batch)
    total = build(cls, model, {**kwargs, "reduction": "sum", "done_weight": 3.0})(batch)
    mean = build(cls, model, {**kwargs, "reduction": "mean", "done_weight": 3.0})(batch)
    assert none.batch_size == (3, 4)
    assert total.batch_size == mean.batch_size == ()
    widths = {"reward": 1, "done": 1, "reconstruction": OBS, "latent": LATENT}
    assert list(none.keys()) == [f"loss_{name}" for name in widths]
    for name, width in widths.items():
        elements = none[f"loss_{name}"]
        assert elements.shape == (3, 4, width)
        torch.testing.assert_close(elements.sum(), total[f"loss_{name}"])
        torch.testing.assert_close(elements.mean(), mean[f"loss_{name}"])
    predicted = model(batch.copy())["next", "done"]
    expected = 3.0 * (predicted - batch["next", "done"].float()) ** 2
    torch.testing.assert_close(none["loss_done"], expected)


@improvement
def test_reduction_none_keeps_the_batch_size_of_the_input(cls: type) -> None:
    """Whatever its tensors look like: here time is no batch dim."""
    batch = make_batch(3, 4)
    batch = TensorDict(batch.to_dict(), batch_size=[3])
    assert batch["next"].batch_size == (3,)
    out = cls(make_model(), reduction="none")(batch)
    assert (out.batch_size, out["loss_reward"].shape) == ((3,), (3, 4, 1))


@improvement
def test_reduction_none_keeps_the_entries_of_a_latent_of_parts(cls: type) -> None:
    torch.manual_seed(0)
    loss = cls(Latents(), losses=["latent"], reduction="none")
    out = loss(make_batch(3, 4))["loss_latent"]
    assert out.batch_size == (3, 4)
    assert {k: v.shape for k, v in out.items()} == {"a": (3, 4, 2), "b": (3, 4, 3)}


@improvement
def test_marked_padding_does_not_count(cls: type) -> None:
    model = make_model("done", decoder=RECON)
    kwargs = {"losses": ["reward", "done", "reconstruction"]}
    whole = make_batch(3, 4)
    whole["collector", "mask"] = torch.ones(3, 4, 1, dtype=torch.bool)
    whole["collector", "mask"][:, 2:] = False
    whole["next", "reward"][:, 2:] = float("nan")
    got = cls(model, **kwargs)(whole)
    expected = cls(model, **kwargs)(make_batch(3, 4)[:, :2])
    torch.testing.assert_close(got.to_dict(), expected.to_dict())


def test_padding_of_a_slice_sampler_does_not_count() -> None:
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(6),
        sampler=SliceSampler(slice_len=4, end_key="end", pad_output=True, strict_length=False),
        batch_size=8,
    )
    steps = make_batch(6).exclude(("next", "observation"))
    steps["end"] = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool).unsqueeze(-1)
    buffer.extend(steps)
    sample = buffer.sample()
    mask = sample["collector", "mask"].reshape(-1)
    assert not mask.all()
    loss = WorldModelLoss(make_model())
    masked = loss(sample)["loss_reward"]
    torch.testing.assert_close(masked, loss(sample[mask])["loss_reward"])
    loss.loss_mask_key = None
    everything = loss(sample)["loss_reward"]
    theirs = TorchRLLoss(loss.world_model)(sample)["loss_reward"]
    torch.testing.assert_close(everything, theirs, **tolerance("loss", torch.float32).kwargs())
    assert (everything - masked).abs() > 1e-3


def test_reduction_none_is_zero_where_masked() -> None:
    batch = make_batch(3, 4)
    batch["collector", "mask"] = torch.ones(3, 4, 1, dtype=torch.bool)
    batch["collector", "mask"][1, 2] = False
    elements = WorldModelLoss(make_model(), reduction="none")(batch)["loss_reward"]
    assert elements.shape == (3, 4, 1)
    assert (elements == 0).nonzero().tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("reduction", ["average", "", True])
def test_unknown_reduction(reduction: Any) -> None:
    with pytest.raises(ValueError, match=r"Unknown reduction.*mean, sum, none"):
        WorldModelLoss(make_model(), reduction=reduction)


# ---------------------------------------------------------------- keys and dispatch


@improvement
def test_in_and_out_keys_follow_losses_and_model(cls: type) -> None:
    loss = cls(make_model("done", decoder=RECON), losses=["done", "reward"])
    base = ["observation", "action"]
    assert loss.in_keys == [*base, NEXT_REWARD, ("next", "done")]
    assert loss.out_keys == ["loss_reward", "loss_done"]
    loss = cls(make_model("terminated"), losses=["done"])
    assert loss.in_keys == [*base, ("next", "terminated")]
    loss = cls(make_model(decoder=RECON), losses=["reconstruction"])
    assert loss.in_keys == base
    assert loss.out_keys == ["loss_reconstruction"]
    # Without a decoder, the reconstruction too must come with the batch.
    assert cls(make_model(), losses=["reconstruction"]).in_keys == [*base, RECON]
    loss = cls(make_model(), losses=["latent"])
    loss.set_keys(predicted_latent=NEXT_LATENT, target_latent=("next", "encoded"))
    assert loss.in_keys == [*base, ("next", "encoded")]
    loss.losses.append("reward")
    assert loss.in_keys == [*base, NEXT_REWARD, ("next", "encoded")]
    assert loss.out_keys == ["loss_reward", "loss_latent"]
    # A target of several parts that the model itself writes is no input.
    assert cls(Latents(), losses=["latent"]).in_keys == base


@improvement
def test_in_keys_follow_set_keys(cls: type) -> None:
    loss = cls(make_model("done"), losses=["reward", "done"])
    loss.set_keys(reward=("agents", "gain"), done="end")
    assert loss.in_keys == ["observation", "action", ("next", "agents", "gain"), ("next", "end")]
    loss.set_keys(reward=None)
    assert NEXT_REWARD in loss.in_keys
    loss.in_keys = ["mine"]
    assert loss.in_keys == ["mine"]
    loss.set_keys(done=None)
    assert loss.in_keys == ["observation", "action", NEXT_REWARD, ("next", "done")]


@improvement
def test_in_keys_of_a_model_that_declares_none(cls: type) -> None:
    class Plain(nn.Module):
        def forward(self, td: TensorDictBase) -> TensorDictBase:
            return make_model(decoder=RECON)(td)

    loss = cls(Plain(), losses=["reward", "reconstruction"])
    assert loss.in_keys == [NEXT_REWARD, "observation"]
    assert loss(make_batch()).keys() == {"loss_reward", "loss_reconstruction"}


@improvement
def test_keyword_dispatch(cls: type) -> None:
    batch = make_batch(5)
    loss = cls(make_model("done"), losses=["done", "reward"])
    expected = loss(batch)
    named = {
        "observation": batch["observation"],
        "action": batch["action"],
        "next_reward": batch["next", "reward"],
        "next_done": batch["next", "done"],
    }
    reward, done = loss(**named)
    assert (reward, done) == (expected["loss_reward"], expected["loss_done"])
    # By position, in the order of in_keys.
    reward, done = loss(*named.values())
    assert (reward, done) == (expected["loss_reward"], expected["loss_done"])
    with pytest.raises(TypeError, match="next_rewards"):
        loss(**named, next_rewards=named["next_reward"])


@improvement
def test_keyword_dispatch_with_one_output_and_no_reduction(cls: type) -> None:
    batch = make_batch(5, 3)
    loss = cls(make_model(), reduction="none")
    out = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_reward=batch["next", "reward"],
    )
    torch.testing.assert_close(out, loss(batch)["loss_reward"], rtol=0, atol=0)


@improvement
def test_keyword_dispatch_of_inputs_with_one_feature(cls: type) -> None:
    """Nothing tells a feature dim of size 1 from a batch dim, but the shape of the latent does."""
    seen = []

    class Encoder(TensorDictModuleBase):
        in_keys = ("observation",)
        out_keys = ("latent",)

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            seen.append((td.batch_size, td["next"].batch_size))
            return td.set("latent", td["observation"].expand(*td.batch_size, LATENT))

    dynamics = Mod(Concat(LATENT + 1, LATENT), ["latent", "action"], [NEXT_LATENT])
    loss = cls(make_model(extra={"encoder": Encoder(), "dynamics": dynamics}))
    obs, action, reward = torch.randn(3, 5, 4, 1).unbind()
    batch = TensorDict(
        {"observation": obs, "action": action, "next": {"reward": reward}}, batch_size=[5, 4]
    )
    out = loss(observation=obs, action=action, next_reward=reward)
    assert out == loss(batch)["loss_reward"]
    assert seen == [((5, 4), (5, 4))] * 2


@improvement
def test_keyword_dispatch_follows_set_keys(cls: type) -> None:
    model, batch, kwargs = case_nested_keys()
    loss = build(cls, model, kwargs)
    out = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_agents_gain=batch["next", "agents", "gain"],
    )
    assert out == loss(batch)["loss_reward"]


@improvement
def test_select_out_keys(cls: type) -> None:
    batch = make_batch()
    loss = cls(make_model("done"), losses=["reward", "done"])
    everything = loss(batch)
    named = {
        "observation": batch["observation"],
        "action": batch["action"],
        "next_reward": batch["next", "reward"],
        "next_done": batch["next", "done"],
    }
    assert loss.select_out_keys("loss_done") is loss
    assert loss.out_keys == ["loss_done"]
    assert loss.out_keys_source == ["loss_reward", "loss_done"]
    assert list(loss(batch).keys()) == ["loss_done"]
    assert loss(**named) == everything["loss_done"]
    loss.reset_out_keys()
    assert loss.out_keys == ["loss_reward", "loss_done"]
    loss.losses.append("reconstruction")
    assert loss.out_keys == ["loss_reward", "loss_done", "loss_reconstruction"]


@improvement
def test_out_keys_can_be_assigned(cls: type) -> None:
    batch = make_batch()
    loss = cls(make_model("done"), losses=["reward", "done"])
    loss.out_keys = ["loss_done", "loss_reward"]
    done, reward = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_reward=batch["next", "reward"],
        next_done=batch["next", "done"],
    )
    assert (reward, done) == (loss(batch)["loss_reward"], loss(batch)["loss_done"])


def test_set_keys_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="rewards is not an accepted tensordict key"):
        WorldModelLoss(make_model()).set_keys(rewards="r")


# ---------------------------------------------------------------- the done loss


@improvement
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_head_that_emits_only_terminated(cls: type, distance: str) -> None:
    model, batch = make_model("terminated"), make_batch(64)
    assert (batch["next", "done"] != batch["next", "terminated"]).any()
    got = cls(model, losses=["done"], done_loss=distance)(batch)["loss_done"]
    predicted = model(batch.copy())["next", "terminated"]
    fn = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[distance]
    torch.testing.assert_close(got, fn(predicted, batch["next", "terminated"].float()))


@improvement
@pytest.mark.parametrize("flag", ["done", "terminated"])
def test_only_the_flag_that_is_compared_is_needed(cls: type, flag: str) -> None:
    batch = make_batch(64)
    other = {"done": "terminated", "terminated": "done"}[flag]
    model = make_model(flag)
    expected = (model(batch.copy())["next", flag] - batch["next", flag].float()).square().mean()
    batch.del_(("next", other))
    torch.testing.assert_close(cls(model, losses=["done"])(batch)["loss_done"], expected)


@improvement
@pytest.mark.parametrize("flag", ["done", "terminated"])
@pytest.mark.parametrize("logits", [False, True], ids=["probabilities", "logits"])
def test_binary_cross_entropy(cls: type, flag: str, logits: bool) -> None:
    squash = (lambda x: x) if logits else torch.sigmoid
    model, batch = make_model(flag, flag=squash), make_batch(3, 4)
    name = "binary_cross_entropy" + ("_with_logits" if logits else "")
    loss = cls(model, losses=["done"], done_loss=name)
    out = loss(batch)["loss_done"]
    predicted = model(batch.copy())["next", flag]
    probability = predicted.sigmoid() if logits else predicted
    true = batch["next", flag].float()
    by_hand = -(true * probability.log() + (1 - true) * (1 - probability).log()).mean()
    torch.testing.assert_close(out, by_hand)
    got = torch.autograd.grad(out, loss.world_model.done_head.parameters())
    want = torch.autograd.grad(by_hand, loss.world_model.done_head.parameters())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_binary_cross_entropy_at_certainty_is_finite(value: float) -> None:
    model = make_model("done", flag=lambda x: x * 0 + value)
    loss = WorldModelLoss(model, losses=["done"], done_loss="binary_cross_entropy")
    out = loss(make_batch(64))["loss_done"]
    out.backward()
    assert out.isfinite()
    assert all(p.grad.isfinite().all() for p in model.done_head.parameters())


def test_binary_cross_entropy_names_the_head_that_emits_no_probabilities() -> None:
    model = make_model("done", flag=lambda x: x + 3)
    loss = WorldModelLoss(model, losses=["done"], done_loss="binary_cross_entropy")
    with pytest.raises(RuntimeError, match=r"\('next', 'done'\).*with_logits"):
        loss(make_batch())


@pytest.mark.gpu
def test_binary_cross_entropy_on_cuda_neither_ends_the_context_nor_refuses_autocast() -> None:
    batch = make_batch().to("cuda")
    for flag in (torch.sigmoid, lambda x: x + 3):
        model = make_model("done", flag=flag).to("cuda")
        loss = WorldModelLoss(model, losses=["done"], done_loss="binary_cross_entropy")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = loss(batch)["loss_done"]
        torch.cuda.synchronize()
        assert out.isfinite() == (flag is torch.sigmoid)


@pytest.mark.parametrize(
    "distance", ["l2", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_nan_weights_give_nan(distance: str) -> None:
    model = make_model("done")
    with torch.no_grad():
        model.done_head.module.head.weight.fill_(float("nan"))
    loss = WorldModelLoss(model, losses=["reward", "done"], done_loss=distance)
    out = loss(make_batch())
    assert out["loss_done"].isnan()
    assert out["loss_reward"].isfinite()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_done_head_of_any_dtype(dtype: torch.dtype) -> None:
    model, batch = make_model("done", flag=lambda x: (x > 0).to(dtype)), make_batch(64)
    wrong = (model(batch.copy())["next", "done"].bool() != batch["next", "done"]).float().mean()
    torch.testing.assert_close(WorldModelLoss(model, losses=["done"])(batch)["loss_done"], wrong)


# ---------------------------------------------------------------- the input stays as it was


def snapshot(td: TensorDictBase) -> dict[Any, tuple[int, Tensor]]:
    return {k: (v.data_ptr(), v.clone()) for k, v in td.items(True, True)}


@pytest.mark.parametrize("kind", ["plain", "locked", "lazy", "nested next", "requires_grad"])
def test_input_is_left_as_it_was(kind: str) -> None:
    batch: TensorDictBase = make_batch(4)
    batch["target_latent"] = torch.randn(4, LATENT)
    kwargs: dict[str, Any] = {"losses": ALL, "keys": {"predicted_latent": NEXT_LATENT}}
    model = make_model("done", decoder=RECON)
    if kind == "locked":
        batch.lock_()
    elif kind == "lazy":
        batch = LazyStackedTensorDict.lazy_stack([batch.clone() for _ in range(3)], 0)
    elif kind == "nested next":
        batch["next", "agents", "gain"] = batch["next", "reward"].clone()
        model = make_model(
            extra={
                "reward_head": Mod(
                    nn.Linear(LATENT, 1), [NEXT_LATENT], [("next", "agents", "gain")]
                )
            }
        )
        kwargs = {"keys": {"reward": ("agents", "gain"), "true_reward": ("agents", "true")}}
    elif kind == "requires_grad":
        batch["observation"].requires_grad_()
    is_lazy = isinstance(batch, LazyStackedTensorDict)
    inner = list(batch.tensordicts) if is_lazy else [batch]
    nested = [td["next"] for td in inner]
    before = [snapshot(td) for td in inner]
    out = build(WorldModelLoss, model, kwargs)(batch)
    assert out["loss_reward"].isfinite()
    for td, sub, old in zip(inner, nested, before, strict=True):
        assert td["next"] is sub
        new = snapshot(td)
        assert list(new) == list(old)
        for key in old:
            assert new[key][0] == old[key][0], key
            assert torch.equal(new[key][1], old[key][1]), key
    assert batch.is_locked == (kind == "locked")


def test_a_batch_can_be_used_again_with_other_weights() -> None:
    model, batch = make_model("done"), make_batch()
    loss = WorldModelLoss(model, losses=["reward", "done"])
    first = loss(batch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    second = loss(batch)
    assert (first["loss_reward"] != second["loss_reward"]).all()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1)
    torch.testing.assert_close(loss(batch).to_dict(), first.to_dict())


def test_leftover_true_keys_in_the_batch_do_not_matter() -> None:
    batch = make_batch()
    loss = WorldModelLoss(make_model("done"), losses=["reward", "done"])
    expected = loss(batch)
    for key in ("true_reward", "true_done", "true_terminated"):
        batch["next", key] = torch.full((5, 1), 9.0)
    torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict(), rtol=0, atol=0)
    with pytest.raises(KeyError, match="true_done"):
        TorchRLLoss(loss.world_model, losses=["reward", "done"])(batch)


@improvement
def test_prediction_is_never_compared_with_itself(cls: type) -> None:
    """A decoder that writes over the observation, and a true key equal to the predicted one."""
    loss = cls(make_model("done", decoder="observation"), losses=["reward", "done"])
    loss.set_keys(true_reward="reward", true_done="done")
    batch = make_batch()
    expected = TorchRLLoss(loss.world_model, losses=["reward", "done"])(batch)
    torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict())
    loss = cls(make_model(decoder="observation"), losses=["reconstruction"])
    loss.set_keys(reconstructed_observation="observation")
    predicted = loss.world_model(batch.copy())["observation"]
    expected_loss = (predicted - batch["observation"]).square().mean()
    torch.testing.assert_close(loss(batch)["loss_reconstruction"], expected_loss)


def test_target_that_the_model_writes_is_read_after_it_ran() -> None:
    """Pixels that the encoder prepares: the decoder is held against what was prepared."""
    encoder = Mod(
        lambda x: (x[..., :LATENT], 2 * x), ["observation"], ["latent", "observation"]
    )  # fmt: skip
    model, batch = make_model(decoder=RECON, extra={"encoder": encoder}), make_batch()
    ours = WorldModelLoss(model, losses=["reconstruction"])(batch)["loss_reconstruction"]
    theirs = TorchRLLoss(model, losses=["reconstruction"])(batch)["loss_reconstruction"]
    assert ours == theirs


@improvement
def test_model_that_returns_only_its_predictions(cls: type) -> None:
    """`select_out_keys` and ``inplace=False`` modules: the targets are not in what comes back."""

    class Fresh(TensorDictModuleBase):
        in_keys = ("observation", "action")
        out_keys = (NEXT_REWARD, ("next", "done"), RECON)

        def __init__(self) -> None:
            super().__init__()
            self.model = make_model("done", decoder=RECON)

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            return self.model(td.copy()).select(*self.out_keys)

    losses = ["reward", "done", "reconstruction"]
    loss, batch = cls(Fresh(), losses=losses), make_batch()
    expected = TorchRLLoss(loss.world_model.model, losses=losses)(batch)
    with backend("eager"):
        torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- errors


MISSING = {
    "reward": (["reward"], ("next", "reward"), "next.*reward"),
    "done": (["done"], ("next", "done"), "next.*done"),
    "terminated": (["done"], ("next", "terminated"), "next.*terminated"),
    "target_latent": (["latent"], "target_latent", "target_latent"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_target_is_named(name: str) -> None:
    losses, key, pattern = MISSING[name]
    batch = make_batch()
    batch["target_latent"] = torch.randn(5, LATENT)
    batch.del_(key)
    model = make_model("terminated" if name == "terminated" else "done")
    loss = WorldModelLoss(model, losses=losses)
    loss.set_keys(predicted_latent=NEXT_LATENT)
    with pytest.raises(KeyError, match=f"{losses[0]}.*{pattern}.*input lacks.*observation"):
        loss(batch)


@pytest.mark.parametrize("name", ["reward", "done", "latent"])
def test_missing_target_is_found_before_the_model_runs(name: str) -> None:
    def ran(*_: Tensor) -> Tensor:
        raise AssertionError("the world model ran")

    model = make_model("done", extra={"encoder": Mod(ran, ["observation"], ["latent"])})
    loss = WorldModelLoss(model, losses=[name])
    # Under one key, the target of a latent is what the batch holds.
    loss.set_keys(predicted_latent=NEXT_LATENT, target_latent=NEXT_LATENT)
    batch = make_batch().exclude(("next", name))
    with pytest.raises(KeyError, match=rf"\('next', '{name}'\), which the input lacks"):
        loss(batch)


@improvement
def test_missing_prediction_is_named(cls: type) -> None:
    batch = make_batch()
    batch["target_latent"] = torch.randn(5, LATENT)
    for name, pattern in {
        "done": r"\('next', 'done'\) nor \('next', 'terminated'\)",
        "reconstruction": "reconstructed_observation",
        "latent": "predicted_latent",
    }.items():
        with pytest.raises(KeyError, match=f"world model wrote n.*{pattern}"):
            cls(make_model(), losses=[name])(batch)
    other = Mod(nn.Linear(LATENT, 1), [NEXT_LATENT], [("next", "gain")])
    with pytest.raises(KeyError, match=r"wrote no \('next', 'reward'\).*'gain'"):
        cls(make_model(extra={"reward_head": other}))(batch)
    # Also where the truth was never moved out of the way, its two keys being one.
    loss = cls(make_model(extra={"reward_head": other}))
    loss.set_keys(true_reward="reward")
    with pytest.raises(KeyError, match=r"wrote no \('next', 'reward'\)"):
        loss(batch)


def test_missing_input_of_the_model_is_named() -> None:
    batch = make_batch()
    batch.del_("action")
    with pytest.raises(KeyError, match="action"):
        WorldModelLoss(make_model())(batch)


@improvement
def test_shapes_that_differ_are_named(cls: type) -> None:
    batch = make_batch(5)
    loss = cls(make_model("done"), losses=["reward", "done"])
    for key in (NEXT_REWARD, ("next", "done")):
        bad = batch.clone()
        bad[key] = bad[key].squeeze(-1)
        with pytest.raises(RuntimeError, match=rf"\('next', '{key[1]}'\).*\(5, 1\).*\(5,\)"):
            loss(bad)
    loss = cls(make_model(), losses=["latent"])
    loss.set_keys(predicted_latent=NEXT_LATENT, target_latent="target")
    batch["target"] = torch.randn(5, 1)
    with pytest.raises(RuntimeError, match=r"\('next', 'latent'\).*\(5, 4\).*'target'.*\(5, 1\)"):
        loss(batch)


@improvement
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_entries_of_a_latent_are_not_broadcast(cls: type) -> None:
    loss = cls(Latents(b=1), losses=["latent"])
    with pytest.raises(RuntimeError, match=r"'predicted_latent', 'b'.*\(5, 3\).*\(5, 1\)"):
        loss(make_batch())


def test_latents_with_other_entries_are_named() -> None:
    class Other(Latents):
        def forward(self, td: TensorDictBase) -> TensorDictBase:
            td = super().forward(td)
            td["target_latent", "c"] = td["target_latent", "a"]
            return td

    with pytest.raises(KeyError, match=r"predicted_latent.*target_latent.*'c'"):
        WorldModelLoss(Other(), losses=["latent"])(make_batch())


@improvement
@pytest.mark.parametrize("name", ALL)
def test_unknown_distance_is_refused_at_construction(cls: type, name: str) -> None:
    with pytest.raises(ValueError, match=f"'l3' for {name}_loss.*smooth_l1"):
        cls(make_model(), losses=[name], **{f"{name}_loss": "l3"})


@pytest.mark.parametrize("name", ["reward", "reconstruction", "latent"])
def test_only_the_done_loss_has_a_cross_entropy(name: str) -> None:
    with pytest.raises(ValueError, match=f"binary_cross_entropy.*{name}_loss"):
        WorldModelLoss(
            make_model(), losses=[name], **{f"{name}_loss": "binary_cross_entropy"}
        )  # fmt: skip


def test_settings_changed_later_are_checked() -> None:
    loss = WorldModelLoss(make_model())
    for name, value in {"reward_loss": "l3", "reduction": "all", "losses": ["rewards"]}.items():
        changed = copy.deepcopy(loss)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match="Unknown"):
            changed(make_batch())


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"Unknown loss type.*rewards"):
        WorldModelLoss(make_model(), losses=["rewards"])


# ---------------------------------------------------------------- backend


@pytest.fixture
def fused() -> None:
    if not cpu_library().loaded:
        pytest.skip(cpu_library().reason)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine of each call of the loss from here on."""
    seen: list[str] = []
    methods = {"fused": "_fused_values", "eager": "_eager_value", "captured": "_captured"}
    for name, method in methods.items():

        def spy(self: Any, *args: Any, name: str = name, was: Any = None) -> Any:
            before = list(seen)
            found = was(self, *args)
            if name == "captured":  # what it traced is none of the call's
                seen[:] = before if found is None else [*before, "captured"]
            elif name == "fused" or seen[-1:] != ["eager"]:
                seen.append(name)
            return found

        was = getattr(WorldModelLoss, method)
        monkeypatch.setattr(WorldModelLoss, method, functools.partialmethod(spy, was=was))
    return seen


def test_backends(monkeypatch: pytest.MonkeyPatch, fused: None, runs: list[str]) -> None:
    batch = make_batch()
    for name in ("auto", "captured", "fused", "eager"):
        WorldModelLoss(make_model(), backend=name)(batch)
        with backend(name):
            WorldModelLoss(make_model(), backend="eager")(batch)
        monkeypatch.setenv("FASTWM_BACKEND", name)
        WorldModelLoss(make_model())(batch)
        monkeypatch.delenv("FASTWM_BACKEND")
        engine = "captured" if name == "auto" else name
        assert runs == ([engine] if engine == "eager" else [engine] * 3), name
        runs.clear()
    with pytest.raises(ValueError, match="Unknown backend 'fastest'"):
        WorldModelLoss(make_model(), backend="fastest")


class OwnReduction(WorldModelLoss):
    def _reduce_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return loss.max()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: WorldModelLoss(make_model(), reduction="none"), "reduction='none'"),
        (lambda: OwnReduction(make_model()), "reduces in its own way"),
        (lambda: WorldModelLoss(make_model().bfloat16()), "a prediction of torch.bfloat16"),
        (lambda: WorldModelLoss(make_model().double()), "a target of torch.float32"),
        (
            lambda: WorldModelLoss(make_model(), reward_weight=torch.tensor(2.0)),
            "a weight is no number",
        ),
    ],
    ids=["none", "own reduction", "bfloat16", "mixed", "tensor weight"],
)
def test_what_the_fused_engine_does_not_take(
    make: Callable[[], WorldModelLoss], why: str, fused: None, runs: list[str]
) -> None:
    """Asked for it raises and says why; otherwise the elementwise code runs, traced."""
    loss, batch = make(), make_batch()
    dtype = next(loss.world_model.parameters()).dtype
    for key in ("observation", "action"):
        batch[key] = batch[key].to(dtype)
    if dtype == torch.bfloat16:
        batch[NEXT_REWARD] = batch[NEXT_REWARD].to(dtype)
    loss(batch)
    assert runs == ["captured"]
    with backend("fused"), pytest.raises(RuntimeError, match=f"'fused' was asked for.*{why}"):
        loss(batch)
    with backend("fused"):
        assert why in loss.explain(batch).passed_over["fused"]
    assert why in loss.explain(batch).note


def test_without_the_library_the_elementwise_code_runs(
    monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    library = CpuLibrary(None, False, "fastwm was installed without its C++ library")
    module = importlib.import_module("fastwm.ops.sub_losses")
    monkeypatch.setattr(module, "cpu_library", lambda: library)
    loss = WorldModelLoss(make_model())
    loss(make_batch())
    assert runs == ["captured"]
    assert "without its C++ library" in loss.explain(make_batch()).note
    with backend("fused"), pytest.raises(RuntimeError, match="without its C\\+\\+ library"):
        WorldModelLoss(make_model())(make_batch())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask", ["none", "steps", "column", "elements", "two", "nothing counts"])
@pytest.mark.parametrize(
    "distance", ["l1", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_fused_equals_eager(
    distance: str, mask: str, reduction: str, fused: None, nan_filled: None
) -> None:
    """Values and gradients, with every kind of mask."""
    logits = distance.endswith("logits")
    model = make_model("done", decoder=RECON, flag=(lambda x: x) if logits else torch.sigmoid)
    loss = WorldModelLoss(
        model, losses=ALL[:3], done_loss=distance, done_weight=3.0, reduction=reduction
    )
    batch = make_batch(3, 4)
    steps = torch.rand(3, 4) < 0.5
    if mask != "none":
        counts = torch.zeros(3, 4) > 0 if mask == "nothing counts" else steps
        batch["next", "reward"][~counts] = 1e6
        batch["mask"] = {
            "column": counts[..., None],
            "elements": counts[..., None, None],
        }.get(mask, counts)
        loss.loss_mask_key = "mask"
        if mask == "two":
            batch["other"] = counts | (torch.rand(3, 4) < 0.5)
            loss._loss_mask_keys = lambda: ("mask", "other")
    results = []
    for name in ("fused", "eager"):
        model.zero_grad()
        with backend(name):
            out = loss(batch)
        sum(out.values()).backward()
        results.append((out.to_dict(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (got, got_grads), (want, want_grads) = results
    assert all(x.isfinite() for x in want.values())
    torch.testing.assert_close(got, want, **tolerance("loss", torch.float32).kwargs())
    bound = tolerance("loss.gradient", torch.float32).kwargs()
    torch.testing.assert_close(got_grads, want_grads, **bound)


def test_fused_gradients_are_finite_where_what_does_not_count_is_not(fused: None) -> None:
    """Eager's are NaN: its mask comes after the square, whose derivative is 0 * NaN."""
    batch = make_batch(3, 4)
    batch["collector", "mask"] = torch.ones(3, 4, 1, dtype=torch.bool)
    batch["collector", "mask"][1, 2] = False
    batch[NEXT_REWARD][1, 2] = torch.nan
    model = make_model()
    with backend("fused"):
        WorldModelLoss(model)(batch)["loss_reward"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_each_fused_loss_trains_what_eagers_does(fused: None) -> None:
    """No gradient, and not one of zeros, for the heads of the others; a head of flags trains
    nothing."""
    batch, losses = make_batch(), ["reward", "done", "reconstruction"]
    for flag in (torch.sigmoid, lambda x: x > 0):
        model = make_model("done", decoder=RECON, flag=flag)
        trained = []
        for name in ("fused", "eager"):
            model.zero_grad()
            with backend(name):
                out = WorldModelLoss(model, losses=losses)(batch)
            out["loss_reward"].backward()
            trained.append((
                {n for n, p in model.named_parameters() if p.grad is not None},
                [x.requires_grad for x in out.values()],
            ))  # fmt: skip
        assert trained[0] == trained[1]
        assert not any(n.startswith(("done_head", "decoder")) for n in trained[0][0])


def test_fused_losses_can_be_differentiated_twice(fused: None) -> None:
    model, batch = make_model().double(), make_batch()
    batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    parameters = [*model.reward_head.parameters()]
    results = []
    for name in ("fused", "eager"):
        with backend(name):
            out = WorldModelLoss(model)(batch)["loss_reward"]
        first = torch.autograd.grad(out, parameters, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), parameters)
        results.append([*first, *second])
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------- as a module


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str, tmp_path: Any) -> None:
    loss = WorldModelLoss(
        make_model("done"), losses=["reward", "done"], reduction="sum", reward_weight=2.0
    )
    loss.set_keys(true_reward="kept")
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(loss))
    elif how == "deepcopy":
        twin = copy.deepcopy(loss)
    else:
        torch.save(loss, tmp_path / "loss.pt")
        twin = torch.load(tmp_path / "loss.pt", weights_only=False)
    batch = make_batch()
    assert twin(batch)["loss_reward"] == loss(batch)["loss_reward"]
    assert twin.tensor_keys.true_reward == "kept"
    assert twin.reduction == "sum"
    with torch.no_grad():
        twin.world_model.reward_head.module.bias.add_(1)
    assert twin(batch)["loss_reward"] != loss(batch)["loss_reward"]


def test_moves_with_its_model() -> None:
    loss = WorldModelLoss(make_model()).to(torch.float64)
    batch = make_batch().apply(lambda x: x.double() if x.is_floating_point() else x)
    assert loss(batch)["loss_reward"].dtype is torch.float64
    loss.to("meta")
    assert {p.device.type for p in loss.parameters()} == {"meta"}


def test_trains_its_model() -> None:
    model, batch = make_model("terminated", decoder=RECON), make_batch(32, 2)
    batch["target_latent"] = torch.randn(32, 2, LATENT).tanh()
    loss = WorldModelLoss(model, losses=ALL, done_loss="binary_cross_entropy")
    loss.set_keys(predicted_latent=NEXT_LATENT)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-2)
    first = loss(batch)
    for _ in range(60):
        optimizer.zero_grad()
        sum(loss(batch).values()).backward()
        optimizer.step()
    last = loss(batch)
    for key in loss.out_keys:
        assert last[key] < first[key], key


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction: str) -> None:
    loss = WorldModelLoss(make_model("done"), losses=["reward", "done"], reduction=reduction)
    batch = make_batch()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch).to_dict(), loss(batch).to_dict())
