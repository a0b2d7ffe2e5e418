"""DreamerV2 and V3: engines, sizes, torchrl's modules inside, acting, training, bad input."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, OneHot
from torchrl.envs import EnvBase, GymEnv, TransformedEnv
from torchrl.envs.transforms import ActionScaling
from torchrl.modules import (
    DreamerV3DiscreteActor,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    RSSMStateEstimatorV3,
    SymExpTwoHot,
)
from torchrl.objectives import two_hot_decode

import fastwm
from fastwm.models import RSSMFamily, dreamer_v2, dreamer_v3, insert_resets
from fastwm.models.rssm.dreamer_v3 import SIZES
from tests.compare import assert_close, assert_parity
from tests.families.rssm_models import Images, rows_of, start_of

V2: dict[str, Any] = {"deter": 16, "hidden": 12, "stoch": 3, "discrete": 4, "units": 12}
V3: dict[str, Any] = {"deter": 16, "hidden": 12, "depth": 1, "classes": 4, "stoch": 4, "blocks": 4}
BUILDERS: dict[str, Any] = {
    "v2": lambda env: dreamer_v2(env, **V2),
    "v3": lambda env: dreamer_v3(env, bins=31, **V3),
}


@pytest.fixture(scope="module")
def envs() -> dict[str, EnvBase]:
    return {
        "continuous": TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling()),
        "discrete": GymEnv("CartPole-v1"),
    }


@pytest.fixture(params=["continuous", "discrete"])
def base_env(request: pytest.FixtureRequest, envs: dict[str, EnvBase]) -> EnvBase:
    return envs[request.param]


@pytest.fixture(params=BUILDERS)
def family(request: pytest.FixtureRequest, base_env: EnvBase) -> RSSMFamily:
    torch.manual_seed(0)
    built = BUILDERS[request.param](base_env)
    # V3's reward and value begin at exactly zero, which would hide gradients; the bins reach to 5e8.
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 1e-8)
    return built


class TestImagination:
    @pytest.mark.parametrize("batch", [1, 17])
    def test_parity(self, family: RSSMFamily, base_env: EnvBase, batch: int) -> None:
        start = start_of(family, batch)
        wrt = [*family.world_model.step_module.parameters(), start["state"], start["belief"]]
        if isinstance(family.action_spec, Bounded):
            wrt += list(family.policy.parameters())  # one-hot draws pass no gradient
        assert_parity(
            family.env(base_env), family.policy, start, 5, wrt=wrt, engine="fused",
            break_when_any_done=False,
        )  # fmt: skip

    def test_auto_takes_the_fused_engine(self, family: RSSMFamily, base_env: EnvBase) -> None:
        env, start = family.env(base_env), start_of(family, 3)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert env.explain(5, family.policy, tensordict=start).engine == "fused"

    def test_check_parity_of_all_engines(self, family: RSSMFamily, base_env: EnvBase) -> None:
        report = fastwm.check_parity(
            family.env(base_env), family.policy, start_of(family, 3).detach(), 4
        )
        assert report.ok, report
        assert not any(e.refused for e in report.engines)

    def test_states_are_one_hot_with_straight_through_gradients(
        self, family: RSSMFamily, base_env: EnvBase
    ) -> None:
        start = start_of(family, 6)
        out = family.env(base_env, backend="eager").rollout(
            3, family.policy, tensordict=start, break_when_any_done=False
        )
        classes = 4
        states = out["next", "state"].unflatten(-1, (-1, classes))
        torch.testing.assert_close(states.sum(-1), torch.ones(states.shape[:-1]))
        torch.testing.assert_close(states.max(-1).values, torch.ones(states.shape[:-1]))
        (gradient,) = torch.autograd.grad(
            (states * torch.randn(states.shape)).sum(), start["belief"]
        )
        assert gradient.any(-1).all()

    def test_the_continuation_s_sign(self, family: RSSMFamily, base_env: EnvBase) -> None:
        net = family.continuation[0].module  # type: ignore[index]
        last = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
        for bias, ends in ((-30.0, True), (30.0, False)):
            with torch.no_grad():
                last.bias.fill_(bias)
            out = family.env(base_env, backend="eager").rollout(
                2, family.policy, tensordict=start_of(family, 3), break_when_any_done=False
            )
            assert (out["next", "terminated"] == ends).all()


class TestSizes:
    # Belief, hidden units, channels (d / 16) and codes: the paper's table.
    PAPER: ClassVar[dict[str, tuple[int, ...]]] = {
        "12M": (2048, 256, 16, 16),
        "25M": (3072, 384, 24, 24),
        "50M": (4096, 512, 32, 32),
        "100M": (6144, 768, 48, 48),
        "200M": (8192, 1024, 64, 64),
        "400M": (12288, 1536, 96, 96),
    }

    @pytest.mark.parametrize("size", PAPER)
    def test_are_the_paper_s(self, size: str) -> None:
        assert tuple(SIZES[size].values()) == self.PAPER[size]

    @pytest.mark.parametrize("size", SIZES)
    def test_parameters_of_the_rssm(self, size: str) -> None:
        """Counted by hand from the official repository's ``rssm.py``."""
        env = Images()
        env.action_spec = OneHot(18)
        with torch.device("meta"):
            family = dreamer_v3(env, size=size, observation_key="pixels")
        h, u = SIZES[size]["deter"], SIZES[size]["hidden"]
        z, a, e = 32 * SIZES[size]["classes"], 18, 16 * 4 * SIZES[size]["depth"]
        norm = u
        inputs = sum(n * u + u + norm for n in (h, z, a))
        dynamics = (h + 8 * 3 * u) * h // 8 + h + h
        gates = h * 3 * h // 8 + 3 * h
        prior = (h * u + u + norm) + (u * u + u + norm) + u * z + z
        posterior = (h + e) * u + u + norm + u * z + z
        count = sum(p.numel() for p in family.rollout.parameters())
        assert count == inputs + dynamics + gates + prior + posterior

    def test_parameters_in_all(self) -> None:
        """The names are nominal: torchrl's decoder is smaller than the repository's."""
        env = Images()
        env.action_spec = OneHot(18)
        counts = {}
        for size in ("12M", "200M"):
            with torch.device("meta"):
                family = dreamer_v3(env, size=size, observation_key="pixels")
            counts[size] = sum(p.numel() for p in family.parameters())
        assert counts == {"12M": 9_775_828, "200M": 154_424_596}

    def test_may_be_overridden_one_by_one(self) -> None:
        env = Images()
        env.action_spec = OneHot(18)
        with torch.device("meta"):
            family = dreamer_v3(env, size="25M", deter=64, observation_key="pixels")
        assert family.settings["deter"] == 64
        assert family.settings["hidden"] == 384


