"""The posterior of an RSSM along sequences, forward and backward: `RSSMRollout` beside torchrl's classes.

    python bench/test_posterior.py        all in turns, one thread; appends to bench/results/posterior.jsonl
    pytest bench/test_posterior.py --benchmark-enable --benchmark-group-by=group

Sizes: the first Dreamer's (and PlaNet's); and two of DreamerV3's kinds with a belief of 512: "gru", torchrl's
plain recurrence with 512 hidden units and 32 x 32 categoricals, and "block_gru", the official repository's
smallest size. fastwm's are first held to torchrl's values and gradients: no figure comes from a wrong
result. torchrl's compiled forms draw other numbers, as they or Inductor say, and are not held to them.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import (
    RSSMPosterior,
    RSSMPosteriorV3,
    RSSMPrior,
    RSSMPriorV3,
    RSSMRollout,
    RSSMRolloutV3,
)

import fastwm.models
from fastwm.bench.scripts import record
from fastwm.tolerances import tolerance

ACTION, EMBEDDING = 6, 1024
LATENTS: list[Any] = [("next", "state"), ("next", "belief")]
# batch, time, belief, state
SIZES = {
    "gaussian": (50, 50, 200, 30),
    "gru": (16, 64, 512, 32 * 32),
    "block_gru": (16, 64, 512, 32 * 4),
}


def networks(kind: str) -> tuple[TensorDictModule, TensorDictModule]:
    """Prior and posterior."""
    _, _, belief, state = SIZES[kind]
    prior: nn.Module
    posterior: nn.Module
    if kind == "gaussian":
        said = ["mean", "std"]
        prior = RSSMPrior(torch.empty(ACTION), belief, belief, state, action_dim=ACTION)
        posterior = RSSMPosterior(belief, state, rnn_hidden_dim=belief, obs_embed_dim=EMBEDDING)
    else:
        said, classes = ["logits"], state // 32
        hidden = 512 if kind == "gru" else 64
        prior = RSSMPriorV3(
            action_shape=(ACTION,), action_dim=ACTION, hidden_dim=hidden, rnn_hidden_dim=belief,
            num_classes=classes, recurrent_model=kind, unimix=0.01,
        )  # fmt: skip
        posterior = RSSMPosteriorV3(
            hidden, 32, classes, rnn_hidden_dim=belief, obs_embed_dim=EMBEDDING, unimix=0.01,
            use_rms_norm=kind == "block_gru",
        )  # fmt: skip
    of = {w: [("next", f"{w}_{s}") for s in said] for w in ("prior", "posterior")}
    return (
        TensorDictModule(prior, ["state", "belief", "action"], [*of["prior"], *LATENTS]),
        TensorDictModule(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [*of["posterior"], ("next", "state")],
        ),
    )


def providers(kind: str, device: str) -> tuple[dict[str, nn.Module], TensorDict]:
    """What rolls out, by name, torchrl's own first; and a batch, with resets where torchrl has them."""
    torch.manual_seed(0)
    batch, time_steps, belief, state = SIZES[kind]
    prior, posterior = (module.to(device) for module in networks(kind))
    td = TensorDict(
        {
            "state": torch.zeros(batch, time_steps, state),
            "belief": torch.zeros(batch, time_steps, belief),
            "action": torch.randn(batch, time_steps, ACTION).clamp(-1, 1),
            "next": {"encoded_latents": torch.randn(batch, time_steps, EMBEDDING)},
        },
        [batch, time_steps],
    )
    found: dict[str, nn.Module]
    if kind == "gaussian":
        found = {
            "torchrl": RSSMRollout(prior, posterior),
            "torchrl compile_step": RSSMRollout(prior, posterior, compile_step=True),
        }
    else:
        td["is_init"] = torch.rand(batch, time_steps, 1) < 0.02
        found = {"torchrl": RSSMRolloutV3(prior, posterior)}
        for scope, unroll in (("step", 1), ("scan", 8)):
            compiled = RSSMRolloutV3(prior, posterior)
            compiled.compile_rollout(scope, unroll=unroll)
            found[f"torchrl compile_rollout {scope}"] = compiled
    for engine in ("captured", "fused"):
        name = f"fastwm {engine}"
        found[name] = fastwm.models.RSSMRollout(prior, posterior, backend=engine)
    return found, td.to(device)


