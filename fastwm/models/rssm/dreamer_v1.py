"""`dreamer_v1`: the first Dreamer, a Gaussian RSSM with an actor and a critic learned in imagination."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, DreamerActor

from fastwm.models.family import width_of
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.gaussian import gaussian_family
from fastwm.models.rssm.heads import action_of, tanh_normal_actor
from fastwm.models.rssm.keys import ACTION, LATENTS
from fastwm.models.rssm.loss import DreamerModelLoss
from fastwm.models.rssm.observation import conv_observation, dense_observation, observation_shape

__all__ = ["dreamer_v1"]


def dreamer_v1(
    base_env: EnvBase,
    *,
    deter_size: int = 200,
    stoch_size: int = 30,
    num_units: int = 400,
    cnn_depth: int = 32,
    embedding: int = 1024,
    action_init_std: float = 5.0,
    free_nats: float = 3.0,
    kl_scale: float = 1.0,
    pcont: bool = False,
    pcont_scale: float = 10.0,
    discount: float = 0.99,
    observation_key: str = "observation",
) -> RSSMFamily:
    """Dreamer (Hafner et al. 2020): a Gaussian RSSM, an actor and a critic.

    Made of torchrl's ``RSSMPrior``, ``RSSMPosterior``, ``DreamerActor``, ``MLP``, ``ObsEncoder`` and
    ``ObsDecoder``, whose ``state_dict``s load. How it is put together and trained:
    :mod:`fastwm.models.rssm`.

    Args:
        base_env: whose observation, action and reward are modelled. The action must be bounded.

    Keyword Args:
        deter_size, stoch_size: widths of belief and state; the RSSM's hidden layers are as wide as
            the belief. 200 and 30 (paper, appendix A).
        num_units: of the dense heads, ELU: 2 hidden layers for the reward, 3 for the value and the
            continuation, 4 for the actor. 400 (official repository, ``dreamer.py``; the paper's
            appendix says 300).
        cnn_depth: channels of an image's first convolution. 32 (repository).
        embedding: width of a vector's embedding, behind two hidden layers of ``num_units``. 1024, an
            image's (torchrl's Dreamer recipe; the paper has images alone).
        action_init_std: the actor's standard deviation before its tanh, at first. 5 (repository).
        free_nats, kl_scale: of the loss: 3, which bounds the average over the batch, and 1 (repository).
        pcont: model the end of episodes. False (repository).
        pcont_scale, discount: weight of its loss and, as its target, the discount. 10 and 0.99.
        observation_key: a vector, or a float image ``[C, 64, 64]``.

    Returns:
        An :class:`~fastwm.models.RSSMFamily`. Latents: ``state``, ``belief``. Policy: tanh-normal,
        writes ``loc``, ``scale``, ``action``. Value: writes ``state_value``. Loss:
        :class:`~fastwm.models.DreamerModelLoss`.

    Raises:
        KeyError: the env has no such observation.
        ValueError: it is of an unfit shape; the action is no vector, or not bounded.

    Example:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import dreamer_v1, insert_resets
        >>> base_env = GymEnv("Pendulum-v1")
        >>> family = dreamer_v1(base_env, deter_size=16, stoch_size=4, num_units=16, embedding=16)
        >>> data = family.real_env(base_env).rollout(20, family.actor())
        >>> losses, batch = family.loss(insert_resets(data).reshape(1, 21))
        >>> sorted(losses.keys())
        ['loss_model_kl', 'loss_model_reco', 'loss_model_reward']
        >>> start = batch["next"].select("state", "belief").flatten(0, 1)
        >>> dream = family.env(base_env).rollout(15, family.policy, tensordict=start)
        >>> dream.shape, family.value(dream["next"])["state_value"].shape
        (torch.Size([21, 15]), torch.Size([21, 15, 1]))

    Source: Hafner et al. 2020, "Dream to Control: Learning Behaviors by Latent Imagination",
    arXiv:1912.01603.
    """
    shape, latent = observation_shape(base_env, observation_key), stoch_size + deter_size
    if len(shape) == 1:
        observation = dense_observation(
            shape, latent, layers=2, units=num_units, embedding=embedding
        )
    else:
        observation = conv_observation(shape, latent, channels=cnn_depth)
    actor = DreamerActor(
        width_of(base_env, ACTION), depth=4, num_cells=num_units, std_bias=action_init_std
    )
    actor(torch.zeros(1, stoch_size), torch.zeros(1, deter_size))  # its first layer is lazy
    value = MLP(latent, 1, depth=3, num_cells=num_units, activation_class=nn.ELU)
    settings = {
        "observation": tuple(shape),
        "action": width_of(base_env, ACTION),
        "deter_size": deter_size,
        "stoch_size": stoch_size,
        "num_units": num_units,
        "embedding": observation.embedding,
        "pcont": pcont,
    }
    family = gaussian_family(
        "dreamer_v1",
        settings,
        base_env,
        observation,
        belief=deter_size,
        state=stoch_size,
        units=num_units,
        activation=nn.ELU,
        observation_key=observation_key,
        continuation_layers=3 if pcont else 0,
        policy=tanh_normal_actor(action_of(base_env), actor),
        value=TensorDictModule(value, LATENTS, ["state_value"]),
    )
    # Unit Gaussians: half the squared error each.
    family.loss = DreamerModelLoss(
        family.observe,
        lambda_kl=kl_scale,
        lambda_reco=0.5,
        lambda_reward=0.5,
        lambda_continue=pcont_scale if pcont else 0.0,
        continue_target_scale=discount,
        free_nats=free_nats,
        delayed_clamp=True,
    )
    family.loss.set_keys(pixels=observation_key, reco_pixels=f"reco_{observation_key}")
    return family
