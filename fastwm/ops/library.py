"""The operator namespace ``fastwm::`` and the C++ library that fills in its CPU kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["LIBRARY", "CpuLibrary", "cpu_isa", "cpu_library", "has_triton", "implement", "in_kernel",
           "why_no_kernel"]  # fmt: skip

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
    """Whether the kernels of functions take these tensors: one dtype that they have, and nothing of
    what :func:`why_no_kernel` names."""
    return (
        first.dtype in KERNEL_DTYPES
        and all(x is None or x.dtype == first.dtype for x in others)
        and not why_no_kernel(first, *others)
    )


def why_no_kernel(*tensors: Tensor | None) -> str:
    """What wants torch's own operations, or lacks a kernel, whatever the function; "" where nothing
    does."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is on"
    for x in tensors:
        if x is None:
            continue
        if is_traceable_wrapper_subclass(x):
            return f"a {type(x).__name__}, which has operations of its own"
        if x.device.type == "cuda" and not has_triton():
            return "triton is not installed, which the kernels for CUDA need"
    return ""


@functools.cache
def has_triton() -> bool:
    """Whether kernels for CUDA can be compiled; the CPU builds of torch come without it."""
    return importlib.util.find_spec("triton") is not None


def implement(
    name: str,
    anywhere: tuple[Callable[..., Any], Callable[..., Any]],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    fits: Callable[..., bool] | None = None,
) -> None:
    """Fill in a defined op and its backward, ``<name>`` and ``<name>_backward``, two of everything.

    On the CPU both are those of the C++ library, on CUDA the ``forward`` and ``backward`` of
    ``fastwm.kernels.<name>``.

    Args:
        anywhere: on other devices, and without the library.
        fakes: what their results look like.
        autograd: what is kept for the gradient, and the gradient.
        fits: whether the kernels take these arguments, from their module and the op's arguments.
    """
    for op, which, run, fake in zip(
        (name, f"{name}_backward"), ("forward", "backward"), anywhere, fakes, strict=True
    ):
        LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        LIBRARY.impl(op, _on_cuda(name, which, run, fits), "CUDA")
        torch.library.register_fake(f"fastwm::{op}", fake, lib=LIBRARY)
    if autograd is not None:
        setup, formula = autograd
        torch.library.register_autograd(
            f"fastwm::{name}", formula, setup_context=setup, lib=LIBRARY
        )
    cpu_library()


def _on_cuda(
    name: str,
    which: str,
    anywhere: Callable[..., Any],
    fits: Callable[..., bool] | None,
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"fastwm.kernels.{name}")  # triton comes on first use
        takes = fits is None or fits(kernels, *args)
        return (getattr(kernels, which) if takes else anywhere)(*args)

    return run
