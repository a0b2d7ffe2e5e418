"""`planet`: PlaNet, a Gaussian RSSM that acts by planning."""

from __future__ import annotations

from torch import nn
from torchrl.envs import EnvBase

from fastwm.models.family import width_of
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.gaussian import gaussian_family
from fastwm.models.rssm.keys import ACTION
from fastwm.models.rssm.loss import DreamerModelLoss
from fastwm.models.rssm.observation import conv_observation, dense_observation, observation_shape

__all__ = ["planet"]


def planet(
    base_env: EnvBase,
    *,
    deter_size: int = 200,
    stoch_size: int = 30,
    num_units: int = 200,
    cnn_depth: int = 32,
    embedding: int = 1024,
    free_nats: float = 3.0,
    divergence_scale: float = 1.0,
    reward_loss_scale: float = 10.0,
    image_loss_scale: float = 1.0,
    observation_key: str = "observation",
) -> RSSMFamily:
    """PlaNet (Hafner et al. 2019): a Gaussian RSSM with a reward head. It has no policy: it plans.

    Made of torchrl's ``RSSMPrior``, ``RSSMPosterior``, ``MLP``, ``ObsEncoder`` and ``ObsDecoder``, whose
    ``state_dict``s load. How it is put together and trained: :mod:`fastwm.models.rssm`; to act, give
    ``family.actor`` a planner over ``family.env(base_env)``.

    Args:
        base_env: whose observation, action and reward are modelled.

    Keyword Args:
        deter_size, stoch_size: widths of belief and state; the RSSM's hidden layers are as wide as
            the belief. 200 and 30 (paper, appendix A). They are ELU in torchrl's modules, where the
            paper has ReLU.
        num_units: of the dense heads, two hidden layers each, ReLU. 200 (paper, appendix A; the
            official repository's ``configs.py`` has 3 x 300).
        cnn_depth: channels of an image's first convolution. 32 (paper: those of "World Models").
        embedding: width of a vector's embedding, behind two hidden layers of ``num_units``. 1024, an
            image's (the paper has images alone).
        free_nats, divergence_scale, reward_loss_scale, image_loss_scale: of the loss: 3, which bounds
            the divergence of each step, 1, 10 and 1 (``configs.py``). The last is the observation's.
        observation_key: a vector, or a float image ``[C, 64, 64]``.

    Returns:
        An :class:`~fastwm.models.RSSMFamily`. Latents: ``state``, ``belief``. Loss:
        :class:`~fastwm.models.DreamerModelLoss`, without latent overshooting, which the paper found
        not to help an RSSM.

    Raises:
        KeyError: the env has no such observation.
        ValueError: it is of an unfit shape, or the action is no vector.

    Example:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import planet
        >>> from fastwm.planning import CEMPlanner
        >>> base_env = GymEnv("Pendulum-v1")
        >>> family = planet(base_env, deter_size=16, stoch_size=4, num_units=16, embedding=16)
        >>> planner = CEMPlanner(
        ...     family.env(base_env), planning_horizon=5, optim_steps=2, num_candidates=8, top_k=2
        ... )
        >>> family.real_env(base_env).rollout(3, family.actor(planner))["action"].shape
        torch.Size([3, 1])

    Source: Hafner et al. 2019, "Learning Latent Dynamics for Planning from Pixels", arXiv:1811.04551.
    """
    shape, latent = observation_shape(base_env, observation_key), stoch_size + deter_size
    if len(shape) == 1:
        observation = dense_observation(
            shape, latent, layers=2, units=num_units, embedding=embedding, activation=nn.ReLU
        )
    else:
        observation = conv_observation(shape, latent, channels=cnn_depth)
    settings = {
        "observation": tuple(shape),
        "action": width_of(base_env, ACTION),
        "deter_size": deter_size,
        "stoch_size": stoch_size,
        "num_units": num_units,
        "embedding": observation.embedding,
    }
    family = gaussian_family(
        "planet",
        settings,
        base_env,
        observation,
        belief=deter_size,
        state=stoch_size,
        units=num_units,
        activation=nn.ReLU,
        observation_key=observation_key,
    )
    # Unit Gaussians: half the squared error each.
    family.loss = DreamerModelLoss(
        family.observe,
        lambda_kl=divergence_scale,
        lambda_reco=0.5 * image_loss_scale,
        lambda_reward=0.5 * reward_loss_scale,
        free_nats=free_nats,
    )
    family.loss.set_keys(pixels=observation_key, reco_pixels=f"reco_{observation_key}")
    return family
