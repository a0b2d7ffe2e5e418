"""`dreamer_v3`: DreamerV3, a categorical RSSM around a block GRU, and the sizes that the paper names."""

from __future__ import annotations

from torchrl.data import OneHot
from torchrl.envs import EnvBase
from torchrl.modules import DreamerV3DiscreteActor, DreamerV3MLP

from fastwm.models.rssm.categorical import categorical_family
from fastwm.models.rssm.categorical_loss import DreamerV3ModelLoss
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.heads import (
    NormalActor,
    action_of,
    continuation_head,
    normal_actor,
    two_hot_head,
)
from fastwm.models.rssm.keys import LATENTS, NEXT_LATENTS
from fastwm.models.rssm.observation import (
    conv_observation_v3,
    dense_observation_v3,
    observation_shape,
)

__all__ = ["SIZES", "dreamer_v3"]

# The paper's table of model sizes, with what follows from it in the official repository's
# ``configs.yaml``, which alone has 1M: width of the belief, of the hidden layers, channels of the first
# convolution, classes of a categorical.
SIZES: dict[str, dict[str, int]] = {
    "1M": {"deter": 512, "hidden": 64, "depth": 4, "classes": 4},
    "12M": {"deter": 2048, "hidden": 256, "depth": 16, "classes": 16},
    "25M": {"deter": 3072, "hidden": 384, "depth": 24, "classes": 24},
    "50M": {"deter": 4096, "hidden": 512, "depth": 32, "classes": 32},
    "100M": {"deter": 6144, "hidden": 768, "depth": 48, "classes": 48},
    "200M": {"deter": 8192, "hidden": 1024, "depth": 64, "classes": 64},
    "400M": {"deter": 12288, "hidden": 1536, "depth": 96, "classes": 96},
}


