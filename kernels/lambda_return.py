"""The lambda-return on CUDA: one launch forward, one backward; semantics in
``fastwm/ops/lambda_return.py``.

A program takes a block of rows and walks their time from end to end with the running return in
registers. Rows never talk to each other. Memory is read in whatever strides it has; only batch
dimensions that no single stride spans are copied first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build
from fastwm.kernels.trajectory import build_each, launch

__all__ = ["backward", "builds", "forward", "lambda_return_bwd_kernel", "lambda_return_fwd_kernel"]


@triton.jit
def lambda_return_fwd_kernel(
    p_value,
    p_reward,
    p_done,
    p_terminated,
    p_gamma,
    p_lmbda,
    p_out,
    gamma,
    lmbda,
    n_rows,
    n_features,
    n_time,
    s_value_b,
    s_value_t,
    s_value_f,
    s_reward_b,
    s_reward_t,
    s_reward_f,
    s_done_b,
    s_done_t,
    s_done_f,
    s_terminated_b,
    s_terminated_t,
    s_terminated_f,
    s_gamma_b,
    s_gamma_t,
    s_gamma_f,
    s_lmbda_b,
    s_lmbda_t,
    s_lmbda_f,
    s_out_b,
    s_out_t,
    s_out_f,
    HAS_GAMMA: tl.constexpr,
    HAS_LMBDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_row < n_rows
    o_b, o_f = o_row // n_features, o_row % n_features
    dtype = p_out.dtype.element_ty

    # Time runs backwards: all pointers start at the last step.
    i_last = tl.cast(n_time, tl.int64) - 1
    p_value += o_b * s_value_b + o_f * s_value_f + i_last * s_value_t
    p_reward += o_b * s_reward_b + o_f * s_reward_f + i_last * s_reward_t
    p_done += o_b * s_done_b + o_f * s_done_f + i_last * s_done_t
    p_terminated += o_b * s_terminated_b + o_f * s_terminated_f + i_last * s_terminated_t
    p_out += o_b * s_out_b + o_f * s_out_f + i_last * s_out_t
    if HAS_GAMMA:
        p_gamma += o_b * s_gamma_b + o_f * s_gamma_f + i_last * s_gamma_t
    if HAS_LMBDA:
        p_lmbda += o_b * s_lmbda_b + o_f * s_lmbda_f + i_last * s_lmbda_t

    b_gamma = tl.cast(gamma, dtype)
    b_lmbda = tl.cast(lmbda, dtype)
    # What the last step bootstraps from is its own next value.
    b_terminated = tl.load(p_terminated, mask=mask, other=0).to(dtype)
    b_return = tl.load(p_value, mask=mask, other=0.0) * (1.0 - b_terminated)
    for _ in range(n_time):
        b_done = tl.load(p_done, mask=mask, other=0).to(dtype)
        b_terminated = tl.load(p_terminated, mask=mask, other=0).to(dtype)
        b_value = tl.load(p_value, mask=mask, other=0.0) * (1.0 - b_terminated)
        b_reward = tl.load(p_reward, mask=mask, other=0.0)
        if HAS_GAMMA:
            b_g = tl.load(p_gamma, mask=mask, other=0.0)
            p_gamma -= s_gamma_t
        else:
            b_g = b_gamma
        if HAS_LMBDA:
            b_l = tl.load(p_lmbda, mask=mask, other=0.0)
            p_lmbda -= s_lmbda_t
        else:
            b_l = b_lmbda
        # Products with the flag, not a choice: a NaN spreads as it does in the reference.
        b_bootstrap = b_return * (1.0 - b_done) + b_value * b_done
        b_return = b_reward + b_g * ((1.0 - b_l) * b_value + b_l * b_bootstrap)
        tl.store(p_out, b_return, mask=mask)
        p_value -= s_value_t
        p_reward -= s_reward_t
        p_done -= s_done_t
        p_terminated -= s_terminated_t
        p_out -= s_out_t


@triton.jit
def lambda_return_bwd_kernel(
    p_grad,
    p_done,
    p_terminated,
    p_gamma,
    p_lmbda,
    p_grad_value,
    p_grad_reward,
    gamma,
    lmbda,
    n_rows,
    n_features,
    n_time,
    s_grad_b,
    s_grad_t,
    s_grad_f,
    s_done_b,
    s_done_t,
    s_done_f,
    s_terminated_b,
    s_terminated_t,
    s_terminated_f,
    s_gamma_b,
    s_gamma_t,
    s_gamma_f,
    s_lmbda_b,
    s_lmbda_t,
    s_lmbda_f,
    s_grad_value_b,
    s_grad_value_t,
    s_grad_value_f,
    s_grad_reward_b,
    s_grad_reward_t,
    s_grad_reward_f,
    HAS_GAMMA: tl.constexpr,
    HAS_LMBDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_row < n_rows
    o_b, o_f = o_row // n_features, o_row % n_features
    dtype = p_grad_value.dtype.element_ty

    p_grad += o_b * s_grad_b + o_f * s_grad_f
    p_done += o_b * s_done_b + o_f * s_done_f
    p_terminated += o_b * s_terminated_b + o_f * s_terminated_f
    p_grad_value += o_b * s_grad_value_b + o_f * s_grad_value_f
    p_grad_reward += o_b * s_grad_reward_b + o_f * s_grad_reward_f
    if HAS_GAMMA:
        p_gamma += o_b * s_gamma_b + o_f * s_gamma_f
    if HAS_LMBDA:
        p_lmbda += o_b * s_lmbda_b + o_f * s_lmbda_f

    b_gamma = tl.cast(gamma, dtype)
    b_lmbda = tl.cast(lmbda, dtype)
    b_carry = tl.zeros((BLOCK,), dtype=dtype)  # what earlier steps ask of this step's return
    for i_t in range(n_time):
        b_done = tl.load(p_done, mask=mask, other=0).to(dtype)
        b_terminated = tl.load(p_terminated, mask=mask, other=0).to(dtype)
        b_total = tl.load(p_grad, mask=mask, other=0.0) + b_carry
        if HAS_GAMMA:
            b_g = tl.load(p_gamma, mask=mask, other=0.0)
            p_gamma += s_gamma_t
        else:
            b_g = b_gamma
        if HAS_LMBDA:
            b_l = tl.load(p_lmbda, mask=mask, other=0.0)
            p_lmbda += s_lmbda_t
        else:
            b_l = b_lmbda
        b_scaled = b_g * b_total
        b_carry = b_scaled * b_l * (1.0 - b_done)
        b_grad_value = b_scaled * (1.0 - b_l) + b_scaled * b_l * b_done
        # The last step bootstraps from its own next value, so its carry comes back to it.
        b_grad_value += tl.where(i_t == n_time - 1, b_carry, 0.0)
        tl.store(p_grad_reward, b_total, mask=mask)
        tl.store(p_grad_value, b_grad_value * (1.0 - b_terminated), mask=mask)
        p_grad += s_grad_t
        p_done += s_done_t
        p_terminated += s_terminated_t
        p_grad_value += s_grad_value_t
        p_grad_reward += s_grad_reward_t


def forward(
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> Tensor:
    """Run ``lambda_return_fwd_kernel``; arguments and result are those of
    ``fastwm::lambda_return``."""
    out = torch.empty_like(next_value)
    inputs = (next_value, reward, done, terminated)
    launch(lambda_return_fwd_kernel, inputs, (out,), gamma, lmbda, gamma_scalar, lmbda_scalar)
    return out


def backward(
    grad: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor]:
    """Run ``lambda_return_bwd_kernel``; arguments and result are those of
    ``fastwm::lambda_return_backward``."""
    outputs = (torch.empty_like(grad), torch.empty_like(grad))
    inputs = (grad, done, terminated)
    launch(lambda_return_bwd_kernel, inputs, outputs, gamma, lmbda, gamma_scalar, lmbda_scalar)
    return outputs


def builds() -> Iterator[Build]:
    """All that ``launch`` launches of these kernels."""
    for kernel in (lambda_return_fwd_kernel, lambda_return_bwd_kernel):
        yield from build_each(kernel)
