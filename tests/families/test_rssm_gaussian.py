"""PlaNet and the first Dreamer: engines, torchrl's modules inside, acting, training, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import GymEnv, SerialEnv
from torchrl.modules import CEMPlanner, DreamerActor, RSSMPosterior, RSSMPrior
from torchrl.modules import RSSMRollout as TorchRLRollout

import fastwm
from fastwm.models import RSSMFamily, dreamer_v1, insert_resets, planet
from fastwm.models.rssm.prior import Prior
from tests.compare import assert_parity
from tests.families.rssm_models import Images, rows_of, start_of

SMALL: dict[str, Any] = {"deter_size": 16, "stoch_size": 4, "num_units": 16, "embedding": 12}
VARIANTS: dict[str, Any] = {
    "planet": lambda env: planet(env, **SMALL),
    "dreamer_v1": lambda env: dreamer_v1(env, **SMALL),
    "dreamer_v1 pcont": lambda env: dreamer_v1(env, pcont=True, **SMALL),
}


@pytest.fixture(scope="module")
def base_env() -> GymEnv:
    return GymEnv("Pendulum-v1")


@pytest.fixture(params=VARIANTS)
def family(request: pytest.FixtureRequest, base_env: GymEnv) -> RSSMFamily:
    torch.manual_seed(0)
    return VARIANTS[request.param](base_env)


class TestImagination:
    @pytest.mark.parametrize("engine", ["fused", "captured"])
    @pytest.mark.parametrize("batch", [1, 17])
    def test_parity(self, family: RSSMFamily, base_env: GymEnv, engine: str, batch: int) -> None:
        start = start_of(family, batch)
        wrt = [*family.world_model.step_module.parameters(), start["state"], start["belief"]]
        if family.policy is not None:
            wrt += list(family.policy.parameters())
        env = family.env(base_env)
        assert_parity(env, family.policy, start, 6, wrt=wrt, engine=engine)

    def test_auto_takes_the_fused_engine(self, family: RSSMFamily, base_env: GymEnv) -> None:
        env = family.env(base_env)
        start = start_of(family, 3)
        assert env.explain(5, family.policy, tensordict=start).engine == "fused"
        with torch.no_grad():
            assert env.explain(5, family.policy, tensordict=start).engine == "fused"

    def test_check_parity(self, family: RSSMFamily, base_env: GymEnv) -> None:
        report = fastwm.check_parity(
            family.env(base_env), family.policy, start_of(family, 3).detach(), 5
        )
        assert report.ok, report
        assert not any(e.refused for e in report.engines)

    def test_the_step_does_not_decode(self, family: RSSMFamily, base_env: GymEnv) -> None:
        out = family.env(base_env).rollout(4, family.policy, tensordict=start_of(family, 3))
        assert "reco_observation" not in out.keys(True)
        decoded = family.world_model.decode(out)["reco_observation"]
        assert decoded.shape == (*out.shape, 3)

    def test_the_continuation_ends_rows(self, base_env: GymEnv) -> None:
        family = dreamer_v1(base_env, pcont=True, **SMALL)
        with torch.no_grad():
            family.continuation[0].module[-1].bias.fill_(-9.0)  # type: ignore[index]
        out = family.env(base_env).rollout(
            4, family.policy, tensordict=start_of(family, 3), break_when_any_done=False
        )
        assert out["next", "terminated"].all()
        assert out["next", "done"].all()
        assert out.shape == (3, 4)

    def test_a_planner_s_two_batch_dims(self, base_env: GymEnv) -> None:
        family = planet(base_env, **SMALL)
        planner = CEMPlanner(
            family.env(base_env), planning_horizon=4, optim_steps=2, num_candidates=6, top_k=2
        )
        assert planner(start_of(family, 3).detach())["action"].shape == (3, 1)


class TestAgainstTorchRL:
    def test_state_dicts_of_its_modules_load(self, base_env: GymEnv) -> None:
        family = dreamer_v1(base_env, **SMALL)
        prior = RSSMPrior(base_env.action_spec, 16, 16, 4, action_dim=1)
        posterior = RSSMPosterior(16, 4, rnn_hidden_dim=16, obs_embed_dim=12)
        actor = DreamerActor(1, depth=4, num_cells=16)
        actor(torch.zeros(1, 4), torch.zeros(1, 16))
        family.world_model.dynamics.module.load_state_dict(prior.state_dict())
        family.rollout.rssm_posterior.module.load_state_dict(posterior.state_dict())
        family.policy[0].module.load_state_dict(actor.state_dict())  # type: ignore[index]
        state, belief, action = torch.randn(3, 4), torch.randn(3, 16), torch.randn(3, 1)
        torch.manual_seed(1)
        want = prior(state, belief, action)
        torch.manual_seed(1)
        got = family.world_model.dynamics.module(state, belief, action)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    def test_the_rollout_s_state_dict_goes_both_ways(self, base_env: GymEnv) -> None:
        family = planet(base_env, **SMALL)
        theirs = TorchRLRollout(family.rollout.rssm_prior, family.rollout.rssm_posterior)
        assert theirs.state_dict().keys() == family.rollout.state_dict().keys()

    def test_more_batch_dims_are_the_same_numbers(self) -> None:
        prior = Prior(torch.empty(2), 8, 8, 3, action_dim=2)
        flat = [torch.randn(6, n) for n in (3, 8, 2)]
        torch.manual_seed(1)
        want = RSSMPrior.forward(prior, *flat)
        torch.manual_seed(1)
        got = prior(*(x.unflatten(0, (2, 3)) for x in flat))
        for g, w in zip(got, want, strict=True):
            assert g.shape[:2] == (2, 3)
            torch.testing.assert_close(g.flatten(0, 1), w)

    def test_dense_sizes_of_its_recipe(self, base_env: GymEnv) -> None:
        """200, 30 and 400 are what torchrl's recipe and the official repository have."""
        family = dreamer_v1(base_env)
        shapes = {name: tuple(p.shape) for name, p in family.rollout.named_parameters()}
        assert shapes["rssm_prior.module.rnn.weight_hh"] == (600, 200)
        assert shapes["rssm_posterior.module.obs_rnn_to_post_projector.0.weight"] == (200, 1224)
        assert shapes["rssm_posterior.module.obs_rnn_to_post_projector.2.weight"] == (60, 200)
        reward = [tuple(p.shape) for p in family.world_model.reward_head.parameters() if p.ndim > 1]
        assert reward == [(400, 230), (400, 400), (1, 400)]
        actor = [tuple(p.shape) for p in family.policy.parameters() if p.ndim > 1]
        assert actor == [(400, 230), *[(400, 400)] * 3, (2, 400)]
        value = [tuple(p.shape) for p in family.value.parameters() if p.ndim > 1]
        assert value == [(400, 230), *[(400, 400)] * 2, (1, 400)]

    def test_the_actor_begins_wide(self, base_env: GymEnv) -> None:
        family = dreamer_v1(base_env, **SMALL)
        with torch.no_grad():
            for parameter in family.policy.parameters():
                parameter.zero_()
        out = family.policy(start_of(family, 3))
        torch.testing.assert_close(out["scale"], torch.full((3, 1), 5.0))
        assert out["action"].abs().max() <= 2  # Pendulum's bound


