"""`DreamerV3ModelLoss` against torchrl's, and DreamerV2's settings against the paper's formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.objectives import DreamerV3ModelLoss as TorchRLLoss

from fastwm.models import DreamerV3ModelLoss

BINS = 31


class Model(nn.Module):
    """Writes given predictions, multiplied by a parameter."""

    def __init__(self, predictions: TensorDictBase) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.predictions = predictions

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        assert tensordict.get(("next", "reward"), None) is None, "the target is within sight"
        said = self.predictions.apply(lambda x: x * self.factor)
        return tensordict.update({"next": said})


def predictions(event: tuple[int, ...] = (7,)) -> TensorDict:
    torch.manual_seed(0)
    values = {
        "prior_logits": torch.randn(3, 4, 5, 6),
        "posterior_logits": torch.randn(3, 4, 5, 6),
        "reco_pixels": torch.randn(3, 4, *event),
        "reward_logits": torch.randn(3, 4, BINS),
        "reward": torch.randn(3, 4, 1),
        "continue_pred": torch.randn(3, 4, 1),
    }
    return TensorDict(values, [3, 4])


def batch(event: tuple[int, ...] = (7,)) -> TensorDict:
    torch.manual_seed(1)
    values = {
        "pixels": 3 * torch.randn(3, 4, *event),
        "reward": 10 * torch.randn(3, 4, 1),
        "terminated": torch.rand(3, 4, 1) < 0.5,
    }
    return TensorDict({"next": TensorDict(values, [3, 4])}, [3, 4])


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_mode": "balanced"},
        {"kl_mode": "balanced", "kl_alpha": 0.5, "free_bits": 0.3, "reco_loss": "l1"},
        {"kl_mode": "separate", "unimix": 0.01},
        {"kl_mode": "separate", "free_bits": 1e3},
        {"kl_mode": "separate", "lambda_dynamic": 0.5, "lambda_representation": 2.0},
        {"reward_two_hot": False},
        {"global_average": True, "reco_symlog": False},
        {"lambda_kl": 2.0, "lambda_reco": 3.0, "lambda_reward": 4.0, "lambda_continue": 5.0},
        {"lambda_continue": 1.0, "continue_target_scale": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("event", [(7,), (3, 5, 5)], ids=str)
def test_values_and_gradients_are_torchrls(
    settings: dict[str, Any], event: tuple[int, ...]
) -> None:
    model = Model(predictions(event))
    found = []
    for make in (TorchRLLoss, DreamerV3ModelLoss):
        losses, _ = make(model, num_reward_bins=BINS, **settings)(batch(event))
        total = sum(x.sum() for x in losses.values())
        found.append((losses, torch.autograd.grad(total, model.factor)[0]))
    (want, want_gradient), (got, got_gradient) = found
    assert set(got.keys()) == set(want.keys())
    for key, value in got.items():
        torch.testing.assert_close(value, want[key].squeeze(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-5, atol=1e-5)


def test_images_of_integers_and_several_observations() -> None:
    said, true = predictions(), batch()
    said["reco_camera"] = torch.rand(3, 4, 3, 5, 5)
    true["next", "camera"] = torch.randint(256, (3, 4, 3, 5, 5), dtype=torch.uint8)
    found = []
    for make in (TorchRLLoss, DreamerV3ModelLoss):
        loss = make(Model(said), num_reward_bins=BINS, reco_symlog=[True, False])
        loss.set_keys(pixels=["pixels", "camera"], reco_pixels=["reco_pixels", "reco_camera"])
        found.append(loss(true)[0]["loss_model_reco"].squeeze())
    torch.testing.assert_close(*found)
    assert ("next", "camera") in loss.in_keys


def test_joint_is_the_sum_of_the_separate_terms() -> None:
    settings: dict[str, Any] = {"num_reward_bins": BINS, "unimix": 0.01, "free_bits": 0.5}
    model = Model(predictions())
    totals = []
    for mode in ("joint", "separate"):
        losses, _ = DreamerV3ModelLoss(model, kl_mode=mode, **settings)(batch())
        of_kl = [v for k, v in losses.items() if k not in ("loss_model_reco", "loss_model_reward")]
        totals.append((sum(of_kl), *torch.autograd.grad(sum(of_kl), model.factor)))
    for joint, separate in zip(*totals, strict=True):
        torch.testing.assert_close(joint, separate)


def test_dreamer_v2s_balance() -> None:
    """``alpha KL[sg(post) || prior] + (1 - alpha) KL[post || sg(prior)]``: the paper's algorithm 2."""
    said = predictions()
    prior = said["prior_logits"].clone().requires_grad_()
    posterior = said["posterior_logits"].clone().requires_grad_()
    said["prior_logits"], said["posterior_logits"] = prior, posterior
    loss = DreamerV3ModelLoss(
        Model(said), kl_mode="joint", lambda_kl=0.1, lambda_dynamic=0.8, lambda_representation=0.2,
        free_bits=0.0, num_reward_bins=BINS,
    )  # fmt: skip
    got, _ = loss(batch())

    def divergence(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1)).mean()

    want = 0.1 * (
        0.8 * divergence(posterior.detach(), prior) + 0.2 * divergence(posterior, prior.detach())
    )
    torch.testing.assert_close(got["loss_model_kl"], want)
    gradients = [
        torch.autograd.grad(value, [prior, posterior]) for value in (got["loss_model_kl"], want)
    ]
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w)


def test_a_plain_reward() -> None:
    said, true = predictions(), batch()
    loss = DreamerV3ModelLoss(
        Model(said), reward_two_hot=False, reward_symlog=False, num_reward_bins=BINS
    )
    want = (said["reward"] - true["next", "reward"]).square().mean()
    torch.testing.assert_close(loss(true)[0]["loss_model_reward"], want)


class TestBadInput:
    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="Unknown kl_mode 'both'"):
            DreamerV3ModelLoss(Model(predictions()), kl_mode="both")
        with pytest.raises(ValueError, match="Unknown reco_loss 'l3'"):
            DreamerV3ModelLoss(Model(predictions()), reco_loss="l3")

    def test_other_bins(self) -> None:
        with pytest.raises(ValueError, match=r"reward_logits.* has 31 bins, .* for 255"):
            DreamerV3ModelLoss(Model(predictions()))(batch())

    def test_lists_of_other_lengths(self) -> None:
        loss = DreamerV3ModelLoss(Model(predictions()), num_reward_bins=BINS)
        loss.set_keys(pixels=["pixels", "camera"])
        with pytest.raises(ValueError, match="of 2, 1 and 2"):
            loss(batch())

    def test_what_is_missing(self) -> None:
        true = batch()
        del true["next", "terminated"]
        loss = DreamerV3ModelLoss(Model(predictions()), num_reward_bins=BINS, lambda_continue=1.0)
        with pytest.raises(KeyError, match=r"needs .*terminated"):
            loss(true)
        said = predictions().exclude("continue_pred")
        loss = DreamerV3ModelLoss(Model(said), num_reward_bins=BINS, lambda_continue=1.0)
        with pytest.raises(KeyError, match=r"needs .*continue_pred"):
            loss(batch())

    def test_shapes_that_differ(self) -> None:
        loss = DreamerV3ModelLoss(Model(predictions((6,))), num_reward_bins=BINS)
        with pytest.raises(ValueError, match=r"'pixels'.*\[3, 4, 7\].*'reco_pixels'.*\[3, 4, 6\]"):
            loss(batch())
