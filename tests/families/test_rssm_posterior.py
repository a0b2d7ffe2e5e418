"""`RSSMRollout` against torchrl's `RSSMRollout` and `RSSMRolloutV3`, on every engine."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import RSSMPosterior, RSSMPrior
from torchrl.modules import RSSMRollout as TorchRLRollout

import fastwm
from fastwm.models import RSSMRollout
from tests.compare import assert_close
from tests.families.rssm_models import (
    ACTION,
    BELIEF,
    EMBEDDING,
    KINDS,
    batch_of,
    pair,
    reference,
)

ENGINES = ("fused", "captured", "eager")


def run(module: nn.Module, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
    torch.manual_seed(3)
    out = module(batch)
    return out, torch.get_rng_state()


def gradients(out: TensorDictBase, batch: TensorDictBase, module: nn.Module) -> list[Any]:
    """Of a fixed weighting of all that was written, to parameters, start and embeddings."""
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (
            torch.sin(out["next", key]) * torch.randn(out["next", key].shape, generator=generator)
        ).sum()
        for key in sorted(out["next"].keys())
        if key != "encoded_latents"
    )
    inputs = [batch["state"], batch["belief"], batch["next", "encoded_latents"]]
    return list(torch.autograd.grad(total, [*module.parameters(), *inputs], allow_unused=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 4)], ids=str)
def test_values_gradients_and_random_numbers_are_torchrls(
    kind: str, engine: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    prior, posterior = pair(kind)
    # torchrl's Gaussian rollout has no resets.
    batch = batch_of(kind, *shape, resets=kind != "gaussian")
    theirs, ours = reference(kind, prior, posterior), RSSMRollout(prior, posterior, backend=engine)
    want, want_state = run(theirs, batch)
    got, got_state = run(ours, batch)
    assert set(got.keys(True, True)) == set(want.keys(True, True))
    assert got.batch_size == want.batch_size
    assert torch.equal(got_state, want_state), "the generator stands elsewhere"
    for key in want.keys(True, True):
        assert got[key].dtype is want[key].dtype
        assert_close(got[key], want[key], "rollout", str(key))
    pairs = zip(gradients(got, batch, ours), gradients(want, batch, theirs), strict=True)
    for i, (g, w) in enumerate(pairs):
        assert (g is None) == (w is None), i
        if w is not None:
            assert_close(g, w, "rollout.gradient", f"gradient {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_fused_engine(kind: str) -> None:
    rollout = RSSMRollout(*pair(kind))
    batch = batch_of(kind, 4, 3)
    assert rollout.explain(batch).engine == "fused"
    with torch.no_grad():
        assert rollout.explain(batch).engine == "fused"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reset_begins_anew_from_zero(engine: str) -> None:
    """What follows a reset is what a sequence of its own from zero gives, the action cleared."""
    torch.manual_seed(0)
    prior, posterior = pair("gaussian")
    batch = batch_of("gaussian", 4, 6, resets=False)
    still = RSSMRollout(_without_noise(prior), _without_noise(posterior), backend=engine)
    batch["is_init"] = torch.zeros(4, 6, dtype=torch.bool)
    batch["is_init"][:, 2] = True
    whole = still(batch)
    tail = batch[:, 2:].clone()
    tail["state"], tail["belief"] = torch.zeros(4, 4, 5), torch.zeros(4, 4, BELIEF)
    tail["action"][:, 0] = 0
    del tail["is_init"]
    own = still(tail)
    for key in ("state", "belief", "posterior_mean", "prior_std"):
        assert_close(whole["next", key][:, 2:], own["next", key], "rollout", key)
    assert not whole["action"][:, 2].any()
    assert not whole["belief"][:, 2].any()
    assert whole["action"][:, 3].any()
    assert batch["action"][:, 2].any()


def _without_noise(module: TensorDictModule) -> TensorDictModule:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module.module

        def forward(self, *inputs: Tensor) -> Any:
            mean, std, _, *belief = self.net(*inputs, torch.zeros((*inputs[0].shape[:-1], 5)))
            return (mean, std, mean, *belief)

    return TensorDictModule(Mean(), module.in_keys, module.out_keys)


def test_without_a_reset_key_flags_are_not_looked_at() -> None:
    prior, posterior = pair("gaussian")
    batch = batch_of("gaussian", 3, 4)
    want, _ = run(TorchRLRollout(prior, posterior), batch)
    got, _ = run(RSSMRollout(prior, posterior, reset_key=None), batch)
    assert_close(got["next", "state"], want["next", "state"], "rollout", "state")


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_any_batch_dims(engine: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    prior, posterior = pair("gaussian")
    batch = batch_of("gaussian", *shape)
    want, _ = run(RSSMRollout(prior, posterior, backend="eager"), batch)
    got, _ = run(RSSMRollout(prior, posterior, backend=engine), batch)
    assert got.batch_size == batch.batch_size
    for key in want.keys(True, True):
        assert got[key].shape == want[key].shape
        assert_close(got[key], want[key], "rollout", str(key))


def test_noise_by_key_as_torchrls_recipe_wires_it() -> None:
    """Optional inputs: drawn where the batch has none, else taken."""
    torch.manual_seed(0)
    prior = TensorDictModule(
        RSSMPrior(torch.empty(ACTION), BELIEF, BELIEF, 5, action_dim=ACTION),
        in_keys={"state": "state", "belief": "belief", "action": "action", "noise": "prior_noise"},
        out_keys=[("next", "prior_mean"), ("next", "prior_std"), "_", ("next", "belief")],
        out_to_in_map=True,
    )
    posterior = TensorDictModule(
        RSSMPosterior(BELIEF, 5, rnn_hidden_dim=BELIEF, obs_embed_dim=EMBEDDING),
        in_keys={
            "belief": ("next", "belief"),
            "obs_embedding": ("next", "encoded_latents"),
            "noise": "posterior_noise",
        },
        out_keys=[("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
        out_to_in_map=True,
    )
    batch = batch_of("gaussian", 3, 4, resets=False)
    theirs, ours = TorchRLRollout(prior, posterior), RSSMRollout(prior, posterior, backend="fused")
    for noise in (False, True):
        if noise:
            batch["prior_noise"], batch["posterior_noise"] = torch.randn(2, 3, 4, 5)
        want, got = run(theirs, batch)[0], run(ours, batch)[0]
        assert_close(got["next", "state"], want["next", "state"], "rollout", f"noise {noise}")
    shifted = batch.clone()
    shifted["posterior_noise"] += 1
    assert not torch.equal(ours(shifted)["next", "state"], got["next", "state"])


def test_one_hot_actions_of_bools() -> None:
    torch.manual_seed(0)
    prior, posterior = pair("gru")
    batch = batch_of("gru", 3, 4)
    batch["action"] = torch.rand(3, 4, ACTION) < 0.5
    want, _ = run(reference("gru", prior, posterior), batch)
    got, _ = run(RSSMRollout(prior, posterior, backend="fused"), batch)
    assert_close(got["next", "belief"], want["next", "belief"], "rollout", "belief")


def test_torchrls_state_dict_loads() -> None:
    theirs = TorchRLRollout(*pair("gaussian"))
    ours = RSSMRollout(*pair("gaussian"))
    ours.load_state_dict(theirs.state_dict())
    batch = batch_of("gaussian", 2, 3, resets=False)
    want, got = run(theirs, batch)[0], run(ours, batch)[0]
    assert_close(got["next", "state"], want["next", "state"], "rollout", "state")


def test_changes_are_seen() -> None:
    rollout = RSSMRollout(*pair("gaussian"))
    batch = batch_of("gaussian", 2, 3)

    def check() -> Tensor:
        want, _ = run(
            RSSMRollout(rollout.rssm_prior, rollout.rssm_posterior, backend="eager"), batch
        )
        got, _ = run(rollout, batch)
        assert_close(got["next", "state"], want["next", "state"], "rollout", "state")
        return got["next", "state"].detach().clone()

    first = check()
    with torch.no_grad():
        rollout.rssm_posterior.module.obs_rnn_to_post_projector[0].weight.mul_(2)
    second = check()
    assert not torch.equal(first, second)
    rollout.rssm_prior = pair("gaussian")[0]
    assert not torch.equal(second, check())


def test_a_copy_has_its_own_weights() -> None:
    rollout = RSSMRollout(*pair("gaussian"))
    batch = batch_of("gaussian", 2, 3)
    want, _ = run(rollout, batch)
    for twin in (copy.deepcopy(rollout), pickle.loads(pickle.dumps(rollout))):
        assert torch.equal(run(twin, batch)[0]["next", "state"], want["next", "state"])
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(run(twin, batch)[0]["next", "state"], want["next", "state"])
        assert torch.equal(run(rollout, batch)[0]["next", "state"], want["next", "state"])


def test_lazy_modules_become_ready_in_their_first_call() -> None:
    prior = pair("gaussian")[0]
    posterior = TensorDictModule(
        RSSMPosterior(BELIEF, 5),
        [("next", "belief"), ("next", "encoded_latents")],
        [("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
    )
    rollout = RSSMRollout(prior, posterior)
    batch = batch_of("gaussian", 2, 3)
    assert rollout.explain(batch).engine == "eager"
    with pytest.raises(RuntimeError, match="lazy parameters"), fastwm.backend("fused"):
        rollout(batch)
    rollout(batch)
    assert rollout.explain(batch).engine == "fused"


def test_the_batch_is_left_alone() -> None:
    rollout = RSSMRollout(*pair("gaussian"))
    batch = batch_of("gaussian", 2, 3)
    before = batch.clone()
    out = rollout(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(batch[key], before[key]) for key in before.keys(True, True))
    again = rollout(batch)
    assert out["next", "state"].data_ptr() != again["next", "state"].data_ptr()


def test_an_env_serves_all_batches_of_its_kind() -> None:
    rollout = RSSMRollout(*pair("gaussian"))
    for shape in ((2, 3), (5, 3), (2, 7), (2, 2, 3)):
        for resets in (True, False):
            rollout(batch_of("gaussian", *shape, resets=resets))
    assert len(rollout.__dict__["_envs"]) == 2


class TestBadInput:
    def test_a_latent_to_begin_with_is_missing(self) -> None:
        batch = batch_of("gaussian", 2, 3)
        del batch["belief"]
        with pytest.raises(KeyError, match=r"belief.*the latent to begin with"):
            RSSMRollout(*pair("gaussian"))(batch)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_embedding_is_missing(self, engine: str) -> None:
        batch = batch_of("gaussian", 2, 3)
        del batch["next", "encoded_latents"]
        with pytest.raises(KeyError, match=r"has no .*encoded_latents"):
            RSSMRollout(*pair("gaussian"), backend=engine)(batch)

    def test_a_reset_flag_that_is_no_flag(self) -> None:
        batch = batch_of("gaussian", 2, 3)
        batch["is_init"] = torch.zeros(2, 3, 1)
        with pytest.raises(ValueError, match=r"'is_init' must be boolean .* torch.float32"):
            RSSMRollout(*pair("gaussian"))(batch)
        batch["is_init"] = torch.zeros(2, 3, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"of shape \[2, 3, 2\]"):
            RSSMRollout(*pair("gaussian"))(batch)

    def test_no_time(self) -> None:
        with pytest.raises(ValueError, match=r"at least one step, got \[\]"):
            RSSMRollout(*pair("gaussian"))(batch_of("gaussian"))
        with pytest.raises(ValueError, match=r"at least one step, got \[2, 0\]"):
            RSSMRollout(*pair("gaussian"))(batch_of("gaussian", 2, 0))

    def test_modules_that_carry_nothing(self) -> None:
        module = TensorDictModule(nn.Linear(2, 2), ["a"], [("next", "b")])
        with pytest.raises(ValueError, match="carry no latent"):
            RSSMRollout(module, module)

    def test_an_action_that_cannot_be_told(self) -> None:
        prior, posterior = pair("gaussian")
        prior = TensorDictModule(
            lambda s, b, x, y: prior.module(s, b, x),
            ["state", "belief", "push", "pull"],
            prior.out_keys,
        )
        with pytest.raises(ValueError, match=r"Which of \['push', 'pull'\] is the action"):
            RSSMRollout(prior, posterior)
        assert RSSMRollout(prior, posterior, action_key="push").action_key == "push"

    def test_an_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="Unknown backend 'quick'"):
            RSSMRollout(*pair("gaussian"), backend="quick")

    def test_dtypes_that_do_not_fit_together(self) -> None:
        batch = batch_of("gaussian", 2, 3)
        batch["action"] = torch.zeros(2, 3, ACTION, dtype=torch.int64)
        rollout = RSSMRollout(*pair("gaussian"))
        assert "differ in dtype" in rollout.explain(batch).passed_over["fused"]
        message = "'fused' cannot run this: the inputs differ"
        with pytest.raises(RuntimeError, match=message), fastwm.backend("fused"):
            rollout(batch)
        assert isinstance(rollout(batch), TensorDict)
