"""How far a fast path may be from its reference: one table, one line per thing compared.

Every test, ``check_parity`` and benchmark takes its bounds from here. A line is an upper bound that
follows from the arithmetic or from a promise of the design, never from what an implementation
happened to reach.

Example:
    >>> import torch
    >>> from fastwm.tolerances import tolerance
    >>> tolerance("rollout", torch.float32).rtol
    1e-05

A rollout's own line depends on how its products are taken: :func:`rollout_tolerance` finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastwm.row_program.kinds import matmul_precision

__all__ = ["TOLERANCES", "Tolerance", "rollout_tolerance", "tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """``|fast - reference| <= atol + rtol * |reference|``, and where the two numbers come from."""

    rtol: float
    atol: float
    why: str

    def kwargs(self) -> dict[str, float]:
        """For :func:`torch.testing.assert_close`."""
        return {"rtol": self.rtol, "atol": self.atol}


# Unit roundoff: 2**-24 = 6.0e-8 (float32), 2**-53 = 1.1e-16 (float64), 2**-11 = 4.9e-4 (float16),
# 2**-8 = 3.9e-3 (bfloat16). Tensor-float32 keeps float32's sums, and of each factor of a product 10 bits
# after the leading one: off by 2**-11 where they are rounded, by up to 2**-10 where 13 bits are dropped.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # A whole imagined rollout, engine against eager, and its gradients.
    ("rollout", torch.float32): Tolerance(
        1e-5, 1e-6, "the design's promise: 1e-5 relative after 15 steps; atol for values near zero"
    ),
    ("rollout", torch.float64): Tolerance(
        1e-12, 1e-14, "the float32 line scaled by the ratio of unit roundoffs, with a margin of 50"
    ),
    ("rollout", torch.bfloat16): Tolerance(
        4e-2,
        4e-2,
        "ten roundings at 3.9e-3: one per layer and step that may round in another order",
    ),
    ("rollout", torch.float16): Tolerance(5e-3, 5e-3, "ten roundings at 4.9e-4, as for bfloat16"),
    ("rollout.gradient", torch.float32): Tolerance(
        1e-4, 1e-5, "sums over batch and time in another order: sqrt(4096 * 15) roundings of 6e-8"
    ),
    ("rollout.gradient", torch.float64): Tolerance(
        1e-11, 1e-13, "the float32 line scaled by the ratio of unit roundoffs, with a margin of 50"
    ),
    ("rollout.gradient", torch.bfloat16): Tolerance(
        8e-2, 8e-2, "twice the roundings of the rollout: forward, then backward"
    ),
    ("rollout.gradient", torch.float16): Tolerance(
        1e-2, 1e-2, "twice the roundings of the rollout: forward, then backward"
    ),
    # float32 on CUDA where torch takes products in tensor-float32, in eager as in every engine. What
    # reads a factor may round it or drop its last bits, each library as it likes.
    ("rollout.tf32", torch.float32): Tolerance(
        6e-3,
        2e-3,
        "dropped bits shrink a factor by 2**-11 of it on average, a product of two by 2**-10; six products "
        "deep a step, three of a policy and three of a model; what is random averages out in their sums; "
        "atol as large a part of tensors whose largest is a third",
    ),
    ("rollout.gradient.tf32", torch.float32): Tolerance(
        1.8e-2,
        3e-3,
        "three times the products of the rollout: forward, and two for each backward; atol as large a part "
        "of tensors whose largest is a sixth",
    ),
    # ``fused_weights=torch.bfloat16``: matrices rounded, products and sums in float32.
    ("rollout.bf16_weights", torch.float32): Tolerance(
        3e-2,
        3e-2,
        "weights are off by 2**-9 = 2e-3 relative at most; 15 steps add up to 15 of that. On CUDA the other "
        "factor of a product is rounded as well: errors of either sign, which average out in its sum",
    ),
    # A bfloat16 model on the fused engine, against the float32 model of the same weights. (Against eager,
    # which rounds every value, it is held to the lines of bfloat16 above.)
    ("rollout.bf16_model", torch.bfloat16): Tolerance(
        8e-3, 1e-6, "rounded once, when it is given back: to one of two neighbours, 2**-7 apart"
    ),
    ("rollout.bf16_model.gradient", torch.bfloat16): Tolerance(8e-3, 1e-5, "as the rollout"),
    # fastwm.lambda_return. The CPU kernel keeps the reference's order of operations and rounds each
    # once.
    ("lambda_return", torch.float32): Tolerance(
        0.0, 0.0, "same operations in the same order, no contraction: bit for bit"
    ),
    ("lambda_return", torch.float64): Tolerance(0.0, 0.0, "as for float32"),
    ("lambda_return.gradient", torch.float32): Tolerance(
        1e-5, 1e-6, "three products per step reassociated against autograd's order, over 129 steps"
    ),
    ("lambda_return.gradient", torch.float64): Tolerance(
        1e-13, 1e-14, "as for float32, with float64's unit roundoff and a margin of 10"
    ),
    # The Triton twin is compiled without contraction, but a compiler may still reassociate what it
    # proves equal.
    ("lambda_return.triton", torch.float32): Tolerance(
        1e-6,
        1e-6,
        "five roundings per step at 6e-8, damped by gamma * lambda < 1; atol for sums near zero",
    ),
    ("lambda_return.triton", torch.float64): Tolerance(
        1e-14, 1e-14, "as for float32, with float64's unit roundoff"
    ),
    # The float32 recurrence against the same in float64: the honest error of the arithmetic itself.
    ("lambda_return.float64", torch.float32): Tolerance(
        1e-5,
        1e-5,
        "five roundings per step at 6e-8 accumulate over 1 / (1 - 0.99 * 0.95) = 17 steps",
    ),
    # fastwm.gae, as the lambda-return.
    ("gae", torch.float32): Tolerance(
        0.0, 0.0, "same operations in the same order, no contraction: bit for bit"
    ),
    ("gae", torch.float64): Tolerance(0.0, 0.0, "as for float32"),
    ("gae.gradient", torch.float32): Tolerance(
        1e-5, 1e-6, "two products per step reassociated against autograd's order, over 129 steps"
    ),
    ("gae.gradient", torch.float64): Tolerance(
        1e-13, 1e-14, "as for float32, with float64's unit roundoff and a margin of 10"
    ),
    ("gae.triton", torch.float32): Tolerance(
        1e-6,
        1e-6,
        "five roundings per step at 6e-8, damped by gamma * lambda < 1; atol for sums near zero",
    ),
    ("gae.triton", torch.float64): Tolerance(
        1e-14, 1e-14, "as for float32, with float64's unit roundoff"
    ),
    ("gae.float64", torch.float32): Tolerance(
        1e-5,
        1e-5,
        "five roundings per step at 6e-8 accumulate over 1 / (1 - 0.99 * 0.95) = 17 steps",
    ),
    # The losses: sums over a row (or all elements) in another order than torch's, with exponentials
    # and logarithms of up to 3 units in the last place.
    ("loss", torch.float32): Tolerance(
        2e-6, 1e-6, "about 30 roundings of 6e-8; atol for terms of size 1 that cancel"
    ),
    ("loss", torch.float64): Tolerance(
        1e-13, 1e-14, "the float32 line scaled by the ratio of unit roundoffs, with a margin of 30"
    ),
    ("loss.gradient", torch.float32): Tolerance(
        1e-5, 1e-6, "a quotient of two sums, each off as a loss is; atol as for the loss"
    ),
    ("loss.gradient", torch.float64): Tolerance(
        1e-12, 1e-14, "the float32 line scaled by the ratio of unit roundoffs, with a margin of 50"
    ),
}


def tolerance(what: str, dtype: torch.dtype) -> Tolerance:
    """The bound for ``what`` at ``dtype``.

    Raises:
        KeyError: the table has no such line; add one, with its reason, rather than choosing a
            number in a test.
    """
    try:
        return TOLERANCES[what, dtype]
    except KeyError:
        raise KeyError(f"fastwm/tolerances.py has no line for {what!r} at {dtype}.") from None


def rollout_tolerance(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    gradient: bool = False,
    rounds_weights: bool = False,
) -> Tolerance:
    """The bound for a rollout's results, or for its gradients, as things are set now.

    float32 on CUDA is held to tensor-float32's line where torch is allowed to multiply in it
    (``torch.set_float32_matmul_precision("high")``), and to float32's own under ``"highest"``.

    Args:
        dtype: of the result.
        device: that it was computed on.
        gradient: it is a gradient.
        rounds_weights: the engine was allowed to round weights (``fused_weights=torch.bfloat16``).

    Raises:
        KeyError: as :func:`tolerance`.

    Example:
        >>> import torch
        >>> from fastwm.tolerances import rollout_tolerance
        >>> rollout_tolerance(torch.float32, "cpu").rtol
        1e-05
    """
    what = "rollout.gradient" if gradient else "rollout"
    if rounds_weights and dtype is torch.float32 and not gradient:
        return tolerance("rollout.bf16_weights", dtype)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and dtype is torch.float32 and matmul_precision() == "tf32":
        what += ".tf32"
    return tolerance(what, dtype)
