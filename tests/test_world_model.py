"""`fastwm.WorldModel` against torchrl's class of that name and against its parts called by hand."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.modules import WorldModel as UpstreamWorldModel

import fastwm
from tests.models import (
    ACTION,
    AGENTS,
    CASES,
    LATENT,
    OBS,
    linear_world_model,
    make_case,
    multi_agent_world_model,
    nested_world_model,
    rssm_world_model,
)

B = 3


def data(*batch: int) -> TensorDict:
    return TensorDict(
        {"observation": torch.randn(*batch, OBS), "action": torch.randn(*batch, ACTION)}, batch
    )


def pair(builder: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The same weights in fastwm's class and in torchrl's."""
    torch.manual_seed(0)
    ours = builder(fastwm.WorldModel, **kwargs)
    torch.manual_seed(0)
    theirs = builder(UpstreamWorldModel, **kwargs)
    return ours, theirs


HEADS = [
    pytest.param({}, id="bare"),
    pytest.param({"done": "done"}, id="done"),
    pytest.param({"done": "terminated"}, id="terminated"),
    pytest.param({"decoder": True}, id="decoder"),
    pytest.param({"done": "done", "decoder": True}, id="done-decoder"),
]


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", [(), (B,), (2, B), (0,)])
def test_forward_is_upstreams(heads: dict, batch: tuple[int, ...]) -> None:
    ours, theirs = pair(linear_world_model, **heads)
    td = data(*batch)
    got, want = ours(td.clone()), theirs(td.clone())
    assert list(got.keys(True)) == list(want.keys(True))
    assert (got == want).all()


def test_forward_is_encoder_dynamics_heads_in_that_order() -> None:
    wm = linear_world_model(done="done", decoder=True)
    td = data(B)
    out = wm(td.clone())
    latent = wm.encoder.module(td["observation"])
    after = wm.dynamics.module(latent, td["action"])
    torch.testing.assert_close(out["latent"], latent)
    torch.testing.assert_close(out["next", "latent"], after)
    torch.testing.assert_close(out["next", "reward"], wm.reward_head.module(after))
    torch.testing.assert_close(out["next", "done"], wm.done_head.module(after))
    torch.testing.assert_close(out["reconstruction"], wm.decoder.module(latent))


def test_forward_writes_into_its_input_and_returns_it() -> None:
    wm, td = linear_world_model(), data(B)
    assert wm(td) is td
    assert {"latent", "next"} <= set(td.keys())


def test_encode_is_the_encoder_alone() -> None:
    wm, td = linear_world_model(), data(B)
    out = wm.encode(td.select("observation"))
    assert set(out.keys()) == {"observation", "latent"}
    torch.testing.assert_close(out["latent"], wm.encoder.module(td["observation"]))


def test_step_does_not_encode() -> None:
    wm = linear_world_model(done="done")
    latent, action = torch.randn(B, LATENT), torch.randn(B, ACTION)
    # An observation that would change the latent if the encoder ran.
    td = TensorDict(
        {"latent": latent, "action": action, "observation": torch.full((B, OBS), torch.nan)}, [B]
    )
    out = wm.step(td)
    assert out["latent"] is latent
    torch.testing.assert_close(out["next", "latent"], wm.dynamics.module(latent, action))
    assert set(out["next"].keys()) == {"latent", "reward", "done"}


def test_encode_then_step_is_forward() -> None:
    wm, td = linear_world_model(done="done", decoder=True), data(B)
    assert (wm.step(wm.encode(td.clone())) == wm(td.clone())).all()


def test_decode_is_the_decoder_alone() -> None:
    wm = linear_world_model(decoder=True)
    latent = torch.randn(B, LATENT)
    out = wm.decode(TensorDict({"latent": latent}, [B]))
    assert set(out.keys()) == {"latent", "reconstruction"}
    torch.testing.assert_close(out["reconstruction"], wm.decoder.module(latent))


def test_decode_without_a_decoder_is_upstreams_error() -> None:
    ours, theirs = pair(linear_world_model)
    errors = []
    for wm in (ours, theirs):
        with pytest.raises(RuntimeError) as info:
            wm.decode(TensorDict({"latent": torch.randn(B, LATENT)}, [B]))
        errors.append(str(info.value))
    assert errors[0] == errors[1]
    assert "decoder" in errors[0]


def test_a_missing_input_is_named() -> None:
    wm = linear_world_model()
    with pytest.raises(KeyError, match="latent"):
        wm.step(TensorDict({"action": torch.randn(B, ACTION)}, [B]))
    with pytest.raises(KeyError, match="action"):
        wm(data(B).exclude("action"))


def test_gradients_reach_every_part() -> None:
    wm = linear_world_model(done="done", decoder=True)
    out = wm(data(B))
    loss = sum(v.sum() for v in (out["next", "reward"], out["next", "done"], out["reconstruction"]))
    loss.backward()
    for name, parameter in wm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("heads", HEADS)
def test_keys_are_upstreams(heads: dict) -> None:
    ours, theirs = pair(linear_world_model, **heads)
    assert list(ours.in_keys) == list(theirs.in_keys) == ["observation", "action"]
    assert list(ours.out_keys) == list(theirs.out_keys)
    assert list(ours.step_module.in_keys) == list(theirs.step_module.in_keys)
    assert list(ours.step_module.out_keys) == list(theirs.step_module.out_keys)


