"""Modules of the libraries around us are captured, whatever they keep from their construction."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.modules import MLP, NoisyLinear

import fastwm
from tests.models import make_case, module


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(in_features=4, out_features=2, num_cells=[8, 8]),
        lambda: MLP(in_features=4, out_features=2, depth=0),
        lambda: MLP(
            in_features=4,
            out_features=2,
            num_cells=[8],
            norm_class=nn.LayerNorm,
            norm_kwargs={"normalized_shape": 8},
            dropout=0.0,
        ),
        lambda: MLP(in_features=4, out_features=2, num_cells=[8], layer_class=NoisyLinear),
    ],
    ids=["mlp", "linear", "norm", "noisy"],
)
def test_torchrl_mlps_are_captured(make):
    case = make_case("linear")
    policy = module(make(), ["latent"], ["action"])
    with torch.no_grad():
        report = fastwm.check_parity(case.env([3]), policy, case.start(3), 5)
    assert report.ok, report
