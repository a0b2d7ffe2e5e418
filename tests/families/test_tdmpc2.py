"""TD-MPC2: sizes, wiring, what the networks compute, and every engine against eager."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ActionScaling, ExplorationType, GymEnv, TransformedEnv
from torchrl.envs.utils import set_exploration_type

import fastwm
from fastwm.models import Family
from fastwm.models.tdmpc2 import SIZES, PixelEncoder, TaskEmbedding, tdmpc2
from fastwm.tolerances import tolerance
from tests.models import SpecEnv, flag, spec_env

OBS, ACTION, TASKS = 5, 3, 4
SMALL = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 24, "num_q": 3, "num_bins": 11}
MASKS = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
VARIANTS: dict[str, dict[str, Any]] = {
    "one task": {},
    "terminates": {"episodic": True},
    "tasks": {"tasks": TASKS},
    "tasks with masks": {"tasks": TASKS, "action_masks": MASKS, "episodic": True},
}


def base_env(obs: int = OBS, action: int = ACTION) -> SpecEnv:
    return spec_env(obs=obs, action=action, bounded=True)


def make(variant: str = "one task", **kwargs: Any) -> Family:
    return tdmpc2(base_env(), **{**SMALL, **VARIANTS[variant], **kwargs}).eval()


def observed(family: Family, *batch: int) -> TensorDict:
    td = TensorDict({"observation": torch.randn(*batch, OBS)}, list(batch))
    if family.settings["tasks"] is not None:
        td["task_id"] = torch.randint(TASKS, batch)
    return td


def close(got: Tensor, want: Tensor) -> None:
    bound = tolerance("rollout", torch.float32)
    torch.testing.assert_close(got, want, rtol=bound.rtol, atol=bound.atol)


# ---------------------------------------------------------------- sizes and wiring


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_about_the_parameters_of_its_name(size: str) -> None:
    env = base_env(39, 6)  # MT80's
    with torch.device("meta"):
        family = tdmpc2(env, size=size, tasks=80)
    count = sum(parameter.numel() for parameter in family.loss.parameters())
    published = {"1M": 1.4e6, "5M": 5.4e6, "19M": 19e6, "48M": 48.8e6}[size]
    assert count == pytest.approx(published, rel=0.03)
    assert count == sum(p.numel() for p in family.parameters() if p.requires_grad)


def test_5M_has_the_layers_of_the_official_configuration() -> None:
    env = base_env(24, 6)
    with torch.device("meta"):
        family = tdmpc2(env)
    shapes = {name: tuple(p.shape) for name, p in family.loss.named_parameters()}
    assert shapes["world_model.encoder.module.net.0.weight"] == (256, 24)
    assert shapes["world_model.encoder.module.net.3.weight"] == (512, 256)
    assert shapes["world_model.dynamics.module.net.0.weight"] == (512, 512 + 6)
    assert shapes["world_model.dynamics.module.last.0.weight"] == (512,)
    assert shapes["world_model.reward_head.module.0.module.net.6.weight"] == (101, 512)
    assert shapes["qvalue_network.module.weights.0"] == (5, 512, 512 + 6)
    assert shapes["actor_network.module.prior.net.6.weight"] == (12, 512)


def test_initial_weights() -> None:
    family = make("tasks", mlp_dim=128)
    first = family.world_model.dynamics.module.net[0]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not first.bias.any()
    assert not family.world_model.reward_head.module[0].module.net[-1].weight.any()
    assert not family.loss.qvalue_network.module.weights[-1].any()
    assert family.policy.module.net[-1].weight.any()
    embedding = family.world_model.encoder.module[0].module.embedding.weight
    assert 0.015 < embedding.abs().max() <= 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_shapes(variant: str) -> None:
    family = make(variant)
    start = family.world_model.encode(observed(family, 2, 3))
    rollout = family.env(base_env()).rollout(
        4, family.policy, tensordict=start, break_when_any_done=False
    )
    assert rollout.shape == (2, 3, 4)
    assert rollout["next", "latent"].shape == (2, 3, 4, 24)
    assert rollout["next", "reward"].shape == (2, 3, 4, 1)
    assert rollout["action"].shape == (2, 3, 4, ACTION)
    assert rollout["action"].abs().max() <= 1
    simplices = rollout["next", "latent"].unflatten(-1, (3, 8)).sum(-1)
    close(simplices, torch.ones_like(simplices))
    assert family.value(rollout.clone())["state_action_value"].shape == (2, 3, 4, 3)
    if "tasks" in VARIANTS[variant]:
        assert start["task"].shape == (2, 3, 96)
        assert (rollout["task"] == start["task"].unsqueeze(2)).all()
    if "action_masks" in VARIANTS[variant]:
        absent = start["action_mask"].unsqueeze(2).expand_as(rollout["action"]) == 0
        assert absent.any()
        assert not rollout["action"][absent].any()


def test_a_done_head_ends_imagination() -> None:
    family = make("terminates")
    head = family.world_model.done_head.module[0].module.net[-1]
    start = family.world_model.encode(observed(family, 2))
    for bias, steps in ((-9.0, 3), (9.0, 1)):
        with torch.no_grad():
            head.bias.fill_(bias)
        assert family.env(base_env()).rollout(3, family.policy, tensordict=start).shape[1] == steps


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_engine_gives_eagers_values_gradients_and_samples(variant: str) -> None:
    family = make(variant)
    with torch.no_grad():  # a reward head that has learnt something
        family.world_model.reward_head.module[0].module.net[-1].weight.normal_(0, 0.5)
    start = family.world_model.encode(observed(family, 3)).detach()
    start["latent"].requires_grad_()
    env = family.env(base_env())
    report = fastwm.check_parity(env, family.policy, start, 5, break_when_any_done=False)
    assert report.ok, report
    assert "fused: parity" in str(report)
    assert "captured: parity" in str(report)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gradients", [False, True])
def test_auto_takes_the_fused_engine(variant: str, gradients: bool) -> None:
    family = make(variant)
    start = family.world_model.encode(observed(family, 3)).detach()
    with torch.set_grad_enabled(gradients):
        explained = family.env(base_env()).explain(5, family.policy, tensordict=start)
    assert str(explained) == "fused: runs"


def test_parity_at_the_papers_size() -> None:
    env = TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling())
    family = tdmpc2(env, size="5M")
    start = family.world_model.encode(TensorDict({"observation": torch.randn(3, 3)}, [3])).detach()
    report = fastwm.check_parity(family.env(env), family.policy, start, 3)
    assert report.ok, report


# ---------------------------------------------------------------- against plain torch


def plain_simplicial(x: Tensor, layers: list[nn.Module]) -> Tensor:
    """Linear, LayerNorm, Mish, ...; the last layer's norm is followed by a softmax of eight each."""
    *layers, norm = layers
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    norms = [*(m for m in layers if isinstance(m, nn.LayerNorm)), norm]
    assert len(linears) == len(norms)
    for i, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        x = x @ linear.weight.T + linear.bias
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()
        x = x * norm.weight + norm.bias
        if i < len(linears) - 1:
            x = x * torch.tanh(torch.log1p(torch.exp(x)))
    groups = torch.exp(x).unflatten(-1, (-1, 8))
    return (groups / groups.sum(-1, keepdim=True)).flatten(-2)


