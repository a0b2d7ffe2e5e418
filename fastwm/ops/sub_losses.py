r"""The sub-losses of a world model, all in one call: pairs of a prediction and a target, each with a
distance and a weight.

.. math:: \text{loss}_k = w_k \, \mathrm{mean}_i \, d_k(\text{prediction}_{ki}, \text{target}_{ki}),

or the sum instead of the mean; elements that a mask leaves out do not count. Source: TorchRL 0.14's
``WorldModelLoss`` and ``LossModule._reduce_loss``, whose values these are.

The ops return fresh tensors and write into nothing. CPU: ``csrc/sub_losses.cpp``; CUDA:
``kernels/sub_losses.py``; any other device: the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops.library import KERNEL_DTYPES, LIBRARY, cpu_library, implement, why_no_kernel

__all__ = ["DISTANCES", "elementwise", "sub_losses", "sub_losses_reference", "why_not_in_kernel"]

# In the numbering of csrc/loss_kernels.h.
DISTANCES = (
    "l1",
    "l2",
    "smooth_l1",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)


def sub_losses(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    distances: Sequence[str],
    weights: Sequence[float],
    *,
    reduction: str = "mean",
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The reduced and weighted distance of each pair, differentiable in predictions and targets.

    Args:
        predictions: tensors of any shapes, floating point.
        targets: one for each prediction, of its shape, and of its dtype or bool.
        distances: one name of :data:`DISTANCES` for each pair. Of ``"binary_cross_entropy"``, which
            is NaN where a prediction lies outside [0, 1], the gradient is 0 there.
        weights: one factor for each pair.
        reduction: ``"mean"`` or ``"sum"``.
        masks: a bool tensor for each pair whose shape is the first dimensions of the prediction's:
            what counts. A mean is over that, and 0 where nothing does.

    Returns:
        one 0-dim tensor per pair, in the dtype of its prediction.

    Raises:
        TypeError: predictions that are not floating point; masks that are not bool.
        ValueError: lists of different lengths; shapes that differ (named in the message); an
            unknown distance or reduction.
        RuntimeError: a pair on two devices.

    float32 and float64 run in a kernel; what :func:`why_not_in_kernel` names runs on
    :func:`sub_losses_reference`.

    Example:
        >>> import torch
        >>> from fastwm.ops import sub_losses
        >>> reward, done = torch.zeros(4, 1), torch.full((4, 1), 0.5)
        >>> sub_losses(
        ...     [reward, done],
        ...     [torch.ones(4, 1), torch.ones(4, 1) > 0],
        ...     ["l2", "binary_cross_entropy"],
        ...     [2.0, 1.0],
        ... )
        [tensor(2.), tensor(0.6931)]
    """
    masks = [] if masks is None else list(masks)
    _check(predictions, targets, distances, weights, reduction, masks)
    codes = [DISTANCES.index(name) for name in distances]
    mean = reduction == "mean"
    if why_not_in_kernel(predictions, targets, distances):
        return _losses(predictions, targets, masks, codes, weights, mean)
    tensors = (*predictions, *targets)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return list(_Fused.apply(masks, codes, list(weights), mean, *tensors))
    return torch.ops.fastwm.sub_losses(
        list(predictions), list(targets), masks, codes, list(weights), mean
    )


