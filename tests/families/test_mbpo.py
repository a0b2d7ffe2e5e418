"""MBPO and PETS: the ensemble's step on every engine, against plain torch, and what is never stale."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import GymEnv
from torchrl.modules import ProbabilisticActor, TanhNormal

import fastwm
from fastwm.models import Family, mbpo
from fastwm.models.mbpo import terminations
from fastwm.plan import cache_of
from fastwm.tolerances import tolerance

SMALL = {"hidden": (16, 16)}
T = 5


@pytest.fixture(scope="module")
def base_env() -> GymEnv:
    return GymEnv("Pendulum-v1")


def make_policy() -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        default_interaction_type="random",
    )


def start_of(family: Family, *batch: int) -> TensorDict:
    return family.world_model.encode(
        TensorDict({"observation": torch.randn(*batch, 3)}, list(batch))
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "MBPO, any batch": {},
    "MBPO's sizes": {"hidden": (200,) * 4},
    "PETS TSinf, any batch": {"propagation": "TSinf", "members": 5, "elites": 5},
    "PETS TS1": {"propagation": "TS1"},
    "deterministic members": {"deterministic": True},
    "means": {"sample": False},
    "one elite": {"elites": 1},
    "terminates": {"termination": terminations.inverted_pendulum},
    "terminates by a row's largest": {"termination": terminations.hopper},
    "other activation": {"activation": nn.Tanh},
}


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_engine_is_eager(variant: str, base_env: GymEnv) -> None:
    """Values, gradients and samples, through check_parity; "auto" takes the fused engine."""
    family = mbpo(base_env, **{**SMALL, **VARIANTS[variant]})
    env, policy = family.env(base_env), make_policy()
    for batch in [(3,), (2, 3), ()] if "any batch" in variant else [(3,)]:
        start = start_of(family, *batch)
        start["observation"].requires_grad_()
        arguments = {"policy": policy, "tensordict": start, "break_when_any_done": False}
        assert env.explain(T, **arguments).engine == "fused", env.explain(T, **arguments)
        report = fastwm.check_parity(env, max_steps=T, **arguments)
        assert report.ok, report
        assert not any(engine.refused for engine in report.engines), report
    with torch.no_grad():
        assert env.explain(T, **arguments).engine == "fused"


def test_only_the_drawn_elite_is_computed(base_env: GymEnv) -> None:
    for propagation in ("random", "TSinf"):
        family = mbpo(base_env, propagation=propagation)
        program = str(family.env(base_env).explain(T, tensordict=start_of(family, 4)).source)
        assert program.count("member_linear(") == 5
        assert "grouped_linear(" not in program


def test_new_elites_are_seen_without_a_new_trace(base_env: GymEnv) -> None:
    """Choosing others between rollouts changes the next one, on every engine, as in eager."""
    family = mbpo(base_env, members=4, elites=1, sample=False, **SMALL)
    start = start_of(family, 3)
    envs = {name: family.env(base_env, backend=name) for name in ("eager", "captured", "fused")}
    actions = [torch.rand(3, 1) for _ in range(T)]
    seen = []
    with torch.no_grad():
        for best in (1, 0, 2, 3):
            family.world_model.dynamics.module.elites.choose((torch.arange(4) != best).float())
            found = {
                name: env.rollout(T, actions=actions, tensordict=start)["next", "observation"]
                for name, env in envs.items()
            }
            for name in ("captured", "fused"):
                torch.testing.assert_close(found[name], found["eager"])
            seen.append(found["eager"])
    assert not any(torch.allclose(a, b) for a, b in combinations(seen, 2))
    assert [cache_of(env).traces for env in envs.values()] == [0, 1, 1]


def test_sample_and_the_normalizer_are_seen(base_env: GymEnv) -> None:
    family = mbpo(base_env, elites=1, **SMALL)
    env, start = family.env(base_env, backend="fused"), start_of(family, 3)
    dynamics = family.world_model.dynamics.module

    def imagined() -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            fused = env.rollout(T, make_policy_of_zeros(), tensordict=start)
            torch.manual_seed(5)
            with fastwm.backend("eager"):
                eager = env.rollout(T, make_policy_of_zeros(), tensordict=start)
        torch.testing.assert_close(fused["next", "reward"], eager["next", "reward"])
        return fused["next", "reward"]

    first = imagined()
    dynamics.ensemble.fit_normalizer(torch.randn(50, 4) * 3 + 1)
    second = imagined()
    dynamics.sample = False
    third = imagined()
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


def make_policy_of_zeros() -> TensorDictModule:
    return TensorDictModule(lambda o: torch.zeros_like(o[..., :1]), ["observation"], ["action"])


# --- against plain torch --------------------------------------------------------------------------


def plain_members(family: Family, x: Tensor) -> Tensor:
    """Every member's output, member by member, from the weights alone: ``[B, I] -> [M, B, ...]``."""
    ensemble = family.world_model.dynamics.module.ensemble
    x = (x - ensemble.input_mean) / ensemble.input_std
    outputs = []
    for m in range(ensemble.members):
        y = x
        for i, layer in enumerate(ensemble.layers):
            y = y @ layer.weight[m] + layer.bias[m, 0]
            if i < len(ensemble.layers) - 1:
                y = y * torch.sigmoid(y)
        outputs.append(y)
    return torch.stack(outputs)


