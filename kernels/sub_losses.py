"""The sub-losses of a world model on CUDA, up to four pairs a launch: one launch for the sums of
blocks and one for the losses; one backward. Semantics in ``fastwm/ops/sub_losses.py``.

A program takes a block of one pair's elements; which pair, its number says. Blocks are summed in one
order, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build
from fastwm.kernels.elementary import log1p, sigmoid, two_floats

__all__ = [
    "backward",
    "builds",
    "forward",
    "sub_losses_bwd_kernel",
    "sub_losses_finish_kernel",
    "sub_losses_fwd_kernel",
]

PAIRS = 4  # in one launch
BLOCK = 1024
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _distance(x, y, DISTANCE: tl.constexpr):
    """In the numbering of fastwm/ops/sub_losses.py."""
    if DISTANCE == 0:
        b_loss = tl.abs(x - y)
    elif DISTANCE == 1:
        b_loss = (x - y) * (x - y)
    elif DISTANCE == 2:
        b_size = tl.abs(x - y)
        b_loss = tl.where(b_size < 1.0, 0.5 * b_size * b_size, b_size - 0.5)
    elif DISTANCE == 3:
        # torch's bound on a logarithm, so that certainty costs 100 and not infinity.
        b_valid = (x >= 0.0) & (x <= 1.0)
        b_log = tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), -100.0)
        b_rest = tl.where(x < 1.0, log1p(-tl.where(x < 1.0, x, 0.0)), -100.0)
        b_log, b_rest = tl.maximum(b_log, -100.0), tl.maximum(b_rest, -100.0)
        b_loss = tl.where(b_valid, (y - 1.0) * b_rest - y * b_log, float("nan"))
    else:
        b_loss = tl.where(x <= 0.0, 0.0, x) - x * y + log1p(tl.exp(-tl.abs(x)))
    return b_loss


@triton.jit
def _derivative(x, y, DISTANCE: tl.constexpr):
    b_d = x - y
    if DISTANCE == 0:
        b_slope = tl.where(b_d > 0.0, 1.0, tl.where(b_d < 0.0, -1.0, 0.0))
    elif DISTANCE == 1:
        b_slope = b_d + b_d
    elif DISTANCE == 2:
        b_slope = tl.where(b_d > 1.0, 1.0, tl.where(b_d < -1.0, -1.0, b_d))
    elif DISTANCE == 3:
        b_valid = (x >= 0.0) & (x <= 1.0)
        b_slope = tl.where(b_valid, b_d / tl.maximum((1.0 - x) * x, 1e-12), 0.0)
    else:
        b_slope = sigmoid(x) - y
    return b_slope


@triton.jit
def _block_of(
    i_block, p_prediction, p_target, p_mask, n, per, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a block's elements are, which of them are there, which count, and both values."""
    o_at = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_at < n
    counts = inside
    if MASKED:
        counts = inside & (tl.load(p_mask + o_at // per, mask=inside, other=0) != 0)
    b_x = tl.load(p_prediction + o_at, mask=inside, other=0.0)
    b_y = tl.load(p_target + o_at, mask=inside, other=0).to(b_x.dtype)
    return o_at, inside, counts, b_x, b_y


@triton.jit
def _block_sum(
    i_block, p_prediction, p_target, p_mask, n, per, p_sum, p_count,
    DISTANCE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, _, counts, b_x, b_y = _block_of(
        i_block, p_prediction, p_target, p_mask, n, per, MASKED, BLOCK
    )
    # Selected, not multiplied: what does not count may not be finite.
    b_loss = tl.where(counts, _distance(b_x, b_y, DISTANCE), 0.0)
    tl.store(p_sum, tl.sum(b_loss, 0).to(p_sum.dtype.element_ty))
    tl.store(p_count, tl.sum(counts.to(tl.int32), 0))


@triton.jit
def _pair_loss(
    p_sums, p_counts, i_first, i_end, weight, weight_rest, p_out,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = p_sums.dtype.element_ty
    b_sums = tl.zeros((BLOCK,), dtype)
    b_counts = tl.zeros((BLOCK,), tl.int64)
    for i in range(i_first, i_end, BLOCK):
        o_at = i + tl.arange(0, BLOCK)
        b_sums += tl.load(p_sums + o_at, mask=o_at < i_end, other=0.0)
        b_counts += tl.load(p_counts + o_at, mask=o_at < i_end, other=0).to(tl.int64)
    b_loss = tl.sum(b_sums, 0)
    if MEAN:
        b_loss = b_loss / tl.maximum(tl.sum(b_counts, 0), 1).to(dtype)
    b_loss = (tl.cast(weight, dtype) + tl.cast(weight_rest, dtype)) * b_loss
    tl.store(p_out, b_loss.to(p_out.dtype.element_ty))


@triton.jit
def _block_grad(
    i_block, p_grad, p_prediction, p_target, p_mask, p_count, p_out, n, per, weight, weight_rest,
    DISTANCE: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_at, inside, counts, b_x, b_y = _block_of(
        i_block, p_prediction, p_target, p_mask, n, per, MASKED, BLOCK
    )
    dtype = p_out.dtype.element_ty
    b_scale = tl.load(p_grad) * (tl.cast(weight, dtype) + tl.cast(weight_rest, dtype))
    if MEAN:
        if MASKED:
            b_scale = b_scale / tl.load(p_count).to(dtype)
        else:
            b_scale = b_scale / tl.cast(n, dtype)
    b_grad = tl.where(counts, b_scale * _derivative(b_x, b_y, DISTANCE), 0.0)
    tl.store(p_out + o_at, b_grad, mask=inside)


@triton.jit
def sub_losses_fwd_kernel(
    p_prediction0,
    p_prediction1,
    p_prediction2,
    p_prediction3,
    p_target0,
    p_target1,
    p_target2,
    p_target3,
    p_mask0,
    p_mask1,
    p_mask2,
    p_mask3,
    p_sums,
    p_counts,
    n0,
    n1,
    n2,
    n3,
    per0,
    per1,
    per2,
    per3,
    end0,
    end1,
    end2,
    DISTANCE0: tl.constexpr,
    DISTANCE1: tl.constexpr,
    DISTANCE2: tl.constexpr,
    DISTANCE3: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    if i_block < end0:
        _block_sum(
            i_block,
            p_prediction0,
            p_target0,
            p_mask0,
            n0,
            per0,
            p_sums + i_block,
            p_counts + i_block,
            DISTANCE0,
            MASKED,
            BLOCK,
        )
    elif i_block < end1:
        _block_sum(
            i_block - end0,
            p_prediction1,
            p_target1,
            p_mask1,
            n1,
            per1,
            p_sums + i_block,
            p_counts + i_block,
            DISTANCE1,
            MASKED,
            BLOCK,
        )
    elif i_block < end2:
        _block_sum(
            i_block - end1,
            p_prediction2,
            p_target2,
            p_mask2,
            n2,
            per2,
            p_sums + i_block,
            p_counts + i_block,
            DISTANCE2,
            MASKED,
            BLOCK,
        )
    else:
        _block_sum(
            i_block - end2,
            p_prediction3,
            p_target3,
            p_mask3,
            n3,
            per3,
            p_sums + i_block,
            p_counts + i_block,
            DISTANCE3,
            MASKED,
            BLOCK,
        )


@triton.jit
def sub_losses_finish_kernel(
    p_sums,
    p_counts,
    p_out0,
    p_out1,
    p_out2,
    p_out3,
    end0,
    end1,
    end2,
    end3,
    weight0,
    weight1,
    weight2,
    weight3,
    weight_rest0,
    weight_rest1,
    weight_rest2,
    weight_rest3,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_pair = tl.program_id(0)
    if i_pair == 0:
        _pair_loss(p_sums, p_counts, 0, end0, weight0, weight_rest0, p_out0, MEAN, BLOCK)
    elif i_pair == 1:
        _pair_loss(p_sums, p_counts, end0, end1, weight1, weight_rest1, p_out1, MEAN, BLOCK)
    elif i_pair == 2:
        _pair_loss(p_sums, p_counts, end1, end2, weight2, weight_rest2, p_out2, MEAN, BLOCK)
    else:
        _pair_loss(p_sums, p_counts, end2, end3, weight3, weight_rest3, p_out3, MEAN, BLOCK)


@triton.jit
def sub_losses_bwd_kernel(
    p_grad0,
    p_grad1,
    p_grad2,
    p_grad3,
    p_prediction0,
    p_prediction1,
    p_prediction2,
    p_prediction3,
    p_target0,
    p_target1,
    p_target2,
    p_target3,
    p_mask0,
    p_mask1,
    p_mask2,
    p_mask3,
    p_count0,
    p_count1,
    p_count2,
    p_count3,
    p_out0,
    p_out1,
    p_out2,
    p_out3,
    n0,
    n1,
    n2,
    n3,
    per0,
    per1,
    per2,
    per3,
    weight0,
    weight1,
    weight2,
    weight3,
    weight_rest0,
    weight_rest1,
    weight_rest2,
    weight_rest3,
    end0,
    end1,
    end2,
    DISTANCE0: tl.constexpr,
    DISTANCE1: tl.constexpr,
    DISTANCE2: tl.constexpr,
    DISTANCE3: tl.constexpr,
    MASKED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    if i_block < end0:
        _block_grad(
            i_block,
            p_grad0,
            p_prediction0,
            p_target0,
            p_mask0,
            p_count0,
            p_out0,
            n0,
            per0,
            weight0,
            weight_rest0,
            DISTANCE0,
            MASKED,
            MEAN,
            BLOCK,
        )
    elif i_block < end1:
        _block_grad(
            i_block - end0,
            p_grad1,
            p_prediction1,
            p_target1,
            p_mask1,
            p_count1,
            p_out1,
            n1,
            per1,
            weight1,
            weight_rest1,
            DISTANCE1,
            MASKED,
            MEAN,
            BLOCK,
        )
    elif i_block < end2:
        _block_grad(
            i_block - end1,
            p_grad2,
            p_prediction2,
            p_target2,
            p_mask2,
            p_count2,
            p_out2,
            n2,
            per2,
            weight2,
            weight_rest2,
            DISTANCE2,
            MASKED,
            MEAN,
            BLOCK,
        )
    else:
        _block_grad(
            i_block - end2,
            p_grad3,
            p_prediction3,
            p_target3,
            p_mask3,
            p_count3,
            p_out3,
            n3,
            per3,
            weight3,
            weight_rest3,
            DISTANCE3,
            MASKED,
            MEAN,
            BLOCK,
        )


def forward(
    predictions: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor],
    distances: list[int],
    weights: list[float],
    mean: bool,
) -> list[Tensor]:
    """Run the forward kernels; arguments and results are those of ``fastwm::sub_losses``."""
    losses = []
    for group in _groups(predictions, targets, masks, distances, weights):
        outputs = [x.new_empty(()) for x in group.predictions]
        wide = torch.float64 if torch.float64 in group.dtypes else torch.float32
        sums = torch.empty(group.ends[-1], dtype=wide, device=outputs[0].device)
        counts = torch.empty_like(sums, dtype=torch.int32)
        with torch.cuda.device_of(sums):
            if group.ends[-1]:
                sub_losses_fwd_kernel[(group.ends[-1],)](
                    *_four(group.predictions),
                    *_four(group.targets),
                    *_four(group.masks or group.targets),
                    sums,
                    counts,
                    *_four(group.sizes),
                    *_four(group.per),
                    *_four(group.ends)[:-1],
                    **group.constexprs(),
                    **LAUNCH,
                )
            sub_losses_finish_kernel[(len(outputs),)](
                sums,
                counts,
                *_four(outputs),
                *_four(group.ends),
                *_four(group.weights),
                *_four(group.weight_rests),
                MEAN=mean,
                BLOCK=BLOCK,
                **LAUNCH,
            )
        for output, n in zip(outputs, group.sizes, strict=True):
            if mean and not n and not masks:
                output.fill_(torch.nan)  # as torch's mean of nothing
        losses += outputs
    return losses


def backward(
    grads: list[Tensor],
    predictions: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor],
    distances: list[int],
    weights: list[float],
    mean: bool,
) -> list[Tensor]:
    """Run ``sub_losses_bwd_kernel``; arguments and results are those of
    ``fastwm::sub_losses_backward``."""
    results: list[Tensor] = []
    for group in _groups(predictions, targets, masks, distances, weights):
        outputs = [x.new_empty(x.shape) for x in group.predictions]
        own = [x.contiguous() for x in grads[len(results) :][: len(outputs)]]
        counts = own
        if mean and masks:
            counts = [
                (mask.sum() * per).clamp_min(1)
                for mask, per in zip(group.masks, group.per, strict=True)
            ]
        if group.ends[-1]:
            with torch.cuda.device_of(outputs[0]):
                sub_losses_bwd_kernel[(group.ends[-1],)](
                    *_four(own),
                    *_four(group.predictions),
                    *_four(group.targets),
                    *_four(group.masks or group.targets),
                    *_four(counts),
                    *_four(outputs),
                    *_four(group.sizes),
                    *_four(group.per),
                    *_four(group.weights),
                    *_four(group.weight_rests),
                    *_four(group.ends)[:-1],
                    **group.constexprs(),
                    MEAN=mean,
                    **LAUNCH,
                )
        results += outputs
    return results


class _Group:
    """Up to four pairs, as a launch takes them."""

    def __init__(
        self,
        predictions: list[Tensor],
        targets: list[Tensor],
        masks: list[Tensor],
        distances: list[int],
        weights: list[float],
    ) -> None:
        self.predictions = [x.contiguous() for x in predictions]
        self.targets = [x.contiguous() for x in targets]
        self.masks = [x.contiguous() for x in masks]
        self.distances = distances
        self.dtypes = {x.dtype for x in predictions}
        self.sizes = [x.numel() for x in predictions]
        self.per = [1] * len(predictions)
        if masks:
            self.per = [
                max(1, n // max(1, mask.numel())) for n, mask in zip(self.sizes, masks, strict=True)
            ]
        self.weights = [two_floats(weight)[0] for weight in weights]
        self.weight_rests = [two_floats(weight)[1] for weight in weights]
        self.ends: list[int] = []  # the number of the first block past each pair
        for n in self.sizes:
            self.ends.append((self.ends[-1] if self.ends else 0) + triton.cdiv(n, BLOCK))

    def constexprs(self) -> dict[str, Any]:
        named = {f"DISTANCE{k}": d for k, d in enumerate(_four(self.distances))}
        return {**named, "MASKED": bool(self.masks), "BLOCK": BLOCK}


def _groups(*lists: list[Any]) -> Iterator[_Group]:
    for i in range(0, len(lists[0]), PAIRS):
        yield _Group(*(x[i : i + PAIRS] for x in lists))


def _four(items: list[Any]) -> list[Any]:
    """The last of fewer stands in for those that are not there; no block is theirs."""
    return items + [items[-1]] * (PAIRS - len(items))


def builds() -> Iterator[Build]:
    """A distance of each kind in either dtype, with masks and without, flags for targets among
    them."""
    for kernel in (sub_losses_fwd_kernel, sub_losses_finish_kernel, sub_losses_bwd_kernel):
        for dtype in ("fp32", "fp64"):
            for variant, codes in (("numbers", (0, 1, 2, 1)), ("flags", (3, 4, 1, 1))):
                if kernel is sub_losses_finish_kernel and variant == "flags":
                    continue  # it knows no distance
                named: dict[str, Any] = {f"DISTANCE{k}": d for k, d in enumerate(codes)}
                masked = variant == "flags"
                named |= {"MASKED": masked, "MEAN": True, "BLOCK": BLOCK}
                constexprs = {k: v for k, v in named.items() if k in kernel.arg_names}
                signature = {
                    name: "constexpr" if name in constexprs else _type(name, dtype, masked)
                    for name in kernel.arg_names
                }
                yield Build(f"{dtype}-{variant}", kernel, signature, constexprs, LAUNCH)


def _type(name: str, dtype: str, masked: bool) -> str:
    if name.startswith("p_mask") or (masked and name in ("p_target0", "p_target1")):
        return "*i1"
    if name == "p_counts":
        return "*i32"
    if name.startswith("p_count"):
        return "*i64"
    if name.startswith("p_"):
        return f"*{dtype}"
    return "fp32" if name.startswith("weight") else "i32"
