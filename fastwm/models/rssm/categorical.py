"""The categorical recurrent state-space model that DreamerV2 and V3 share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.modules import RSSMPosteriorV3

from fastwm.models.family import width_of
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.keys import ACTION
from fastwm.models.rssm.observation import ObservationModel
from fastwm.models.rssm.prior import PriorV3

__all__ = ["categorical_family"]


def categorical_family(
    name: str,
    settings: Mapping[str, Any],
    base_env: EnvBase,
    observation: ObservationModel,
    reward: TensorDictModuleBase,
    *,
    belief: int,
    groups: int,
    classes: int,
    hidden: int,
    observation_key: str,
    prior: Mapping[str, Any] | None = None,
    posterior: Mapping[str, Any] | None = None,
    unimix: float = 0.0,
    continuation: TensorDictModuleBase | None = None,
    policy: TensorDictModuleBase | None = None,
    value: TensorDictModuleBase | None = None,
) -> RSSMFamily:
    """torchrl's ``RSSMPriorV3`` and ``RSSMPosteriorV3`` as a family without a loss.

    Args:
        name, settings: of the family.
        base_env: tells the action's width.
        observation: encoder and decoder.
        reward: the head.

    Keyword Args:
        belief, groups, classes, hidden: sizes: the state is ``groups`` one-hot vectors of ``classes``.
        observation_key: of the base env.
        prior, posterior: further arguments of the two modules.
        unimix: uniform probability mixed into what is drawn from.
        continuation, policy, value: as given to the family.
    """
    action = width_of(base_env, ACTION)
    return RSSMFamily(
        name,
        settings,
        PriorV3(
            action_shape=(action,),
            hidden_dim=hidden,
            rnn_hidden_dim=belief,
            num_categoricals=groups,
            num_classes=classes,
            action_dim=action,
            unimix=unimix,
            **(prior or {}),
        ),
        RSSMPosteriorV3(
            hidden,
            groups,
            classes,
            rnn_hidden_dim=belief,
            obs_embed_dim=observation.embedding,
            unimix=unimix,
            **(posterior or {}),
        ),
        observation,
        reward,
        sizes=(groups * classes, belief),
        action_spec=base_env.full_action_spec_unbatched[ACTION],
        statistics=("logits",),
        observation_key=observation_key,
        continuation=continuation,
        policy=policy,
        value=value,
    )
