r"""The cross-entropy between categorical logits and the two-hot encoding of a scalar.

A target x between two neighbouring bins :math:`b_i \le x \le b_{i+1}` puts the weight
:math:`w = (x - b_i) / (b_{i+1} - b_i)` on the upper one and :math:`1 - w` on the lower one; beyond
the bins it is clamped to them. The loss is

.. math:: -(1 - w) \log p_i - w \log p_{i+1}, \quad p = \mathrm{softmax}(\text{logits}),

and its gradient softmax minus two-hot. Neither the encoding nor the softmax is ever built.

Source: Hafner et al., Mastering Diverse Domains through World Models (DreamerV3), arXiv:2301.04104;
Hansen et al., TD-MPC2, arXiv:2310.16828. Semantics for a tensor of bins are those of
``torchrl.objectives.two_hot_cross_entropy`` (torchrl 0.14).

The ops return fresh tensors and write into nothing. CPU: ``csrc/two_hot_cross_entropy.cpp``; CUDA:
``kernels/two_hot_cross_entropy.py``; any other device: the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwm.ops.library import LIBRARY, implement, in_kernel

__all__ = ["two_hot_cross_entropy", "two_hot_cross_entropy_reference"]


def two_hot_cross_entropy(
    logits: Tensor, target: Tensor, bins: Tensor | tuple[float, float]
) -> Tensor:
    """Two-hot cross-entropy of each row, differentiable in the logits and the target.

    Args:
        logits: ``[*batch, bins]``, at least two bins, floating point.
        target: the scalars, ``[*batch]`` or ``[*batch, 1]``, floating point.
        bins: the support: a tensor ``[bins]``, ascending, in the units of the target (that of
            DreamerV3 is ``symexp(linspace(-20, 20, 255))``). Or a pair ``(low, high)``: bins spaced
            evenly from low to high, between which ``symlog(target)`` is placed (TD-MPC2 has
            ``(-10, 10)``).

    Returns:
        the loss of each row: a fresh tensor ``[*batch]``.

    Raises:
        TypeError: logits or target that are not floating point.
        ValueError: shapes that do not fit (named in the message); fewer than two bins; a pair that
            does not ascend.
        RuntimeError: tensors on different devices.

    float32 and float64 run in a kernel. Other dtypes, mixed dtypes, bins that require a gradient
    and calls within a ``torch.func`` transform run on :func:`two_hot_cross_entropy_reference`, as
    does a CPU without the C++ library, and on CUDA a row of more than 4096 bins.

    Example:
        >>> import torch, fastwm
        >>> logits = torch.zeros(2, 3)
        >>> fastwm.two_hot_cross_entropy(logits, torch.tensor([-0.5, 9.0]), (-1.0, 1.0))
        tensor([1.0986, 1.0986])
    """
    target, bins_, symlog = _as_tensors(logits, target, bins)
    kernel = in_kernel(logits, target, bins_) and not bins_.requires_grad
    function = torch.ops.fastwm.two_hot_cross_entropy.default if kernel else _loss
    return function(logits, target, bins_, symlog)


def two_hot_cross_entropy_reference(
    logits: Tensor, target: Tensor, bins: Tensor | tuple[float, float]
) -> Tensor:
    """What :func:`two_hot_cross_entropy` is held against, in plain torch operations, on any device
    and dtype.

    Example:
        >>> import torch, fastwm
        >>> from fastwm.ops import two_hot_cross_entropy_reference
        >>> logits, target = torch.randn(5, 7), torch.randn(5, 1)
        >>> expected = two_hot_cross_entropy_reference(logits, target, (-2.0, 2.0))
        >>> torch.allclose(fastwm.two_hot_cross_entropy(logits, target, (-2.0, 2.0)), expected)
        True
    """
    return _loss(logits, *_as_tensors(logits, target, bins))


# --- input ----------------------------------------------------------------------------------------


def _as_tensors(
    logits: Tensor, target: Tensor, bins: Tensor | tuple[float, float]
) -> tuple[Tensor, Tensor, bool]:
    """The target without its last dimension of 1, the support, and whether the target is to be put
    through symlog first."""
    for name, x in (("logits", logits), ("target", target)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point: got {x.dtype}.")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must be [*batch, bins] with at least 2 bins: got {list(logits.shape)}."
        )
    batch, n = logits.shape[:-1], logits.shape[-1]
    if target.shape == (*batch, 1):
        target = target.squeeze(-1)
    if target.shape != batch:
        raise ValueError(
            f"target must be {list(batch)} or {[*batch, 1]} for logits of shape "
            f"{list(logits.shape)}: got {list(target.shape)}."
        )
    if target.device != logits.device:
        raise RuntimeError(
            "All input tensors must be on one device: "
            f"target is on {target.device}, logits on {logits.device}."
        )
    symlog = not isinstance(bins, Tensor)
    if isinstance(bins, Tensor):
        if bins.shape != (n,):
            raise ValueError(
                f"bins must be [{n}] for logits of shape {list(logits.shape)}: "
                f"got {list(bins.shape)}."
            )
        bins = bins.to(device=target.device, dtype=target.dtype)
    else:
        low, high = bins
        if not low < high:
            raise ValueError(f"bins must be (low, high) with low < high: got {(low, high)}.")
        bins = torch.linspace(low, high, n, dtype=target.dtype, device=target.device)
    return target, bins, symlog


# --- reference ------------------------------------------------------------------------------------


def _place(target: Tensor, bins: Tensor, symlog: bool) -> tuple[Tensor, Tensor]:
    """The lower of the two bins that each target lies between, and the weight of the upper one."""
    if symlog:
        # copysign and not sign, whose derivative would leave none at 0.
        target = torch.where(target == 0, target, target.abs().log1p().copysign(target))
    target = target.clamp(bins[0], bins[-1])
    lower = (target.detach().unsqueeze(-1) >= bins).sum(-1) - 1
    lower = lower.clamp(0, bins.numel() - 2)
    return lower, (target - bins[lower]) / (bins[lower + 1] - bins[lower])


def _loss(logits: Tensor, target: Tensor, bins: Tensor, symlog: bool) -> Tensor:
    lower, upper_weight = _place(target, bins, symlog)
    log_p = logits.log_softmax(-1)
    below = log_p.gather(-1, lower.unsqueeze(-1)).squeeze(-1)
    above = log_p.gather(-1, lower.unsqueeze(-1) + 1).squeeze(-1)
    return -((1 - upper_weight) * below + upper_weight * above)


def _backward(
    grad: Tensor, logits: Tensor, target: Tensor, bins: Tensor, symlog: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and the target. Differentiable itself, which gives second
    derivatives."""
    lower, upper_weight = _place(target, bins, symlog)
    two_hot = torch.zeros_like(logits)
    two_hot = two_hot.scatter(-1, lower.unsqueeze(-1), (1 - upper_weight).unsqueeze(-1))
    two_hot = two_hot.scatter(-1, lower.unsqueeze(-1) + 1, upper_weight.unsqueeze(-1))
    placed = target.abs().log1p().copysign(target) if symlog else target
    slope = ((placed >= bins[0]) & (placed <= bins[-1])) / (bins[lower + 1] - bins[lower])
    slope = slope / (1 + target.abs()) if symlog else slope
    below = logits.gather(-1, lower.unsqueeze(-1)).squeeze(-1)
    above = logits.gather(-1, lower.unsqueeze(-1) + 1).squeeze(-1)
    to_logits = grad.unsqueeze(-1) * (logits.softmax(-1) - two_hot)
    return to_logits, grad * slope * (below - above)


