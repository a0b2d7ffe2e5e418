r"""The discounted lambda-return, :math:`\mathrm{TD}(\lambda)`, over a trajectory.

With :math:`V_t` the value after step t (zero where the step terminated) and :math:`R_T = V_{T-1}`,

.. math:: R_t = r_t + \gamma_t ((1 - \lambda_t) V_t + \lambda_t B_t), \quad
          B_t = V_t \text{ where done, else } R_{t+1}.

Source: Sutton and Barto, Reinforcement Learning, 2nd edition, section 12.1. Semantics and signature
are those of ``torchrl.objectives.value.functional.td_lambda_return_estimate`` (torchrl 0.14).

The ops return fresh tensors and write into nothing. CPU: ``csrc/lambda_return.cpp``; CUDA:
``kernels/lambda_return.py``; any other device: the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwm.ops import trajectory
from fastwm.ops.library import LIBRARY, implement, in_kernel

__all__ = ["lambda_return", "lambda_return_reference"]


def lambda_return(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    r"""Discounted lambda-return of each step, differentiable in the values, rewards, gamma and
    lambda.

    Args:
        gamma: discount; a float, or a tensor that expands to the shape of the values (one discount
            per step).
        lmbda: the mixing coefficient lambda; a float or a tensor, as ``gamma``.
        next_state_value: value of the state after each step, ``[*batch, time, feature]``, floating
            point. With ``time_dim`` the time may be any dimension, also the only one.
        reward: same shape.
        done: bool, same shape: the trajectory ends with this step, what follows is another one.
        terminated: bool, same shape: the episode ends with this step, its next value counts as
            zero. ``done`` where not given.
        rolling_gamma: with gamma or lambda per step: True (the default) applies each to its own
            step; False applies step t's to all of the return that starts at t.
        time_dim: the dimension of time.

    Returns:
        the returns: a fresh tensor of the shape and dtype of ``next_state_value``.

    Raises:
        TypeError: values that are not floating point; flags that are not bool.
        RuntimeError: shapes or devices that differ (named in the message); a dimension of time that
            the shape does not have; ``rolling_gamma=False`` with scalar gamma and lambda.
        IndexError: a trajectory of no steps.

    float32 and float64 run in a kernel. Other dtypes, mixed dtypes, ``rolling_gamma=False`` and
    calls within a ``torch.func`` transform run on :func:`lambda_return_reference`, as does a CPU
    without the C++ library.

    Example:
        >>> import torch, fastwm
        >>> value = torch.tensor([[1.0], [2.0], [3.0]])
        >>> reward = torch.ones(3, 1)
        >>> done = torch.tensor([[False], [False], [True]])
        >>> fastwm.lambda_return(0.5, 1.0, value, reward, done).flatten().tolist()
        [1.75, 1.5, 1.0]
    """
    terminated = done if terminated is None else terminated
    trajectory.check(next_state_value, done, terminated, reward=reward)
    shape = next_state_value.shape
    if time_dim != -2 or len(shape) < 2:
        time_dim = trajectory.time_from_end(shape, time_dim)
        gamma, lmbda, next_state_value, reward, done, terminated = (
            trajectory.time_to_second_last(x, time_dim)
            for x in (gamma, lmbda, next_state_value, reward, done, terminated)
        )
    if not next_state_value.shape[-2]:
        raise IndexError(
            f"lambda_return needs at least one step: got shape {list(shape)}, no time."
        )

    if rolling_gamma is False:
        size = next_state_value.shape
        if not any(isinstance(x, Tensor) and x.shape == size for x in (gamma, lmbda)):
            raise RuntimeError(
                "rolling_gamma=False is expected only with time-sensitive gamma or lambda values"
            )
        out = _non_rolling(gamma, lmbda, next_state_value, reward, done, terminated)
    else:
        gamma_, gamma_scalar = trajectory.coefficient(gamma, next_state_value)
        lmbda_, lmbda_scalar = trajectory.coefficient(lmbda, next_state_value)
        kernel = in_kernel(next_state_value, reward, gamma_, lmbda_)
        function = torch.ops.fastwm.lambda_return.default if kernel else _rolling
        out = function(
            next_state_value, reward, done, terminated, gamma_, lmbda_, gamma_scalar, lmbda_scalar
        )
    if time_dim != -2:
        out = out.transpose(time_dim, -2) if len(shape) > 1 else out.squeeze(-1)
    return out


def lambda_return_reference(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
) -> Tensor:
    """What :func:`lambda_return` is held against, in plain torch operations, on any device and
    dtype.

    The time is dimension -2; gamma and lambda apply to their own step.

    Example:
        >>> import torch, fastwm
        >>> from fastwm.ops import lambda_return_reference
        >>> value, reward = torch.rand(2, 3, 15, 1)
        >>> done = torch.rand(3, 15, 1) < 0.1
        >>> expected = lambda_return_reference(0.99, 0.95, value, reward, done)
        >>> torch.equal(fastwm.lambda_return(0.99, 0.95, value, reward, done), expected)
        True
    """
    terminated = done if terminated is None else terminated
    gamma_, gamma_scalar = trajectory.coefficient(gamma, next_state_value)
    lmbda_, lmbda_scalar = trajectory.coefficient(lmbda, next_state_value)
    return _rolling(
        next_state_value, reward, done, terminated, gamma_, lmbda_, gamma_scalar, lmbda_scalar
    )


# --- reference ------------------------------------------------------------------------------------


def _rolling(
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> Tensor:
    value = next_value * ~terminated
    # Scalars take the dtype of the values first: 1 - lambda is then what a tensor of lambdas would
    # give.
    g = torch.full_like(value, gamma_scalar) if gamma is None else gamma
    lam = torch.full_like(value, lmbda_scalar) if lmbda is None else lmbda
    following = value[..., -1, :]
    steps = []
    for v, r, d, g_t, l_t in zip(
        *(reversed(x.unbind(-2)) for x in (value, reward, done, g, lam)), strict=True
    ):
        # Products with the flag, not a choice: torchrl's semantics, also for a value that is not
        # finite.
        bootstrap = following * ~d + v * d
        following = r + g_t * ((1 - l_t) * v + l_t * bootstrap)
        steps.append(following)
    return torch.stack(steps[::-1], -2).to(next_value.dtype)


def _non_rolling(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
) -> Tensor:
    """Each step's return under that step's own gamma and lambda throughout: quadratic in time, no
    kernel."""
    gamma_, gamma_scalar = trajectory.coefficient(gamma, next_value)
    lmbda_, lmbda_scalar = trajectory.coefficient(lmbda, next_value)
    steps = []
    for t in range(next_value.shape[-2]):
        value, *rest = (x[..., t:, :] for x in (next_value, reward, done, terminated))
        own = (
            None if x is None else x[..., t : t + 1, :].expand_as(value) for x in (gamma_, lmbda_)
        )
        arguments: tuple[Any, ...] = (*rest, *own, gamma_scalar, lmbda_scalar)
        steps.append(_rolling(value, *arguments)[..., 0, :])
    return torch.stack(steps, -2)


def _rolling_backward(
    grad: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: Tensor | None,
    lmbda: Tensor | None,
    gamma_scalar: float,
    lmbda_scalar: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the next values and the rewards. Differentiable itself, which gives second
    derivatives."""
    g = torch.full_like(grad, gamma_scalar) if gamma is None else gamma
    lam = torch.full_like(grad, lmbda_scalar) if lmbda is None else lmbda
    carry = torch.zeros_like(grad[..., 0, :])
    to_reward, to_value = [], []
    for dr, d, g_t, l_t in zip(*(x.unbind(-2) for x in (grad, done, g, lam)), strict=True):
        total = dr + carry
        scaled = g_t * total
        carry = scaled * l_t * ~d
        to_reward.append(total)
        to_value.append(scaled * (1 - l_t) + scaled * l_t * d)
    to_value[-1] = to_value[-1] + carry  # the last step bootstraps from its own next value
    return torch.stack(to_value, -2) * ~terminated, torch.stack(to_reward, -2)