def plain_step(family: Family, x: Tensor, action: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """One step of given members, drawing its noise from torch's generator."""
    ensemble = family.world_model.dynamics.module.ensemble
    out = plain_members(family, torch.cat((x, action), -1))[member, torch.arange(len(x))]
    mean, logvar = out[:, :4], out[:, 4:]
    high, low = ensemble.max_logvar, ensemble.min_logvar
    logvar = high - torch.log1p(torch.exp(high - logvar))
    logvar = low + torch.log1p(torch.exp(logvar - low))
    drawn = mean + logvar.exp().sqrt() * torch.randn(len(x), 4)
    return x + drawn[:, :3], drawn[:, 3:]


def prepared(base_env: GymEnv, **settings: Any) -> Family:
    """An ensemble whose elites and normalizer are not those that it begins with."""
    family = mbpo(base_env, **{**SMALL, **settings})
    dynamics = family.world_model.dynamics.module
    dynamics.elites.choose(torch.randperm(dynamics.ensemble.members).float())
    dynamics.ensemble.fit_normalizer(torch.randn(100, 4) * 2 + 0.5)
    return family.double()


@pytest.mark.parametrize("backend", ["eager", "captured", "fused"])
@pytest.mark.parametrize("propagation", ["random", "TSinf"])
def test_rollout_is_that_of_plain_torch(propagation: str, backend: str, base_env: GymEnv) -> None:
    family = prepared(base_env, propagation=propagation)
    elites = family.world_model.dynamics.module.elites.index
    actions = [torch.rand(6, 1, dtype=torch.float64) for _ in range(T)]
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        x = torch.randn(6, 3)
        start = family.world_model.encode(TensorDict({"observation": x}, [6]))
        env = family.env(base_env, backend=backend)
        with torch.no_grad():
            found = env.rollout(T, actions=actions, tensordict=start)
        torch.manual_seed(1)
        torch.randn(6, 3)
        keeps = propagation == "TSinf"
        kept = torch.randint(5, (6, 1))[:, 0] if keeps else None
        for t, action in enumerate(actions):
            drawn = torch.randint(5, (6,)) if kept is None else kept
            x, reward = plain_step(family, x, action, elites[drawn])
            allowed = tolerance("rollout", torch.float64)
            close = {"rtol": allowed.rtol, "atol": 1e-12}
            torch.testing.assert_close(found["next", "observation"][:, t], x, **close)
            torch.testing.assert_close(found["next", "reward"][:, t], reward, **close)
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_draws_each_elite_alike_and_no_other(base_env: GymEnv) -> None:
    """Members that only differ in the reward's bias tell who was drawn, row by row and step by step."""
    family = mbpo(base_env, sample=False, **SMALL)
    dynamics = family.world_model.dynamics.module
    with torch.no_grad():
        last = dynamics.ensemble.layers[-1]
        last.weight.zero_()
        last.bias[:, 0, 3] = torch.arange(7.0)
    dynamics.elites.choose(torch.tensor([9.0, 1, 9, 2, 3, 4, 5]))
    with torch.no_grad():
        out = family.env(base_env).rollout(20, tensordict=start_of(family, 500))
    drawn, count = out["next", "reward"].flatten().unique(return_counts=True)
    assert drawn.tolist() == [1, 3, 4, 5, 6]
    # Each 2000 times of 10000, with a standard deviation of 40.
    assert (count - 2000).abs().max() < 200
    changed = out["next", "reward"].squeeze(-1).diff(dim=1) != 0
    assert 0.75 < changed.double().mean() < 0.85


def test_tsinf_keeps_the_member_of_each_row(base_env: GymEnv) -> None:
    family = mbpo(base_env, propagation="TSinf", sample=False, **SMALL)
    with torch.no_grad():
        last = family.world_model.dynamics.module.ensemble.layers[-1]
        last.weight.zero_()
        last.bias[:, 0, 3] = torch.arange(7.0)
    start = start_of(family, 500)
    assert start["member"].dtype is torch.int64
    assert start["member"].shape == (500, 1)
    with torch.no_grad():
        out = family.env(base_env).rollout(20, tensordict=start)
    reward = out["next", "reward"].squeeze(-1)
    assert (reward == reward[:, :1]).all()
    assert torch.equal(reward[:, 0], start["member"].squeeze(-1).float())
    assert reward.unique().tolist() == [0, 1, 2, 3, 4]


def test_starts_for_tsinf_come_from_real_observations(base_env: GymEnv) -> None:
    family = mbpo(base_env, propagation="TSinf", **SMALL)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4)
    buffer.extend(TensorDict({"observation": torch.randn(20, 3)}, [20]))
    env = family.env(base_env, batch_size=[4], initial_state=buffer)
    assert env.rollout(T)["member"].shape == (4, T, 1)