def test_step_module_is_dynamics_and_heads() -> None:
    wm = linear_world_model(done="done", decoder=True)
    assert isinstance(wm.step_module, TensorDictSequential)
    assert list(wm.step_module.module) == [wm.dynamics, wm.reward_head, wm.done_head, wm.decoder]
    assert list(linear_world_model().step_module.out_keys) == [
        ("next", "latent"),
        ("next", "reward"),
    ]


def test_optional_parts_are_none() -> None:
    wm = linear_world_model()
    assert wm.done_head is None
    assert wm.decoder is None


def test_nested_keys() -> None:
    ours, theirs = pair(nested_world_model)
    td = TensorDict(
        {
            "sensors": {"observation": torch.randn(B, OBS)},
            "control": {"action": torch.randn(B, ACTION)},
        },
        [B],
    )
    assert list(ours.in_keys) == [("sensors", "observation"), ("control", "action")]
    got, want = ours(td.clone()), theirs(td.clone())
    assert got["next", "hidden", "deep", "latent"].shape == (B, LATENT)
    assert got["next", "gain", "reward"].shape == (B, 1)
    assert got["next", "status", "done"].shape == (B, 1)
    assert (got == want).all()


def test_multi_agent_keys() -> None:
    ours, theirs = pair(multi_agent_world_model, done="agents")
    agents = TensorDict(
        {
            "observation": torch.randn(B, AGENTS, OBS),
            "action": torch.randn(B, AGENTS, ACTION),
        },
        [B, AGENTS],
    )
    td = TensorDict({"agents": agents}, [B])
    got, want = ours(td.clone()), theirs(td.clone())
    assert got["next", "agents", "latent"].shape == (B, AGENTS, LATENT)
    assert got["next", "agents", "reward"].shape == (B, AGENTS, 1)
    assert (got == want).all()


def test_several_latents() -> None:
    ours, theirs = pair(rssm_world_model, sampled=True)
    assert list(ours.step_module.in_keys) == ["state", "belief", "action"]
    td = data(B)
    torch.manual_seed(1)
    got = ours(td.clone())
    torch.manual_seed(1)
    assert (got == theirs(td.clone())).all()


# ---------------------------------------------------------------- state


BUILDERS = [
    pytest.param(linear_world_model, {}, id="bare"),
    pytest.param(linear_world_model, {"done": "done", "decoder": True}, id="full"),
    pytest.param(rssm_world_model, {}, id="rssm"),
    pytest.param(nested_world_model, {}, id="nested"),
    pytest.param(multi_agent_world_model, {"done": "team"}, id="multi-agent"),
]


@pytest.mark.parametrize(("builder", "kwargs"), BUILDERS)
def test_state_dict_is_upstreams(builder: Any, kwargs: dict) -> None:
    ours, theirs = pair(builder, **kwargs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("to_ours", [False, True], ids=["to-torchrl", "from-torchrl"])
@pytest.mark.parametrize(("builder", "kwargs"), BUILDERS)
def test_checkpoints_move_both_ways(
    builder: Any, kwargs: dict, to_ours: bool, assign: bool
) -> None:
    classes = [fastwm.WorldModel, UpstreamWorldModel]
    source, target = (builder(cls, **kwargs) for cls in (classes[::-1] if to_ours else classes))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    result = target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_parameters_are_listed_once() -> None:
    wm = linear_world_model(done="done", decoder=True)
    assert len(list(wm.parameters())) == 10
    assert all(not name.startswith("_") for name, _ in wm.named_parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", CASES)
def test_copies_compute_the_same_on_weights_of_their_own(name: str, way: str) -> None:
    case = make_case(name)
    wm = case.world_model
    if way == "deepcopy":
        copied = copy.deepcopy(wm)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(wm))
    else:
        file = io.BytesIO()
        torch.save(wm, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    td = case.start(B).update(case.env([B]).full_action_spec.rand())
    torch.manual_seed(1)
    want = wm.step(td.clone())
    torch.manual_seed(1)
    assert (copied.step(td.clone()) == want).all()
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    torch.manual_seed(1)
    assert (wm.step(td.clone()) == want).all()


def test_train_and_eval_reach_the_parts() -> None:
    wm = linear_world_model(done="done")
    dropout = nn.Dropout(0.5)
    # What is inside a part may be exchanged: the composed sequence sees it.
    wm.encoder.module = nn.Sequential(wm.encoder.module, dropout)
    td = data(B)
    assert not torch.equal(wm(td.clone())["latent"], wm(td.clone())["latent"])
    wm.eval()
    assert torch.equal(wm(td.clone())["latent"], wm(td.clone())["latent"])
    assert not wm.dynamics.module.linear.training


def test_to_moves_every_part_once() -> None:
    wm = linear_world_model(done="done", decoder=True).to(torch.float64)
    assert {p.dtype for p in wm.parameters()} == {torch.float64}
    out = wm(data(B).double())
    assert out["next", "reward"].dtype is torch.float64
    # The step module runs the very parameters that the parts show.
    assert {id(p) for p in wm.step_module.parameters()} < {id(p) for p in wm.parameters()}
