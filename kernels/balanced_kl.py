"""The balanced KL divergence on CUDA: one launch forward, one backward; semantics in
``fastwm/ops/balanced_kl.py``.

A program takes a row and walks its groups, some of them at a time. The backward walks them twice:
whether a row is trained at all is known only when its whole divergence is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build, signature
from fastwm.kernels.elementary import two_floats

__all__ = [
    "MOST_CLASSES",
    "backward",
    "balanced_kl_bwd_kernel",
    "balanced_kl_fwd_kernel",
    "builds",
    "forward",
]

# A group has to fit the registers of a program. DreamerV3 has up to 64 classes.
MOST_CLASSES = 1024
# Elements that a program holds at a time.
TILE = 1024


@triton.jit
def _softmax(p_logits, o_at, mask, mask_c):
    """Logits of a tile of groups, their softmax, and the logarithm of it."""
    b_x = tl.load(p_logits + o_at, mask=mask, other=0.0)
    b_x = tl.where(mask_c[None, :], b_x, -float("inf"))
    b_x = b_x - tl.max(b_x, 1)[:, None]
    b_exp = tl.where(mask_c[None, :], tl.exp(b_x), 0.0)
    b_sum = tl.sum(b_exp, 1)
    return b_exp / b_sum[:, None], b_x - tl.log(b_sum)[:, None]


@triton.jit
def _terms(
    p_posterior,
    p_prior,
    i_g,
    n_groups,
    n_classes,
    b_unimix,
    MIXED: tl.constexpr,
    TILE_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the groups from i_g on: places, mask, both softmaxes, q, log(q / p) and
    r = (1 - unimix) * softmax / p of the prior."""
    o_g, o_c = i_g + tl.arange(0, TILE_G), tl.arange(0, BLOCK_C)
    mask_c = o_c < n_classes
    mask = (o_g < n_groups)[:, None] & mask_c[None, :]
    o_at = o_g[:, None] * n_classes + o_c[None, :]
    b_soft_q, b_log_q = _softmax(p_posterior, o_at, mask, mask_c)
    b_soft_p, b_log_p = _softmax(p_prior, o_at, mask, mask_c)
    b_q = b_soft_q
    b_r = tl.full((TILE_G, BLOCK_C), 1.0, b_q.dtype)
    if MIXED:
        b_uniform = b_unimix / n_classes
        b_q = (1.0 - b_unimix) * b_soft_q + b_uniform
        b_p = (1.0 - b_unimix) * b_soft_p + b_uniform
        b_log_q, b_log_p = tl.log(b_q), tl.log(b_p)
        b_r = (1.0 - b_unimix) * b_soft_p / b_p
    b_ratio = tl.where(mask, b_log_q - b_log_p, 0.0)
    return o_at, mask, b_soft_q, b_soft_p, tl.where(mask, b_q, 0.0), b_ratio, b_r


