"""The Gaussian loss with soft bounds on CUDA: one launch forward; one backward and a sum over its
blocks of rows; semantics in ``fastwm/ops/gaussian_nll.py``.

Forward, a program takes a tile of rows and walks their features. Backward, it takes some features
and walks a fixed number of rows, so that the bounds' gradients are summed in one order, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build, signature
from fastwm.kernels.elementary import log1p, sigmoid

__all__ = ["backward", "builds", "forward", "gaussian_nll_bwd_kernel", "gaussian_nll_fwd_kernel"]

# Elements that a program holds at a time, and how many of them may be features.
TILE, MOST_FEATURES = 512, 64
# Rows that a program of the backward walks.
ROWS = 64
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _softplus(x):
    return tl.where(x > 0.0, x, 0.0 * x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def gaussian_nll_fwd_kernel(
    p_mean,
    p_logvar,
    p_target,
    p_max_logvar,
    p_min_logvar,
    p_loss,
    n_rows,
    n_features,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_loss = tl.zeros((BLOCK_R,), p_loss.dtype.element_ty)
    for i_f in range(0, n_features, BLOCK_F):
        o_f = i_f + tl.arange(0, BLOCK_F)
        mask_f = o_f < n_features
        mask = (o_row < n_rows)[:, None] & mask_f[None, :]
        o_at = o_row[:, None] * n_features + o_f[None, :]
        b_max = tl.load(p_max_logvar + o_f, mask=mask_f, other=0.0)[None, :]
        b_min = tl.load(p_min_logvar + o_f, mask=mask_f, other=0.0)[None, :]
        b_below_max = b_max - _softplus(b_max - tl.load(p_logvar + o_at, mask=mask, other=0.0))
        b_logvar = b_min + _softplus(b_below_max - b_min)
        b_error = tl.load(p_mean + o_at, mask=mask, other=0.0)
        b_error -= tl.load(p_target + o_at, mask=mask, other=0.0)
        b_terms = b_error * b_error * tl.exp(-b_logvar) + b_logvar
        b_loss += tl.sum(tl.where(mask, b_terms, 0.0), 1)
    tl.store(p_loss + o_row, b_loss, mask=o_row < n_rows)


@triton.jit
def gaussian_nll_bwd_kernel(
    p_grad,
    p_mean,
    p_logvar,
    p_target,
    p_max_logvar,
    p_min_logvar,
    p_grad_mean,
    p_grad_logvar,
    p_share_max,
    p_share_min,
    n_rows,
    n_features,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = o_f < n_features
    dtype = p_grad_mean.dtype.element_ty
    b_max = tl.load(p_max_logvar + o_f, mask=mask_f, other=0.0)[None, :]
    b_min = tl.load(p_min_logvar + o_f, mask=mask_f, other=0.0)[None, :]
    b_share_max = tl.zeros((BLOCK_F,), dtype)
    b_share_min = tl.zeros((BLOCK_F,), dtype)
    for i_r in range(0, ROWS, BLOCK_R):
        o_row = i_block * ROWS + i_r + tl.arange(0, BLOCK_R)
        mask = (o_row < n_rows)[:, None] & mask_f[None, :]
        o_at = o_row[:, None] * n_features + o_f[None, :]
        b_grad = tl.load(p_grad + o_row, mask=o_row < n_rows, other=0.0)[:, None]
        b_to_max = b_max - tl.load(p_logvar + o_at, mask=mask, other=0.0)
        b_to_min = b_max - _softplus(b_to_max) - b_min
        b_precision = tl.exp(-(b_min + _softplus(b_to_min)))
        b_error = tl.load(p_mean + o_at, mask=mask, other=0.0)
        b_error -= tl.load(p_target + o_at, mask=mask, other=0.0)
        b_to_bounded = b_grad * (1.0 - b_error * b_error * b_precision)
        b_to_below_max = b_to_bounded * sigmoid(b_to_min)
        tl.store(p_grad_mean + o_at, b_grad * 2.0 * b_error * b_precision, mask=mask)
        tl.store(p_grad_logvar + o_at, b_to_below_max * sigmoid(b_to_max), mask=mask)
        b_share_max += tl.sum(tl.where(mask, b_to_below_max * sigmoid(-b_to_max), 0.0), 0)
        b_share_min += tl.sum(tl.where(mask, b_to_bounded * sigmoid(-b_to_min), 0.0), 0)
    tl.store(p_share_max + i_block * n_features + o_f, b_share_max, mask=mask_f)
    tl.store(p_share_min + i_block * n_features + o_f, b_share_min, mask=mask_f)


def forward(
    mean: Tensor, logvar: Tensor, target: Tensor, max_logvar: Tensor, min_logvar: Tensor
) -> Tensor:
    """Run ``gaussian_nll_fwd_kernel``; arguments and result are those of
    ``fastwm::gaussian_nll``."""
    loss = mean.new_empty(mean.shape[:-1])
    n_rows, n_features = loss.numel(), mean.shape[-1]
    inputs = [x.contiguous() for x in (mean, logvar, target, max_logvar, min_logvar)]
    tile = _tile(n_features)
    if n_rows:
        with torch.cuda.device_of(mean):
            gaussian_nll_fwd_kernel[(triton.cdiv(n_rows, tile["BLOCK_R"]),)](
                *inputs, loss, n_rows, n_features, **tile, **LAUNCH
            )
    return loss


def backward(
    grad: Tensor,
    mean: Tensor,
    logvar: Tensor,
    target: Tensor,
    max_logvar: Tensor,
    min_logvar: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``gaussian_nll_bwd_kernel``; arguments and results are those of
    ``fastwm::gaussian_nll_backward``."""
    n_rows, n_features = grad.numel(), mean.shape[-1]
    outputs = (mean.new_empty(mean.shape), logvar.new_empty(logvar.shape))
    inputs = [x.contiguous() for x in (grad, mean, logvar, target, max_logvar, min_logvar)]
    shares = mean.new_empty((2, triton.cdiv(n_rows, ROWS), n_features))
    tile = _tile(n_features)
    if mean.numel():
        grid = (shares.shape[1], triton.cdiv(n_features, tile["BLOCK_F"]))
        with torch.cuda.device_of(mean):
            gaussian_nll_bwd_kernel[grid](
                *inputs, *outputs, *shares, n_rows, n_features, ROWS=ROWS, **tile, **LAUNCH
            )
    to_max, to_min = (share.sum(0) for share in shares)
    return (*outputs, to_max, to_min)


def _tile(n_features: int) -> dict[str, int]:
    block = min(MOST_FEATURES, triton.next_power_of_2(max(n_features, 1)))
    return {"BLOCK_R": min(ROWS, TILE // block), "BLOCK_F": block}


def builds() -> Iterator[Build]:
    """Few features and many, in either dtype."""
    for kernel in (gaussian_nll_fwd_kernel, gaussian_nll_bwd_kernel):
        for dtype in ("fp32", "fp64"):
            for n_features in (16, MOST_FEATURES):
                constexprs: dict[str, Any] = {"ROWS": ROWS, **_tile(n_features)}
                constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
                types = signature(kernel, constexprs, dtype, lambda n: "i32")
                yield Build(f"{dtype}-{n_features}", kernel, types, constexprs, LAUNCH)
