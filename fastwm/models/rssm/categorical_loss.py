"""`DreamerV3ModelLoss`: how the categorical world models, DreamerV2's and V3's, learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symlog
from torchrl.objectives import categorical_kl_balanced
from torchrl.objectives.common import LossModule

from fastwm.models.rssm.loss import continue_loss, found, pair, set_aside
from fastwm.ops import balanced_kl, two_hot_cross_entropy
from fastwm.specs import next_key

__all__ = ["DreamerV3ModelLoss"]

KL_MODES = ("balanced", "separate", "joint")


class DreamerV3ModelLoss(LossModule):
    """Balanced divergence, reconstruction, reward and continuation losses of a categorical RSSM.

    The arguments, keys and values of ``torchrl.objectives.DreamerV3ModelLoss``, with the divergence and
    the two-hot reward loss in fused kernels. Losses are scalars, where torchrl's are of shape ``[1]``;
    shapes have to fit exactly; a continuation loss that is asked for and cannot be computed is an
    error.

    ==========================  ===================================================================
    ``loss_model_kl``           with ``kl_mode`` ``"joint"`` or ``"balanced"``
    ``loss_model_dynamic``,     with ``kl_mode="separate"``
    ``loss_model_representation``
    ``loss_model_reco``         reconstruction error, summed over the observation
    ``loss_model_reward``       two-hot cross-entropy, or a squared error
    ``loss_model_continue``     binary cross-entropy of going on; only with ``lambda_continue``
    ==========================  ===================================================================

    all averaged over batch and time, and multiplied by their weights.

    Args:
        world_model: a batch to predictions, e.g. the ``observe`` of
            :class:`fastwm.models.RSSMFamily`. Its parameters are those of the loss.

    Keyword Args:
        lambda_kl, lambda_reco, lambda_reward, lambda_continue: weights. 1, and no continuation loss.
        kl_mode: ``"separate"``: the dynamics term, which trains the prior, and the representation
            term, which trains the posterior, each at least ``free_bits``. ``"joint"``: their weighted
            sum, in one kernel: what the papers minimise. ``"balanced"``: torchrl's older form,
            which bounds each categorical and averages over them; torchrl computes it. Default
            ``"balanced"``, as in torchrl.
        lambda_dynamic, lambda_representation: weights of the two terms. 1 and 0.1.
        unimix: uniform probability that the divergence's categoricals are mixed with. 0.
        kl_alpha: of ``"balanced"``. 0.8.
        free_bits: the least that a divergence counts for, in nats. 1.
        continue_target_scale: what the continuation should say where nothing terminates. 1.
        reco_loss: ``"l2"`` (default) or ``"l1"``.
        reco_symlog: compare symlogs of the observations; one per observation, or for all. Where
            False, integer images are divided by 255. Default True.
        reward_two_hot: the reward head says ``("next", "reward_logits")``; else ``("next",
            "reward")`` is compared. Default True.
        reward_symlog: where not two-hot, compare symlogs. Default True.
        num_reward_bins: 255.
        global_average: average the reconstruction error over features too. Default False.
        detach_output: of the batch that is returned. Default True.

    Attributes:
        in_keys: what the batch must hold.
        out_keys: the losses.

    Raises:
        KeyError: the batch lacks a target, or the world model wrote no prediction; names the key.
        ValueError: shapes that do not fit (names both), an unknown ``kl_mode`` or distance.

    Source: Hafner et al. 2023 (DreamerV3), equations 4 and 5; Hafner et al. 2021 (DreamerV2), section
    2.1 and algorithm 2.
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` accepts, all of them under ``"next"``.

        Attributes:
            reward: true, and predicted. Default ``"reward"``.
            reward_logits: Default ``"reward_logits"``.
            true_reward: where the true one is while the world model runs. Default ``"true_reward"``.
            prior_logits, posterior_logits: ``[*B, groups, classes]``.
            pixels, reco_pixels: the true observation and the predicted one, or lists of them.
            continue_pred: the logit of going on. Default ``"continue_pred"``.
            terminated: the true flag. Default ``"terminated"``.
            true_terminated: where it is while the world model runs. Default ``"true_terminated"``.
        """

        reward: NestedKey = "reward"
        reward_logits: NestedKey = "reward_logits"
        true_reward: NestedKey = "true_reward"
        prior_logits: NestedKey = "prior_logits"
        posterior_logits: NestedKey = "posterior_logits"
        pixels: NestedKey | list[NestedKey] = "pixels"
        reco_pixels: NestedKey | list[NestedKey] = "reco_pixels"
        continue_pred: NestedKey = "continue_pred"
        terminated: NestedKey = "terminated"
        true_terminated: NestedKey = "true_terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    reward_bins: Tensor

    def __init__(
        self,
        world_model: torch.nn.Module,
        *,
        lambda_kl: float = 1.0,
        lambda_reco: float = 1.0,
        lambda_reward: float = 1.0,
        lambda_continue: float = 0.0,
        kl_mode: str = "balanced",
        lambda_dynamic: float = 1.0,
        lambda_representation: float = 0.1,
        unimix: float = 0.0,
        kl_alpha: float = 0.8,
        free_bits: float = 1.0,
        continue_target_scale: float = 1.0,
        reco_loss: str = "l2",
        reco_symlog: bool | list[bool] = True,
        reward_two_hot: bool = True,
        reward_symlog: bool = True,
        num_reward_bins: int = 255,
        global_average: bool = False,
        detach_output: bool = True,
    ) -> None:
        super().__init__()
        if kl_mode not in KL_MODES:
            raise ValueError(f"Unknown kl_mode {kl_mode!r}; choose one of {', '.join(KL_MODES)}.")
        if reco_loss not in ("l1", "l2"):
            raise ValueError(f"Unknown reco_loss {reco_loss!r}; choose 'l1' or 'l2'.")
        self.world_model = world_model
        self.lambda_kl = lambda_kl
        self.lambda_reco = lambda_reco
        self.lambda_reward = lambda_reward
        self.lambda_continue = lambda_continue
        self.kl_mode = kl_mode
        self.lambda_dynamic = lambda_dynamic
        self.lambda_representation = lambda_representation
        self.unimix = unimix
        self.kl_alpha = kl_alpha
        self.free_bits = free_bits
        self.continue_target_scale = continue_target_scale
        self.reco_loss = reco_loss
        self.reco_symlog = reco_symlog
        self.reward_two_hot = reward_two_hot
        self.reward_symlog = reward_symlog
        self.num_reward_bins = num_reward_bins
        self.global_average = global_average
        self.detach_output = detach_output
        self.register_buffer("reward_bins", SymExpTwoHot(num_reward_bins).bins)
        self._forward_value_estimator_keys()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        # There is no value estimator; set_keys() calls this after a change.
        keys = self.tensor_keys
        targets = [*_as_list(keys.pixels), keys.reward]
        divergence = ["loss_model_kl"]
        if self.kl_mode == "separate":
            divergence = ["loss_model_dynamic", "loss_model_representation"]
        self.out_keys = [*divergence, "loss_model_reco", "loss_model_reward"]
        if self.lambda_continue:
            targets.append(keys.terminated)
            self.out_keys.append("loss_model_continue")
        targets = [next_key(unravel_key(key)) for key in targets]
        self.in_keys = list(dict.fromkeys([*getattr(self.world_model, "in_keys", ()), *targets]))

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """The losses of a batch ``[B, T]``, and the batch with all that the world model wrote.

        The second holds the posteriors ``("next", "state")`` and ``("next", "belief")`` that
        imagination starts from. The batch given is left as it was.
        """
        keys = self.tensor_keys
        moved = {keys.reward: keys.true_reward}
        if self.lambda_continue:
            moved[keys.terminated] = keys.true_terminated
        batch = self.world_model(set_aside(tensordict, moved))

        losses = TensorDict(self._divergences(batch), [])
        losses.set("loss_model_reco", self.lambda_reco * self._reconstruction(batch))
        losses.set("loss_model_reward", self.lambda_reward * self._reward(batch))
        if self.lambda_continue:
            loss = continue_loss(
                found(batch, keys.continue_pred),
                found(batch, keys.true_terminated),
                self.continue_target_scale,
            )
            losses.set("loss_model_continue", self.lambda_continue * loss)
        self._clear_weakrefs(tensordict, losses)
        return losses, batch.data if self.detach_output else batch

    def _divergences(self, batch: TensorDictBase) -> dict[str, Tensor]:
        keys = self.tensor_keys
        posterior, prior = pair(batch, keys.posterior_logits, keys.prior_logits)
        if self.kl_mode == "balanced":
            kl = categorical_kl_balanced(posterior, prior, self.kl_alpha, self.free_bits)
            return {"loss_model_kl": self.lambda_kl * kl}
        dynamic = self.lambda_kl * self.lambda_dynamic
        representation = self.lambda_kl * self.lambda_representation
        weights = {"loss_model_kl": (dynamic, representation)}
        if self.kl_mode == "separate":
            weights = {
                "loss_model_dynamic": (dynamic, 0.0),
                "loss_model_representation": (0.0, representation),
            }
        return {
            name: balanced_kl(
                posterior, prior, dynamics_scale=of_dynamics, representation_scale=of_representation,
                free_nats=self.free_bits, unimix=self.unimix,
            ).mean()
            for name, (of_dynamics, of_representation) in weights.items()
        }  # fmt: skip

    def _reconstruction(self, batch: TensorDictBase) -> Tensor:
        targets, predictions = (
            _as_list(key) for key in (self.tensor_keys.pixels, self.tensor_keys.reco_pixels)
        )
        symlogs = self.reco_symlog
        symlogs = [symlogs] * len(targets) if isinstance(symlogs, bool) else symlogs
        if not targets or not len(targets) == len(predictions) == len(symlogs):
            raise ValueError(
                "pixels, reco_pixels and reco_symlog must be of one length: they are of "
                f"{len(targets)}, {len(predictions)} and {len(symlogs)}."
            )
        losses = []
        for key, prediction_key, in_symlog in zip(targets, predictions, symlogs, strict=True):
            target, prediction = pair(batch, key, prediction_key)
            if in_symlog:
                target, prediction = symlog(target), symlog(prediction)
            elif not target.is_floating_point():
                target = target.to(prediction.dtype) / 255
            error = target - prediction
            error = error.square() if self.reco_loss == "l2" else error.abs()
            if not self.global_average:
                error = error.reshape(*batch.batch_size, -1).sum(-1)
            losses.append(error.mean())
        return sum(losses[1:], losses[0])

    def _reward(self, batch: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        if not self.reward_two_hot:
            target, prediction = pair(batch, keys.true_reward, keys.reward)
            if self.reward_symlog:
                target, prediction = symlog(target), symlog(prediction)
            return (target - prediction).square().mean()
        logits = found(batch, keys.reward_logits)
        if logits.shape[-1] != self.num_reward_bins:
            raise ValueError(
                f"{next_key(keys.reward_logits)!r} has {logits.shape[-1]} bins, the loss was built "
                f"for {self.num_reward_bins}."
            )
        return two_hot_cross_entropy(
            logits, found(batch, keys.true_reward), self.reward_bins
        ).mean()


def _as_list(key: NestedKey | list[NestedKey]) -> list[NestedKey]:
    return key if isinstance(key, list) else [key]
