"""How a kernel over a trajectory is launched: a block of rows per program, one row per lane, each
walking its time with the running value in registers.

Rows never talk to each other. Memory is read in whatever strides it has; only batch dimensions that
no single stride spans are copied first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fastwm.kernels import Build

__all__ = ["BLOCK", "LAUNCH", "build_each", "launch"]

# The floats of a kernel, by name.
SCALARS = ("gamma", "lmbda", "discount")
# One warp, one row per lane: small batches, too, spread over many multiprocessors.
BLOCK = 32
# No fused multiply-add: each operation is rounded once, as eager does on the same device.
LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def launch(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    gamma: Tensor | None,
    lmbda: Tensor | None,
    *scalars: float,
) -> None:
    """Write ``kernel``'s results into ``outputs``, all of them of the inputs' shape and any
    strides. The first two of ``scalars`` are gamma and lambda, for where no tensor is given."""
    like = outputs[0]
    if not like.numel():
        return
    if like.dtype == torch.float64:  # a kernel's float argument is a float32: hand over tensors
        gamma, lmbda = (
            torch.full((), scalar, dtype=like.dtype, device=like.device).expand(like.shape)
            if x is None
            else x
            for x, scalar in ((gamma, scalars[0]), (lmbda, scalars[1]))
        )
    written = [_three_dims(x) for x in outputs]
    read = [None if x is None else _three_dims(x) for x in (*inputs, gamma, lmbda)]
    tensors = [*read, *written]
    n_batch, n_time, n_features = written[0].shape
    n_rows = n_batch * n_features
    strides = [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride())]
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(n_rows, BLOCK),)](
            *tensors,
            *scalars,
            n_rows,
            n_features,
            n_time,
            *strides,
            HAS_GAMMA=gamma is not None,
            HAS_LMBDA=lmbda is not None,
            BLOCK=BLOCK,
            **LAUNCH,
        )
    for target, source in zip(outputs, written, strict=True):
        if source.data_ptr() != target.data_ptr():  # its batch dimensions could not be one
            target.copy_(source.view(target.shape))


def _three_dims(x: Tensor) -> Tensor:
    """``[*batch, time, feature]`` as ``[batch, time, feature]``: a view wherever there is one."""
    if x.ndim == 3:
        return x
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def build_each(kernel: Any) -> Iterator[Build]:
    """Scalars in float32, and one coefficient per step in float32 and float64: all that ``launch``
    launches."""
    for dtype, has in (("fp32", False), ("fp32", True), ("fp64", True)):
        constexprs: dict[str, Any] = {"HAS_GAMMA": has, "HAS_LMBDA": has, "BLOCK": BLOCK}
        signature = {}
        for name in kernel.arg_names:
            if name in constexprs:
                signature[name] = "constexpr"
            elif name in ("p_gamma", "p_lmbda") and not has:
                signature[name], constexprs[name] = "constexpr", None
            elif name in ("p_done", "p_terminated"):
                signature[name] = "*i1"
            elif name.startswith("p_"):
                signature[name] = f"*{dtype}"
            else:
                signature[name] = "fp32" if name in SCALARS else "i32"
        variant = f"{dtype}-{'tensors' if has else 'scalars'}"
        yield Build(variant, kernel, signature, constexprs, LAUNCH)