def forward(module: nn.Module, batch: TensorDict) -> dict[str, Tensor]:
    torch.manual_seed(1)
    out = module(batch)["next"]
    return {key: value for key, value in out.items() if key != "encoded_latents"}


def backward(out: dict[str, Tensor]) -> None:
    sum(value.square().mean() for value in out.values()).backward()  # type: ignore[union-attr]


def run(module: nn.Module, batch: TensorDict) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Forward and backward, to the parameters and to the embeddings."""
    embeddings = batch["next", "encoded_latents"]
    inputs = [*module.parameters(), embeddings.requires_grad_()]
    for x in inputs:
        x.grad = None
    out = forward(module, batch)
    backward(out)
    return out, [x.grad for x in inputs]


def check(module: nn.Module, reference: nn.Module, batch: TensorDict) -> None:
    (got, got_gradients), (want, want_gradients) = run(module, batch), run(reference, batch)
    for key, value in want.items():
        _close(got[key], value, "rollout", key)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        _close(g, w, "rollout.gradient", f"gradient of shape {tuple(w.shape)}")


def _close(got: Tensor, want: Tensor, what: str, name: str) -> None:
    """Within the table of tolerances; its absolute part is relative to the largest value."""
    bound = tolerance(what, torch.float32)
    atol = max(bound.atol, bound.rtol * want.abs().max().item())
    torch.testing.assert_close(got, want, rtol=bound.rtol, atol=atol, msg=name)


NAMES = dict.fromkeys(SIZES, ("torchrl", "fastwm captured", "fastwm fused"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in NAMES.items() for n in names])
def test_posterior(benchmark: Any, kind: str, name: str, device: str) -> None:
    torch.set_num_threads(1)
    modules, batch = providers(kind, device)
    # On CUDA torchrl draws all of V3's numbers at once, which gives others.
    if device == "cpu":
        check(modules[name], modules["torchrl"], batch)

    def timed() -> None:
        run(modules[name], batch)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{kind}, {device}"
    benchmark(timed)


def in_turns(kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time on CPU, by provider: medians over rounds in turns."""
    modules, batch = providers(kind, "cpu")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in modules}
    for name in ("fastwm captured", "fastwm fused"):
        check(modules[name], modules["torchrl"], batch)
    for name, module in list(modules.items()):
        try:
            for _ in range(3):
                run(module, batch)
        except Exception as error:  # torch.compile's, on this torch
            print(f"  {name} does not run: {type(error).__name__}: {str(error).splitlines()[0]}")
            del modules[name], times[name]
    for _ in range(rounds):
        for name, module in modules.items():
            for parameter in module.parameters():
                parameter.grad = None
            begin = time.thread_time()
            out = forward(module, batch)
            middle = time.thread_time()
            backward(out)
            times[name].append((middle - begin, time.thread_time() - begin))
    return {
        name: {
            "forward": 1e3 * statistics.median(f for f, _ in taken),
            "forward+backward": 1e3 * statistics.median(b for _, b in taken),
        }
        for name, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=Path("bench/results/posterior.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in options.kind:
        ms = in_turns(kind, options.rounds)
        names = ("batch", "time", "belief", "state")
        row = {"kind": kind, **dict(zip(names, SIZES[kind], strict=True)), "threads": 1, "ms": ms}
        record(options.results, {**row, "rounds": options.rounds})
        for name, found in ms.items():
            ratios = [ms["torchrl"][what] / value for what, value in found.items()]
            print(
                f"{kind:10} {name:30} {found['forward']:7.1f} ms ({ratios[0]:.2f}x) forward, "
                f"{found['forward+backward']:7.1f} ms ({ratios[1]:.2f}x) with gradients"
            )


if __name__ == "__main__":
    main()
