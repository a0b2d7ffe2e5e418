r"""The balanced KL divergence of DreamerV3 between a posterior and a prior of categoricals.

Both are softmaxes, each mixed with a uniform distribution, :math:`(1 - u)\,\mathrm{softmax} + u/C`.
With the divergence summed over the groups of a row, and sg for a stopped gradient, the loss is

.. math:: \beta_{dyn} \max(\mathrm{free}, \mathrm{KL}[\mathrm{sg}(q) \,\|\, p])
          + \beta_{rep} \max(\mathrm{free}, \mathrm{KL}[q \,\|\, \mathrm{sg}(p)]).

Source: Hafner et al., Mastering Diverse Domains through World Models (DreamerV3), arXiv:2301.04104,
equations 4 and 5. The two terms are those of ``torchrl.objectives.categorical_kl_terms`` (torchrl
0.14), which returns their means over the rows.

The ops return fresh tensors and write into nothing. CPU: ``csrc/balanced_kl.cpp``; CUDA:
``kernels/balanced_kl.py``; any other device: the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwm.ops.library import LIBRARY, implement, in_kernel

__all__ = ["balanced_kl", "balanced_kl_reference"]


def balanced_kl(
    posterior_logits: Tensor,
    prior_logits: Tensor,
    *,
    dynamics_scale: float = 1.0,
    representation_scale: float = 0.1,
    free_nats: float = 1.0,
    unimix: float = 0.01,
) -> Tensor:
    """Balanced KL divergence of each row, differentiable in both logits.

    The dynamics term trains the prior and the representation term the posterior; both have the same
    value. Where the divergence is below the free nats neither is trained.

    Args:
        posterior_logits: ``[*batch, groups, classes]``, floating point.
        prior_logits: same shape.
        dynamics_scale: factor of the dynamics term.
        representation_scale: factor of the representation term.
        free_nats: the least that a divergence, summed over the groups, counts for. 0: no bound.
        unimix: fraction of uniform probability in each categorical, in [0, 1).

    Returns:
        the loss of each row: a fresh tensor ``[*batch]``.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes that differ (named in the message) or have fewer than two dimensions; a
            ``unimix`` outside [0, 1).
        RuntimeError: tensors on different devices.

    float32 and float64 run in a kernel. Other dtypes, mixed dtypes and calls within a
    ``torch.func`` transform run on :func:`balanced_kl_reference`, as does a CPU without the C++
    library, and on CUDA a group of more than 1024 classes.

    Example:
        >>> import torch, fastwm
        >>> posterior, prior = torch.randn(2, 16, 32, 8, requires_grad=True)
        >>> fastwm.balanced_kl(posterior, prior).shape
        torch.Size([16])
    """
    _check(posterior_logits, prior_logits, unimix)
    function: Any = torch.ops.fastwm.balanced_kl.default
    if not in_kernel(posterior_logits, prior_logits):
        function = _loss
    return function(
        posterior_logits, prior_logits, dynamics_scale, representation_scale, free_nats, unimix
    )


def balanced_kl_reference(
    posterior_logits: Tensor,
    prior_logits: Tensor,
    *,
    dynamics_scale: float = 1.0,
    representation_scale: float = 0.1,
    free_nats: float = 1.0,
    unimix: float = 0.01,
) -> Tensor:
    """What :func:`balanced_kl` is held against, in plain torch operations, on any device and dtype.

    Example:
        >>> import torch, fastwm
        >>> from fastwm.ops import balanced_kl_reference
        >>> posterior, prior = torch.randn(2, 16, 32, 8)
        >>> expected = balanced_kl_reference(posterior, prior)
        >>> torch.allclose(fastwm.balanced_kl(posterior, prior), expected)
        True
    """
    _check(posterior_logits, prior_logits, unimix)
    return _loss(
        posterior_logits, prior_logits, dynamics_scale, representation_scale, free_nats, unimix
    )


def _check(posterior: Tensor, prior: Tensor, unimix: float) -> None:
    for name, x in (("posterior_logits", posterior), ("prior_logits", prior)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point: got {x.dtype}.")
    if posterior.ndim < 2 or posterior.shape != prior.shape:
        raise ValueError(
            "posterior_logits and prior_logits must share a shape [*batch, groups, classes]: "
            f"got {list(posterior.shape)} and {list(prior.shape)}."
        )
    if posterior.device != prior.device:
        raise RuntimeError(
            "All input tensors must be on one device: "
            f"prior_logits is on {prior.device}, posterior_logits on {posterior.device}."
        )
    if not 0 <= unimix < 1:
        raise ValueError(f"unimix must be in [0, 1): got {unimix}.")


# --- reference ------------------------------------------------------------------------------------


def _mixed(logits: Tensor, unimix: float) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms."""
    if not unimix:
        # Not the logarithm of the softmax, which may have underflowed.
        return logits.softmax(-1), logits.log_softmax(-1)
    probs = (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]
    return probs, probs.log()