def dreamer_v3(
    base_env: EnvBase,
    *,
    size: str = "12M",
    deter: int | None = None,
    hidden: int | None = None,
    depth: int | None = None,
    classes: int | None = None,
    stoch: int = 32,
    blocks: int = 8,
    unimix: float = 0.01,
    bins: int = 255,
    free_nats: float = 1.0,
    horizon: int = 333,
    observation_key: str = "observation",
) -> RSSMFamily:
    """DreamerV3 (Hafner et al. 2023): block GRU, unimix categoricals, two-hot reward and value.

    Made of torchrl's ``RSSMPriorV3`` and ``RSSMPosteriorV3`` (with ``recurrent_model="block_gru"``),
    ``DreamerV3MLP``, ``SymExpTwoHot``, ``DreamerV3DiscreteActor``, ``DreamerV3ImageEncoder`` and
    ``DreamerV3ImageDecoder``, whose ``state_dict``s load. How it is put together and trained:
    :mod:`fastwm.models.rssm`. Defaults are those of the official repository's ``configs.yaml``.

    Args:
        base_env: whose observation, action and reward are modelled. The action is one-hot, or bounded
            by -1 and 1 (torchrl's ``ActionScaling`` makes it so): its RSSM divides what is larger by
            its size.

    Keyword Args:
        size: ``"1M"``, ``"12M"``, ``"25M"``, ``"50M"``, ``"100M"``, ``"200M"`` or ``"400M"``: all parameters
            of a model of images, without the slow critic. It names the four that follow.
        deter: width of the belief.
        hidden: width of the RSSM's hidden layers and of the heads (the repository's ``hidden`` and
            ``units``, which are one number in the paper).
        depth: channels of an image's first convolution are twice this.
        classes: of each categorical.
        stoch, blocks: categoricals, 32, and blocks of the GRU, 8.
        unimix: uniform probability in what is drawn from, in the divergence and in a discrete policy.
        bins: of reward and value.
        free_nats: of the loss. 1.
        horizon: the continuation says ``1 - 1 / horizon`` where nothing terminates. 333.
        observation_key: a vector, or a float image ``[C, H, W]`` in [0, 1] whose sides are multiples of
            16.

    Returns:
        An :class:`~fastwm.models.RSSMFamily`. Latents: ``state`` ``[stoch * classes]``, ``belief``.
        Policy: writes ``logits`` and ``action_log_prob`` for one-hot actions, else ``loc`` and
        ``scale`` of a Gaussian, to be clipped by who acts with it (``family.actor`` does). Reward and
        value heads also write ``("next", "reward_logits")`` and ``state_value_logits``. Loss:
        :class:`~fastwm.models.DreamerV3ModelLoss`.

    Raises:
        KeyError: the env has no such observation.
        ValueError: it is of an unfit shape; the action is neither one-hot nor in [-1, 1]; an unknown
            size, or a width that cannot be divided into the blocks.

    Example:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> from torchrl.envs.transforms import ActionScaling
        >>> from fastwm.models import dreamer_v3, insert_resets
        >>> base_env = TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling())
        >>> family = dreamer_v3(base_env, size="1M")
        >>> data = family.real_env(base_env).rollout(7, family.actor())
        >>> losses, batch = family.loss(insert_resets(data)[None])
        >>> sorted(losses.keys())
        ['loss_model_continue', 'loss_model_kl', 'loss_model_reco', 'loss_model_reward']
        >>> start = batch["next"].select("state", "belief").flatten(0, 1)
        >>> dream = family.env(base_env).rollout(
        ...     15, family.policy, tensordict=start, break_when_any_done=False
        ... )
        >>> family.value(dream["next"])["state_value"].shape
        torch.Size([8, 15, 1])

    Source: Hafner et al. 2023, "Mastering Diverse Domains through World Models", arXiv:2301.04104.
    """
    given = {"deter": deter, "hidden": hidden, "depth": depth, "classes": classes}
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r}; choose one of {', '.join(SIZES)}.")
    chosen = {key: SIZES[size][key] if value is None else value for key, value in given.items()}
    units, belief, state = chosen["hidden"], chosen["deter"], stoch * chosen["classes"]
    if belief % blocks:
        raise ValueError(f"deter={belief} cannot be divided into blocks={blocks}.")
    shape, latent = observation_shape(base_env, observation_key), state + belief
    if len(shape) == 1:
        observation = dense_observation_v3(shape, latent, units=units)
    else:
        observation = conv_observation_v3(shape, latent, depth=chosen["depth"])

    def net(outputs: int, layers: int, scale: float) -> DreamerV3MLP:
        return DreamerV3MLP(latent, outputs, depth=layers, num_cells=units, outscale=scale)

    spec = action_of(base_env)
    width = spec.shape[-1]
    if isinstance(spec, OneHot):
        policy = DreamerV3DiscreteActor(latent, width, num_cells=units, unimix=unimix)
    else:
        policy = normal_actor(spec, NormalActor(net(2 * width, 3, 0.01)))
    settings = {
        "observation": tuple(shape),
        "action": width,
        **chosen,
        "stoch": stoch,
        "blocks": blocks,
        "bins": bins,
        "embedding": observation.embedding,
    }
    family = categorical_family(
        "dreamer_v3",
        settings,
        base_env,
        observation,
        two_hot_head(
            net(bins, 1, 0.0), NEXT_LATENTS, ("next", "reward_logits"), ("next", "reward"), bins
        ),
        belief=belief,
        groups=stoch,
        classes=chosen["classes"],
        hidden=units,
        observation_key=observation_key,
        prior={"recurrent_model": "block_gru", "num_blocks": blocks},
        posterior={"use_rms_norm": True},
        unimix=unimix,
        continuation=continuation_head(net(1, 1, 1.0)),
        policy=policy,
        value=two_hot_head(net(bins, 3, 0.0), LATENTS, "state_value_logits", "state_value", bins),
    )
    family.loss = DreamerV3ModelLoss(
        family.observe,
        lambda_continue=1.0,
        kl_mode="joint",
        unimix=unimix,
        free_bits=free_nats,
        continue_target_scale=1 - 1 / horizon,
        reco_symlog=not observation.image,
        num_reward_bins=bins,
    )
    family.loss.set_keys(pixels=observation_key, reco_pixels=f"reco_{observation_key}")
    return family
