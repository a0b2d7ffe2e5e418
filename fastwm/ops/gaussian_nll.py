r"""The negative log-likelihood of a diagonal Gaussian, its log-variance held between soft bounds.

.. math:: m = \mathrm{max} - \mathrm{softplus}(\mathrm{max} - \mathrm{logvar}), \quad
          v = \mathrm{min} + \mathrm{softplus}(m - \mathrm{min}), \quad
          \sum_d (\mathrm{mean} - \mathrm{target})^2 e^{-v} + v.

(Twice the negative log-likelihood, without its constant.) Source: Chua et al., Deep Reinforcement
Learning in a Handful of Trials (PETS), arXiv:1805.12114, appendix A.1; Janner et al., When to Trust
Your Model (MBPO), arXiv:1906.08253. torchrl has no such function.

The ops return fresh tensors and write into nothing. CPU: ``csrc/gaussian_nll.cpp``; CUDA:
``kernels/gaussian_nll.py``; any other device: the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwm.ops.library import LIBRARY, implement, in_kernel

__all__ = ["gaussian_nll", "gaussian_nll_reference"]


def gaussian_nll(
    mean: Tensor, logvar: Tensor, target: Tensor, max_logvar: Tensor, min_logvar: Tensor
) -> Tensor:
    """Gaussian loss of each row, summed over its features; differentiable in everything.

    MBPO's own loss is its mean over the rows divided by the features, with
    ``0.01 * (max_logvar.sum() - min_logvar.sum())`` added, which draws the bounds together.

    Args:
        mean: predicted mean, ``[*batch, features]``, floating point.
        logvar: predicted log-variance before its bounds, same shape.
        target: same shape.
        max_logvar: upper bound, ``[features]``; any shape that expands to that of the mean is
            accepted.
        min_logvar: lower bound, likewise.

    Returns:
        the loss of each row: a fresh tensor ``[*batch]``.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that differ, or bounds that do not expand (named in the message).
        RuntimeError: tensors on different devices.

    float32 and float64 with bounds per feature, or one for all, run in a kernel. Other dtypes,
    mixed dtypes, other bounds and calls within a ``torch.func`` transform run on
    :func:`gaussian_nll_reference`, as does a CPU without the C++ library.

    Example:
        >>> import torch, fastwm
        >>> mean, logvar, target = torch.zeros(3, 4, 2)
        >>> loss = fastwm.gaussian_nll(mean, logvar, target, torch.full((2,), 0.5), torch.tensor(-10.0))
        >>> loss.shape
        torch.Size([4])
    """
    _check(mean, logvar, target, max_logvar, min_logvar)
    high, low = (_per_feature(x, mean.shape[-1]) for x in (max_logvar, min_logvar))
    if high is not None and low is not None and in_kernel(mean, logvar, target, high, low):
        return torch.ops.fastwm.gaussian_nll.default(mean, logvar, target, high, low)
    return _loss(mean, logvar, target, max_logvar, min_logvar)


def gaussian_nll_reference(
    mean: Tensor, logvar: Tensor, target: Tensor, max_logvar: Tensor, min_logvar: Tensor
) -> Tensor:
    """What :func:`gaussian_nll` is held against, in plain torch operations, on any device and
    dtype.

    Example:
        >>> import torch, fastwm
        >>> from fastwm.ops import gaussian_nll_reference
        >>> mean, logvar, target = torch.randn(3, 4, 2)
        >>> bounds = torch.full((2,), 0.5), torch.full((2,), -10.0)
        >>> expected = gaussian_nll_reference(mean, logvar, target, *bounds)
        >>> torch.allclose(fastwm.gaussian_nll(mean, logvar, target, *bounds), expected)
        True
    """
    _check(mean, logvar, target, max_logvar, min_logvar)
    return _loss(mean, logvar, target, max_logvar, min_logvar)


# --- input ----------------------------------------------------------------------------------------


def _check(mean: Tensor, logvar: Tensor, target: Tensor, *bounds: Tensor) -> None:
    tensors = {"mean": mean, "logvar": logvar, "target": target}
    tensors["max_logvar"], tensors["min_logvar"] = bounds
    if mean.ndim < 1:
        raise ValueError(f"mean must be [*batch, features]: got {list(mean.shape)}.")
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point: got {x.dtype}.")
        if name in ("logvar", "target") and x.shape != mean.shape:
            raise ValueError(
                f"mean, logvar and target must share a shape: {name} is {list(x.shape)}, "
                f"mean is {list(mean.shape)}."
            )
        if x.device != mean.device:
            raise RuntimeError(
                "All input tensors must be on one device: "
                f"{name} is on {x.device}, mean on {mean.device}."
            )
        leading = mean.ndim - x.ndim
        if x.shape == mean.shape[leading:]:
            continue
        if leading < 0 or any(
            size not in (1, of) for size, of in zip(x.shape, mean.shape[leading:], strict=True)
        ):
            raise ValueError(
                f"{name} must expand to the shape of the mean, {list(mean.shape)}: "
                f"got {list(x.shape)}."
            )


def _per_feature(bound: Tensor, features: int) -> Tensor | None:
    """A bound as the kernels take it, or None where rows have different ones."""
    if bound.shape == (features,):
        return bound
    if bound.numel() == 1:
        return bound.reshape(1).expand(features)
    return bound.reshape(features) if bound.shape[-1] == bound.numel() else None


# --- reference ------------------------------------------------------------------------------------


def _loss(
    mean: Tensor, logvar: Tensor, target: Tensor, max_logvar: Tensor, min_logvar: Tensor
) -> Tensor:
    logvar = max_logvar - F.softplus(max_logvar - logvar)
    logvar = min_logvar + F.softplus(logvar - min_logvar)
    return ((mean - target).square() * (-logvar).exp() + logvar).sum(-1)


def _backward(
    grad: Tensor,
    mean: Tensor,
    logvar: Tensor,
    target: Tensor,
    max_logvar: Tensor,
    min_logvar: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the mean, the log-variance and the bounds. Differentiable itself, which gives
    second derivatives."""
    grad = grad.unsqueeze(-1)
    to_max = max_logvar - logvar
    to_min = max_logvar - F.softplus(to_max) - min_logvar
    precision = (-(min_logvar + F.softplus(to_min))).exp()
    error = mean - target
    to_bounded = grad * (1 - error.square() * precision)
    to_below_max = to_bounded * to_min.sigmoid()
    rows = tuple(range(mean.ndim - 1))
    to_max_logvar, to_min_logvar = (
        to_below_max * (-to_max).sigmoid(),
        to_bounded * (-to_min).sigmoid(),
    )
    if rows:  # sum(()) would sum over everything
        to_max_logvar, to_min_logvar = to_max_logvar.sum(rows), to_min_logvar.sum(rows)
    to_logvar = to_below_max * to_max.sigmoid()
    return 2 * grad * error * precision, to_logvar, to_max_logvar, to_min_logvar