def test_encoder_and_dynamics_are_what_the_paper_says() -> None:
    family = make("tasks", num_enc_layers=3)
    td = observed(family, 7)
    out = family.world_model(td.clone().set("action", torch.rand(7, ACTION)))
    task = family.world_model.encoder.module[0].module.embedding.weight[td["task_id"]]
    net = family.world_model.encoder.module[1].module
    latent = plain_simplicial(torch.cat([td["observation"], task], -1), [*net.net, net.last[0]])
    close(out["latent"], latent)
    net = family.world_model.dynamics.module
    joined = torch.cat([latent, out["action"], task], -1)
    close(out["next", "latent"], plain_simplicial(joined, [*net.net, net.last[0]]))


def test_reward_is_the_mean_of_its_bins_out_of_symlog() -> None:
    family = make()
    with torch.no_grad():
        family.world_model.reward_head.module[0].module.net[-1].weight.normal_()
    out = family.world_model(observed(family, 7).set("action", torch.rand(7, ACTION)))
    mean = functional.softmax(out["reward_logits"], -1) @ torch.linspace(-10, 10, 11)
    close(out["next", "reward"].squeeze(-1), mean.sign() * (mean.abs().exp() - 1))


def test_each_q_function_is_a_network_of_its_own() -> None:
    family = make()
    ensemble = family.loss.qvalue_network.module
    for parameter in ensemble.parameters():
        nn.init.normal_(parameter, std=0.5)
    latent, action = torch.randn(7, 24), torch.rand(7, ACTION)
    logits = ensemble(latent, action)
    assert logits.shape == (7, 3, 11)
    for i in range(3):
        x = torch.cat([latent, action], -1)
        for layer in range(2):
            x = functional.linear(x, ensemble.weights[layer][i], ensemble.biases[layer][i])
            weight, bias = ensemble.norm_weights[layer][i], ensemble.norm_biases[layer][i]
            x = functional.mish(functional.layer_norm(x, (16,), weight, bias))
        close(logits[:, i], functional.linear(x, ensemble.weights[2][i], ensemble.biases[2][i]))
    td = TensorDict({"latent": latent, "action": action}, [7])
    mean = logits.softmax(-1) @ torch.linspace(-10, 10, 11)
    close(family.value(td)["state_action_value"], mean.sign() * (mean.abs().exp() - 1))


