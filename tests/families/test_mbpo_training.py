"""Learning of the MBPO ensemble: its loss against plain torch, the hold-out, elites, early stopping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs import GymEnv

from fastwm.models import Family, mbpo
from fastwm.models.mbpo import WEIGHT_DECAY, EnsembleLoss, fit, parameter_groups, rollout_length
from fastwm.models.mbpo.ensemble import EnsembleLinear

MEMBERS = 4
KEYS = ["observation", "action", ("next", "observation"), ("next", "reward")]


@pytest.fixture(scope="module")
def base_env() -> GymEnv:
    return GymEnv("Pendulum-v1")


def make(base_env: GymEnv, **settings: Any) -> Family:
    settings = {"members": MEMBERS, "elites": 2, "hidden": (16, 16), **settings}
    return mbpo(base_env, **settings)


def transitions(*batch: int) -> TensorDict:
    """Of a linear system without noise."""
    x, u = torch.randn(*batch, 3), torch.rand(*batch, 1) * 2 - 1
    following = 0.9 * x + 0.1 * x.roll(1, -1) + 0.3 * u
    reward = x[..., :1] - u
    return TensorDict(
        {"observation": x, "action": u, "next": {"observation": following, "reward": reward}},
        list(batch),
    )


# --- loss -----------------------------------------------------------------------------------------


def plain_nll(family: Family, batch: TensorDict) -> Tensor:
    """The Gaussian's log-density by torch.distributions: ``[members, B]``, one member at a time."""
    ensemble = family.world_model.dynamics.module.ensemble
    losses = []
    for m in range(MEMBERS):
        own = batch[m] if batch.ndim == 2 else batch
        x = torch.cat((own["observation"], own["action"]), -1)
        x = (x - ensemble.input_mean) / ensemble.input_std
        for i, layer in enumerate(ensemble.layers):
            x = (x if i == 0 else nn.functional.silu(x)) @ layer.weight[m] + layer.bias[m, 0]
        high, low = ensemble.max_logvar, ensemble.min_logvar
        logvar = high - nn.functional.softplus(high - x[:, 4:])
        logvar = low + nn.functional.softplus(logvar - low)
        target = torch.cat(
            (own["next", "observation"] - own["observation"], own["next", "reward"]), -1
        )
        density = torch.distributions.Normal(x[:, :4], (0.5 * logvar).exp()).log_prob(target)
        losses.append((-2 * density - math.log(2 * math.pi)).mean(-1))
    return torch.stack(losses)


@pytest.mark.parametrize("own", [False, True])
def test_loss_and_gradients_are_the_gaussians(own: bool, base_env: GymEnv) -> None:
    family = make(base_env).double()
    family.world_model.dynamics.module.ensemble.fit_normalizer(torch.randn(50, 4) + 2)
    batch = (transitions(MEMBERS, 30) if own else transitions(30)).double()
    found = family.loss(batch)
    ensemble = family.world_model.dynamics.module.ensemble
    expected = plain_nll(family, batch)
    torch.testing.assert_close(found["loss_nll"], expected.mean(1).sum())
    bounds = 0.01 * (ensemble.max_logvar.sum() - ensemble.min_logvar.sum())
    torch.testing.assert_close(found["loss_bounds"], bounds)
    parameters = list(family.loss.parameters())
    assert len(parameters) == 8
    got = torch.autograd.grad(sum(found.values()), parameters)
    want = torch.autograd.grad(expected.mean(1).sum() + bounds, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_reductions(base_env: GymEnv) -> None:
    family, batch = make(base_env), transitions(30)
    dynamics = family.world_model.dynamics.module
    rows = EnsembleLoss(dynamics, reduction="none")(batch)["loss_nll"]
    assert rows.shape == (MEMBERS, 30)
    total = EnsembleLoss(dynamics, reduction="sum")(batch)["loss_nll"]
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(family.loss(batch)["loss_nll"], rows.mean(1).sum())
    with pytest.raises(ValueError, match="'median'; choose one of mean, sum, none"):
        EnsembleLoss(dynamics, reduction="median")


def test_deterministic_members_learn_by_squared_error(base_env: GymEnv) -> None:
    family, batch = make(base_env, deterministic=True), transitions(30)
    assert family.loss.out_keys == ["loss_mse"]
    loss = family.loss(batch)["loss_mse"]
    torch.testing.assert_close(loss, family.loss.errors(batch).sum())
    assert all(p.grad is None for p in family.parameters())
    loss.backward()
    assert all(p.grad is not None for p in family.parameters())


def test_keys(base_env: GymEnv) -> None:
    loss, batch = make(base_env).loss, transitions(30)
    assert loss.in_keys == KEYS
    assert loss.out_keys == ["loss_nll", "loss_bounds"]
    expected = loss(batch)
    by_name = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_observation=batch["next", "observation"],
        next_reward=batch["next", "reward"],
    )
    assert [x.item() for x in by_name] == [expected[key].item() for key in loss.out_keys]
    loss.set_keys(action="torque")
    assert loss.in_keys == [KEYS[0], "torque", *KEYS[2:]]
    assert loss(batch.rename_key_("action", "torque"))["loss_nll"] == expected["loss_nll"]