@triton.jit
def _divergence(
    p_posterior,
    p_prior,
    n_groups,
    n_classes,
    b_unimix,
    MIXED: tl.constexpr,
    TILE_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b_kl = tl.zeros((), p_posterior.dtype.element_ty)
    for i_g in range(0, n_groups, TILE_G):
        _, _, _, _, b_q, b_ratio, _ = _terms(
            p_posterior, p_prior, i_g, n_groups, n_classes, b_unimix, MIXED, TILE_G, BLOCK_C
        )
        b_kl += tl.sum(b_q * b_ratio)
    return b_kl


@triton.jit
def balanced_kl_fwd_kernel(
    p_posterior,
    p_prior,
    p_loss,
    dynamics,
    dynamics_rest,
    representation,
    representation_rest,
    free_nats,
    free_nats_rest,
    unimix,
    unimix_rest,
    n_groups,
    n_classes,
    MIXED: tl.constexpr,
    FREE: tl.constexpr,
    TILE_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    dtype = p_loss.dtype.element_ty
    p_posterior += i_row * n_groups * n_classes
    p_prior += i_row * n_groups * n_classes
    b_unimix = tl.cast(unimix, dtype) + tl.cast(unimix_rest, dtype)
    b_kl = _divergence(p_posterior, p_prior, n_groups, n_classes, b_unimix, MIXED, TILE_G, BLOCK_C)
    if FREE:
        b_free = tl.cast(free_nats, dtype) + tl.cast(free_nats_rest, dtype)
        b_kl = tl.where(b_kl < b_free, b_free, b_kl)
    b_dynamics = tl.cast(dynamics, dtype) + tl.cast(dynamics_rest, dtype)
    b_representation = tl.cast(representation, dtype) + tl.cast(representation_rest, dtype)
    tl.store(p_loss + i_row, b_dynamics * b_kl + b_representation * b_kl)


@triton.jit
def balanced_kl_bwd_kernel(
    p_grad,
    p_posterior,
    p_prior,
    p_grad_posterior,
    p_grad_prior,
    dynamics,
    dynamics_rest,
    representation,
    representation_rest,
    free_nats,
    free_nats_rest,
    unimix,
    unimix_rest,
    n_groups,
    n_classes,
    MIXED: tl.constexpr,
    FREE: tl.constexpr,
    TILE_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    dtype = p_grad_prior.dtype.element_ty
    p_posterior += i_row * n_groups * n_classes
    p_prior += i_row * n_groups * n_classes
    p_grad_posterior += i_row * n_groups * n_classes
    p_grad_prior += i_row * n_groups * n_classes
    b_unimix = tl.cast(unimix, dtype) + tl.cast(unimix_rest, dtype)
    b_grad = tl.load(p_grad + i_row)
    b_below = b_grad != b_grad
    if FREE:
        b_kl = _divergence(
            p_posterior, p_prior, n_groups, n_classes, b_unimix, MIXED, TILE_G, BLOCK_C
        )
        b_below = b_kl < tl.cast(free_nats, dtype) + tl.cast(free_nats_rest, dtype)
    b_to_q = b_grad * (tl.cast(representation, dtype) + tl.cast(representation_rest, dtype))
    b_to_p = b_grad * (tl.cast(dynamics, dtype) + tl.cast(dynamics_rest, dtype))
    if MIXED:
        b_to_q *= 1.0 - b_unimix
    for i_g in range(0, n_groups, TILE_G):
        o_at, mask, b_soft_q, b_soft_p, b_q, b_ratio, b_r = _terms(
            p_posterior, p_prior, i_g, n_groups, n_classes, b_unimix, MIXED, TILE_G, BLOCK_C
        )
        b_mean = tl.sum(b_soft_q * b_ratio, 1)[:, None]
        b_share = b_q * b_r
        b_grad_q = b_to_q * b_soft_q * (b_ratio - b_mean)
        b_grad_p = b_to_p * (b_soft_p * tl.sum(b_share, 1)[:, None] - b_share)
        # A choice, not a product with 0: what is below may not be finite.
        if FREE:
            b_grad_q = tl.where(b_below, 0.0, b_grad_q)
            b_grad_p = tl.where(b_below, 0.0, b_grad_p)
        tl.store(p_grad_posterior + o_at, b_grad_q, mask=mask)
        tl.store(p_grad_prior + o_at, b_grad_p, mask=mask)


def forward(posterior: Tensor, prior: Tensor, *scalars: float) -> Tensor:
    """Run ``balanced_kl_fwd_kernel``; arguments and result are those of ``fastwm::balanced_kl``."""
    loss = posterior.new_empty(posterior.shape[:-2])
    inputs = (posterior.contiguous(), prior.contiguous())
    _launch(balanced_kl_fwd_kernel, loss.numel(), (*inputs, loss), posterior.shape, scalars)
    return loss


def backward(
    grad: Tensor, posterior: Tensor, prior: Tensor, *scalars: float
) -> tuple[Tensor, Tensor]:
    """Run ``balanced_kl_bwd_kernel``; arguments and results are those of
    ``fastwm::balanced_kl_backward``."""
    outputs = (posterior.new_empty(posterior.shape), prior.new_empty(prior.shape))
    inputs = (grad.contiguous(), posterior.contiguous(), prior.contiguous())
    _launch(balanced_kl_bwd_kernel, grad.numel(), (*inputs, *outputs), posterior.shape, scalars)
    return outputs


def _launch(
    kernel: Any,
    n_rows: int,
    tensors: tuple[Tensor, ...],
    shape: torch.Size,
    scalars: tuple[float, ...],
) -> None:
    n_groups, n_classes = shape[-2:]
    if n_classes > MOST_CLASSES:
        raise RuntimeError(f"The CUDA kernel takes up to {MOST_CLASSES} classes: got {n_classes}.")
    if not n_rows:
        return
    *_, free_nats, unimix = scalars
    with torch.cuda.device_of(tensors[0]):
        kernel[(n_rows,)](
            *tensors,
            *(part for scalar in scalars for part in two_floats(scalar)),
            n_groups,
            n_classes,
            MIXED=unimix != 0,
            FREE=free_nats != 0,
            **_tile(n_classes),
            **LAUNCH,
        )


LAUNCH = {"num_warps": 4, "num_stages": 1}


def _tile(n_classes: int) -> dict[str, int]:
    block = triton.next_power_of_2(max(n_classes, 1))
    return {"TILE_G": max(1, TILE // block), "BLOCK_C": block}


def builds() -> Iterator[Build]:
    """DreamerV3's 32 classes with and without mixture in either dtype, and the widest group."""
    for kernel in (balanced_kl_fwd_kernel, balanced_kl_bwd_kernel):
        for dtype, mixed, n_classes in (
            ("fp32", True, 32),
            ("fp32", False, 32),
            ("fp64", True, 32),
            ("fp32", True, MOST_CLASSES),
            ("fp64", True, MOST_CLASSES),
        ):
            constexprs: dict[str, Any] = {"MIXED": mixed, "FREE": True, **_tile(n_classes)}
            types = signature(
                kernel, constexprs, dtype, lambda n: "i32" if n.startswith("n_") else "fp32"
            )
            variant = f"{dtype}-{'mixed' if mixed else 'plain'}-{n_classes}"
            yield Build(variant, kernel, types, constexprs, LAUNCH)