def sub_losses_reference(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    distances: Sequence[str],
    weights: Sequence[float],
    *,
    reduction: str = "mean",
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What :func:`sub_losses` is held against, in plain torch operations, on any device and dtype.

    Example:
        >>> import torch
        >>> from fastwm.ops import sub_losses_reference
        >>> sub_losses_reference([torch.zeros(4)], [torch.ones(4)], ["l1"], [3.0])
        [tensor(3.)]
    """
    masks = [] if masks is None else list(masks)
    _check(predictions, targets, distances, weights, reduction, masks)
    codes = [DISTANCES.index(name) for name in distances]
    return _losses(predictions, targets, masks, codes, weights, reduction == "mean")


def why_not_in_kernel(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], distances: Sequence[str]
) -> str:
    """Why the kernels do not take these pairs; "" when they do."""
    if torch.compiler.is_compiling():
        return "inside torch.compile the compiler is the engine"
    for prediction, target, distance in zip(predictions, targets, distances, strict=True):
        if prediction.dtype not in KERNEL_DTYPES:
            return f"a prediction of {prediction.dtype}; the kernels take float32 and float64"
        if target.dtype not in (prediction.dtype, torch.bool):
            return f"a target of {target.dtype} for a prediction of {prediction.dtype}"
        if target.requires_grad and distance.startswith("binary_cross_entropy"):
            return f"the target of a {distance} requires a gradient"
    devices = {x.device for x in (*predictions, *targets)}
    if len(devices) > 1:
        return f"tensors on {', '.join(sorted(map(str, devices)))}"
    if devices and next(iter(devices)).type == "cpu" and not cpu_library().loaded:
        return cpu_library().reason
    return why_no_kernel(*predictions, *targets)


# --- input ----------------------------------------------------------------------------------------


def _check(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    distances: Sequence[str],
    weights: Sequence[float],
    reduction: str,
    masks: Sequence[Tensor],
) -> None:
    lengths = [len(x) for x in (predictions, targets, distances, weights)]
    lengths += [len(masks)] if masks else []
    if len(set(lengths)) > 1:
        raise ValueError(f"predictions, targets, distances, weights (and masks) differ: {lengths}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction {reduction!r}; choose one of mean, sum.")
    for name in distances:
        if name not in DISTANCES:
            raise ValueError(f"Unknown distance {name!r}; choose one of {', '.join(DISTANCES)}.")
    for i, (x, y) in enumerate(zip(predictions, targets, strict=True)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"predictions[{i}] must be floating point: got {x.dtype}.")
        if x.shape != y.shape:
            raise ValueError(
                f"predictions[{i}] and its target must share a shape: "
                f"got {list(x.shape)} and {list(y.shape)}."
            )
        if x.device != y.device:
            raise RuntimeError(f"predictions[{i}] is on {x.device}, its target on {y.device}.")
    for i, (x, mask) in enumerate(zip(predictions, masks, strict=False)):
        if mask.dtype != torch.bool:
            raise TypeError(f"masks[{i}] must be a bool tensor: got {mask.dtype}.")
        if mask.shape != x.shape[: mask.ndim]:
            raise ValueError(
                f"masks[{i}] must have the first dimensions of predictions[{i}], "
                f"{list(x.shape)}: got {list(mask.shape)}."
            )
        if mask.device != x.device:
            raise RuntimeError(f"masks[{i}] is on {mask.device}, predictions[{i}] on {x.device}.")


# --- reference ------------------------------------------------------------------------------------


def elementwise(prediction: Tensor, target: Tensor, distance: str) -> Tensor:
    """The distance of each element. A cross-entropy of what is no probability is NaN.

    torch's own cross-entropy ends the CUDA context (a device-side assert) over one number outside
    [0, 1], a NaN included, and refuses to run under CUDA autocast even on float32.
    """
    if distance == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    if distance == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    if distance == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none")
    if distance == "binary_cross_entropy_with_logits":
        return F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    valid = (prediction >= 0) & (prediction <= 1)
    with torch.autocast("cuda", enabled=False) if prediction.is_cuda else nullcontext():
        inside = prediction.where(valid, torch.zeros_like(prediction))
        loss = F.binary_cross_entropy(inside, target, reduction="none")
    return loss.where(valid, torch.full_like(loss, torch.nan))


def _expanded(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of the first dimensions, over all of them."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim)).expand_as(like)


def _losses(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    distances: Sequence[int],
    weights: Sequence[float],
    mean: bool,
) -> list[Tensor]:
    losses = []
    for i, (x, y) in enumerate(zip(predictions, targets, strict=True)):
        loss = elementwise(
            x, y.to(x.dtype) if y.dtype == torch.bool else y, DISTANCES[distances[i]]
        )
        if masks:
            mask = _expanded(masks[i], loss)
            # Selected, not multiplied: what does not count may not be finite.
            loss = torch.where(mask, loss, torch.zeros_like(loss))
            reduced = loss.sum() / mask.sum().clamp_min(1) if mean else loss.sum()
        else:
            reduced = loss.mean() if mean else loss.sum()
        losses.append(weights[i] * reduced)
    return losses


def _derivative(x: Tensor, y: Tensor, distance: str) -> Tensor:
    if distance == "l1":
        return (x - y).sign()
    if distance == "l2":
        return 2 * (x - y)
    if distance == "smooth_l1":
        return (x - y).clamp(-1, 1)
    if distance == "binary_cross_entropy_with_logits":
        return x.sigmoid() - y
    valid = (x >= 0) & (x <= 1)
    x = x.where(valid, 0.5)
    return torch.where(valid, (x - y) / ((1 - x) * x).clamp_min(1e-12), 0)


def _backward(
    grads: Sequence[Tensor],
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    distances: Sequence[int],
    weights: Sequence[float],
    mean: bool,
) -> list[Tensor]:
    """The gradient of each prediction. Differentiable itself, which gives second derivatives."""
    out = []
    for i, (grad, x, y) in enumerate(zip(grads, predictions, targets, strict=True)):
        slope = _derivative(x, y.to(x.dtype), DISTANCES[distances[i]])
        scale = grad * weights[i]
        if masks:
            mask = _expanded(masks[i], x)
            slope = torch.where(mask, slope, 0)
            scale = scale / mask.sum().clamp_min(1) if mean else scale
        elif mean:
            scale = scale / max(x.numel(), 1)
        out.append(slope * scale)
    return out


# --- op: definition, fallback, autograd, fake -----------------------------------------------------

_INPUT = (
    "Tensor[] predictions, Tensor[] targets, Tensor[] masks, int[] distances, float[] weights, "
    "bool mean"
)
LIBRARY.define(f"sub_losses({_INPUT}) -> Tensor[]")
LIBRARY.define(f"sub_losses_backward(Tensor[] grads, {_INPUT}) -> Tensor[]")


def _forward_anywhere(*args: Any) -> list[Tensor]:
    return _losses(*args)


def _backward_anywhere(*args: Any) -> list[Tensor]:
    return [x.contiguous() for x in _backward(*args)]


def _forward_fake(predictions: list[Tensor], *args: Any) -> list[Tensor]:
    return [x.new_empty(()) for x in predictions]


def _backward_fake(grads: list[Tensor], predictions: list[Tensor], *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in predictions]


class _Fused(torch.autograd.Function):
    """One node for all pairs that acts as a node each: a loss of which no gradient is asked gives
    none (not zeros) to its prediction, and each can be differentiated on its own.

    Not ``torch.library.register_autograd``, which takes 150 us for lists of tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        masks: list[Tensor],
        distances: list[int],
        weights: list[float],
        mean: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(distances)
        predictions, targets = list(tensors[:n]), list(tensors[n:])
        losses = torch.ops.fastwm.sub_losses(predictions, targets, masks, distances, weights, mean)
        needed = ctx.needs_input_grad[4:]
        ctx.mark_non_differentiable(
            *(x for i, x in enumerate(losses) if not (needed[i] or needed[n + i]))
        )
        ctx.set_materialize_grads(False)
        # Not saved by autograd, which would free them all after the first of several losses.
        ctx.inputs = (predictions, targets, masks, distances, weights)
        ctx.mean = mean
        ctx.versions = _versions([*tensors, *masks])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(grads)
        if ctx.versions != _versions([x for tensors in ctx.inputs[:3] for x in tensors]):
            raise RuntimeError(
                "One of the predictions, targets or masks of a loss, which its gradient needs, has "
                "been modified by an inplace operation."
            )
        asked = [i for i, grad in enumerate(grads) if grad is not None]
        # The kernel has no derivative of its own: with create_graph the reference runs, and
        # autograd through it.
        op: Any = torch.ops.fastwm.sub_losses_backward
        function: Any = _backward if torch.is_grad_enabled() else op
        lists = ([x[i] for i in asked] if x else [] for x in ctx.inputs)
        out: list[Tensor | None] = [None] * (2 * n)
        if asked:
            results = function([grads[i] for i in asked], *lists, ctx.mean)
            for i, grad in zip(asked, results, strict=True):
                out[i] = grad
                # Every distance whose target may require a gradient is one of the difference: a
                # latent that the model itself encodes.
                out[n + i] = -grad if ctx.needs_input_grad[4 + n + i] else None
        return None, None, None, None, *out


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Counters of in-place changes; tensors of inference mode have none, and cannot be trained."""
    return [0 if x.is_inference() else x._version for x in tensors]


implement(
    "sub_losses",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
)
