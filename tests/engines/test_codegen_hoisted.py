"""What is made once for all steps is not overwritten by the first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastwm
from tests.compare import assert_parity
from tests.models import ACTION, LATENT, CatLinear, linear_policy, module, spec_env


class WritesIntoFixed(nn.Module):
    """Of a context alone, yet with an in-place write, so that it stays in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, LATENT))

    def forward(self, context: Tensor) -> Tensor:
        return nn.functional.elu(context @ self.weight).mul_(0.5)


def test_a_fixed_value_is_not_overwritten_in_the_loop() -> None:
    model = fastwm.WorldModel(
        module(nn.Linear(8, LATENT), ["observation"], ["latent"]),
        module(
            CatLinear(LATENT + ACTION + LATENT, LATENT),
            ["latent", "action", "goal"],
            [("next", "latent")],
        ),
        module(nn.Linear(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    )
    from tensordict import TensorDict
    from tensordict.nn import TensorDictSequential

    policy = TensorDictSequential(
        module(WritesIntoFixed(), ["context"], ["goal"]), linear_policy(LATENT, ACTION)
    )
    env = fastwm.WorldModelEnv(model, spec_env(), batch_size=[5])
    td = TensorDict(
        {
            "latent": torch.randn(5, LATENT),
            "context": torch.randn(5, 3),
            "goal": torch.zeros(5, LATENT),
        },
        [5],
    )
    with torch.no_grad():
        assert_parity(env, policy, td, 4)