def test_bad_batches(base_env: GymEnv) -> None:
    loss, batch = make(base_env).loss, transitions(30)
    for key in KEYS:
        with pytest.raises(KeyError) as raised:
            loss(batch.exclude(key))
        assert f"no {key!r}, which EnsembleLoss reads; it has" in raised.value.args[0]
    with pytest.raises(ValueError, match=r"\[B\].*or \[4, B\].*it is \[3, 10\]"):
        loss(batch.reshape(3, 10))
    wrong = batch.clone()
    wrong["next", "reward"] = wrong["next", "reward"].squeeze(-1)
    with pytest.raises(ValueError, match=r"reward.* shape \(30, 1\), its shape is \(30,\)"):
        loss(wrong)
    wrong = batch.clone()
    wrong["action"] = torch.randn(30, 2)
    with pytest.raises(ValueError, match=r"'action' must have shape \(30, 1\).*\(30, 2\)"):
        loss(wrong)


# --- hold-out and elites --------------------------------------------------------------------------


def test_elites_are_the_members_of_least_error_on_the_holdout(base_env: GymEnv) -> None:
    family, batch = make(base_env), transitions(3, 20)
    x, target = family.loss.inputs_and_targets(batch)
    mean = family.world_model.dynamics.module.ensemble(x.reshape(60, 4))[..., :4]
    expected = (mean - target.reshape(60, 4)).square().mean((1, 2))
    error = family.loss.select_elites(batch)
    torch.testing.assert_close(error, expected)
    elites = family.world_model.dynamics.module.elites.index
    assert elites.tolist() == expected.argsort()[:2].tolist()
    assert not error.requires_grad


def test_elites_need_data_and_finite_errors(base_env: GymEnv) -> None:
    family = make(base_env)
    with pytest.raises(ValueError, match="0 transitions"):
        family.loss.select_elites(transitions(0))
    with torch.no_grad():
        family.world_model.dynamics.module.ensemble.layers[0].weight[1:] = math.nan
    with pytest.raises(ValueError, match="2 elites are wanted, but only 1 of 4 members"):
        family.loss.select_elites(transitions(10))


# --- fit ------------------------------------------------------------------------------------------


def test_fit_learns(base_env: GymEnv) -> None:
    family, data, fresh = make(base_env), transitions(500), transitions(200)
    before = family.loss.errors(fresh)
    optimizer = torch.optim.Adam(family.loss.parameters(), lr=1e-2)
    fitted = fit(family.loss, optimizer, data, batch_size=64, max_epochs=30)
    after = family.loss.errors(fresh)
    assert (after < 0.02 * before).all()
    # Of data that it has not seen, the hold-out's error is the fair estimate.
    assert fitted.error.mean() == pytest.approx(after.mean().item(), rel=0.5)
    assert fitted.updates == fitted.epochs * 7  # 400 rows in batches of 64
    dynamics = family.world_model.dynamics.module
    assert torch.equal(fitted.elites, dynamics.elites.index)
    assert fitted.elites.tolist() == fitted.error.argsort()[:2].tolist()
    # Its own 400 rows, not all 500.
    inputs = torch.cat((data["observation"], data["action"]), -1)
    assert torch.allclose(dynamics.ensemble.input_mean, inputs.mean(0), atol=0.1)
    assert not torch.equal(dynamics.ensemble.input_mean, inputs.mean(0))


class Watched(EnsembleLoss):
    """A loss whose hold-out errors are made up: one row per epoch, and what it was called with."""

    def script(self, errors: list[list[float]]) -> Watched:
        self.errors_to_come = [torch.tensor(error) for error in errors]
        self.seen: list[Tensor] = []
        self.weights: list[Tensor] = []
        return self

    def forward(self, tensordict: TensorDict) -> TensorDict:
        self.seen.append(tensordict["observation"][..., 0].clone())
        return super().forward(tensordict)

    def errors(self, tensordict: TensorDict) -> Tensor:
        self.held_out = tensordict
        if not self.errors_to_come:
            return torch.arange(float(MEMBERS))
        self.weights.append(self.dynamics.ensemble.layers[0].weight.detach().clone())
        return self.errors_to_come.pop(0)


def watched(base_env: GymEnv, errors: list[list[float]]) -> tuple[Watched, torch.optim.Optimizer]:
    loss = Watched(make(base_env).world_model.dynamics.module).script(errors)
    return loss, torch.optim.SGD(loss.parameters(), lr=1e-2)


