"""Operators: definition, fake, autograd and reference of each, one file per op.

An op is defined here in Python, so it exists everywhere and runs on its reference everywhere. Where
the C++ library is installed its CPU kernels take over, and on CUDA the Triton ones of
``fastwm.kernels``.
"""

from __future__ import annotations

from fastwm.ops.balanced_kl import balanced_kl, balanced_kl_reference
from fastwm.ops.gae import gae, gae_reference
from fastwm.ops.gaussian_nll import gaussian_nll, gaussian_nll_reference
from fastwm.ops.lambda_return import lambda_return, lambda_return_reference
from fastwm.ops.library import CpuLibrary, cpu_isa, cpu_library
from fastwm.ops.sub_losses import sub_losses, sub_losses_reference
from fastwm.ops.two_hot_cross_entropy import (
    two_hot_cross_entropy,
    two_hot_cross_entropy_reference,
)

__all__ = [
    "CpuLibrary",
    "balanced_kl",
    "balanced_kl_reference",
    "cpu_isa",
    "cpu_library",
    "gae",
    "gae_reference",
    "gaussian_nll",
    "gaussian_nll_reference",
    "lambda_return",
    "lambda_return_reference",
    "sub_losses",
    "sub_losses_reference",
    "two_hot_cross_entropy",
    "two_hot_cross_entropy_reference",
]