def _loss(
    posterior: Tensor,
    prior: Tensor,
    dynamics_scale: float,
    representation_scale: float,
    free_nats: float,
    unimix: float,
) -> Tensor:
    q, log_q = _mixed(posterior, unimix)
    _, log_p = _mixed(prior, unimix)
    dynamics = (q.detach() * (log_q.detach() - log_p)).sum((-1, -2))
    representation = (q * (log_q - log_p.detach())).sum((-1, -2))
    if free_nats:
        dynamics, representation = (
            dynamics.clamp_min(free_nats),
            representation.clamp_min(free_nats),
        )
    return dynamics_scale * dynamics + representation_scale * representation


def _backward(
    grad: Tensor,
    posterior: Tensor,
    prior: Tensor,
    dynamics_scale: float,
    representation_scale: float,
    free_nats: float,
    unimix: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits. Differentiable itself, which gives second derivatives."""
    q, log_q = _mixed(posterior, unimix)
    p, log_p = _mixed(prior, unimix)
    soft_q, soft_p = (x.softmax(-1) for x in (posterior, prior))
    ratio = log_q - log_p
    if free_nats:
        kl = (q * ratio).sum((-1, -2))
        grad = torch.where(kl < free_nats, 0, grad)  # NaN is not below, and spreads
    grad = grad[..., None, None]
    to_posterior = (1 - unimix) * soft_q * (ratio - (soft_q * ratio).sum(-1, keepdim=True))
    # (1 - unimix) * soft_p / p, which is 1 where nothing is mixed, also where both underflow.
    share = q * ((1 - unimix) * soft_p / p) if unimix else q
    to_prior = soft_p * share.sum(-1, keepdim=True) - share
    return grad * representation_scale * to_posterior, grad * dynamics_scale * to_prior


# --- op: definition, fallback, fake, autograd -----------------------------------------------------

_INPUT = (
    "Tensor posterior, Tensor prior, float dynamics_scale, float representation_scale, "
    "float free_nats, float unimix"
)
LIBRARY.define(f"balanced_kl({_INPUT}) -> Tensor")
LIBRARY.define(f"balanced_kl_backward(Tensor grad, {_INPUT}) -> (Tensor, Tensor)")


def _forward_anywhere(*args: Any) -> Tensor:
    return _loss(*args).contiguous()


def _backward_anywhere(*args: Any) -> tuple[Tensor, Tensor]:
    to_posterior, to_prior = _backward(*args)
    return to_posterior.contiguous(), to_prior.contiguous()


def _forward_fake(posterior: Tensor, *args: Any) -> Tensor:
    return posterior.new_empty(posterior.shape[:-2])


def _backward_fake(
    grad: Tensor, posterior: Tensor, prior: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return posterior.new_empty(posterior.shape), prior.new_empty(prior.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    posterior, prior, *ctx.scalars = inputs
    ctx.save_for_backward(posterior, prior)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The kernel has no derivative of its own: with create_graph the reference runs, and autograd
    # through it. There the stopped gradients are stopped as well: each term has one parent.
    if torch.is_grad_enabled():
        to_posterior, to_prior = _second_order(grad, *ctx.saved_tensors, *ctx.scalars)
    else:
        op: Any = torch.ops.fastwm.balanced_kl_backward
        to_posterior, to_prior = op(grad, *ctx.saved_tensors, *ctx.scalars)
    return to_posterior, to_prior, None, None, None, None


def _second_order(
    grad: Tensor, posterior: Tensor, prior: Tensor, *scalars: float
) -> tuple[Tensor, Tensor]:
    """The gradients with the graph that autograd would have built over the reference: the gradient
    of each logits does not depend on the other's, which is detached in its term."""
    to_posterior, _ = _backward(grad, posterior, prior.detach(), *scalars)
    _, to_prior = _backward(grad, posterior.detach(), prior, *scalars)
    return to_posterior, to_prior


implement(
    "balanced_kl",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
    autograd=(_setup_context, _autograd),
    fits=lambda kernels, *args: args[-5].shape[-1] <= kernels.MOST_CLASSES,  # the prior's
)
