"""`WorldModelLoss`: what a world model gets wrong on real transitions, as named sub-losses."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import dispatch
from tensordict.utils import NestedKey, unravel_key
from torch.compiler import is_compiling
from torchrl.envs.utils import set_exploration_type
from torchrl.modules.tensordict_module.rnn import set_recurrent_mode
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import distance_loss

from fastwm.backends import check_name, requested
from fastwm.explain import Explanation
from fastwm.explain_loss import explain_loss
from fastwm.guarded_trace import BadCall
from fastwm.loss_pairs import (
    Pair,
    check_probabilities,
    leading,
    listed,
    missing,
    paired,
    path_of,
)
from fastwm.loss_plan import LossPlan, plan_for
from fastwm.ops.sub_losses import elementwise, sub_losses, why_not_in_kernel
from fastwm.process_modes import NotCapturable

__all__ = ["WorldModelLoss"]

# The order of the outputs, whatever the order in which the losses were asked for.
SUB_LOSSES = ("reward", "done", "reconstruction", "latent")
DISTANCES = ("l1", "l2", "smooth_l1")
# Only a flag has a cross-entropy.
CROSS_ENTROPIES = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
REDUCTIONS = ("mean", "sum", "none")
UNMEASURED = "its kernel has not been measured on a GPU yet"

_Compared = tuple[tuple[dict[str, Any], str], list[torch.Tensor]]


class WorldModelLoss(LossModule):
    """Losses of a world model on a batch of real transitions.

    A drop-in for ``torchrl.objectives.WorldModelLoss``: the same arguments, defaults, tensor keys,
    values and ``state_dict`` names, plus ``reduction``, ``in_keys`` / ``out_keys``, keyword
    dispatch and cross-entropies for the done flag. The world model runs once, on a private copy of
    the batch; every sub-loss compares something that it wrote with something real:

    ==================  =============================  ===============================
    sub-loss            prediction                     target
    ==================  =============================  ===============================
    ``reward``          ``("next", reward)``           ``("next", reward)`` of the batch
    ``done``            ``("next", done)``, else       the same key of the batch
                        ``("next", terminated)``
    ``reconstruction``  ``reconstructed_observation``  ``observation``
    ``latent``          ``predicted_latent``           ``target_latent``
    ==================  =============================  ===============================

    The names in it are tensor keys: change them with :meth:`set_keys`; nested keys are fine.
    Targets of the last two rows are read after the world model ran (its encoder may write them),
    except where prediction and target share one key: then the target is what the batch held.

    Args:
        world_model: any TensorDict module that writes the predictions: :class:`fastwm.WorldModel`,
            torchrl's own, or one of yours. Its parameters are the parameters of the loss.

    Keyword Args:
        losses: any of ``"reward"``, ``"done"``, ``"reconstruction"``, ``"latent"``.
            Default ``["reward"]``.
        reward_loss, reconstruction_loss, latent_loss: ``"l2"`` (default), ``"l1"`` or
            ``"smooth_l1"``.
        done_loss: one of these; or ``"binary_cross_entropy"``, for a head that emits probabilities
            (which is what :class:`fastwm.WorldModelEnv` takes floats for: ``done_threshold=0.5``);
            or ``"binary_cross_entropy_with_logits"``, for one that emits logits (give the env
            ``done_threshold=0.0`` then). Prediction and target are cast to float32.
        reward_weight, done_weight, reconstruction_weight, latent_weight: factor of each sub-loss.
            Default 1.0.
        reduction: ``"mean"`` (default) and ``"sum"`` give scalars. ``"none"`` gives the elementwise
            losses, in the shapes of the predictions, in a TensorDict of the input's batch size.
            Positions that :attr:`loss_mask_key` marks invalid do not count (with ``"none"`` they
            are 0), as in every ``LossModule``; by default those are the ones that torchrl itself
            marks, such as the padding of a ``SliceSampler``. ``loss.loss_mask_key = None`` counts
            everything.
        backend: ``"captured"`` traces the whole call once for each kind of batch, world model and
            sub-losses, and runs the trace without TensorDict and modules; on CUDA as one graph, and
            its backward as another (a backward from some of several losses, or one that is to be
            differentiated itself, runs the trace without them). ``"fused"`` runs the world model
            eagerly and computes all sub-losses in one call of a C++ or Triton kernel, and their
            gradients in another: scalar reductions, predictions in float32 or float64 with targets
            of their dtype (or bool), all on one device. ``"captured"`` uses that kernel, too, where
            it can. ``"eager"`` is the definition; the values of the others are its own within
            ``fastwm/tolerances.py``. ``"auto"`` (default) is the first of the three that can run
            (the quickest, too: ``bench/world_model_loss.py``, on a CPU); on CUDA it leaves out the
            kernel. :meth:`explain` says which and why.

    Attributes:
        in_keys: what the batch must hold: the ``in_keys`` of the world model, then the targets.
            They follow :meth:`set_keys` and ``losses``; assigned ones stay until :meth:`set_keys`.
        out_keys: ``"loss_reward"``, ``"loss_done"``, ``"loss_reconstruction"``, ``"loss_latent"``:
            those that were chosen, in this order. ``select_out_keys`` works.

    Raises:
        ValueError: an unknown loss, distance, reduction or backend.
        KeyError: the batch lacks a target, or the world model wrote no prediction; names the key.
        RuntimeError: prediction and target differ in shape (nothing is broadcast): names the keys
            and both shapes. Or the backend asked for cannot run. Or what should be probabilities
            lies outside [0, 1] (on CPU; elsewhere such elements give NaN, because to look would
            mean to wait for the device).

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP
        >>> import fastwm
        >>> latent, reward = ("next", "latent"), ("next", "reward")
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(8, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(6, 4, num_cells=[]), in_keys=["latent", "action"], out_keys=[latent]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[latent], out_keys=[reward]),
        ... )
        >>> loss = fastwm.WorldModelLoss(world_model)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(16, 10, 8),
        ...     "action": torch.randn(16, 10, 2),
        ...     "next": {"reward": torch.randn(16, 10, 1)},
        ... }, [16, 10])
        >>> loss(batch)["loss_reward"].shape
        torch.Size([])
        >>> loss.in_keys, loss.out_keys
        (['observation', 'action', ('next', 'reward')], ['loss_reward'])
        >>> loss_reward = loss(
        ...     observation=batch["observation"],
        ...     action=batch["action"],
        ...     next_reward=batch["next", "reward"],
        ... )
        >>> loss_reward == loss(batch)["loss_reward"]
        tensor(True)
        >>> loss.reduction = "none"
        >>> loss(batch)["loss_reward"].shape
        torch.Size([16, 10, 1])

    Source: TorchRL 0.14's ``WorldModelLoss``.
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` accepts, and their defaults.

        Attributes:
            reward: predicted and true reward, under ``"next"``. Default ``"reward"``.
            true_reward: where, under ``"next"``, the world model finds the true reward while it
                runs (``reward`` is left free for its prediction). Default ``"true_reward"``.
            done: predicted and true done flag, under ``"next"``. Default ``"done"``.
            true_done: the true done flag while the world model runs. Default ``"true_done"``.
            terminated: the flag used where the world model predicts no ``done``, under ``"next"``.
                Default ``"terminated"``.
            true_terminated: the true flag while the world model runs.
                Default ``"true_terminated"``.
            observation: what the decoder should return. Default ``"observation"``.
            reconstructed_observation: what it returns. Default ``"reconstructed_observation"``.
            predicted_latent: the latent as predicted. Default ``"predicted_latent"``.
            target_latent: the latent as it should be. Default ``"target_latent"``.
        """

        reward: NestedKey = "reward"
        true_reward: NestedKey = "true_reward"
        done: NestedKey = "done"
        true_done: NestedKey = "true_done"
        terminated: NestedKey = "terminated"
        true_terminated: NestedKey = "true_terminated"
        observation: NestedKey = "observation"
        reconstructed_observation: NestedKey = "reconstructed_observation"
        predicted_latent: NestedKey = "predicted_latent"
        target_latent: NestedKey = "target_latent"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    # On the class, so that a pickle of torchrl's loss, opened under fastwm.patch(), has them too.
    reduction: str = "mean"
    backend: str = "auto"
    _in_keys: list[NestedKey] | None = None
    _out_keys_apparent: list[NestedKey] | None = None

    def __init__(
        self,
        world_model: torch.nn.Module,
        *,
        losses: Sequence[Literal["reward", "done", "reconstruction", "latent"]] | None = None,
        reward_loss: str = "l2",
        done_loss: str = "l2",
        reconstruction_loss: str = "l2",
        latent_loss: str = "l2",
        reward_weight: float = 1.0,
        done_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        latent_weight: float = 1.0,
        reduction: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.world_model = world_model
        self.losses: list[str] = ["reward"] if losses is None else list(losses)
        self.reward_loss = reward_loss
        self.done_loss = done_loss
        self.reconstruction_loss = reconstruction_loss
        self.latent_loss = latent_loss
        self.reward_weight = reward_weight
        self.done_weight = done_weight
        self.reconstruction_weight = reconstruction_weight
        self.latent_weight = latent_weight
        self.reduction = "mean" if reduction is None else reduction
        self.backend = check_name(backend)
        self._check_settings()

    # ---------------------------------------------------------------- settings

    def _active(self) -> list[str]:
        return [name for name in SUB_LOSSES if name in self.losses]

    def _check_settings(self) -> None:
        """At construction and at each call: they are plain attributes, which anyone may set."""
        unknown = set(self.losses) - set(SUB_LOSSES)
        if unknown:
            raise ValueError(
                f"Unknown loss type(s): {unknown}. Valid choices are {sorted(SUB_LOSSES)}."
            )
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"Unknown reduction {self.reduction!r}; choose one of {', '.join(REDUCTIONS)}."
            )
        for name in self._active():
            valid = DISTANCES + CROSS_ENTROPIES if name == "done" else DISTANCES
            distance = getattr(self, f"{name}_loss")
            if distance not in valid:
                raise ValueError(
                    f"Unknown loss function {distance!r} for {name}_loss; "
                    f"choose one of {', '.join(valid)}."
                )

    def _backend(self) -> str:
        # Inside torch.compile the compiler is the engine.
        return "eager" if is_compiling() else requested(self.backend)

    # ---------------------------------------------------------------- keys

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the batch must hold; see the class."""
        if self._in_keys is not None:
            return self._in_keys
        keys = list(self._model_keys("in_keys"))
        if "reward" in self.losses:
            keys.append(self._next("reward"))
        if "done" in self.losses:
            keys.append(self._next(self._declared_flag() or "done"))
        # A model that does not say what it writes is taken to write the predictions, no target.
        silent = not self._model_keys("out_keys")
        for name in ("reconstruction", "latent"):
            if name in self.losses:
                key, target_key = self._compared_keys(name)
                if not silent and not self._model_writes(key):
                    keys.append(key)
                if target_key == key or not self._model_writes(target_key):
                    keys.append(target_key)
        return list(dict.fromkeys(keys))

    @in_keys.setter
    def in_keys(self, keys: Iterable[NestedKey]) -> None:
        self._in_keys = [unravel_key(key) for key in keys]

    @property
    def out_keys(self) -> list[NestedKey]:
        """The losses that a call returns; see the class."""
        chosen = self._out_keys_apparent
        return self.out_keys_source if chosen is None else chosen

    @out_keys.setter
    def out_keys(self, keys: Iterable[NestedKey]) -> None:
        keys = [unravel_key(key) for key in keys]
        # reset_out_keys() assigns what select_out_keys() found: follow `losses` again from there.
        self._out_keys_apparent = None if keys == self.out_keys_source else keys

    @property
    def out_keys_source(self) -> list[NestedKey]:
        """:attr:`out_keys` before any selection."""
        return [f"loss_{name}" for name in self._active()]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        # There is no value estimator; set_keys() calls this after a change.
        self._in_keys = None

    def _next(self, field: str) -> NestedKey:
        return unravel_key(("next", getattr(self.tensor_keys, field)))

    def _compared_keys(self, name: str) -> tuple[NestedKey, NestedKey]:
        """Prediction and target of the two losses whose keys are not under ``"next"``."""
        keys = self.tensor_keys
        if name == "reconstruction":
            return unravel_key(keys.reconstructed_observation), unravel_key(keys.observation)
        return unravel_key(keys.predicted_latent), unravel_key(keys.target_latent)

    def _model_keys(self, which: str) -> list[NestedKey]:
        """``in_keys`` or ``out_keys`` as the world model declares them, if it does."""
        return [unravel_key(key) for key in getattr(self.world_model, which, None) or ()]

    def _model_writes(self, key: NestedKey) -> bool:
        """Whether the world model declares ``key``, or an entry of the tensordict at ``key``."""
        path = path_of(key)
        return any(path_of(out)[: len(path)] == path for out in self._model_keys("out_keys"))

    def _declared_flag(self) -> str | None:
        """The flag that the world model declares and the done loss takes, if it declares one."""
        return next((f for f in ("done", "terminated") if self._model_writes(self._next(f))), None)

    # ---------------------------------------------------------------- forward

    def forward(self, tensordict: TensorDictBase | None = None, *args: Any, **kwargs: Any) -> Any:
        """The losses of a batch of real transitions.

        Args:
            tensordict: batch ``[*B]`` (``[B]``, ``[B, T]``, ...) with every key of :attr:`in_keys`;
                rewards and flags in the shape that the heads emit, normally ``[*B, 1]``. It is left
                as it was, and so are its nested tensordicts. Or the tensors themselves, by name
                (nested keys joined by ``_``: ``next_reward=``) or in the order of :attr:`in_keys`.

        Returns:
            A TensorDict of :attr:`out_keys`: scalars, or with ``reduction="none"`` tensors of the
            predictions' shapes and batch size ``[*B]``. Called with tensors: a tuple of the same in
            the order of :attr:`out_keys`, or the one there is. Where prediction and target are
            tensordicts (a latent of several parts), so is the loss, one value per entry.

        Raises:
            KeyError, RuntimeError: see the class.
        """
        # Not `dispatch` from the start: loss(tensordict=batch), which torchrl accepts, would fail.
        if is_tensor_collection(tensordict) and not args and not kwargs:
            return self._losses_of(tensordict)
        if tensordict is not None:
            args = (tensordict, *args)
        return self._from_tensors(*args, **kwargs)

    # Left to itself, dispatch takes the feature dim of a [B, 1] reward for a batch dim, and then
    # there is no room for a latent beside it.
    @dispatch(auto_batch_size=False)
    def _from_tensors(self, tensordict: TensorDictBase) -> TensorDictBase:
        shapes = [value.shape for value in tensordict.values(True, True)]
        batch: list[int] = []
        for sizes in zip(*(shape[:-1] for shape in shapes), strict=False):
            if len(set(sizes)) > 1:
                break
            batch.append(sizes[0])
        return self._losses_of(TensorDict(tensordict.to_dict(), batch_size=batch))

    def explain(self, tensordict: TensorDictBase) -> Explanation:
        """Which engine would run ``loss(tensordict)``, and why not a faster one.

        The call may be traced; where no trace is to be had, the world model runs once. Random
        generators are left as they were.

        Args:
            tensordict: as for a call.

        Raises:
            What the call raises, where that is the batch's or a setting's fault.

        Example:
            >>> print(loss.explain(batch))  # doctest: +SKIP
            captured: runs, with all sub-losses in one kernel
        """
        asked = self._backend()
        self._check_settings()
        # The modes of a call of any LossModule.
        with set_exploration_type(self.deterministic_sampling_mode), set_recurrent_mode(True):
            return explain_loss(self._plan, self._compared, tensordict, asked)

    def _losses_of(self, tensordict: TensorDictBase) -> TensorDictBase:
        backend = self._backend()
        self._check_settings()
        found = None
        if backend in ("auto", "captured"):
            found = self._captured(tensordict, backend)
        (losses, _), values = found or self._compared(tensordict, backend)
        out = self._filled(losses, values, self._out_batch_size(tensordict))
        self._clear_weakrefs(tensordict, out)
        return out

    def _captured(self, tensordict: TensorDictBase, backend: str) -> _Compared | None:
        """The same as :meth:`_compared`; None where "auto" has to go on without a trace."""
        try:
            plan, leaves = self._plan(tensordict, backend)
            return plan.structure, plan.run(leaves)
        except NotCapturable as reason:
            if backend == "auto":
                return None
            if isinstance(reason, BadCall):
                self._compared(tensordict, "auto")  # raises what the batch deserves
            raise RuntimeError(
                "The backend 'captured' was asked for (by backend=, fastwm.backend or "
                f"FASTWM_BACKEND), but it does not take this WorldModelLoss: {reason}."
            ) from reason

    def _plan(
        self, tensordict: TensorDictBase, backend: str
    ) -> tuple[LossPlan, dict[tuple[str, ...], torch.Tensor]]:
        compute = functools.partial(self._compared, backend=backend)
        variant = backend if torch.cuda.is_initialized() else None  # the same on a CPU
        return plan_for(self, compute, tensordict, variant, patient=backend == "captured")

    def _compared(self, tensordict: TensorDictBase, backend: str) -> _Compared:
        """Run the world model and compare: the indices of the losses by name, and why no kernel
        computed them ("" where one did); and the losses."""
        active = self._active()
        # Its nested tensordicts are copied with it; the tensors are shared, nobody writes in them.
        batch = tensordict.copy()
        truth = self._set_truth_aside(batch, active)

        predicted = self.world_model(batch)

        pairs: list[Pair] = []
        losses: dict[str, Any] = {}
        for name in active:
            key, prediction, target_key, target = self._pair(name, predicted, truth)
            if target is None:
                raise missing(name, target_key, tensordict)
            if prediction is None:
                raise KeyError(
                    f"The world model wrote no {key!r}, which the {name!r} loss compares with "
                    f"{target_key!r}. After it ran there were {listed(predicted)}."
                )
            losses[f"loss_{name}"] = paired(name, key, prediction, target_key, target, pairs)
        values, unfused = self._values(pairs, tensordict, backend)
        self._clear_weakrefs(batch, predicted)
        return (losses, unfused), values

    def _set_truth_aside(self, batch: TensorDictBase, active: list[str]) -> dict[NestedKey, Any]:
        """Every target that ``batch`` holds, by key (None where there is none).

        Real rewards and flags go to their ``true_*`` keys, so that what is found at the key itself
        after the world model ran is its prediction.

        Raises:
            KeyError: a target is absent that cannot come from the world model.
        """
        fields = ["reward"] if "reward" in active else []
        fields += ["done", "terminated"] if "done" in active else []
        pairs = {n: self._compared_keys(n) for n in ("reconstruction", "latent") if n in active}

        keys = [*map(self._next, fields), *(target_key for _, target_key in pairs.values())]
        truth = {key: batch.get(key, None) for key in keys}
        if any(value is None for value in truth.values()):
            needed = [("reward", self._next("reward"))] if "reward" in active else []
            flag = self._declared_flag() if "done" in active else None
            needed += [("done", self._next(flag))] if flag else []
            needed += [(name, target) for name, (key, target) in pairs.items() if key == target]
            for name, key in needed:
                if truth[key] is None:
                    raise missing(name, key, batch)

        for field in fields:
            key, aside = self._next(field), self._next(f"true_{field}")
            if truth[key] is None:
                continue
            if key == aside:
                batch.del_(key)
            else:
                batch.rename_key_(key, aside)
        return truth

    def _pair(
        self, name: str, predicted: TensorDictBase, truth: dict[NestedKey, Any]
    ) -> tuple[NestedKey, Any, NestedKey, Any]:
        """Key and value of the prediction, then of the target; None for a value that is absent."""
        if name in ("reward", "done"):
            key = self._next(name)
            prediction = predicted.get(key, None)
            if name == "done" and prediction is None:
                key = self._next("terminated")
                prediction = predicted.get(key, None)
                if prediction is None:
                    raise KeyError(
                        f"The world model wrote neither {self._next('done')!r} nor {key!r}: the "
                        f"'done' loss needs a done head. After it ran there were "
                        f"{listed(predicted)}."
                    )
            return key, prediction, key, truth[key]
        key, target_key = self._compared_keys(name)
        target = None if key == target_key else predicted.get(target_key, None)
        if target is None:
            target = truth[target_key]
        return key, predicted.get(key, None), target_key, target

    def _values(
        self, pairs: list[Pair], tensordict: TensorDictBase, backend: str
    ) -> tuple[list[torch.Tensor], str]:
        """The distance of each pair, reduced and weighted; and why not by a kernel."""
        if not pairs:
            return [], ""
        for pair in pairs:
            if self._distance(pair) == "binary_cross_entropy":
                check_probabilities(pair)
        why = "backend='eager' was asked for"
        if backend != "eager":
            masks = self._masks(pairs, tensordict)
            why = self._why_not_fused(pairs, masks)
            if not why and backend == "auto" and any(p.prediction.is_cuda for p in pairs):
                why = UNMEASURED  # by name alone
            if not why:
                return self._fused_values(pairs, masks), ""
            if backend == "fused":
                raise RuntimeError(
                    "The backend 'fused' was asked for (by backend=, fastwm.backend or "
                    f"FASTWM_BACKEND), but it does not take this WorldModelLoss: {why}."
                )
        return [self._eager_value(pair, tensordict) for pair in pairs], why

    def _distance(self, pair: Pair) -> str:
        return getattr(self, f"{pair.name}_loss")

    def _weight(self, pair: Pair) -> float:
        return getattr(self, f"{pair.name}_weight")

    def _eager_value(self, pair: Pair, tensordict: TensorDictBase) -> torch.Tensor:
        prediction, target, distance = pair.prediction, pair.target, self._distance(pair)
        if pair.name == "done":
            target = target.float()
        if distance in CROSS_ENTROPIES:
            loss = elementwise(prediction, target, distance)
        else:
            loss = distance_loss(prediction, target, distance)
        return self._weight(pair) * self._reduce_loss(loss, tensordict)

    def _fused_values(self, pairs: list[Pair], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        return sub_losses(
            [pair.prediction for pair in pairs],
            [pair.target for pair in pairs],
            [self._distance(pair) for pair in pairs],
            [self._weight(pair) for pair in pairs],
            reduction=self.reduction,
            masks=masks,
        )

    def _why_not_fused(self, pairs: list[Pair], masks: list[torch.Tensor]) -> str:
        if self.reduction == "none":
            return "reduction='none' gives no scalars"
        if type(self)._reduce_loss is not LossModule._reduce_loss:
            return "its class reduces in its own way"
        if not all(isinstance(self._weight(pair), int | float) for pair in pairs):
            return "a weight is no number"
        if any(mask.dtype != torch.bool for mask in masks):
            return "a mask is not bool"
        if any(m.device != p.prediction.device for m, p in zip(masks, pairs, strict=False)):
            return "a mask is on another device"
        return why_not_in_kernel(
            [pair.prediction for pair in pairs],
            [pair.target for pair in pairs],
            [self._distance(pair) for pair in pairs],
        )

    def _masks(self, pairs: list[Pair], tensordict: TensorDictBase) -> list[torch.Tensor]:
        """What counts of each pair, over the first dimensions of its tensors; nothing where
        everything counts."""
        found = [tensordict.get(key, None) for key in self._loss_mask_keys()]
        given = [mask for mask in found if mask is not None]
        if not given:
            return []
        masks = []
        for pair in pairs:
            if len(given) == 1 and (mask := leading(given[0], pair.prediction)) is not None:
                masks.append(mask)
                continue
            expanded = [self._expand_loss_mask(mask, pair.prediction) for mask in given]
            masks.append(torch.stack(expanded).all(0))
        return masks

    def _filled(
        self, losses: dict[str, Any], values: list[torch.Tensor], batch_size: torch.Size
    ) -> TensorDict:
        """``losses`` with the values that its indices stand for."""
        filled = {
            key: self._filled(index, values, batch_size)
            if isinstance(index, dict)
            else values[index]
            for key, index in losses.items()
        }
        return TensorDict(filled, batch_size=batch_size)

    def _out_batch_size(self, tensordict: TensorDictBase) -> torch.Size:
        return tensordict.batch_size if self.reduction == "none" else torch.Size([])
