"""The Gaussian recurrent state-space model that PlaNet and the first Dreamer share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, RSSMPosterior

from fastwm.models.family import width_of
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.heads import continuation_head
from fastwm.models.rssm.keys import ACTION, NEXT_LATENTS
from fastwm.models.rssm.observation import ObservationModel
from fastwm.models.rssm.prior import Prior

__all__ = ["gaussian_family"]


def gaussian_family(
    name: str,
    settings: Mapping[str, Any],
    base_env: EnvBase,
    observation: ObservationModel,
    *,
    belief: int,
    state: int,
    units: int,
    activation: type[nn.Module],
    observation_key: str,
    continuation_layers: int = 0,
    policy: TensorDictModuleBase | None = None,
    value: TensorDictModuleBase | None = None,
) -> RSSMFamily:
    """torchrl's ``RSSMPrior`` and ``RSSMPosterior`` with dense heads, as a family without a loss.

    Args:
        name, settings: of the family.
        base_env: tells the action's width.
        observation: encoder and decoder.

    Keyword Args:
        belief, state: widths. torchrl's ``RSSMPrior`` takes hidden layers of the belief's width alone
            (it reads the belief with a layer of ``hidden_dim`` inputs).
        units, activation: of the heads.
        observation_key: of the base env.
        continuation_layers: hidden layers of the continuation head; 0 for none.
        policy, value: as given to the family.
    """
    action = width_of(base_env, ACTION)

    def head(layers: int) -> nn.Module:
        return MLP(state + belief, 1, depth=layers, num_cells=units, activation_class=activation)

    return RSSMFamily(
        name,
        settings,
        Prior(torch.empty(action), belief, belief, state, action_dim=action),
        RSSMPosterior(belief, state, rnn_hidden_dim=belief, obs_embed_dim=observation.embedding),
        observation,
        TensorDictModule(head(2), NEXT_LATENTS, [("next", "reward")]),
        sizes=(state, belief),
        action_spec=base_env.full_action_spec_unbatched[ACTION],
        statistics=("mean", "std"),
        observation_key=observation_key,
        continuation=continuation_head(head(continuation_layers)) if continuation_layers else None,
        policy=policy,
        value=value,
    )
