"""`check_parity`: hold every engine against the eager path, on the caller's own model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase

from fastwm.assemble import leaves
from fastwm.backends import backend
from fastwm.rollout import _RandomState
from fastwm.tolerances import rollout_tolerance

if TYPE_CHECKING:
    from fastwm.fast_env import FastEnv

__all__ = ["Comparison", "EngineReport", "ParityReport", "check_parity"]


@dataclass(frozen=True)
class Comparison:
    """One tensor of an engine against eager's.

    Attributes:
        name: key of the rollout, or ``grad of ...``.
        error: largest ``|engine - eager|`` over the largest ``|eager|`` of that tensor; for flags and
            integers the share of entries that differ.
        tolerance: the largest ``error`` that passes: ``rtol + atol / largest |eager|`` of
            :mod:`fastwm.tolerances`.
        problem: what is wrong besides values (missing, other shape or dtype), else "".
    """

    name: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.tolerance


@dataclass
class EngineReport:
    """An engine's comparisons, or why it does not run this rollout."""

    engine: str
    refused: str = ""
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.engine}: does not run this: {self.refused}"
        width = max([len(c.name) for c in self.comparisons], default=0)
        lines = [f"{self.engine}: {'parity' if self.ok else 'DIFFERS FROM EAGER'}"]
        for c in self.comparisons:
            mark = "ok " if c.ok else "BAD"
            text = c.problem or f"error {c.error:.1e} (tolerance {c.tolerance:.0e})"
            lines.append(f"  {mark} {c.name:<{width}}  {text}")
        return "\n".join(lines)


@dataclass
class ParityReport:
    """What :func:`check_parity` found. Prints as a table; ``ok`` is True when all that ran agreed.

    Attributes:
        engines: one report per engine besides eager.
        steps: steps that the eager rollout took.
    """

    engines: list[EngineReport]
    steps: int

    @property
    def ok(self) -> bool:
        """Every engine that runs this rollout agrees with eager, and at least one runs it."""
        ran = [e for e in self.engines if not e.refused]
        return bool(ran) and all(e.ok for e in ran)

    def __str__(self) -> str:
        return "\n".join([f"eager: {self.steps} steps, the reference", *map(str, self.engines)])