def test_fit_stops_when_no_member_improves_and_goes_back_to_the_best(base_env: GymEnv) -> None:
    loss, optimizer = watched(
        base_env,
        [
            [8.0, 8, 8, 8],
            [4.0, 9, 7.93, 8],  # member 2 by less than 1 %
            [5.0, 4, 9, math.nan],
            [5.0, 5, 9, 9],
            [5.0, 5, 7.93, 9],
        ],
    )
    fitted = fit(loss, optimizer, transitions(40), patience=2)
    assert fitted.epochs == 5
    final = loss.dynamics.ensemble.layers[0].weight
    for member, epoch in enumerate((1, 2, 0, 0)):
        assert torch.equal(final[member], loss.weights[epoch][member])
        assert not torch.equal(final[member], loss.weights[4][member])
    assert fitted.elites.tolist() == [0, 1]


def test_fit_counts_a_fall_of_more_than_the_given_part(base_env: GymEnv) -> None:
    falling = [[100.0 * 0.98**i] * MEMBERS for i in range(20)]
    loss, optimizer = watched(base_env, falling)
    assert fit(loss, optimizer, transitions(40), max_epochs=15).epochs == 15
    loss, optimizer = watched(base_env, falling)
    # 3 %: each second epoch has fallen by enough.
    assert fit(loss, optimizer, transitions(40), improvement=0.03, patience=1).epochs == 2


def test_each_member_sees_its_own_bootstrap_sample_in_new_orders(base_env: GymEnv) -> None:
    loss, optimizer = watched(base_env, [[2.0] * MEMBERS, [1.0] * MEMBERS])
    data = transitions(500)
    fit(loss, optimizer, data, max_epochs=2, batch_size=150)
    assert [tuple(seen.shape) for seen in loss.seen] == [(4, 150), (4, 150), (4, 100)] * 2
    epochs = torch.cat(loss.seen[:3], 1), torch.cat(loss.seen[3:], 1)
    held_out = loss.held_out["observation"][:, 0]
    assert held_out.unique().numel() == 100
    for member in range(MEMBERS):
        first, second = epochs[0][member], epochs[1][member]
        assert not torch.equal(first, second)
        assert torch.equal(first.sort()[0], second.sort()[0])
        assert not torch.isin(first, held_out).any()
        # 1 - 1/e of the rows are in a bootstrap sample.
        assert first.unique().numel() / 400 == pytest.approx(1 - math.exp(-1), abs=0.07)
    assert not torch.equal(epochs[0][0].sort()[0], epochs[0][1].sort()[0])

    loss, optimizer = watched(base_env, [[2.0] * MEMBERS])
    fit(loss, optimizer, data, max_epochs=1, batch_size=400, bootstrap=False)
    (seen,) = loss.seen
    assert all(row.unique().numel() == 400 for row in seen)
    assert not torch.equal(seen[0], seen[1])


def test_the_holdout_has_a_largest_size(base_env: GymEnv) -> None:
    loss, optimizer = watched(base_env, [[2.0] * MEMBERS])
    fit(loss, optimizer, transitions(10, 10), max_epochs=1, holdout=0.5, max_holdout=30)
    assert loss.held_out.numel() == 30


def test_fit_refuses_what_it_cannot_do(base_env: GymEnv) -> None:
    loss, optimizer = watched(base_env, [])
    with pytest.raises(ValueError, match=r"4 transitions are too few: holdout=0\.2"):
        fit(loss, optimizer, transitions(4))
    with pytest.raises(ValueError, match="0 transitions are too few"):
        fit(loss, optimizer, transitions(0))
    for part in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"holdout={part}"):
            fit(loss, optimizer, transitions(40), holdout=part)
    with pytest.raises(KeyError, match=r"no .*action"):
        fit(loss, optimizer, transitions(40).exclude("action"))


def test_parameter_groups_are_mbpos(base_env: GymEnv) -> None:
    family = mbpo(base_env)
    groups = parameter_groups(family.loss)
    layers = family.world_model.dynamics.module.ensemble.layers
    assert [g["weight_decay"] for g in groups] == [*WEIGHT_DECAY, 0.0]
    for group, layer in zip(groups, layers, strict=False):
        assert len(group["params"]) == 1
        assert group["params"][0] is layer.weight
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in family.parameters()}
    with pytest.raises(ValueError, match="5 weight decays for 3 layers"):
        parameter_groups(make(base_env))
    assert [g["weight_decay"] for g in parameter_groups(make(base_env), (1.0, 2.0, 3.0))] == [
        1.0, 2.0, 3.0, 0.0,
    ]  # fmt: skip
    assert isinstance(layers[0], EnsembleLinear)


def test_rollout_length_is_that_of_the_paper() -> None:
    for epoch in range(200):
        exact = min(max(1 + (epoch - 20) / (100 - 20) * (15 - 1), 1), 15)
        assert rollout_length(epoch) in {math.floor(exact), math.floor(exact + 1e-9)}
    assert [rollout_length(e, epochs=(2, 6), lengths=(1, 5)) for e in range(9)] == [
        1, 1, 1, 2, 3, 4, 5, 5, 5,
    ]  # fmt: skip
    assert {rollout_length(e, epochs=(20, 150), lengths=(1, 1)) for e in range(200)} == {1}
    with pytest.raises(ValueError, match=r"epochs=\(5, 5\)"):
        rollout_length(1, epochs=(5, 5))