def test_q_functions_drop_out_in_training_only() -> None:
    ensemble = make(dropout=0.5).loss.qvalue_network.module
    nn.init.normal_(ensemble.weights[-1])
    x = torch.rand(7, 24 + ACTION)
    assert torch.equal(ensemble(x), ensemble(x))
    ensemble.train()
    assert not torch.equal(ensemble(x), ensemble(x))


# ---------------------------------------------------------------- policy prior


def test_log_probability_is_that_of_the_squashed_gaussian() -> None:
    prior = make().policy.module
    latent = torch.rand(50, 24)
    action, log_prob, bonus = prior.sample(latent)
    mean, raw = prior.net(latent).chunk(2, -1)
    scale = torch.exp(-10 + 6 * (torch.tanh(raw) + 1))
    gaussian = torch.distributions.Normal(mean.double(), scale.double())
    squashed = torch.distributions.TransformedDistribution(
        gaussian, torch.distributions.TanhTransform()
    )
    want = squashed.log_prob(action.double()).sum(-1, keepdim=True)
    torch.testing.assert_close(log_prob.double(), want, rtol=1e-3, atol=1e-3)
    before = gaussian.log_prob(torch.atanh(action.double())).sum(-1, keepdim=True)
    torch.testing.assert_close(bonus.double(), -ACTION * before, rtol=1e-3, atol=1e-3)


def test_masked_actions_count_for_nothing() -> None:
    prior = make("tasks with masks").policy.module
    latent, task = torch.rand(50, 24), torch.rand(50, 96)
    mask = torch.tensor([1.0, 0, 0]).expand(50, 3)
    action, log_prob, bonus = prior.sample(latent, task, mask)
    assert not action[:, 1:].any()
    mean, raw = (part[:, :1] for part in prior.net(torch.cat([latent, task], -1)).chunk(2, -1))
    gaussian = torch.distributions.Normal(mean, torch.exp(-10 + 6 * (torch.tanh(raw) + 1)))
    before = gaussian.log_prob(torch.atanh(action[:, :1]))
    torch.testing.assert_close(bonus, -before, rtol=1e-3, atol=1e-3)
    correction = torch.log(1 - action[:, :1].square() + 1e-6)
    torch.testing.assert_close(log_prob, before - correction, rtol=1e-3, atol=1e-3)


def test_deterministic_exploration_plays_the_mean() -> None:
    family = make()
    td = family.world_model.encode(observed(family, 5))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = family.policy(td)["action"]
    mean = family.policy.module.net(td["latent"])[:, :ACTION]
    close(action, torch.tanh(mean))
    assert not torch.equal(family.policy(td)["action"], action)


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_the_scale_is_bounded(extreme: float) -> None:
    prior = make().policy.module
    with torch.no_grad():
        prior.net[-1].bias[ACTION:] = extreme
    _, log_prob, bonus = prior.sample(torch.rand(5, 24))
    assert log_prob.isfinite().all()
    bound = ACTION * (2 if extreme > 0 else -10) + 0.5 * ACTION * math.log(2 * math.pi)
    assert ((bonus / ACTION - bound) >= -1e-3).all()  # plus half the squared noise


# ---------------------------------------------------------------- tasks


def test_embeddings_stay_within_the_unit_ball() -> None:
    embed = TaskEmbedding(3, 8)
    with torch.no_grad():
        embed.embedding.weight.fill_(1.0)
    out = embed(torch.tensor([[0], [2]]))
    assert out.shape == (2, 8)
    close(out.norm(dim=-1), torch.ones(2))
    assert embed.embedding.weight.norm(dim=-1).tolist() == pytest.approx([1, 8**0.5, 1], rel=1e-5)


def test_a_task_changes_what_is_imagined() -> None:
    family = make("tasks")
    td = observed(family, 1).expand(TASKS).clone()
    td["task_id"] = torch.arange(TASKS).unsqueeze(-1)
    latent = family.world_model.encode(td)["latent"]
    assert not torch.allclose(latent[0], latent[1], atol=1e-6)


# ---------------------------------------------------------------- images


def pixel_env(shape: tuple[int, ...] = (9, 64, 64)) -> SpecEnv:
    return SpecEnv(
        Composite(pixels=Unbounded(shape, dtype=torch.uint8)),
        Bounded(-1.0, 1.0, (ACTION,)),
        Unbounded((1,)),
        Composite(done=flag(), terminated=flag()),
    )


