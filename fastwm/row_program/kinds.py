"""Kinds of elements (``"float"``, ``"bool"``, ``"int"``) and the dtypes of the tensors that hold them."""

from __future__ import annotations

import torch

__all__ = ["KINDS", "dtype_name", "dtype_of", "kind_of", "matmul_precision"]

#: In the order of the enumeration in csrc/row_code.h.
KINDS = ("float", "bool", "int")


def kind_of(dtype: torch.dtype) -> str:
    """The kind of a tensor's elements."""
    if dtype is torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def dtype_of(kind: str, floats: torch.dtype) -> torch.dtype:
    """How the executor takes and gives tensors of a kind, in a program of such floats."""
    return {"bool": torch.bool, "int": torch.int64}.get(kind, floats)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def matmul_precision() -> str:
    """How torch multiplies float32 matrices on CUDA: ``"ieee"`` or ``"tf32"``.

    Asked of torch's newer setting, which the older ones write to as well; asking an older one raises once
    the newer was set.
    """
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:  # torch before 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"
