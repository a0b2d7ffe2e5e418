"""`DreamerModelLoss` against torchrl's, and where they differ on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torchrl.objectives import DreamerModelLoss as TorchRLLoss

from fastwm.models import DreamerModelLoss


class Model(nn.ModuleList):
    """Writes given predictions, multiplied by a parameter; in the form that torchrl's loss wants."""

    def __init__(self, predictions: TensorDictBase) -> None:
        super().__init__([nn.ModuleList([nn.Identity()]), nn.Identity()])
        self.factor = nn.Parameter(torch.ones(()))
        self.predictions = predictions

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        assert tensordict.get(("next", "reward"), None) is None, "the target is within sight"
        said = self.predictions.apply(lambda x: x * self.factor)
        return tensordict.update({"next": said})


def predictions(event: tuple[int, ...]) -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(
        {
            "prior_mean": torch.randn(3, 4, 6),
            "prior_std": torch.rand(3, 4, 6) + 0.1,
            "posterior_mean": torch.randn(3, 4, 6),
            "posterior_std": torch.rand(3, 4, 6) + 0.1,
            "reco_pixels": torch.rand(3, 4, *event),
            "reward": torch.randn(3, 4, 1),
        },
        [3, 4],
    )


def batch(event: tuple[int, ...]) -> TensorDict:
    torch.manual_seed(1)
    values = {
        "pixels": torch.rand(3, 4, *event),
        "reward": torch.randn(3, 4, 1),
        "terminated": torch.rand(3, 4, 1) < 0.5,
    }
    return TensorDict({"next": TensorDict(values, [3, 4])}, [3, 4])


@pytest.mark.parametrize("global_average", [False, True])
@pytest.mark.parametrize("delayed_clamp", [False, True])
@pytest.mark.parametrize("free_nats", [0.0, 8.0, 1e3])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_values_and_gradients_are_torchrls(
    global_average: bool, delayed_clamp: bool, free_nats: float, distance: str
) -> None:
    settings: dict[str, Any] = {
        "global_average": global_average, "delayed_clamp": delayed_clamp, "free_nats": free_nats,
        "reco_loss": distance, "reward_loss": distance,
        "lambda_kl": 0.5, "lambda_reco": 2.0, "lambda_reward": 3.0,
    }  # fmt: skip
    model = Model(predictions((3, 5, 5)))
    found = []
    for loss in (TorchRLLoss(model, **settings), DreamerModelLoss(model, **settings)):
        losses, _ = loss(batch((3, 5, 5)))
        total = sum(x.sum() for x in losses.values())
        found.append((losses, torch.autograd.grad(total, model.factor)[0]))
    (want, want_gradient), (got, got_gradient) = found
    assert set(got.keys()) == set(want.keys())
    for key, value in got.items():
        torch.testing.assert_close(value, want[key].squeeze())
    torch.testing.assert_close(got_gradient, want_gradient)


def test_a_vector_is_summed_over_its_own_dim() -> None:
    """Half of it is a unit Gaussian's negative log-likelihood, but for a constant."""
    said, true = predictions((7,)), batch((7,))
    losses, _ = DreamerModelLoss(Model(said), lambda_reco=0.5)(true)
    normal = Independent(Normal(said["reco_pixels"], 1.0), 1)
    constant = Independent(Normal(torch.zeros(7), 1.0), 1).log_prob(torch.zeros(7))
    want = -(normal.log_prob(true["next", "pixels"]) - constant).mean()
    torch.testing.assert_close(losses["loss_model_reco"], want)


def test_the_divergence_is_that_of_torchs_distributions() -> None:
    said = predictions((7,))
    prior = Normal(said["prior_mean"], said["prior_std"])
    posterior = Normal(said["posterior_mean"], said["posterior_std"])
    want = kl_divergence(posterior, prior).sum(-1).mean()
    losses, _ = DreamerModelLoss(Model(said), free_nats=0.0)(batch((7,)))
    torch.testing.assert_close(losses["loss_model_kl"], want)


def test_continuation() -> None:
    said, true = predictions((7,)), batch((7,))
    said["continue_pred"] = torch.randn(3, 4, 1)
    loss = DreamerModelLoss(Model(said), lambda_continue=10.0, continue_target_scale=0.9)
    assert ("next", "terminated") in loss.in_keys
    losses, _ = loss(true)
    target = 0.9 * (~true["next", "terminated"]).float()
    p = said["continue_pred"].sigmoid()
    want = -10 * (target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(losses["loss_model_continue"], want)


def test_keys_may_be_renamed_and_nested() -> None:
    said, true = predictions((7,)), batch((7,))
    want, _ = DreamerModelLoss(Model(said))(true)
    said = said.rename_key_("reco_pixels", ("agent", "guess")).rename_key_("reward", "gain")
    true = true.rename_key_(("next", "pixels"), ("next", "agent", "look"))
    true = true.rename_key_(("next", "reward"), ("next", "gain"))
    loss = DreamerModelLoss(Model(said))
    loss.set_keys(pixels=("agent", "look"), reco_pixels=("agent", "guess"), reward="gain")
    got, _ = loss(true)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)
    assert loss.in_keys == [("next", "agent", "look"), ("next", "gain")]


def test_the_batch_is_left_alone_and_the_output_detached() -> None:
    true = batch((7,))
    before = set(true.keys(True, True))
    _, out = DreamerModelLoss(Model(predictions((7,))))(true)
    assert set(true.keys(True, True)) == before
    assert torch.equal(out["next", "true_reward"], true["next", "reward"])
    assert not out["next", "prior_mean"].requires_grad
    _, out = DreamerModelLoss(Model(predictions((7,))), detach_output=False)(true)
    assert out["next", "prior_mean"].requires_grad


class TestBadInput:
    def test_missing_target(self) -> None:
        true = batch((7,))
        del true["next", "reward"]
        with pytest.raises(KeyError, match=r"needs .*next.*reward"):
            DreamerModelLoss(Model(predictions((7,))))(true)

    def test_missing_prediction(self) -> None:
        said = predictions((7,)).exclude("posterior_std")
        with pytest.raises(KeyError, match=r"needs .*posterior_std"):
            DreamerModelLoss(Model(said))(batch((7,)))

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"'pixels'.*\[3, 4, 7\].*'reco_pixels'.*\[3, 4, 6\]"):
            DreamerModelLoss(Model(predictions((6,))))(batch((7,)))

    def test_an_unknown_distance(self) -> None:
        with pytest.raises(ValueError, match="Unknown distance 'l3'"):
            DreamerModelLoss(Model(predictions((6,))), reco_loss="l3")
