"""The two-hot cross-entropy on CUDA: one launch forward, one backward; semantics in
``fastwm/ops/two_hot_cross_entropy.py``.

A program takes a row: its logits and the support are in registers, and the softmax, the place of
the target and the gradient are made from them without another trip to memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build, signature
from fastwm.kernels.elementary import log1p

__all__ = [
    "MOST_BINS",
    "backward",
    "builds",
    "forward",
    "two_hot_bwd_kernel",
    "two_hot_fwd_kernel",
]

# A row has to fit the registers of a program. DreamerV3 has 255 bins, TD-MPC2 101.
MOST_BINS = 4096


@triton.jit
def _place(b_target, b_bins, p_bins, mask, n_bins, SYMLOG: tl.constexpr):
    """Lower bin, weight of the upper one, its slope in the target."""
    b_x = b_target
    b_slope = tl.full((), 1.0, b_target.dtype)
    if SYMLOG:
        b_size = tl.abs(b_target)
        b_x = tl.where(b_target < 0, -log1p(b_size), log1p(b_size))
        b_slope = 1.0 / (1.0 + b_size)
    b_low = tl.load(p_bins)
    b_high = tl.load(p_bins + n_bins - 1)
    b_slope = tl.where((b_x < b_low) | (b_x > b_high), 0.0, b_slope)
    b_x = tl.where(b_x < b_low, b_low, tl.where(b_x > b_high, b_high, b_x))
    i_lower = tl.sum(((b_x >= b_bins) & mask).to(tl.int32), 0) - 1
    i_lower = tl.minimum(tl.maximum(i_lower, 0), n_bins - 2)
    b_from = tl.load(p_bins + i_lower)
    b_width = tl.load(p_bins + i_lower + 1) - b_from
    return i_lower, (b_x - b_from) / b_width, b_slope / b_width


@triton.jit
def two_hot_fwd_kernel(
    p_logits, p_target, p_bins, p_loss, n_bins, SYMLOG: tl.constexpr, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_bin = tl.arange(0, BLOCK)
    mask = o_bin < n_bins
    p_logits += i_row * n_bins
    b_logits = tl.load(p_logits + o_bin, mask=mask, other=-float("inf"))
    b_bins = tl.load(p_bins + o_bin, mask=mask, other=0.0)
    i_lower, b_upper, _ = _place(tl.load(p_target + i_row), b_bins, p_bins, mask, n_bins, SYMLOG)
    b_max = tl.max(b_logits, 0)
    b_log_sum = tl.log(tl.sum(tl.where(mask, tl.exp(b_logits - b_max), 0.0), 0))
    b_below = b_log_sum - (tl.load(p_logits + i_lower) - b_max)
    b_above = b_log_sum - (tl.load(p_logits + i_lower + 1) - b_max)
    tl.store(p_loss + i_row, (1.0 - b_upper) * b_below + b_upper * b_above)


@triton.jit
def two_hot_bwd_kernel(
    p_grad,
    p_logits,
    p_target,
    p_bins,
    p_grad_logits,
    p_grad_target,
    n_bins,
    SYMLOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_bin = tl.arange(0, BLOCK)
    mask = o_bin < n_bins
    p_logits += i_row * n_bins
    b_grad = tl.load(p_grad + i_row)
    b_logits = tl.load(p_logits + o_bin, mask=mask, other=-float("inf"))
    b_bins = tl.load(p_bins + o_bin, mask=mask, other=0.0)
    i_lower, b_upper, b_slope = _place(
        tl.load(p_target + i_row), b_bins, p_bins, mask, n_bins, SYMLOG
    )
    b_exp = tl.where(mask, tl.exp(b_logits - tl.max(b_logits, 0)), 0.0)
    b_two_hot = tl.where(o_bin == i_lower, 1.0 - b_upper, 0.0)
    b_two_hot = tl.where(o_bin == i_lower + 1, b_upper, b_two_hot)
    b_grad_logits = b_grad * (b_exp / tl.sum(b_exp, 0) - b_two_hot)
    tl.store(p_grad_logits + i_row * n_bins + o_bin, b_grad_logits, mask=mask)
    b_difference = tl.load(p_logits + i_lower) - tl.load(p_logits + i_lower + 1)
    tl.store(p_grad_target + i_row, b_grad * b_slope * b_difference)


def forward(logits: Tensor, target: Tensor, bins: Tensor, symlog: bool) -> Tensor:
    """Run ``two_hot_fwd_kernel``; arguments and result are those of
    ``fastwm::two_hot_cross_entropy``.

    Raises:
        RuntimeError: more than ``MOST_BINS`` bins.
    """
    loss = logits.new_empty(logits.shape[:-1])
    inputs = (logits.contiguous(), target.contiguous(), bins.contiguous())
    _launch(two_hot_fwd_kernel, loss.numel(), (*inputs, loss), bins.numel(), symlog)
    return loss


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, bins: Tensor, symlog: bool
) -> tuple[Tensor, Tensor]:
    """Run ``two_hot_bwd_kernel``; arguments and results are those of
    ``fastwm::two_hot_cross_entropy_backward``."""
    outputs = (logits.new_empty(logits.shape), target.new_empty(target.shape))
    inputs = (grad.contiguous(), logits.contiguous(), target.contiguous(), bins.contiguous())
    _launch(two_hot_bwd_kernel, grad.numel(), (*inputs, *outputs), bins.numel(), symlog)
    return outputs


def _launch(
    kernel: Any, n_rows: int, tensors: tuple[Tensor, ...], n_bins: int, symlog: bool
) -> None:
    if n_bins > MOST_BINS:
        raise RuntimeError(f"The CUDA kernel takes up to {MOST_BINS} bins: got {n_bins}.")
    if not n_rows:
        return
    block = triton.next_power_of_2(n_bins)
    with torch.cuda.device_of(tensors[0]):
        kernel[(n_rows,)](*tensors, n_bins, SYMLOG=symlog, BLOCK=block, **_options(block))


def _options(block: int) -> dict[str, Any]:
    return {"num_warps": min(8, max(1, block // 256)), "num_stages": 1}


def builds() -> Iterator[Build]:
    """Either support in either dtype at the usual number of bins, and the widest row."""
    for kernel in (two_hot_fwd_kernel, two_hot_bwd_kernel):
        for dtype, symlog, block in (
            ("fp32", False, 256),
            ("fp32", True, 256),
            ("fp64", True, 256),
            ("fp32", True, MOST_BINS),
            ("fp64", True, MOST_BINS),
        ):
            constexprs = {"SYMLOG": symlog, "BLOCK": block}
            types = signature(kernel, constexprs, dtype, lambda n: "i32")
            variant = f"{dtype}-{'log' if symlog else 'raw'}-{block}"
            yield Build(variant, kernel, types, constexprs, _options(block))
