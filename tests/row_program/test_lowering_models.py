"""Whole models: the lowered step rolls out to what eager gives, noise for noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastwm
from fastwm.row_program.lowering import Lowered
from tests.engines.test_captured import DISTRIBUTIONS, FloatAction, begin, model_of
from tests.models import CASES, make_case, spec_env
from tests.row_program.lowered import assert_lowers


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [(), (3,), (1,), (2, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_model(name: str, batch: tuple[int, ...], grad: bool) -> None:
    case = make_case(name)
    lowered = assert_lowers(case.env(batch), case.policy, case.start(*batch), grad=grad)
    assert lowered.plain  # its uniforms are the parameters themselves


@pytest.mark.parametrize("name", CASES)
def test_a_batch_as_large_as_the_features(name: str) -> None:
    case = make_case(name)
    for size in (2, 4, 5, 6):
        assert_lowers(case.env([size]), case.policy, case.start(size))


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_actors(name: str, batch: int, grad: bool) -> None:
    torch.manual_seed(0)
    env = fastwm.WorldModelEnv(model_of(FloatAction()), spec_env(), batch_size=[batch])
    assert_lowers(env, DISTRIBUTIONS[name](), begin(batch), grad=grad)