# --- op: definition, fallback, fake, autograd -----------------------------------------------------

_FLAGS = "Tensor done, Tensor terminated"
_COEFFICIENTS = "Tensor? gamma, Tensor? lmbda, float gamma_scalar, float lmbda_scalar"
LIBRARY.define(
    f"lambda_return(Tensor next_value, Tensor reward, {_FLAGS}, {_COEFFICIENTS}) -> Tensor"
)
LIBRARY.define(
    f"lambda_return_backward(Tensor grad, {_FLAGS}, {_COEFFICIENTS}) -> (Tensor, Tensor)"
)


def _forward_anywhere(next_value: Tensor, *args: Any) -> Tensor:
    return trajectory.like(_rolling(next_value, *args), next_value)


def _backward_anywhere(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    to_value, to_reward = _rolling_backward(grad, *args)
    return trajectory.like(to_value, grad), trajectory.like(to_reward, grad)


def _forward_fake(next_value: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(next_value)


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    next_value, _, done, terminated, gamma, lmbda, *scalars = inputs
    # Values and returns are kept only for the gradient of a coefficient.
    needed = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    kept = (next_value, output) if needed else (None, None)
    ctx.save_for_backward(done, terminated, gamma, lmbda, *kept)
    ctx.scalars = scalars


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    done, terminated, gamma, lmbda, next_value, returns = ctx.saved_tensors
    # The kernel has no derivative of its own: with create_graph the reference runs, and autograd
    # through it.
    function = (
        _rolling_backward if torch.is_grad_enabled() else torch.ops.fastwm.lambda_return_backward
    )
    to_value, to_reward = function(grad, done, terminated, gamma, lmbda, *ctx.scalars)
    to_gamma = to_lmbda = None
    if next_value is not None:
        g, lam = (
            x if x is not None else s for x, s in zip((gamma, lmbda), ctx.scalars, strict=True)
        )
        value = next_value * ~terminated
        following = torch.cat((returns[..., 1:, :], value[..., -1:, :]), -2)
        bootstrap = following * ~done + value * done
        if ctx.needs_input_grad[4]:
            to_gamma = to_reward * ((1 - lam) * value + lam * bootstrap)
        if ctx.needs_input_grad[5]:
            to_lmbda = to_reward * g * (bootstrap - value)
    return to_value, to_reward, None, None, to_gamma, to_lmbda, None, None


implement(
    "lambda_return",
    anywhere=(_forward_anywhere, _backward_anywhere),
    fakes=(_forward_fake, _backward_fake),
    autograd=(_setup_context, _autograd),
)
