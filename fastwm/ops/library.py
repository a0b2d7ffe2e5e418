"""The operator namespace ``fastwm::`` and the C++ library that fills in its CPU kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LIBRARY", "CpuLibrary", "cpu_isa", "cpu_library", "in_kernel"]

# Library.define/impl, not torch.library.custom_op: 5 to 8 us a call against 11 to 26.
LIBRARY = torch.library.Library("fastwm", "FRAGMENT")

KERNEL_DTYPES = (torch.float32, torch.float64)

_NAMES = ("libfastwm_cpu.so", "libfastwm_cpu.dylib", "fastwm_cpu.dll")
_ISA = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class CpuLibrary:
    """The C++ library: where it is, whether it is loaded and, if not, why."""

    path: Path | None
    loaded: bool
    reason: str


@functools.cache
def cpu_library() -> CpuLibrary:
    """Load the C++ library, once; without it every op runs on its reference.

    Returns:
        what was found. ``reason`` is empty when it is loaded.

    Example:
        >>> import fastwm.ops
        >>> status = fastwm.ops.cpu_library()
        >>> status.loaded or bool(status.reason)
        True
    """
    import fastwm

    # An editable install spreads the package over the checkout and site-packages.
    candidates = (Path(folder) / "lib" / name for folder in fastwm.__path__ for name in _NAMES)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return CpuLibrary(None, False, "fastwm was installed without its C++ library")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another platform, or against a symbol this torch lacks
        return CpuLibrary(path, False, f"the C++ library does not load: {error}")
    return CpuLibrary(path, True, "")


def cpu_isa() -> str | None:
    """The widest instruction set of this CPU that the C++ kernels may choose: ``"avx512"``,
    ``"avx2"`` or ``"portable"``; None without the C++ library, which is what asks.

    Example:
        >>> import fastwm.ops
        >>> fastwm.ops.cpu_isa() in {"avx512", "avx2", "portable", None}
        True
    """
    return _ISA[torch.ops.fastwm.cpu_isa()] if cpu_library().loaded else None


def in_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels of functions take these tensors: one dtype that they have, and no
    ``torch.func`` transform, which wants torch's own operations."""
    return (
        first.dtype in KERNEL_DTYPES
        and all(x is None or x.dtype == first.dtype for x in others)
        and not torch._C._are_functorch_transforms_active()
    )
