"""The parity gate: no number for a provider whose outputs or gradients are not the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastwm.tolerances import rollout_tolerance

__all__ = ["Verdict", "compare"]


@dataclass(frozen=True)
class Verdict:
    """One provider against the reference.

    Args:
        worst: per key, the largest error over the largest reference value of that key.
        used: per key, the largest error as a part of what the tolerance table allows; red above 1.
        fault: the first thing that is wrong, or None where parity is green.
    """

    worst: dict[str, float]
    used: dict[str, float]
    fault: str | None

    @property
    def ok(self) -> bool:
        return self.fault is None

    def __str__(self) -> str:
        if self.fault:
            return f"parity RED: {self.fault}"
        return f"parity green, worst {max(self.worst.values(), default=0.0):.1e}"


def _fault(key: str, found: Tensor | None, expected: Tensor) -> str | None:
    if found is None:
        return f"{key} is missing"
    if found.shape != expected.shape:
        return f"{key} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"{key} has dtype {found.dtype}, not {expected.dtype}"
    return None


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Verdict:
    """Every key of ``expected`` against ``found``, element by element, within
    ``fastwm/tolerances.py``.

    Example:
        >>> import torch
        >>> from fastwm.bench.verdict import compare
        >>> print(compare({"reward": torch.ones(3)}, {"reward": torch.zeros(3)}))
        parity RED: reward is off by 1.0e+00, 1e+06 times what is allowed
    """
    worst: dict[str, float] = {}
    used: dict[str, float] = {}
    fault = None
    for key, reference in expected.items():
        value = found.get(key)
        wrong = _fault(key, value, reference)
        if wrong:
            fault = fault or wrong
            continue
        assert value is not None
        bound = rollout_tolerance(
            reference.dtype, reference.device, gradient=key.startswith("grad/")
        )
        with torch.no_grad():
            error = (value - reference).abs()
            allowed = bound.atol + bound.rtol * reference.abs()
            part = (error / allowed).amax().item()
            largest, scale = error.amax().item(), reference.abs().amax().item()
        worst[key], used[key] = largest / scale if scale else largest, part
        if not part <= 1:  # so that NaN is red too
            fault = fault or f"{key} is off by {largest:.1e}, {part:.0e} times what is allowed"
    return Verdict(worst, used, fault)
