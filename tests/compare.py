"""Running one rollout on two engines, and holding every aspect of the results against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

import fastwm
from fastwm.tolerances import rollout_tolerance, tolerance

__all__ = ["assert_parity", "assert_same", "run", "why_eager", "why_not_fused"]


def run(
    engine: str,
    env: fastwm.WorldModelEnv,
    horizon: int,
    policy: Any,
    start: TensorDictBase | None,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[TensorDictBase, Tensor]:
    """The rollout from a seeded generator, and the generator's state afterwards."""
    torch.manual_seed(seed)
    with fastwm.backend(engine):
        out = env.rollout(horizon, policy, tensordict=start, **kwargs)
    return out, torch.get_rng_state()


def assert_same(got: TensorDictBase, want: TensorDictBase, path: tuple[str, ...] = ()) -> None:
    """Same keys in the same order, structure, kinds and values within the table of tolerances."""
    assert type(got) is type(want), path
    assert got.batch_size == want.batch_size, path
    assert got.device == want.device, path
    assert got.names == want.names, path
    assert list(got.keys()) == list(want.keys()), path
    for key, w in want.items():
        g, here = got.get(key), (*path, key)
        if isinstance(w, TensorDictBase):
            assert_same(g, w, here)
            continue
        assert type(g) is type(w), here
        assert (g.shape, g.dtype, g.device) == (w.shape, w.dtype, w.device), here
        assert g.requires_grad == w.requires_grad, here
        assert g.is_contiguous() == w.is_contiguous(), here
        assert g.is_inference() == w.is_inference(), here
        assert_close(g, w, "rollout", ".".join(here))


def assert_close(got: Tensor, want: Tensor, what: str, name: str) -> None:
    """Within the tolerance for ``what``; its absolute part is relative to the largest value."""
    got, want = got.detach(), want.detach()
    if not want.is_floating_point():
        assert torch.equal(got, want), name
        return
    if what in ("rollout", "rollout.gradient"):
        bound = rollout_tolerance(want.dtype, want.device, gradient=what.endswith("gradient"))
    else:
        bound = tolerance(what, want.dtype)
    largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(
        got,
        want,
        rtol=bound.rtol,
        atol=max(bound.atol, bound.rtol * largest),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def assert_parity(
    env: fastwm.WorldModelEnv,
    policy: Any,
    start: TensorDictBase | None,
    horizon: int,
    *,
    wrt: Sequence[Tensor] = (),
    engine: str = "captured",
    **kwargs: Any,
) -> TensorDictBase:
    """An engine against eager: results, gradients with respect to ``wrt``, generator state.

    Returns:
        Eager's result.
    """
    results = {}
    for name in ("eager", engine):
        out, state = run(name, env, horizon, policy, start, **kwargs)
        grads = gradients(out, wrt) if wrt else ()
        results[name] = out, state, grads
    want, want_state, want_grads = results["eager"]
    got, got_state, got_grads = results[engine]
    assert_same(got, want)
    assert torch.equal(got_state, want_state), "the generator stands elsewhere"
    for i, (g, w) in enumerate(zip(got_grads, want_grads, strict=True)):
        assert (g is None) == (w is None), f"gradient {i}"
        if w is not None:
            assert_close(g, w, "rollout.gradient", f"gradient {i} of shape {tuple(w.shape)}")
    return want


def gradients(out: TensorDictBase, wrt: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a fixed random weighting of every floating-point result."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for value in out.values(True, True):
        if value.requires_grad:
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (value.double() * weight).sum()
    return torch.autograd.grad(total, list(wrt), allow_unused=True)


def why_eager(
    env: fastwm.WorldModelEnv, policy: Any = None, start: Any = None, **kwargs: Any
) -> str:
    """Why the captured engine passes this rollout on; "" when it takes it."""
    return env.explain(3, policy, tensordict=start, **kwargs).passed_over.get("captured", "")


def why_not_fused(
    env: fastwm.WorldModelEnv, policy: Any = None, start: Any = None, **kwargs: Any
) -> str:
    """Why the fused engine passes this rollout on; "" when it takes it."""
    with fastwm.backend("auto"):
        return env.explain(3, policy, tensordict=start, **kwargs).passed_over.get("fused", "")
