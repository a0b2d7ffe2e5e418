"""Generalized advantage estimation on CUDA: one launch forward, one backward; semantics in
``fastwm/ops/gae.py``, launching in ``kernels/trajectory.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastwm.kernels import Build
from fastwm.kernels.trajectory import build_each, launch

__all__ = ["backward", "builds", "forward", "gae_bwd_kernel", "gae_fwd_kernel"]


@triton.jit
def gae_fwd_kernel(
    p_value,
    p_next,
    p_reward,
    p_done,
    p_terminated,
    p_gamma,
    p_lmbda,
    p_advantage,
    p_target,
    gamma,
    lmbda,
    discount,
    n_rows,
    n_features,
    n_time,
    s_value_b,
    s_value_t,
    s_value_f,
    s_next_b,
    s_next_t,
    s_next_f,
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
    s_advantage_b,
    s_advantage_t,
    s_advantage_f,
    s_target_b,
    s_target_t,
    s_target_f,
    HAS_GAMMA: tl.constexpr,
    HAS_LMBDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_row < n_rows
    o_b, o_f = o_row // n_features, o_row % n_features
    dtype = p_advantage.dtype.element_ty

    # Time runs backwards: all pointers start at the last step.
    i_last = tl.cast(n_time, tl.int64) - 1
    p_value += o_b * s_value_b + o_f * s_value_f + i_last * s_value_t
    p_next += o_b * s_next_b + o_f * s_next_f + i_last * s_next_t
    p_reward += o_b * s_reward_b + o_f * s_reward_f + i_last * s_reward_t
    p_done += o_b * s_done_b + o_f * s_done_f + i_last * s_done_t
    p_terminated += o_b * s_terminated_b + o_f * s_terminated_f + i_last * s_terminated_t
    p_advantage += o_b * s_advantage_b + o_f * s_advantage_f + i_last * s_advantage_t
    p_target += o_b * s_target_b + o_f * s_target_f + i_last * s_target_t
    if HAS_GAMMA:
        p_gamma += o_b * s_gamma_b + o_f * s_gamma_f + i_last * s_gamma_t
    if HAS_LMBDA:
        p_lmbda += o_b * s_lmbda_b + o_f * s_lmbda_f + i_last * s_lmbda_t

    b_gamma = tl.cast(gamma, dtype)
    b_lmbda = tl.cast(lmbda, dtype)
    b_discount = tl.cast(discount, dtype)
    b_advantage = tl.zeros((BLOCK,), dtype=dtype)  # of the step after this one
    for _ in range(n_time):
        b_done = tl.load(p_done, mask=mask, other=0).to(dtype)
        b_terminated = tl.load(p_terminated, mask=mask, other=0).to(dtype)
        b_value = tl.load(p_value, mask=mask, other=0.0)
        b_next = tl.load(p_next, mask=mask, other=0.0)
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
        # Two floats were multiplied, and rounded once, on the host.
        b_both = b_l * b_g if HAS_GAMMA or HAS_LMBDA else b_discount
        # Products with the flags, not a choice: a NaN spreads as it does in the reference.
        b_delta = b_reward + b_g * (1.0 - b_terminated) * b_next - b_value
        b_advantage = b_delta + b_advantage * (b_both * (1.0 - b_done))
        tl.store(p_advantage, b_advantage, mask=mask)
        tl.store(p_target, b_advantage + b_value, mask=mask)
        p_value -= s_value_t
        p_next -= s_next_t
        p_reward -= s_reward_t
        p_done -= s_done_t
        p_terminated -= s_terminated_t
        p_advantage -= s_advantage_t
        p_target -= s_target_t


@triton.jit
def gae_bwd_kernel(
    p_grad_advantage,
    p_grad_target,
    p_done,
    p_terminated,
    p_gamma,
    p_lmbda,
    p_grad_value,
    p_grad_next,
    p_grad_reward,
    gamma,
    lmbda,
    discount,
    n_rows,
    n_features,
    n_time,
    s_grad_advantage_b,
    s_grad_advantage_t,
    s_grad_advantage_f,
    s_grad_target_b,
    s_grad_target_t,
    s_grad_target_f,
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
    s_grad_next_b,
    s_grad_next_t,
    s_grad_next_f,
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

    p_grad_advantage += o_b * s_grad_advantage_b + o_f * s_grad_advantage_f
    p_grad_target += o_b * s_grad_target_b + o_f * s_grad_target_f
    p_done += o_b * s_done_b + o_f * s_done_f
    p_terminated += o_b * s_terminated_b + o_f * s_terminated_f
    p_grad_value += o_b * s_grad_value_b + o_f * s_grad_value_f
    p_grad_next += o_b * s_grad_next_b + o_f * s_grad_next_f
    p_grad_reward += o_b * s_grad_reward_b + o_f * s_grad_reward_f
    if HAS_GAMMA:
        p_gamma += o_b * s_gamma_b + o_f * s_gamma_f
    if HAS_LMBDA:
        p_lmbda += o_b * s_lmbda_b + o_f * s_lmbda_f

    b_gamma = tl.cast(gamma, dtype)
    b_lmbda = tl.cast(lmbda, dtype)
    b_discount = tl.cast(discount, dtype)
    b_carry = tl.zeros((BLOCK,), dtype=dtype)  # what earlier steps ask of this step's advantage
    for _ in range(n_time):
        b_done = tl.load(p_done, mask=mask, other=0).to(dtype)
        b_terminated = tl.load(p_terminated, mask=mask, other=0).to(dtype)
        b_target = tl.load(p_grad_target, mask=mask, other=0.0)
        b_total = tl.load(p_grad_advantage, mask=mask, other=0.0) + b_target + b_carry
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
        # Two floats were multiplied, and rounded once, on the host.
        b_both = b_l * b_g if HAS_GAMMA or HAS_LMBDA else b_discount
        b_carry = b_total * (b_both * (1.0 - b_done))
        tl.store(p_grad_reward, b_total, mask=mask)
        tl.store(p_grad_next, b_total * (b_g * (1.0 - b_terminated)), mask=mask)
        tl.store(p_grad_value, b_target - b_total, mask=mask)
        p_grad_advantage += s_grad_advantage_t
        p_grad_target += s_grad_target_t
        p_done += s_done_t
        p_terminated += s_terminated_t
        p_grad_value += s_grad_value_t
        p_grad_next += s_grad_next_t
        p_grad_reward += s_grad_reward_t


def forward(
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor]:
    """Run ``gae_fwd_kernel``; arguments and results are those of ``fastwm::gae``."""
    outputs = (torch.empty_like(value), torch.empty_like(value))
    inputs = (value, next_value, reward, done, terminated)
    scalars = (gamma_scalar, lmbda_scalar, lmbda_scalar * gamma_scalar)
    launch(gae_fwd_kernel, inputs, outputs, gamma, lmbda, *scalars)
    return outputs


def backward(
    grad_advantage: Tensor,
    grad_target: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``gae_bwd_kernel``; arguments and results are those of ``fastwm::gae_backward``."""
    like = grad_advantage
    outputs = (torch.empty_like(like), torch.empty_like(like), torch.empty_like(like))
    inputs = (grad_advantage, grad_target, done, terminated)
    scalars = (gamma_scalar, lmbda_scalar, lmbda_scalar * gamma_scalar)
    launch(gae_bwd_kernel, inputs, outputs, gamma, lmbda, *scalars)
    return outputs


def builds() -> Iterator[Build]:
    """All that ``launch`` launches of these kernels."""
    for kernel in (gae_fwd_kernel, gae_bwd_kernel):
        yield from build_each(kernel)