# --- the pieces -----------------------------------------------------------------------------------


def test_weights_begin_as_in_the_official_code(base_env: GymEnv) -> None:
    ensemble = mbpo(base_env).world_model.dynamics.module.ensemble
    assert [tuple(layer.weight.shape) for layer in ensemble.layers] == [
        (7, 4, 200), *[(7, 200, 200)] * 3, (7, 200, 8),
    ]  # fmt: skip
    weight = ensemble.layers[1].weight
    std = 0.5 / math.sqrt(200)
    assert weight.abs().max() <= 2 * std
    # A normal cut off at two standard deviations has 0.8796 of its own.
    assert weight.std().item() / std == pytest.approx(0.8796, abs=0.005)
    assert all((layer.bias == 0).all() for layer in ensemble.layers)
    assert ensemble.max_logvar.tolist() == [0.5] * 4
    assert ensemble.min_logvar.tolist() == [-10.0] * 4


def test_normalizer_whitens_what_varies(base_env: GymEnv) -> None:
    ensemble = mbpo(base_env, **SMALL).world_model.dynamics.module.ensemble
    x = torch.randn(5, 40, 4) * torch.tensor([3.0, 0.1, 1.0, 0.0]) + 7
    ensemble.fit_normalizer(x)
    y = (x - ensemble.input_mean) / ensemble.input_std
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        y.std((0, 1), correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match="0 rows"):
        ensemble.fit_normalizer(x[:0])


def test_elites_rank_only_finite_errors(base_env: GymEnv) -> None:
    elites = mbpo(base_env, members=4, elites=2, **SMALL).world_model.dynamics.module.elites
    error = torch.tensor([3.0, math.nan, 1.0, -math.inf])
    assert elites.choose(error).tolist() == [2, 0]
    assert elites.index.tolist() == [2, 0]
    with pytest.raises(ValueError, match="2 elites are wanted, but only 1 of 4"):
        elites.choose(torch.tensor([3.0, math.nan, math.inf, math.nan]))
    assert elites.index.tolist() == [2, 0]


def test_terminations_are_what_gymnasium_documents() -> None:
    def ends(rule: Any, *rows: list[float]) -> list[bool]:
        following = torch.tensor(rows)
        return rule(following, torch.zeros(len(rows), 1), following)[:, 0].tolist()

    rest = [0.0] * 9
    healthy, nan = [1.25, 0.0, *rest], math.nan
    assert ends(
        terminations.hopper,
        healthy, [0.7, 0.0, *rest], [1.25, -0.2, *rest], [1.25, 0.0, *rest[1:], -100.0],
        [nan, 0.0, *rest], [1.25, 0.0, nan, *rest[1:]],
    ) == [False, True, True, True, True, True]  # fmt: skip
    assert ends(
        terminations.walker2d,
        healthy, [0.8, 0.0, *rest], [2.0, 0.0, *rest], [1.25, 1.0, *rest], [1.25, nan, *rest],
    ) == [False, True, True, True, True]  # fmt: skip
    assert ends(
        terminations.inverted_pendulum,
        [5.0, 0.2, 0.0, 0.0], [0.0, -0.21, 0.0, 0.0], [0.0, nan, 0.0, 0.0],
    ) == [False, True, True]  # fmt: skip


