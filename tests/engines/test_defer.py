"""Putting off what feeds no later step: which ops, when, and that nothing but rounding changes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import fastwm
from fastwm.engines import captured
from fastwm.plan import cache_of
from tests.models import CatLinear, linear_policy, make_case, module, spec_env

B, T = 3, 5


def loop_of(
    env: fastwm.WorldModelEnv, policy: nn.Module, start: TensorDict
) -> captured.CapturedLoop:
    with fastwm.backend("captured"):
        env.rollout(T, policy, tensordict=start)
    (variants,) = cache_of(env).plans.values()
    return variants[0].loop


def put_off(loop: captured.CapturedLoop, *, stop: bool = True) -> list[str]:
    """Names of the ops that run after the loop."""
    source = loop._loop(stop=stop, defer=True).source
    later = set(source.put_off)
    return [op.name for op in loop.graph.ops if any(o and o.index in later for o in op.outputs)]


def head(net: nn.Module, out: str = "reward") -> TensorDictModule:
    return module(net, [("next", "latent")], [("next", out)])


def env_with(reward: nn.Module, done: nn.Module | None = None) -> fastwm.WorldModelEnv:
    model = fastwm.WorldModel(
        module(nn.Linear(8, 4), ["observation"], ["latent"]),
        module(CatLinear(6, 4), ["latent", "action"], [("next", "latent")]),
        head(reward),
        done_head=None if done is None else head(done, "done"),
    )
    return fastwm.WorldModelEnv(model, spec_env(), batch_size=[B])


def start() -> TensorDict:
    return TensorDict({"latent": torch.randn(B, 4)}, [B])


def test_a_reward_head_is_put_off_and_the_dynamics_are_not():
    loop = loop_of(env_with(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))),
                   linear_policy(), start())  # fmt: skip
    assert [n for n in put_off(loop) if n != "t"] == ["addmm", "silu", "addmm"]


def test_a_done_head_waits_only_where_it_ends_the_rollout():
    loop = loop_of(env_with(nn.Linear(4, 1), nn.Linear(4, 1)), linear_policy(), start())
    assert "gt.Scalar" not in put_off(loop, stop=True)
    assert "gt.Scalar" in put_off(loop, stop=False)


class CentredHead(nn.Module):
    """Rows of a batch talk to each other: its mean over the batch must stay one step's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.linear(latent - latent.mean(0, keepdim=True))


class NoisyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.linear(latent + 0.1 * torch.randn_like(latent))


class PerRowHead(nn.Module):
    """A table with one row per row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(B, 4))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent * self.table).sum(-1, keepdim=True)


@pytest.mark.parametrize("net", [CentredHead, NoisyHead, PerRowHead])
@pytest.mark.parametrize("grad", [False, True])
def test_heads_that_are_not_row_by_row_give_what_eager_gives(net, grad):
    with torch.set_grad_enabled(grad):
        report = fastwm.check_parity(env_with(net()), linear_policy(), start(), T)
    assert report.ok, report


@pytest.mark.parametrize(
    ("net", "stays"),
    [
        (CentredHead, {"mean.dim", "sub.Tensor"}),
        (NoisyHead, {"randn_like"}),
        (PerRowHead, {"mul.Tensor", "sum.dim_IntList"}),
    ],
)
def test_the_part_that_mixes_rows_or_draws_stays_in_the_loop(net, stays):
    loop = loop_of(env_with(net()), linear_policy(), start())
    assert stays <= {op.name for op in loop.graph.ops}
    assert not stays & set(put_off(loop))


def test_a_batch_as_wide_as_the_features_is_not_mistaken_for_weights():
    # latent 4, batch 4: a per-row table has the shape of a weight matrix.
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 4))

        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return torch.tanh(latent + self.table)[..., :1]

    model = fastwm.WorldModel(
        module(nn.Linear(8, 4), ["observation"], ["latent"]),
        module(CatLinear(6, 4), ["latent", "action"], [("next", "latent")]),
        head(Table()),
    )
    env = fastwm.WorldModelEnv(model, spec_env(), batch_size=[4])
    report = fastwm.check_parity(
        env, linear_policy(), TensorDict({"latent": torch.randn(4, 4)}, [4]), T
    )
    assert report.ok, report


@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name", ["linear", "mlp", "mlp_sampled", "rssm_sampled", "context", "linear_done"]
)
def test_both_ways_agree_with_eager(monkeypatch, name, limit, grad):
    monkeypatch.setitem(captured._DEFER_BYTES, "cpu", limit)
    monkeypatch.setitem(captured._DEFER_BYTES_GRAD, "cpu", limit)
    case = make_case(name)
    with torch.set_grad_enabled(grad):
        report = fastwm.check_parity(case.env([B]), case.policy, case.start(B), T)
    assert report.ok, report


@pytest.mark.parametrize("grad", [False, True])
def test_a_large_rollout_keeps_its_heads_in_the_loop(grad):
    with torch.set_grad_enabled(grad):
        loop = loop_of(env_with(nn.Linear(4, 1)), linear_policy(), start())
        few, _ = loop._choose(T, stop=True, exact=False)
        many, _ = loop._choose(1 << 24, stop=True, exact=False)
    assert few.after is not None
    assert many.after is None


def test_results_do_not_share_memory():
    model = fastwm.WorldModel(
        module(nn.Linear(8, 1), ["observation"], ["latent"]),
        module(CatLinear(3, 1), ["latent", "action"], [("next", "latent")]),
        head(nn.Tanh()),
    )
    env = fastwm.WorldModelEnv(model, spec_env(), batch_size=[B])
    policy = linear_policy(1)
    with torch.no_grad(), fastwm.backend("captured"):
        out = env.rollout(T, policy, tensordict=TensorDict({"latent": torch.randn(B, 1)}, [B]))
    places = [v.untyped_storage().data_ptr() for v in out.values(True, True)]
    assert len(set(places)) == len(places)
