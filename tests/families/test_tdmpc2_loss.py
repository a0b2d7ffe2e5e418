"""TD-MPC2's losses: the equations written out, what each of them trains, engines and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional
from torchrl.objectives import SoftUpdate

import fastwm
from fastwm.models import Family
from fastwm.models.tdmpc2 import RunningScale, discount_of, tdmpc2
from fastwm.tolerances import tolerance
from tests.families.test_tdmpc2 import ACTION, MASKS, OBS, SMALL, TASKS, base_env

B, H = 6, 3
LENGTHS = [25, 200, 500, 1000]
VARIANTS: dict[str, dict[str, Any]] = {
    "one task": {"episode_length": 200},
    "terminates": {"episodic": True},
    "tasks": {
        "tasks": TASKS,
        "action_masks": MASKS,
        "episode_length": LENGTHS,
        "loss": {
            "rho": 0.8, "consistency_coef": 2.0, "reward_coef": 0.3, "value_coef": 0.4,
            "entropy_coef": 0.2, "scale_tau": 0.5,
        },
    },
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


def make(variant: str = "one task", **kwargs: Any) -> Family:
    """Weights as after some training: heads that start at 0 would hide errors."""
    family = tdmpc2(base_env(), **{**SMALL, "dropout": 0.0, **VARIANTS[variant], **kwargs})
    for parameter in family.loss.parameters():
        nn.init.normal_(parameter, std=0.3)
    target = family.loss.target_qvalue_network_params
    target.apply(lambda p: p.data.normal_(0.0, 0.3))
    return family


def batch_of(family: Family) -> TensorDict:
    batch = TensorDict(
        {
            "observation": torch.randn(B, H, OBS),
            "action": torch.rand(B, H, ACTION) * 2 - 1,
            "next": {
                "observation": torch.randn(B, H, OBS),
                "reward": 3 * torch.randn(B, H, 1),
                "terminated": torch.rand(B, H, 1) < 0.3,
            },
        },
        [B, H],
    )
    if family.settings["tasks"] is not None:
        batch["task_id"] = torch.randint(TASKS, (B, 1)).expand(B, H)
    return batch


# ---------------------------------------------------------------- the equations, written out


def two_hot(x: Tensor) -> Tensor:
    """``[...]`` to ``[..., 11]`` over bins from -10 to 10 of symlog."""
    place = (x.sign() * torch.log(1 + x.abs())).clamp(-10, 10) / 2 + 5
    return (1 - (torch.arange(11.0) - place.unsqueeze(-1)).abs()).clamp(min=0)


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return -(two_hot(x) * torch.log_softmax(logits, -1)).sum(-1)


def value_of(logits: Tensor) -> Tensor:
    x = (torch.softmax(logits, -1) * torch.linspace(-10, 10, 11)).sum(-1)
    return x.sign() * (x.abs().exp() - 1)


class Written:
    """The update's losses, in the order in which the loss draws."""

    def __init__(self, family: Family, batch: TensorDict, variant: str) -> None:
        self.family, self.batch = family, batch
        loss = VARIANTS[variant].get("loss", {})
        self.rho = loss.get("rho", 0.5)
        self.coefs = [loss.get(f"{k}_coef", d) for k, d in
                      (("consistency", 20), ("reward", 0.1), ("value", 0.1))]  # fmt: skip
        self.entropy_coef = loss.get("entropy_coef", 1e-4)
        self.scale_tau = loss.get("scale_tau", 0.01)
        self.task: list[Tensor] = []
        self.mask: Tensor = torch.ones(ACTION)
        if family.settings["tasks"] is not None:
            index = batch["task_id"][:, 0]
            embed = family.world_model.encoder.module[0].module.embedding
            self.task = [embed(index)]
            self.mask = MASKS[index]
            self.discount = torch.tensor([discount_of(n) for n in LENGTHS])[index]
        else:
            length = VARIANTS[variant].get("episode_length", 500)
            self.discount = torch.full((B,), discount_of(length))

    def net(self, which: str) -> Any:
        model = self.family.world_model
        return {
            "encoder": (model.encoder.module[1] if self.task else model.encoder).module,
            "dynamics": model.dynamics.module,
            "reward": model.reward_head.module[0].module,
            "policy": self.family.policy.module.net,
        }[which]

    def q(self, params: Any, latent: Tensor, action: Tensor) -> Tensor:
        """``[N, B, bins]``"""
        logits = []
        for i in range(params["weights", "0"].shape[0]):
            x = torch.cat([latent, action, *self.task], -1)
            for k in ("0", "1"):
                x = functional.linear(x, params["weights", k][i], params["biases", k][i])
                w, b = params["norm_weights", k][i], params["norm_biases", k][i]
                x = functional.mish(functional.layer_norm(x, x.shape[-1:], w, b))
            logits.append(functional.linear(x, params["weights", "2"][i], params["biases", "2"][i]))
        return torch.stack(logits)

    def act(self, latent: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action and entropy bonus."""
        mean, raw = self.net("policy")(torch.cat([latent, *self.task], -1)).chunk(2, -1)
        log_std = (-10 + 6 * (torch.tanh(raw) + 1)) * self.mask
        action = torch.tanh(mean * self.mask + log_std.exp() * noise * self.mask)
        gaussian = torch.distributions.Normal(torch.zeros(()), log_std.exp())
        density = gaussian.log_prob(log_std.exp() * noise * self.mask) * self.mask
        return action, -density.sum(-1) * self.mask.expand(B, ACTION).sum(-1)

    def losses(self) -> dict[str, Tensor]:
        family, batch = self.family, self.batch
        params = family.loss.qvalue_network_params["module"]
        target_params = family.loss.target_qvalue_network_params["module"]
        encode = self.net("encoder")
        with torch.no_grad():
            reached = [encode(batch["next", "observation"][:, t], *self.task) for t in range(H)]
            noise = torch.randn(B, H, ACTION)
            pair = torch.randperm(3)[:2]
            target = []
            for t in range(H):
                action, _ = self.act(reached[t], noise[:, t])
                value = value_of(self.q(target_params, reached[t], action)[pair]).amin(0)
                going_on = ~batch["next", "terminated"][:, t, 0]
                target.append(batch["next", "reward"][:, t, 0] + self.discount * going_on * value)
        z = encode(batch["observation"][:, 0], *self.task)
        latents = [z]
        consistency = reward = value = termination = torch.zeros(())
        for t in range(H):
            a, weight = batch["action"][:, t], self.rho**t
            logits = self.net("reward")(torch.cat([z, a, *self.task], -1))
            reward = (
                reward + weight * cross_entropy(logits, batch["next", "reward"][:, t, 0]).mean()
            )
            for q in self.q(params, z, a):
                value = value + weight * cross_entropy(q, target[t]).mean()
            z = self.net("dynamics")(z, a, *self.task)
            consistency = consistency + weight * functional.mse_loss(z, reached[t])
            if family.world_model.done_head is not None:
                head = family.world_model.done_head.module[0].module
                ended = batch["next", "terminated"][:, t].float()
                termination = termination + functional.binary_cross_entropy_with_logits(
                    head(z), ended
                )
            latents.append(z)
        of_consistency, of_reward, of_value = self.coefs
        out = {
            "loss_consistency": of_consistency * consistency / H,
            "loss_reward": of_reward * reward / H,
            "loss_value": of_value * value / (H * 3),
        }
        if family.world_model.done_head is not None:
            out["loss_termination"] = termination / H
        return {**out, **self.policy_losses([z.detach() for z in latents], params.data)}

    def policy_losses(self, latents: list[Tensor], params: Any) -> dict[str, Tensor]:
        noise = torch.randn(B, H + 1, ACTION)
        pair = torch.randperm(3)[:2]
        self.task = [task.detach() for task in self.task]
        values, bonuses = [], []
        for t, z in enumerate(latents):
            action, bonus = self.act(z, noise[:, t])
            values.append(value_of(self.q(params, z, action)[pair]).mean(0))
            bonuses.append(bonus)
        ordered = values[0].detach().sort().values
        at = torch.tensor([0.05, 0.95]) * (B - 1)
        low, high = torch.lerp(ordered[at.long()], ordered[at.long() + 1], at - at.floor())
        scale = torch.lerp(torch.ones(()), (high - low).clamp(min=1), self.scale_tau)
        steps = [
            self.rho**t * (v / scale + self.entropy_coef * b).mean()
            for t, (v, b) in enumerate(zip(values, bonuses, strict=True))
        ]
        return {"loss_policy": -sum(steps) / (H + 1), "scale": scale}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_the_equations(variant: str, each_backend: str) -> None:
    family = make(variant)
    batch = batch_of(family)
    torch.manual_seed(5)
    want = Written(family, batch, variant).losses()
    torch.manual_seed(5)
    got = family.loss(batch)
    assert set(want) == set(got.keys()) - {"entropy"}
    bound = tolerance("rollout", torch.float32)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=bound.rtol, atol=bound.atol, msg=name)
    bound = tolerance("rollout.gradient", torch.float32)
    parameters = dict(family.loss.named_parameters())
    for name in (key for key in want if key.startswith("loss_")):
        grads = [
            torch.autograd.grad(x[name], list(parameters.values()), retain_graph=True, allow_unused=True)
            for x in (got, want)
        ]  # fmt: skip
        for parameter, mine, theirs in zip(parameters, *grads, strict=True):
            mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
            scale = max(theirs.abs().max().item(), 1e-3)
            error = (mine - theirs).abs().max().item()
            assert error <= bound.rtol * scale + bound.atol, (name, parameter, error, scale)


# ---------------------------------------------------------------- what trains what


def touched(family: Family, loss: Tensor) -> set[str]:
    """The parts that the loss has gradients for."""
    parameters = dict(family.loss.named_parameters())
    grads = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    names = ("encoder", "dynamics", "reward_head", "done_head", "actor_network", "qvalue_network")
    moved = [n for n, g in zip(parameters, grads, strict=True) if g is not None and g.any()]
    return {part for part in names if any(part in name for name in moved)}


def test_each_loss_reaches_its_own_parts() -> None:
    family = make("terminates")
    out = family.loss(batch_of(family))
    assert touched(family, out["loss_consistency"]) == {"encoder", "dynamics"}
    assert touched(family, out["loss_reward"]) == {"encoder", "dynamics", "reward_head"}
    assert touched(family, out["loss_value"]) == {"encoder", "dynamics", "qvalue_network"}
    assert touched(family, out["loss_termination"]) == {"encoder", "dynamics", "done_head"}
    assert touched(family, out["loss_policy"]) == {"actor_network"}
    assert not out["entropy"].requires_grad
    assert not out["scale"].requires_grad


def test_parameter_groups_hold_all_but_the_policy_once() -> None:
    family = make("tasks")
    slow, rest = family.loss.parameter_groups(1e-3)
    assert slow["lr"] == pytest.approx(3e-4)
    assert rest["lr"] == 1e-3
    grouped = [*slow["params"], *rest["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    policy = list(family.policy.parameters())
    assert {id(p) for p in [*grouped, *policy]} == {id(p) for p in family.loss.parameters()}
    assert not {id(p) for p in grouped} & {id(p) for p in policy}
    embedding = family.world_model.encoder.module[0].module.embedding.weight
    assert any(p is embedding for p in rest["params"])


def test_the_update_in_two_parts_is_the_whole() -> None:
    family = make()
    batch = batch_of(family)
    torch.manual_seed(1)
    whole = family.loss(batch)
    other = copy.deepcopy(family)
    other.loss.scale.value.fill_(1.0)
    torch.manual_seed(1)
    losses, states = other.loss.model_losses(batch)
    assert states.batch_size == (B, H + 1)
    assert not states["latent"].requires_grad
    parts = {**losses, **other.loss.policy_losses(states)}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_target_parameters_follow_by_torchrls_soft_update() -> None:
    family = make()
    loss = family.loss
    update = SoftUpdate(loss, tau=0.1)
    weight = family.value.module.ensemble.weights[0]
    target = loss.target_qvalue_network_params["module", "weights", "0"]
    assert torch.equal(target, weight)
    before = target.clone()
    with torch.no_grad():
        weight.add_(1.0)
    update.step()
    torch.testing.assert_close(target, before + 0.1)
    assert not target.requires_grad
    assert all(p is not target for p in loss.parameters())


def test_only_the_target_never_drops_out() -> None:
    dropping, whole = make(dropout=0.9).train(), make()
    whole.load_state_dict(dropping.state_dict())
    batch = batch_of(dropping)
    targets, losses = [], []
    for family in (dropping, whole):
        torch.manual_seed(0)
        reached = family.loss._encoded(batch, following=True)
        targets.append(family.loss._value_target(batch, reached))
        torch.manual_seed(0)
        losses.append(family.loss(batch))
    assert torch.equal(*targets)
    for name in ("loss_value", "loss_policy"):
        assert losses[0][name] != losses[1][name]


# ---------------------------------------------------------------- engines


def test_training_with_dropout_is_the_same_on_each_engine() -> None:
    results = {}
    for backend in ("eager", "captured", "fused"):
        torch.manual_seed(0)
        family = make("terminates", dropout=0.2).train()
        batch = batch_of(family)
        optimizer = torch.optim.SGD(family.loss.parameters(), lr=1e-2)
        target = SoftUpdate(family.loss, tau=0.1)
        with fastwm.backend(backend):
            for _ in range(3):
                losses = family.loss(batch)
                optimizer.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                optimizer.step()
                target.step()
        results[backend] = losses
    bound = tolerance("rollout.gradient", torch.float32)
    for backend in ("captured", "fused"):
        for name, value in results["eager"].items():
            torch.testing.assert_close(
                results[backend][name], value, rtol=bound.rtol, atol=bound.atol
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_rolls_out_on_the_fused_engine(variant: str) -> None:
    family = make(variant, dropout=0.01).train()
    batch = batch_of(family)
    family.loss(batch)
    start = family.loss._encoded(batch, following=False)
    env = family.loss.__dict__["_env"]
    explained = env.explain(H, actions=batch["action"].unbind(1), tensordict=start)
    assert str(explained) == "fused: runs"


def test_new_weights_another_dtype_and_another_horizon_are_seen() -> None:
    family = make()
    batch = batch_of(family)
    before = family.loss(batch)["loss_consistency"]
    with torch.no_grad():
        family.world_model.dynamics.module.net[0].weight.mul_(2)
    after = family.loss(batch)["loss_consistency"]
    assert before != after
    shorter = family.loss(batch[:, :1])["loss_consistency"]
    latent = family.world_model(batch[:, 0].clone())["next", "latent"]
    following = TensorDict({"observation": batch["next", "observation"][:, 0]}, [B])
    reached = family.world_model.encode(following)["latent"]
    torch.testing.assert_close(shorter, 20 * functional.mse_loss(latent, reached))
    family.double()
    doubled = family.loss(batch.apply(lambda t: t.double() if t.is_floating_point() else t))
    torch.testing.assert_close(doubled["loss_consistency"].float(), after)
    assert doubled["loss_policy"].dtype == torch.float64


def test_a_copied_loss_trains_its_own_parameters() -> None:
    family = make()
    batch = batch_of(family)
    family.loss(batch)
    other = copy.deepcopy(family)
    other.loss(batch)["loss_value"].backward()
    assert other.value.module.ensemble.weights[0].grad is not None
    assert family.value.module.ensemble.weights[0].grad is None


# ---------------------------------------------------------------- the LossModule


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_keys_and_out_keys(variant: str) -> None:
    family = make(variant)
    batch = batch_of(family)
    loss = family.loss
    assert set(loss(batch.select(*loss.in_keys)).keys()) == set(loss.out_keys)
    for key in loss.in_keys:
        with pytest.raises(KeyError, match=str(key).replace("(", r"\(").replace(")", r"\)")):
            loss(batch.exclude(key))


def test_tensors_by_name() -> None:
    family = make()
    batch = batch_of(family)
    torch.manual_seed(0)
    want = family.loss(batch)
    family.loss.scale.value.fill_(1.0)
    torch.manual_seed(0)
    got = family.loss(
        observation=batch["observation"],
        action=batch["action"],
        next_observation=batch["next", "observation"],
        next_reward=batch["next", "reward"],
        next_terminated=batch["next", "terminated"],
    )
    for name, value in zip(family.loss.out_keys, got, strict=True):
        assert torch.equal(value, want[name]), name


def test_set_keys() -> None:
    family = make()
    batch = batch_of(family)
    torch.manual_seed(0)
    want = family.loss(batch)["loss_reward"]
    family.loss.set_keys(reward="gain")
    batch.rename_key_(("next", "reward"), ("next", "gain"))
    torch.manual_seed(0)
    assert family.loss(batch)["loss_reward"] == want


def test_the_batch_is_left_as_it_was() -> None:
    family = make("tasks")
    batch = batch_of(family)
    kept = batch.clone()
    family.loss(batch)
    assert list(batch.keys(True, True)) == list(kept.keys(True, True))
    assert (batch == kept).all()


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (("next", "reward"), (B, H), r"\('next', 'reward'\) of shape \(6, 3, 1\)"),
        (("next", "terminated"), (B, H, 2), r"\('next', 'terminated'\) of shape \(6, 3, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(key: Any, shape: tuple[int, ...], message: str) -> None:
    family = make()
    batch = batch_of(family)
    batch[key] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        family.loss(batch)


def test_transitions_are_no_sequences() -> None:
    family = make()
    with pytest.raises(RuntimeError, match=r"'action' must be \[B, H, A\], its shape is \(6, 3\)"):
        family.loss(batch_of(family)[:, 0])


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend"):
        make(loss={"backend": "fastest"})


# ---------------------------------------------------------------- scale and discount


def test_running_scale_starts_at_one_and_never_counts_less() -> None:
    scale = RunningScale(0.5)
    scale.update(torch.zeros(4, 1))
    assert scale.value == 1
    x = torch.randn(1000, 1) * 10
    scale.update(x)
    low, high = x.flatten().quantile(torch.tensor([0.05, 0.95]))
    torch.testing.assert_close(scale.value, 0.5 + 0.5 * (high - low))
    assert "value" in scale.state_dict()


def test_discount_by_episode_length() -> None:
    assert discount_of(1000) == pytest.approx(0.995)
    assert discount_of(100) == pytest.approx(0.95)
    assert discount_of(10) == 0.95
    assert discount_of(10_000) == 0.995
    loss = make("tasks").loss
    torch.testing.assert_close(loss.discount, torch.tensor([0.95, 0.975, 0.99, 0.995]))