class TestActing:
    def test_encode_is_the_filter_at_a_reset(self, family: RSSMFamily) -> None:
        observation = torch.randn(3, 3)
        torch.manual_seed(1)
        want = family.world_model.encode(TensorDict({"observation": observation}, [3]))
        td = start_of(family, 3).set("observation", observation)
        td["previous_action"], td["is_init"] = torch.randn(3, 1), torch.ones(3, 1).bool()
        torch.manual_seed(1)
        got = family.filter(family.world_model.encoder[0](td))
        assert torch.equal(got["state"], want["state"])
        assert torch.equal(got["belief"], want["belief"])

    def test_acting_is_the_posterior_rollout_step_by_step(self, base_env: GymEnv) -> None:
        """The belief, which has no noise of its own where the state's is fixed, shows it."""
        torch.manual_seed(0)
        family = dreamer_v1(base_env, **SMALL)
        prior, posterior = family.filter.prior, family.filter.posterior
        env = family.real_env(base_env)
        data = env.rollout(7, family.actor())
        state, belief = torch.zeros(4), torch.zeros(16)
        for step in data:
            *_, belief = prior(state, belief, step["previous_action"])
            torch.testing.assert_close(step["belief"], belief)
            mean, std, _ = posterior(belief, step["encoded_latents"])
            assert ((step["state"] - mean) / std).abs().max() < 6
            state = step["state"]
        assert not data["previous_action"][0].any()
        assert torch.equal(data["previous_action"][1:], data["action"][:-1])

    def test_a_reset_forgets(self) -> None:
        family = dreamer_v1(Images(), observation_key="pixels", cnn_depth=2, **SMALL)
        env = family.real_env(Images())
        data = env.rollout(12, family.actor(), break_when_any_done=False)
        first = data["is_init"].flatten()
        assert first.nonzero().flatten().tolist() == [0, 5, 10]
        assert not data["previous_action"][first].any()
        assert data["previous_action"][~first].any(-1).all()
        # From zero and no action there is but one belief.
        beliefs = data["belief"][first]
        torch.testing.assert_close(beliefs, beliefs[:1].expand_as(beliefs))

    def test_with_a_collector_of_several_envs(self) -> None:
        family = dreamer_v1(GymEnv("Pendulum-v1"), **SMALL)
        env = family.real_env(SerialEnv(2, lambda: GymEnv("Pendulum-v1")))
        collector = Collector(env, family.actor(), frames_per_batch=12, total_frames=24)
        for data in collector:
            assert data.shape == (2, 6)
            assert data["belief"].any()
            assert torch.equal(data["previous_action"][:, 1:], data["action"][:, :-1])
        collector.shutdown()

    def test_without_a_policy(self, base_env: GymEnv) -> None:
        with pytest.raises(ValueError, match="planet has no policy of its own"):
            planet(base_env, **SMALL).actor()


