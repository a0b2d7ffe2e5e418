"""Every way of doing the rollout that is timed: one line each in ``PROVIDERS``.

A provider is built once per configuration, outside the clock, from a
:class:`~fastwm.bench.problem.Problem`. It gives back a ``run``, which is timed, and a ``read``,
which is not and turns what ``run`` returned into named torch tensors ``[B, T, ...]`` (and
``"grad/<name>"``) for the parity check.
"""

from __future__ import annotations

from importlib import import_module

from fastwm.bench.providers import (
    env_rollout,
    jax_scan,
    torch_compile,
    torch_cuda_graph,
    torch_loop,
)
from fastwm.bench.providers.base import Built, Provider, Unavailable

__all__ = ["PROVIDERS", "REFERENCE", "Built", "Provider", "Unavailable", "chosen", "default_names"]

#: Everybody's outputs are compared with this one's, and speed is counted from it.
REFERENCE = "torchrl"

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("torchrl", env_rollout.torchrl),
        Provider("torch-loop", torch_loop.build),
        Provider("torch-compile", torch_compile.step()),
        Provider("torch-compile-graphs", torch_compile.step("reduce-overhead"), devices=("cuda",)),
        Provider("torch-cuda-graph", torch_cuda_graph.build, devices=("cuda",)),
        Provider("torch-compile-loop", torch_compile.loop, refuses=torch_compile.too_long),
        Provider("jax-scan", jax_scan.build),
        Provider("fastwm-eager", env_rollout.fastwm("eager"), ours=True),
        Provider("fastwm-captured", env_rollout.fastwm("captured"), ours=True),
        Provider("fastwm-fused", env_rollout.fastwm("fused"), ours=True),
        Provider(
            "fastwm-captured-inductor", env_rollout.fastwm("captured", inductor=True), ours=True
        ),
    )
}


def default_names(device: str) -> list[str]:
    """The providers that make sense on ``device``, in the order in which they take turns."""
    return [p.name for p in PROVIDERS.values() if device.split(":")[0] in p.devices]


def chosen(names: list[str]) -> dict[str, Provider]:
    """Providers by name; ``module:attribute`` names one that lives elsewhere.

    Raises:
        ValueError: no provider has that name.
    """
    found = {}
    for name in names:
        if ":" in name:
            module, attribute = name.split(":", 1)
            outside: Provider = getattr(import_module(module), attribute)
            found[outside.name] = outside
        elif name in PROVIDERS:
            found[name] = PROVIDERS[name]
        else:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"Unknown provider {name!r}; give module:attribute or one of {known}.")
    return found
