"""`dreamer_v2`: DreamerV2, a categorical RSSM around a GRU."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import OneHot
from torchrl.envs import EnvBase
from torchrl.modules import MLP, DreamerActor

from fastwm.models.rssm.categorical import categorical_family
from fastwm.models.rssm.categorical_loss import DreamerV3ModelLoss
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.heads import action_of, continuation_head, one_hot_actor, tanh_normal_actor
from fastwm.models.rssm.keys import LATENTS, NEXT_LATENTS
from fastwm.models.rssm.observation import conv_observation, dense_observation, observation_shape

__all__ = ["dreamer_v2"]


def dreamer_v2(
    base_env: EnvBase,
    *,
    deter: int = 600,
    hidden: int = 600,
    stoch: int = 32,
    discrete: int = 32,
    units: int = 400,
    cnn_depth: int = 48,
    kl_scale: float = 0.1,
    kl_balance: float = 0.8,
    free_nats: float = 0.0,
    discount: float = 0.995,
    discount_scale: float = 5.0,
    observation_key: str = "observation",
) -> RSSMFamily:
    """DreamerV2 (Hafner et al. 2021): a categorical RSSM with balanced divergence.

    Made of torchrl's ``RSSMPriorV3`` and ``RSSMPosteriorV3`` (with ``recurrent_model="gru"``), ``MLP``,
    ``ObsEncoder`` and ``ObsDecoder``, whose ``state_dict``s load. How it is put together and trained:
    :mod:`fastwm.models.rssm`. Defaults are the paper's for Atari (table D.1), where it has them.

    Args:
        base_env: whose observation, action and reward are modelled. The action is bounded or one-hot.

    Keyword Args:
        deter, hidden: widths of belief and the RSSM's hidden layers. 600. They are SiLU in torchrl's
            modules, where the paper has ELU.
        stoch, discrete: the state is 32 one-hot vectors of 32 classes, drawn with straight-through
            gradients.
        units: of the dense heads, 4 hidden layers each, ELU. 400.
        cnn_depth: channels of an image's first convolution. 48 (official repository,
            ``configs.yaml``).
        kl_scale, kl_balance, free_nats: of the loss: 0.1; 0.8 of it trains the prior; no free nats.
        discount, discount_scale: what the continuation says where nothing terminates, 0.995, and the
            weight of its loss, 5 (``configs.yaml``, ``atari``).
        observation_key: a vector, or a float image ``[C, 64, 64]``.

    Returns:
        An :class:`~fastwm.models.RSSMFamily`. Latents: ``state`` ``[stoch * discrete]``, ``belief``.
        Policy: one-hot categorical, writes ``logits``; or, for bounded actions, tanh-normal as in
        :func:`~fastwm.models.dreamer_v1`. (The repository's truncated normal reads values back to
        Python in torchrl's ``TruncatedNormal``: no engine could take it.) Value: writes
        ``state_value``. Loss: :class:`~fastwm.models.DreamerV3ModelLoss`.

    Raises:
        KeyError: the env has no such observation.
        ValueError: it is of an unfit shape; the action is neither bounded nor one-hot.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import dreamer_v2, insert_resets
        >>> base_env = GymEnv("CartPole-v1")
        >>> family = dreamer_v2(base_env, deter=16, hidden=16, stoch=4, discrete=4, units=16)
        >>> data = family.real_env(base_env).rollout(5, family.actor())
        >>> losses, batch = family.loss(insert_resets(data)[None])
        >>> sorted(losses.keys())
        ['loss_model_continue', 'loss_model_kl', 'loss_model_reco', 'loss_model_reward']
        >>> start = batch["next"].select("state", "belief").flatten(0, 1)
        >>> dream = family.env(base_env).rollout(
        ...     15, family.policy, tensordict=start, break_when_any_done=False
        ... )
        >>> dream["action"].shape
        torch.Size([6, 15, 2])

    Source: Hafner et al. 2021, "Mastering Atari with Discrete World Models", arXiv:2010.02193.
    """
    shape, state = observation_shape(base_env, observation_key), stoch * discrete
    latent = state + deter
    if len(shape) == 1:
        observation = dense_observation(shape, latent, layers=4, units=units, embedding=units)
    else:
        observation = conv_observation(shape, latent, channels=cnn_depth)

    def net(outputs: int) -> nn.Module:
        return MLP(latent, outputs, depth=4, num_cells=units, activation_class=nn.ELU)

    spec = action_of(base_env)
    if isinstance(spec, OneHot):
        policy = one_hot_actor(net(spec.shape[-1]))
    else:
        actor = DreamerActor(spec.shape[-1], depth=4, num_cells=units)
        actor(torch.zeros(1, state), torch.zeros(1, deter))  # its first layer is lazy
        policy = tanh_normal_actor(spec, actor)
    settings = {
        "observation": tuple(shape),
        "action": spec.shape[-1],
        "deter": deter,
        "hidden": hidden,
        "stoch": stoch,
        "discrete": discrete,
        "units": units,
        "embedding": observation.embedding,
    }
    family = categorical_family(
        "dreamer_v2",
        settings,
        base_env,
        observation,
        TensorDictModule(net(1), NEXT_LATENTS, [("next", "reward")]),
        belief=deter,
        groups=stoch,
        classes=discrete,
        hidden=hidden,
        observation_key=observation_key,
        continuation=continuation_head(net(1)),
        policy=policy,
        value=TensorDictModule(net(1), LATENTS, ["state_value"]),
    )
    # Unit Gaussians: half the squared error each.
    family.loss = DreamerV3ModelLoss(
        family.observe,
        lambda_kl=kl_scale,
        lambda_reco=0.5,
        lambda_reward=0.5,
        lambda_continue=discount_scale,
        kl_mode="joint",
        lambda_dynamic=kl_balance,
        lambda_representation=1 - kl_balance,
        free_bits=free_nats,
        continue_target_scale=discount,
        reco_symlog=False,
        reward_two_hot=False,
        reward_symlog=False,
    )
    family.loss.set_keys(pixels=observation_key, reco_pixels=f"reco_{observation_key}")
    return family