def test_terminated_rows_are_flagged_in_the_rollout(base_env: GymEnv) -> None:
    family = mbpo(base_env, termination=lambda o, u, following: following[..., :1] > 0, **SMALL)
    with torch.no_grad():
        env = family.env(base_env)
        out = env.rollout(T, tensordict=start_of(family, 50), break_when_any_done=False)
    expected = out["next", "observation"][..., :1] > 0
    assert torch.equal(out["next", "terminated"], expected)
    assert torch.equal(out["next", "done"], expected)
    assert expected.any()
    assert not expected.all()


# --- keys, checkpoints, bad input -----------------------------------------------------------------


class Nested:
    """Specs alone of an env whose keys are nested: a builder needs no more."""

    batch_size = torch.Size([])
    full_observation_spec = Composite(robot=Composite(joints=Unbounded((6,))))
    full_action_spec = Composite(robot=Composite(torque=Bounded(-1, 1, (2,))))
    full_state_spec = Composite()


def test_other_keys() -> None:
    keys = {
        "observation_key": ("robot", "joints"), "action_key": ("robot", "torque"),
        "reward_key": ("robot", "reward"), "member_key": "who",
    }  # fmt: skip
    family = mbpo(
        Nested(), propagation="TSinf", termination=lambda o, u, n: n[..., :1] > 0, **keys, **SMALL
    )
    assert family.latent_key == ("robot", "joints")
    td = TensorDict({"robot": {"joints": torch.randn(4, 6), "torque": torch.randn(4, 2)}}, [4])
    out = family.world_model(td)
    assert out["who"].shape == (4, 1)
    assert out["next", "robot", "joints"].shape == (4, 6)
    assert out["next", "robot", "reward"].shape == (4, 1)
    assert out["next", "robot", "terminated"].dtype is torch.bool
    assert family.loss(out)["loss_nll"].ndim == 0


def test_checkpoint_restores_everything_and_refuses_another_size(base_env: GymEnv) -> None:
    family, other = prepared(base_env).float(), mbpo(base_env, **SMALL)
    other.load_state_dict(family.state_dict())
    start, actions = start_of(family, 3), [torch.rand(3, 1) for _ in range(T)]
    imagined = []
    for each in (family, other):
        torch.manual_seed(2)
        with torch.no_grad():
            out = each.env(base_env).rollout(T, actions=actions, tensordict=start)
        imagined.append(out["next", "observation"])
    assert torch.equal(*imagined)
    with pytest.raises(RuntimeError, match=r"members: 7 in the checkpoint, 3 here"):
        mbpo(base_env, members=3, elites=2, **SMALL).load_state_dict(family.state_dict())
    with pytest.raises(RuntimeError, match=r"hidden: \(16, 16\) in the checkpoint, \(16,\) here"):
        mbpo(base_env, hidden=(16,)).load_state_dict(family.state_dict())


def test_bad_input(base_env: GymEnv) -> None:
    with pytest.raises(ValueError, match="elites=8 of members=7"):
        mbpo(base_env, elites=8)
    with pytest.raises(ValueError, match="elites=0 of members=7"):
        mbpo(base_env, elites=0)
    with pytest.raises(ValueError, match="'DS'; choose one of random, TS1, TSinf"):
        mbpo(base_env, propagation="DS")
    with pytest.raises(KeyError, match="no 'state'; it has"):
        mbpo(base_env, observation_key="state")
    family = mbpo(base_env, termination=lambda o, u, following: following[..., 0] > 0, **SMALL)
    with pytest.raises(ValueError, match=r"shape \(4, 1\), it returned torch.bool of shape \(4,\)"):
        family.env(base_env, backend="eager").rollout(T, tensordict=start_of(family, 4))
    family = mbpo(base_env, propagation="TSinf", **SMALL)
    with pytest.raises(RuntimeError, match="'member'"):
        family.env(base_env).rollout(
            T, tensordict=TensorDict({"observation": torch.ones(4, 3)}, [4])
        )