def test_images_are_encoded_and_imagined_from() -> None:
    env = pixel_env()
    family = tdmpc2(env, size="1M", observation_key="pixels").eval()
    images = torch.randint(256, (2, 3, 9, 64, 64), dtype=torch.uint8)
    start = family.world_model.encode(TensorDict({"pixels": images}, [2, 3]))
    assert start["latent"].shape == (2, 3, 128)
    fractions = family.world_model.encode(TensorDict({"pixels": images / 255}, [2, 3]))
    close(fractions["latent"], start["latent"])
    assert family.env(env).rollout(2, family.policy, tensordict=start).shape == (2, 3, 2)


def test_images_are_shifted_in_training_each_its_own_way() -> None:
    encoder = PixelEncoder(1, 512)
    seen: list[Tensor] = []
    encoder.net[0].register_forward_hook(lambda module, args, out: seen.append(args[0] + 0.5))
    image = torch.rand(1, 64, 64)
    encoder(image.expand(32, 1, 64, 64))
    encoder.eval()(image.expand(1, 1, 64, 64))
    padded = functional.pad(image[None], (3,) * 4, mode="replicate")[0, 0]
    windows = {(i, j): padded[i : i + 64, j : j + 64] for i in range(7) for j in range(7)}
    found = [
        next(k for k, w in windows.items() if torch.allclose(w, one[0], atol=1e-6))
        for one in seen[0]
    ]
    assert len(set(found)) > 10
    close(seen[1][0, 0], image[0])


# ---------------------------------------------------------------- bad input


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match=r"Unknown size '2M' of TD-MPC2; choose one of 1M, 5M"):
        tdmpc2(base_env(), size="2M")


def test_actions_must_be_scaled() -> None:
    with pytest.raises(ValueError, match=r"acts in \[-1, 1\], the env's action is -2 to 2"):
        tdmpc2(GymEnv("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"the env's action is unbounded"):
        tdmpc2(spec_env())


def test_unknown_observation_key() -> None:
    with pytest.raises(KeyError, match=r"The env has no 'pixels'; it has \['observation'"):
        tdmpc2(base_env(), observation_key="pixels")


def test_latent_must_be_divided_into_simplices() -> None:
    with pytest.raises(ValueError, match=r"multiple of simnorm_dim: got 20 and 8"):
        make(latent_dim=20)
    with pytest.raises(ValueError, match=r"latent_dim must be a multiple of 16: got 24"):
        tdmpc2(pixel_env(), observation_key="pixels", latent_dim=24)


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"must be \[C, 64, 64\], 'pixels' of the env is \[9, 84"):
        tdmpc2(pixel_env((9, 84, 84)), observation_key="pixels")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_masks": MASKS}, "action_masks are for several tasks"),
        ({"episode_length": [100, 200]}, "Several episode lengths are for several tasks"),
        ({"tasks": 3, "action_masks": MASKS}, r"action_masks must be \[3, 3\]: got \[4, 3\]"),
        ({"tasks": 3, "episode_length": [1, 2]}, "There are 3 tasks and 2 episode lengths"),
    ],
)
def test_tasks_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_batch_without_its_task() -> None:
    family = make("tasks")
    with pytest.raises(KeyError, match="task_id"):
        family.world_model.encode(observed(family, 2).exclude("task_id"))
    start = family.world_model.encode(observed(family, 2)).exclude("task")
    with pytest.raises(RuntimeError, match="'task'"):
        family.env(base_env()).rollout(2, family.policy, tensordict=start)


def test_a_checkpoint_of_another_size() -> None:
    saved = make().state_dict()
    with pytest.raises(RuntimeError, match=r"tdmpc2 model: latent_dim: 24 in the checkpoint, 32"):
        make(latent_dim=32).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"episodic: False in the checkpoint, True here"):
        make("terminates").load_state_dict(saved)


def test_a_checkpoint_brings_everything_back() -> None:
    one, other = make("tasks with masks"), make("tasks with masks")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_()
        one.loss.target_qvalue_network_params.apply(lambda p: p.data.normal_())
        one.loss.scale.value.fill_(3.0)
    other.load_state_dict(one.state_dict())
    for (name, got), want in zip(
        other.state_dict().items(), one.state_dict().values(), strict=True
    ):
        if isinstance(got, Tensor):
            assert torch.equal(got, want), name
    assert other.loss.scale.value == 3


def test_a_copy_stands_by_itself() -> None:
    one = make()
    other = copy.deepcopy(one)
    with torch.no_grad():
        one.value.module.ensemble.biases[-1].fill_(1.0)
    assert other.loss.qvalue_network.module is other.value.module.ensemble
    assert not other.loss.qvalue_network.module.biases[-1].any()
    assert other.loss.actor_network.module.prior is other.policy.module
