"""`DreamerModelLoss`: how the Gaussian world models, PlaNet's and the first Dreamer's, learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch.nn import functional
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import distance_loss

from fastwm.specs import next_key

__all__ = ["DreamerModelLoss", "continue_loss", "found"]

DISTANCES = ("l1", "l2", "smooth_l1")


class DreamerModelLoss(LossModule):
    """Divergence of posterior from prior, reconstruction and reward errors of a Gaussian RSSM.

    The arguments, keys and values of ``torchrl.objectives.DreamerModelLoss``, except that

    - an observation of any shape is summed over its own dims; torchrl's sums over the last three
      dims, which for a vector ``[B, T, O]`` are the batch and the time too;
    - losses are scalars, where torchrl's are of shape ``[1]``;
    - there may be a continuation loss.

    ======================  =======================================================================
    ``loss_model_kl``       ``KL[posterior || prior]`` of two diagonal Gaussians, at least ``free_nats``
    ``loss_model_reco``     reconstruction error, summed over the observation
    ``loss_model_reward``   reward error
    ``loss_model_continue``  binary cross-entropy of going on; only with ``lambda_continue``
    ======================  =======================================================================

    all averaged over batch and time, and multiplied by their weights.

    Args:
        world_model: a batch to predictions, e.g. the ``observe`` of
            :class:`fastwm.models.RSSMFamily`, or torchrl's own ``WorldModelWrapper``. Its parameters
            are those of the loss.

    Keyword Args:
        lambda_kl, lambda_reco, lambda_reward, lambda_continue: weights. 1, and no continuation loss.
            The papers' likelihoods are unit Gaussians, whose negative logarithm is *half* the squared
            error and a constant: the builders pass ``lambda_reco=0.5``.
        reco_loss, reward_loss: ``"l2"`` (default), ``"l1"`` or ``"smooth_l1"``.
        free_nats: 3.
        delayed_clamp: bound the divergence after averaging over batch and time (the first Dreamer's
            code), not each step's (PlaNet's). Default False.
        global_average: average over features too, instead of summing. Default False.
        continue_target_scale: what the continuation should say where nothing terminates: the
            discount, for an imagination that multiplies by it. Default 1.
        detach_output: of the batch that is returned. Default True.

    Attributes:
        in_keys: what the batch must hold.
        out_keys: the losses.

    Raises:
        KeyError: the batch lacks a target, or the world model wrote no prediction; names the key.
        ValueError: prediction and target differ in shape (names both); an unknown distance.

    Source: Hafner et al. 2020 (Dreamer), equation 10; Hafner et al. 2019 (PlaNet), equation 3.
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` accepts, all of them under ``"next"``.

        Attributes:
            reward: true and predicted. Default ``"reward"``.
            true_reward: where the true one is while the world model runs. Default ``"true_reward"``.
            prior_mean, prior_std, posterior_mean, posterior_std: of the state.
            pixels: the true observation, vector or image. Default ``"pixels"``.
            reco_pixels: the predicted one. Default ``"reco_pixels"``.
            continue_pred: the logit of going on. Default ``"continue_pred"``.
            terminated: the true flag. Default ``"terminated"``.
            true_terminated: where it is while the world model runs. Default ``"true_terminated"``.
        """

        reward: NestedKey = "reward"
        true_reward: NestedKey = "true_reward"
        prior_mean: NestedKey = "prior_mean"
        prior_std: NestedKey = "prior_std"
        posterior_mean: NestedKey = "posterior_mean"
        posterior_std: NestedKey = "posterior_std"
        pixels: NestedKey = "pixels"
        reco_pixels: NestedKey = "reco_pixels"
        continue_pred: NestedKey = "continue_pred"
        terminated: NestedKey = "terminated"
        true_terminated: NestedKey = "true_terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    def __init__(
        self,
        world_model: torch.nn.Module,
        *,
        lambda_kl: float = 1.0,
        lambda_reco: float = 1.0,
        lambda_reward: float = 1.0,
        lambda_continue: float = 0.0,
        reco_loss: str | None = None,
        reward_loss: str | None = None,
        free_nats: float = 3.0,
        delayed_clamp: bool = False,
        global_average: bool = False,
        continue_target_scale: float = 1.0,
        detach_output: bool = True,
    ) -> None:
        super().__init__()
        self.world_model = world_model
        self.lambda_kl = lambda_kl
        self.lambda_reco = lambda_reco
        self.lambda_reward = lambda_reward
        self.lambda_continue = lambda_continue
        self.reco_loss = "l2" if reco_loss is None else reco_loss
        self.reward_loss = "l2" if reward_loss is None else reward_loss
        for distance in (self.reco_loss, self.reward_loss):
            if distance not in DISTANCES:
                raise ValueError(
                    f"Unknown distance {distance!r}; choose one of {', '.join(DISTANCES)}."
                )
        self.free_nats = free_nats
        self.delayed_clamp = delayed_clamp
        self.global_average = global_average
        self.continue_target_scale = continue_target_scale
        self.detach_output = detach_output
        self._forward_value_estimator_keys()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        # There is no value estimator; set_keys() calls this after a change.
        keys = self.tensor_keys
        targets = [next_key(unravel_key(k)) for k in (keys.pixels, keys.reward)]
        self.out_keys = ["loss_model_kl", "loss_model_reco", "loss_model_reward"]
        if self.lambda_continue:
            targets.append(next_key(unravel_key(keys.terminated)))
            self.out_keys.append("loss_model_continue")
        self.in_keys = list(dict.fromkeys([*getattr(self.world_model, "in_keys", ()), *targets]))

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """The losses of a batch ``[B, T]``, and the batch with all that the world model wrote.

        The second holds the posteriors ``("next", "state")`` and ``("next", "belief")`` that
        imagination starts from. The batch given is left as it was.
        """
        keys = self.tensor_keys
        batch = set_aside(tensordict, self._moved())
        batch = self.world_model(batch)

        losses = TensorDict({}, [])
        losses.set("loss_model_kl", self.lambda_kl * self._divergence(batch))
        target, prediction = pair(batch, keys.pixels, keys.reco_pixels)
        error = distance_loss(target, prediction, self.reco_loss)
        if not self.global_average:
            error = error.reshape(*batch.batch_size, -1).sum(-1)
        losses.set("loss_model_reco", self.lambda_reco * error.mean())
        target, prediction = pair(batch, keys.true_reward, keys.reward)
        error = distance_loss(target, prediction, self.reward_loss)
        losses.set("loss_model_reward", self.lambda_reward * error.mean())
        if self.lambda_continue:
            loss = continue_loss(
                found(batch, keys.continue_pred),
                found(batch, keys.true_terminated),
                self.continue_target_scale,
            )
            losses.set("loss_model_continue", self.lambda_continue * loss)
        self._clear_weakrefs(tensordict, losses)
        return losses, batch.data if self.detach_output else batch

    def _moved(self) -> dict[NestedKey, NestedKey]:
        keys = self.tensor_keys
        moved = {keys.reward: keys.true_reward}
        if self.lambda_continue:
            moved[keys.terminated] = keys.true_terminated
        return moved

    def _divergence(self, batch: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        names = (keys.prior_mean, keys.prior_std, keys.posterior_mean, keys.posterior_std)
        prior_mean, prior_std, mean, std = (found(batch, key) for key in names)
        square = ((mean - prior_mean) / prior_std) ** 2
        ratio = std / prior_std
        kl = 0.5 * (ratio**2 + square - 1) - ratio.log()
        if not self.global_average:
            kl = kl.sum(-1)
        if self.delayed_clamp:
            return kl.mean().clamp_min(self.free_nats)
        return kl.clamp_min(self.free_nats).mean()


def set_aside(tensordict: TensorDictBase, moved: dict[NestedKey, NestedKey]) -> TensorDictBase:
    """A copy in which what the world model is about to predict stands under another name.

    Raises:
        KeyError: it is not there.
    """
    batch = tensordict.copy()
    for key, aside in moved.items():
        batch.set(next_key(aside), found(batch, key))
        del batch[next_key(key)]
    return batch


def found(batch: TensorDictBase, key: NestedKey) -> Tensor:
    """What is under ``"next"`` at ``key``.

    Raises:
        KeyError: nothing is; says what there is.
    """
    value = batch.get(next_key(unravel_key(key)), None)
    if value is None:
        raise KeyError(
            f"The loss needs {next_key(unravel_key(key))!r}, which neither the batch holds nor the "
            f"world model wrote; there is {sorted(map(str, batch.keys(True, True)))}."
        )
    return value


def pair(batch: TensorDictBase, target: NestedKey, prediction: NestedKey) -> tuple[Tensor, Tensor]:
    """Target and prediction, of one shape.

    Raises:
        ValueError: they differ in shape.
    """
    true, predicted = found(batch, target), found(batch, prediction)
    if true.shape != predicted.shape:
        raise ValueError(
            f"Target {next_key(target)!r} has shape {list(true.shape)}, "
            f"prediction {next_key(prediction)!r} has {list(predicted.shape)}."
        )
    return true, predicted


def continue_loss(logit: Tensor, terminated: Tensor, scale: float) -> Tensor:
    """Binary cross-entropy of the continuation, whose target is ``scale`` or, at an end, 0."""
    target = (~terminated).to(logit.dtype) * scale
    return functional.binary_cross_entropy_with_logits(logit, target.reshape(logit.shape))
