r"""Generalized advantage estimation (GAE) over a trajectory.

With :math:`V_t` the value before step t, :math:`V'_t` the value after it (zero where the step
terminated) and :math:`A_T = 0`,

.. math:: \delta_t = r_t + \gamma_t V'_t - V_t, \quad
          A_t = \delta_t + \gamma_t \lambda_t A_{t+1}, \text{ the last term zero where done.}

Source: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation,
arXiv:1506.02438. Semantics and signature are those of
``torchrl.objectives.value.functional.generalized_advantage_estimate`` (torchrl 0.14).

The ops return fresh tensors and write into nothing. CPU: ``csrc/gae.cpp``; CUDA:
``kernels/gae.py``; any other device: the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwm.ops import trajectory
from fastwm.ops.library import LIBRARY, implement, in_kernel

__all__ = ["gae", "gae_reference"]


def gae(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimate of each step, and the target of its value; differentiable in
    the values, rewards, gamma and lambda.

    Args:
        gamma: discount; a float, or a tensor that expands to the shape of the values (one discount
            per step).
        lmbda: the decay lambda; a float or a tensor, as ``gamma``.
        state_value: value of the state before each step, ``[*batch, time, feature]``, floating
            point. With ``time_dim`` the time may be any dimension, also the only one.
        next_state_value: value of the state after each step, same shape.
        reward: same shape.
        done: bool, same shape: the trajectory ends with this step, what follows is another one.
        terminated: bool, same shape: the episode ends with this step, its next value counts as
            zero. ``done`` where not given.
        time_dim: the dimension of time.

    Returns:
        the advantage, in the dtype of ``next_state_value``, and the value target, which is
        ``advantage + state_value``: fresh tensors of the shape of the values.

    Raises:
        TypeError: values that are not floating point; flags that are not bool.
        RuntimeError: shapes or devices that differ (named in the message); a dimension of time that
            the shape does not have.

    float32 and float64 run in a kernel. Other dtypes, mixed dtypes and calls within a
    ``torch.func`` transform run on :func:`gae_reference`, as does a CPU without the C++ library.
    With float64 values a gamma that is a float is used as it is; torchrl rounds it to the default
    dtype.

    Example:
        >>> import torch, fastwm
        >>> value, next_value = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> done = torch.tensor([[False], [False], [True]])
        >>> advantage, target = fastwm.gae(0.5, 1.0, value, next_value, torch.ones(3, 1), done)
        >>> advantage.flatten().tolist()
        [2.75, 2.5, 1.0]
    """
    terminated = done if terminated is None else terminated
    trajectory.check(next_state_value, done, terminated, state_value=state_value, reward=reward)
    shape = next_state_value.shape
    if time_dim != -2 or len(shape) < 2:
        time_dim = trajectory.time_from_end(shape, time_dim)
        gamma, lmbda, state_value, next_state_value, reward, done, terminated = (
            trajectory.time_to_second_last(x, time_dim)
            for x in (gamma, lmbda, state_value, next_state_value, reward, done, terminated)
        )

    gamma_, gamma_scalar = trajectory.coefficient(gamma, next_state_value)
    lmbda_, lmbda_scalar = trajectory.coefficient(lmbda, next_state_value)
    kernel = in_kernel(next_state_value, state_value, reward, gamma_, lmbda_)
    function = torch.ops.fastwm.gae.default if kernel else _estimate
    values = (state_value, next_state_value, reward)
    outputs = function(*values, done, terminated, gamma_, lmbda_, gamma_scalar, lmbda_scalar)
    if time_dim != -2:
        outputs = (
            out.transpose(time_dim, -2) if len(shape) > 1 else out.squeeze(-1) for out in outputs
        )
    advantage, target = outputs
    return advantage, target