# --- op: definition, fallback, fake, autograd -----------------------------------------------------

_INPUT = "Tensor logits, Tensor target, Tensor bins, bool symlog"
LIBRARY.define(f"two_hot_cross_entropy({_INPUT}) -> Tensor")
LIBRARY.define(f"two_hot_cross_entropy_backward(Tensor grad, {_INPUT}) -> (Tensor, Tensor)")


def _forward_anywhere(logits: Tensor, *args: Any) -> Tensor:
    return _loss(logits, *args).contiguous()


def _backward_anywhere(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    to_logits, to_target = _backward(grad, *args)
    return to_logits.contiguous(), to_target.contiguous()


def _forward_fake(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape[:-1])


def _backward_fake(
    grad: Tensor, logits: Tensor, target: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), target.new_empty(target.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.symlog = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The kernel has no derivative of its own: with create_graph the reference runs, and autograd
    # through it.
    op: Any = torch.ops.fastwm.two_hot_cross_entropy_backward
    function: Any = _backward if torch.is_grad_enabled() else op
    to_logits, to_target = function(grad, *ctx.saved_tensors, ctx.symlog)
    return to_logits, to_target, None, None


implement(
    "two_hot_cross_entropy",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
    autograd=(_setup_context, _autograd),
    fits=lambda kernels, *args: args[-2].numel() <= kernels.MOST_BINS,
)