class TestRows:
    def test_each_reset_is_a_row(self) -> None:
        env = dreamer_v1(Images(), observation_key="pixels", cnn_depth=2, **SMALL).real_env(
            Images()
        )
        data = env.rollout(12, break_when_any_done=False)
        rows = insert_resets(data, observation_keys=["pixels"])
        assert rows.shape == (15,)
        assert rows["is_init"].flatten().nonzero().flatten().tolist() == [0, 6, 12]
        for at, start in ((0, 0), (6, 5), (12, 10)):
            assert torch.equal(rows["next", "pixels"][at], data["pixels"][start])
            assert not rows["action"][at].any()
            assert not rows["next", "reward"][at].any()
            assert not rows["next", "done"][at].any()
        own = rows[~rows["is_init"].flatten()]
        for key in ("action", ("next", "pixels"), ("next", "reward"), ("next", "done")):
            assert torch.equal(own[key], data[key])

    def test_bad_input(self, base_env: GymEnv) -> None:
        data = dreamer_v1(base_env, **SMALL).real_env(base_env).rollout(3)
        with pytest.raises(ValueError, match=r"a batch \[N\]; got \[1, 3\]"):
            insert_resets(data[None])
        with pytest.raises(KeyError, match="is_init"):
            insert_resets(data.exclude("is_init"))


class TestTraining:
    def test_the_loss_reaches_all_of_the_model_and_nothing_else(
        self, family: RSSMFamily, base_env: GymEnv
    ) -> None:
        rows = rows_of(family, base_env).reshape(2, 5)
        losses, batch = family.loss(rows)
        assert list(losses.keys()) == family.loss.out_keys
        sum(losses.values()).backward()
        free = {id(p) for p in family.loss.parameters()}
        assert all(p.grad is not None for p in family.loss.parameters())
        for part in (family.policy, family.value):
            assert part is None or not free & {id(p) for p in part.parameters()}
        for part in (family.world_model, family.rollout):
            assert {id(p) for p in part.parameters()} <= free
        assert not batch["next", "state"].requires_grad

    def test_a_few_steps_lower_the_loss(self, base_env: GymEnv) -> None:
        torch.manual_seed(0)
        family = planet(base_env, **SMALL)
        rows = rows_of(family, base_env, 49).reshape(5, 10)
        optimizer = torch.optim.Adam(family.loss.parameters(), 3e-3)
        history = []
        for _ in range(40):
            loss = sum(family.loss(rows)[0].values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert history[-1] < 0.5 * history[0]

    def test_images(self) -> None:
        torch.manual_seed(0)
        env = Images()
        family = dreamer_v1(env, observation_key="pixels", cnn_depth=2, **SMALL)
        rows = rows_of(family, env, 9)[:10].reshape(2, 5)
        losses, batch = family.loss(rows)
        assert batch["next", "reco_pixels"].shape == (2, 5, 3, 64, 64)
        assert family.settings["embedding"] == 64
        sum(losses.values()).backward()
        start = batch["next"].select("state", "belief").flatten(0, 1)
        imagined = family.env(env)
        assert imagined.explain(3, family.policy, tensordict=start).engine == "fused"
        assert family.world_model.decode(start)["reco_pixels"].shape == (10, 3, 64, 64)


class TestBadInput:
    @pytest.mark.parametrize("build", [planet, dreamer_v1])
    def test_observations(self, build: Any, base_env: GymEnv) -> None:
        with pytest.raises(KeyError, match=r"no observation.*pixels.*observation"):
            build(base_env, observation_key="pixels")
        with pytest.raises(ValueError, match=r"must be \[C, 64, 64\], its shape is \(3, 32, 32\)"):
            build(Images((3, 32, 32)), observation_key="pixels")
        with pytest.raises(ValueError, match=r"a vector \[O\] or an image .* \(3, 3\)"):
            build(Images((3, 3)), observation_key="pixels")
        with pytest.raises(ValueError, match=r"must be floating point, it is torch.uint8"):
            build(Images(dtype=torch.uint8), observation_key="pixels")

    def test_an_unbounded_action(self) -> None:
        env = Images()
        env.action_spec = Unbounded(2)
        with pytest.raises(
            ValueError, match="action must be bounded or one-hot, its spec is a Unbounded"
        ):
            dreamer_v1(env, observation_key="pixels")

    def test_a_checkpoint_of_another_size(self, base_env: GymEnv) -> None:
        saved = dreamer_v1(base_env, **SMALL).state_dict()
        other = dreamer_v1(base_env, **{**SMALL, "stoch_size": 5})
        with pytest.raises(RuntimeError, match="stoch_size: 4 in the checkpoint, 5 here"):
            other.load_state_dict(saved)
        twin = dreamer_v1(base_env, **SMALL)
        twin.load_state_dict(saved)
        weight = "world_model.dynamics.module.rnn.weight_hh"
        assert torch.equal(twin.state_dict()[weight], saved[weight])