class TestAgainstTorchRL:
    def test_state_dicts_of_its_modules_load(self, envs: dict[str, EnvBase]) -> None:
        family = dreamer_v3(envs["discrete"], bins=31, **V3)
        prior = RSSMPriorV3(
            action_shape=(2,), hidden_dim=12, rnn_hidden_dim=16, num_categoricals=4, num_classes=4,
            action_dim=2, recurrent_model="block_gru", num_blocks=4, unimix=0.01,
        )  # fmt: skip
        posterior = RSSMPosteriorV3(
            12, 4, 4, rnn_hidden_dim=16, obs_embed_dim=12, use_rms_norm=True, unimix=0.01
        )
        family.rollout.rssm_prior.module.load_state_dict(prior.state_dict())
        family.rollout.rssm_posterior.module.load_state_dict(posterior.state_dict())
        actor = DreamerV3DiscreteActor(32, 2, num_cells=12)
        family.policy.load_state_dict(actor.state_dict())
        value = DreamerV3MLP(32, 31, depth=3, num_cells=12)
        family.value[0].module.load_state_dict(value.state_dict())  # type: ignore[index]
        rows = rows_of(family, envs["discrete"], 4)[None]
        rows["state"], rows["belief"] = torch.zeros(1, 5, 16), torch.zeros(1, 5, 16)
        rows["next", "encoded_latents"] = torch.randn(1, 5, 12)
        theirs = RSSMRolloutV3(family.rollout.rssm_prior, family.rollout.rssm_posterior)
        torch.manual_seed(1)
        want = theirs(rows)
        torch.manual_seed(1)
        got = family.rollout(rows)
        for key in ("state", "belief", "prior_logits", "posterior_logits"):
            assert_close(got["next", key], want["next", key], "rollout", key)

    def test_the_filter_is_its_state_estimator(self, family: RSSMFamily) -> None:
        td = start_of(family, 5).detach()
        width = family.action_spec.shape[-1]
        embedding = family.settings["embedding"]
        td["previous_action"], td["encoded_latents"] = (
            torch.randn(5, width),
            torch.randn(5, embedding),
        )
        td["is_init"] = torch.tensor([True, False, False, True, False])[:, None]
        estimator = RSSMStateEstimatorV3(family.filter.prior, family.filter.posterior)
        torch.manual_seed(1)
        want = estimator(td.clone())
        torch.manual_seed(1)
        got = family.filter(td.clone())
        for key in ("state", "belief"):
            torch.testing.assert_close(got[key], want[key])

    def test_two_hot_heads_say_what_it_decodes(self, envs: dict[str, EnvBase]) -> None:
        family = dreamer_v3(envs["discrete"], bins=31, **V3)
        start = start_of(family, 5)
        with torch.no_grad():
            for parameter in family.value.parameters():
                parameter.normal_()
        out = family.value(start.clone())
        want = two_hot_decode(out["state_value_logits"], SymExpTwoHot(31).bins)
        torch.testing.assert_close(out["state_value"], want.unsqueeze(-1))

    def test_reward_and_value_begin_at_zero(self, envs: dict[str, EnvBase]) -> None:
        family = dreamer_v3(envs["discrete"], bins=31, **V3)
        start = start_of(family, 5)
        assert not family.value(start.clone())["state_value"].any()
        out = family.env(envs["discrete"]).rollout(
            2, family.policy, tensordict=start, break_when_any_done=False
        )
        assert not out["next", "reward"].any()