def gae_reference(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`gae` is held against, in plain torch operations, on any device and dtype.

    The time is dimension -2.

    Example:
        >>> import torch, fastwm
        >>> from fastwm.ops import gae_reference
        >>> value, next_value, reward = torch.rand(3, 4, 15, 1)
        >>> done = torch.rand(4, 15, 1) < 0.1
        >>> expected, _ = gae_reference(0.99, 0.95, value, next_value, reward, done)
        >>> torch.equal(fastwm.gae(0.99, 0.95, value, next_value, reward, done)[0], expected)
        True
    """
    terminated = done if terminated is None else terminated
    gamma_, gamma_scalar = trajectory.coefficient(gamma, next_state_value)
    lmbda_, lmbda_scalar = trajectory.coefficient(lmbda, next_state_value)
    values = (state_value, next_state_value, reward)
    return _estimate(*values, done, terminated, gamma_, lmbda_, gamma_scalar, lmbda_scalar)


# --- reference ------------------------------------------------------------------------------------


def _coefficients(
    like: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor]:
    """Gamma, and lambda times gamma, per step. Half precision is discounted in float32, as torchrl
    does it."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    g = torch.full_like(like, gamma_scalar, dtype=dtype) if gamma is None else gamma
    if gamma is None and lmbda is None:
        # Two floats are multiplied as floats and rounded once.
        return g, torch.full_like(like, lmbda_scalar * gamma_scalar, dtype=dtype)
    lam = torch.full_like(like, lmbda_scalar, dtype=dtype) if lmbda is None else lmbda
    return g, lam * g


def _estimate(
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
    g, both = _coefficients(next_value, gamma, lmbda, gamma_scalar, lmbda_scalar)
    # Products with the flags, not a choice: torchrl's semantics, also for what is not finite.
    delta = reward + g * ~terminated * next_value - value
    discount = both * ~done
    following = torch.zeros_like(delta[..., :1, :].sum(-2))
    steps = []
    for d, c in zip(*(reversed(x.unbind(-2)) for x in (delta, discount)), strict=True):
        following = d + following * c
        steps.append(following)
    advantage = torch.stack(steps[::-1], -2) if steps else delta
    advantage = advantage.to(next_value.dtype)
    return advantage, advantage + value


def _backward(
    grad_advantage: Tensor,
    grad_target: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values, the next values and the rewards. Differentiable itself, which gives
    second derivatives."""
    g, both = _coefficients(grad_advantage, gamma, lmbda, gamma_scalar, lmbda_scalar)
    own, discount = grad_advantage + grad_target, both * ~done
    carry = torch.zeros_like(own[..., :1, :].sum(-2))
    totals = []
    for d, c in zip(*(x.unbind(-2) for x in (own, discount)), strict=True):
        total = d + carry
        carry = total * c
        totals.append(total)
    total = torch.stack(totals, -2) if totals else own
    return grad_target - total, total * (g * ~terminated), total


# --- op: definition, fallback, fake, autograd -----------------------------------------------------

_FLAGS = "Tensor done, Tensor terminated"
_COEFFICIENTS = "Tensor? gamma, Tensor? lmbda, float gamma_scalar, float lmbda_scalar"
LIBRARY.define(
    f"gae(Tensor value, Tensor next_value, Tensor reward, {_FLAGS}, {_COEFFICIENTS})"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"gae_backward(Tensor grad_advantage, Tensor grad_target, {_FLAGS}, {_COEFFICIENTS})"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward_anywhere(value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(trajectory.like(out, value) for out in _estimate(value, *args))


def _backward_anywhere(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(trajectory.like(out, grad) for out in _backward(grad, *args))


def _forward_fake(value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(value)


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, next_value, _, done, terminated, gamma, lmbda, *scalars = inputs
    # Next values and advantages are kept only for the gradient of a coefficient.
    needed = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
    kept = (next_value, output[0]) if needed else (None, None)
    ctx.save_for_backward(done, terminated, gamma, lmbda, *kept)
    ctx.scalars = scalars


def _autograd(ctx: Any, grad_advantage: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    done, terminated, gamma, lmbda, next_value, advantage = ctx.saved_tensors
    # The kernel has no derivative of its own: with create_graph the reference runs, and autograd
    # through it.
    function = _backward if torch.is_grad_enabled() else torch.ops.fastwm.gae_backward
    to_value, to_next, to_reward = function(
        grad_advantage, grad_target, done, terminated, gamma, lmbda, *ctx.scalars
    )
    to_gamma = to_lmbda = None
    if next_value is not None:
        g, lam = (
            x if x is not None else s for x, s in zip((gamma, lmbda), ctx.scalars, strict=True)
        )
        following = torch.cat((advantage[..., 1:, :], torch.zeros_like(advantage[..., :1, :])), -2)
        following = following[..., : advantage.shape[-2], :] * ~done
        if ctx.needs_input_grad[5]:
            to_gamma = to_reward * (next_value * ~terminated + lam * following)
        if ctx.needs_input_grad[6]:
            to_lmbda = to_reward * g * following
    return to_value, to_next, to_reward, None, None, to_gamma, to_lmbda, None, None


implement(
    "gae",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
    autograd=(_setup_context, _autograd),
)