def check_parity(
    env: FastEnv,
    policy: Any = None,
    tensordict: TensorDictBase | None = None,
    max_steps: int = 15,
    *,
    gradients: bool | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> ParityReport:
    """Run one rollout eagerly and on every engine that takes it, from the same seed, and compare.

    Compared: keys and their order, shapes, dtypes, values of every entry and, where something requires
    them, the gradients of every parameter and of the start with respect to a random weighting of all
    floating-point results. Bounds are those of :func:`fastwm.tolerances.rollout_tolerance`: of float32, or
    on CUDA of tensor-float32 where torch is set to it; the fused engine's with ``fused_weights`` are wider.
    ``fused_noise="kernel"``, whose numbers are not eager's, is set aside meanwhile.

    Args:
        env: the imagined env: a :class:`fastwm.WorldModelEnv`, or one given to :func:`fastwm.accelerate`.
        policy: as for ``env.rollout``.
        tensordict: the start, batch ``[*B]``; None to reset from ``initial_state``.
        max_steps: horizon.

    Keyword Args:
        gradients: True or False to ask for them or not; default: when gradients are enabled and a
            parameter or the start requires them.
        seed: of torch's generators; they are left as they were found.
        kwargs: further arguments of ``env.rollout``.

    Returns:
        A :class:`ParityReport`; ``print`` it, or test ``report.ok``.

    Raises:
        TypeError: ``env`` has no engines; one inside a TransformedEnv always runs eagerly.
        Whatever the eager rollout raises.

    Example:
        >>> report = fastwm.check_parity(env, policy, start, 15)  # doctest: +SKIP
        >>> assert report.ok, report  # doctest: +SKIP
    """
    from fastwm.fast_env import FastEnv

    if not isinstance(env, FastEnv):
        raise TypeError(
            "check_parity needs a WorldModelEnv, or an env that fastwm.accelerate was given; "
            f"a {type(env).__name__} runs step by step, without engines."
        )
    state, noise = _RandomState(env.device), env.fused_noise
    try:
        if noise != "torch":
            env.fused_noise = "torch"
        reference = _run("eager", env, policy, tensordict, max_steps, gradients, seed, kwargs)
        reports = []
        for name in ("fused", "captured"):
            try:
                result = _run(name, env, policy, tensordict, max_steps, gradients, seed, kwargs)
            except RuntimeError as error:
                marker = f"backend={name!r} cannot run this rollout: "
                if marker not in str(error):
                    raise
                reports.append(EngineReport(name, str(error).split(marker)[1].rstrip(".")))
            else:
                rounds = name == "fused" and env.fused_weights is torch.bfloat16
                reports.append(EngineReport(name, comparisons=_compare(reference, result, rounds)))
    finally:
        state.restore()
        if noise != "torch":
            env.fused_noise = noise
    return ParityReport(reports, reference.steps)


@dataclass
class _Result:
    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    steps: int


def _run(
    name: str, env: FastEnv, policy: Any, tensordict: TensorDictBase | None, max_steps: int,
    gradients: bool | None, seed: int, kwargs: dict[str, Any],
) -> _Result:  # fmt: skip
    parameters = _parameters(env, policy)
    start = None
    wanted: dict[str, torch.Tensor] = dict(parameters)
    if tensordict is not None:
        # Own leaves: the check must not reach into the graph that the caller's start hangs on.
        start = tensordict.apply(lambda t: t.detach().requires_grad_(t.requires_grad))
        for path, value in leaves(start).items():
            if value.requires_grad:
                wanted[f"start {'.'.join(path)}"] = value
    if gradients is None:
        gradients = torch.is_grad_enabled() and bool(wanted)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(bool(gradients)), backend(name):
        out = env.rollout(max_steps, policy, tensordict=start, **kwargs)
    values = {".".join(path): value for path, value in leaves(out).items()}
    grads: dict[str, torch.Tensor | None] = {}
    if gradients:
        floating = [v for v in values.values() if v.requires_grad]
        if floating:
            generator = torch.Generator().manual_seed(seed + 1)
            weights = [torch.randn(v.shape, generator=generator).to(v) for v in floating]
            total = torch.stack(
                [(v * w).sum() for v, w in zip(floating, weights, strict=True)]
            ).sum()
            found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
            grads = {f"grad of {key}": g for key, g in zip(wanted, found, strict=True)}
    return _Result({k: v.detach() for k, v in values.items()}, grads, out.shape[-1])


def _parameters(env: FastEnv, policy: Any) -> dict[str, torch.Tensor]:
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in (("policy", policy), ("model", env.world_model)):
        if isinstance(module, torch.nn.Module):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    found.setdefault(id(parameter), (f"{prefix}.{name}", parameter))
    return dict(found.values())


def _compare(reference: _Result, result: _Result, rounds: bool) -> list[Comparison]:
    comparisons = []
    if list(reference.values) != list(result.values):
        order = f"{list(result.values)} instead of {list(reference.values)}"
        comparisons.append(Comparison("keys and their order", 0.0, 0.0, order))
    for name, want in {**reference.values, **reference.gradients}.items():
        got = {**result.values, **result.gradients}.get(name)
        comparisons.append(_compare_one(name, want, got, rounds))
    return comparisons


def _compare_one(
    name: str, want: torch.Tensor | None, got: torch.Tensor | None, rounds: bool = False
) -> Comparison:
    if want is None and got is None:
        return Comparison(name, 0.0, 0.0)
    if want is None or got is None:
        return Comparison(name, 0.0, 0.0, f"{'missing' if got is None else 'not there in eager'}")
    if got.shape != want.shape or got.dtype != want.dtype:
        problem = f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
        return Comparison(name, 0.0, 0.0, problem)
    if want.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    if not want.is_floating_point():
        return Comparison(name, (got != want).double().mean().item(), 0.0)
    gradient = name.startswith("grad of ")
    allowed = rollout_tolerance(want.dtype, want.device, gradient=gradient, rounds_weights=rounds)
    bound = allowed.rtol
    nan = want.isnan()
    if not torch.equal(nan, got.isnan()):
        return Comparison(name, 0.0, bound, "NaN at other places")
    finite = want.isfinite()
    if not torch.equal(want[~finite & ~nan], got[~finite & ~nan]):
        return Comparison(name, 0.0, bound, "infinite at other places")
    if not finite.any():
        return Comparison(name, 0.0, bound)
    difference = (got[finite].double() - want[finite].double()).abs().max().item()
    scale = want[finite].double().abs().max().item()
    if not scale:
        return Comparison(name, difference, allowed.atol)
    # |engine - eager| <= atol + rtol * scale, as a bound on the relative error.
    return Comparison(name, difference / scale, bound + allowed.atol / scale)