class TestActing:
    def test_actions_are_kept_within_bounds(self, envs: dict[str, EnvBase]) -> None:
        family = dreamer_v3(envs["continuous"], bins=31, **V3)
        with torch.no_grad():
            for parameter in family.policy.parameters():
                parameter.normal_(0, 3)
        data = family.real_env(envs["continuous"]).rollout(20, family.actor())
        assert data["action"].abs().max() == 1
        assert (data["loc"].abs() < 1 + 1e-6).all()
        assert ((data["scale"] >= 0.1) & (data["scale"] <= 1)).all()

    def test_one_hot_actions_are_remembered(self, envs: dict[str, EnvBase]) -> None:
        for build in BUILDERS.values():
            family = build(envs["discrete"])
            data = family.real_env(envs["discrete"]).rollout(6, family.actor())
            assert torch.equal(data["previous_action"][1:], data["action"][:-1])
            assert data["previous_action"].dtype is data["action"].dtype


class TestTraining:
    def test_the_loss_reaches_all_of_the_model_and_nothing_else(
        self, family: RSSMFamily, base_env: EnvBase
    ) -> None:
        rows = rows_of(family, base_env)[:10].reshape(2, 5)
        losses, batch = family.loss(rows)
        assert list(losses.keys()) == family.loss.out_keys
        sum(losses.values()).backward()
        free = {id(p) for p in family.loss.parameters()}
        assert all(p.grad is not None for p in family.loss.parameters())
        for part in (family.policy, family.value):
            assert not free & {id(p) for p in part.parameters()}
        for part in (family.world_model, family.rollout):
            assert {id(p) for p in part.parameters()} <= free
        assert not batch["next", "state"].requires_grad

    @pytest.mark.parametrize("version", BUILDERS)
    def test_a_few_steps_lower_the_loss(self, version: str, envs: dict[str, EnvBase]) -> None:
        torch.manual_seed(0)
        family = BUILDERS[version](envs["continuous"])
        rows = rows_of(family, envs["continuous"], 49).reshape(5, 10)
        optimizer = torch.optim.Adam(family.loss.parameters(), 3e-3)
        history = []
        for _ in range(40):
            loss = sum(family.loss(rows)[0].values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert history[-1] < 0.7 * history[0]

    def test_images(self) -> None:
        env = Images()
        for family in (
            dreamer_v2(env, observation_key="pixels", cnn_depth=2, **V2),
            dreamer_v3(env, observation_key="pixels", **V3),
        ):
            rows = rows_of(family, env, 9)[:10].reshape(2, 5)
            losses, batch = family.loss(rows)
            sum(losses.values()).backward()
            start = batch["next"].select("state", "belief").flatten(0, 1)
            assert family.env(env).explain(3, family.policy, tensordict=start).engine == "fused"
            assert family.world_model.decode(start)["reco_pixels"].shape == (10, 3, 64, 64)


class TestBadInput:
    def test_sizes(self, envs: dict[str, EnvBase]) -> None:
        env = envs["discrete"]
        with pytest.raises(ValueError, match=r"Unknown size '13M'; choose one of 1M, 12M"):
            dreamer_v3(env, size="13M")
        with pytest.raises(ValueError, match="deter=20 cannot be divided into blocks=8"):
            dreamer_v3(env, deter=20)
        with pytest.raises(ValueError, match=r"unimix must be in \[0, 1\)"):
            dreamer_v3(env, unimix=1.0, **V3)

    def test_actions_outside_of_one(self) -> None:
        message = (
            r"in \[-1, 1\], the env's are between \[-2.0\] and \[2.0\]: append .*ActionScaling"
        )
        with pytest.raises(ValueError, match=message):
            dreamer_v3(GymEnv("Pendulum-v1"), **V3)

    def test_an_action_that_is_an_index(self) -> None:
        env = GymEnv("CartPole-v1", categorical_action_encoding=True)
        for build in BUILDERS.values():
            with pytest.raises(ValueError, match="bounded or one-hot, its spec is a Categorical"):
                build(env)

    def test_a_checkpoint_of_another_size(self, envs: dict[str, EnvBase]) -> None:
        saved = dreamer_v2(envs["discrete"], **V2).state_dict()
        with pytest.raises(RuntimeError, match="discrete: 4 in the checkpoint, 5 here"):
            dreamer_v2(envs["discrete"], **{**V2, "discrete": 5}).load_state_dict(saved)


def test_rows_of_one_hot_actions(envs: dict[str, EnvBase]) -> None:
    family = dreamer_v2(envs["discrete"], **V2)
    data = family.real_env(envs["discrete"]).rollout(4, family.actor())
    rows = insert_resets(data)
    assert rows["action"].dtype is data["action"].dtype
    assert isinstance(rows, TensorDict)