# --- op: definition, fallback, fake, autograd -----------------------------------------------------

_INPUT = "Tensor mean, Tensor logvar, Tensor target, Tensor max_logvar, Tensor min_logvar"
LIBRARY.define(f"gaussian_nll({_INPUT}) -> Tensor")
LIBRARY.define(f"gaussian_nll_backward(Tensor grad, {_INPUT}) -> (Tensor, Tensor, Tensor, Tensor)")


def _forward_anywhere(*args: Tensor) -> Tensor:
    return _loss(*args).contiguous()


def _backward_anywhere(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in _backward(*args))


def _forward_fake(mean: Tensor, *args: Tensor) -> Tensor:
    return mean.new_empty(mean.shape[:-1])


def _backward_fake(
    grad: Tensor, mean: Tensor, logvar: Tensor, target: Tensor, *bounds: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (mean, logvar, *bounds))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The kernel has no derivative of its own: with create_graph the reference runs, and autograd
    # through it.
    op: Any = torch.ops.fastwm.gaussian_nll_backward
    function: Any = _backward if torch.is_grad_enabled() else op
    to_mean, to_logvar, to_max, to_min = function(grad, *ctx.saved_tensors)
    to_target = -to_mean if ctx.needs_input_grad[2] else None
    return to_mean, to_logvar, to_target, to_max, to_min


implement(
    "gaussian_nll",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
    autograd=(_setup_context, _autograd),
)
