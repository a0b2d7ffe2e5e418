"""`tdmpc2`: the builder, and the sizes that the paper names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from fastwm.models.family import Family, width_of
from fastwm.models.layers import Concat, TwoHot
from fastwm.models.tdmpc2.discount import discount_of
from fastwm.models.tdmpc2.loss import TDMPC2Loss
from fastwm.models.tdmpc2.networks import (
    PixelEncoder,
    PolicyPrior,
    PolicySample,
    QEnsemble,
    QValues,
    TaskEmbedding,
    network,
    simplicial_network,
)
from fastwm.world_model import WorldModel

__all__ = ["SIZES", "tdmpc2"]

# MODEL_SIZE of the official repository (``common/__init__.py``), where num_q is 5 if not said otherwise.
SIZES: dict[str, dict[str, int]] = {
    "1M": {"enc_dim": 256, "mlp_dim": 384, "latent_dim": 128, "num_enc_layers": 2, "num_q": 2},
    "5M": {"enc_dim": 256, "mlp_dim": 512, "latent_dim": 512, "num_enc_layers": 2, "num_q": 5},
    "19M": {"enc_dim": 1024, "mlp_dim": 1024, "latent_dim": 768, "num_enc_layers": 3, "num_q": 5},
    "48M": {"enc_dim": 1792, "mlp_dim": 1792, "latent_dim": 768, "num_enc_layers": 4, "num_q": 5},
}


def tdmpc2(
    base_env: EnvBase,
    *,
    size: str = "5M",
    enc_dim: int | None = None,
    mlp_dim: int | None = None,
    latent_dim: int | None = None,
    num_enc_layers: int | None = None,
    num_q: int | None = None,
    tasks: int | None = None,
    action_masks: Tensor | None = None,
    task_dim: int = 96,
    episodic: bool = False,
    episode_length: int | Sequence[int] = 500,
    observation_key: NestedKey = "observation",
    num_channels: int = 32,
    simnorm_dim: int = 8,
    num_bins: int = 101,
    vmin: float = -10.0,
    vmax: float = 10.0,
    dropout: float = 0.01,
    log_std_min: float = -10.0,
    log_std_max: float = 2.0,
    loss: Mapping[str, Any] | None = None,
) -> Family:
    """TD-MPC2: an implicit world model with a policy prior and an ensemble of Q functions.

    The parts are wired by these keys; ``task`` and ``action_mask`` only with ``tasks``:

    ==============  =======================================  =======================================
    part            reads                                    writes
    ==============  =======================================  =======================================
    encoder         ``observation`` (``task_id``)            ``latent`` (``task``, ``action_mask``)
    dynamics        ``latent``, ``action`` (``task``)        ``("next", "latent")``
    reward head     ``latent``, ``action`` (``task``)        ``reward_logits``, ``("next", "reward")``
    done head       ``("next", "latent")`` (``task``)        ``("next", "terminated_logits")``,
                                                             ``("next", "terminated")``
    ``policy``      ``latent`` (``task``, ``action_mask``)   ``action``
    ``value``       ``latent``, ``action`` (``task``)        ``state_action_value``
    ==============  =======================================  =======================================

    ``latent`` is ``[*B, latent_dim]``, on simplices; ``task``, an embedding ``[*B, 96]``, and
    ``action_mask`` stay constant through a rollout. The done head writes the probability of an end,
    the value what each Q function expects, ``[*B, num_q]``.

    Args:
        base_env: its observation, a vector or an image ``[C, 64, 64]``, and its action, a vector in
            [-1, 1] (:class:`torchrl.envs.ActionScaling` makes it so).

    Keyword Args:
        size: ``"1M"``, ``"5M"`` (default, as official), ``"19M"`` or ``"48M"``: about how many parameters
            there are. It gives the next five, each of which may be given by itself:
        enc_dim, num_enc_layers: hidden width and layers of a vector's encoder.
        mlp_dim: hidden width of all else.
        latent_dim: width of the latent.
        num_q: Q functions.
        tasks: how many; None for one, without an embedding. The data then hold ``task_id``, an index
            ``[*B]`` or ``[*B, 1]``.
        action_masks: ``[tasks, A]``, 1 where a task has an action.
        task_dim: width of a task's embedding; its L2 norm is at most 1.
        episodic: whether episodes can terminate: then there is a done head.
        episode_length: steps of an episode, or of one of each task, for the discount: see
            :func:`fastwm.models.tdmpc2.discount_of`. Default: DMControl's, with an action repeat of 2.
        observation_key: what the encoder reads.
        num_channels: of an image's encoder.
        simnorm_dim: numbers per simplex of the latent.
        num_bins, vmin, vmax: bins of rewards and values, and their range in symlog units.
        dropout: of the Q functions' first layers.
        log_std_min, log_std_max: range of the policy prior's.
        loss: keyword arguments of :class:`fastwm.models.tdmpc2.TDMPC2Loss` other than its defaults.

    Returns:
        A :class:`fastwm.models.Family` whose ``loss`` is a
        :class:`fastwm.models.tdmpc2.TDMPC2Loss`.

    Raises:
        ValueError: an unknown size; actions beyond [-1, 1]; a ``latent_dim`` that simplices do not
            divide; ``action_masks`` of another shape; another number of episode lengths than of tasks.
        KeyError: ``base_env`` lacks the observation; names it.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import ActionScaling, GymEnv, TransformedEnv
        >>> from fastwm.models.tdmpc2 import tdmpc2
        >>> base_env = TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling())
        >>> family = tdmpc2(base_env, size="1M", episode_length=200)
        >>> start = family.world_model.encode(TensorDict({"observation": torch.randn(4, 3)}, [4]))
        >>> rollout = family.env(base_env).rollout(3, family.policy, tensordict=start)
        >>> rollout["next", "reward"].shape
        torch.Size([4, 3, 1])

    Source: Hansen et al. 2024, "TD-MPC2", sections 3 and 4 and appendix H; every default is that of the
    official repository's ``config.yaml``.
    """
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r} of TD-MPC2; choose one of {', '.join(SIZES)}.")
    given = {
        "enc_dim": enc_dim, "mlp_dim": mlp_dim, "latent_dim": latent_dim,
        "num_enc_layers": num_enc_layers, "num_q": num_q,
    }  # fmt: skip
    sizes = SIZES[size] | {name: value for name, value in given.items() if value is not None}
    latent, hidden = sizes["latent_dim"], sizes["mlp_dim"]
    if latent % simnorm_dim:
        raise ValueError(
            f"latent_dim must be a multiple of simnorm_dim: got {latent} and {simnorm_dim}."
        )
    action = _action_width(base_env)
    _check_tasks(tasks, action_masks, action, episode_length)
    embedding = 0 if tasks is None else task_dim
    discount = (
        discount_of(episode_length)
        if isinstance(episode_length, int)
        else [discount_of(steps) for steps in episode_length]
    )
    task: list[NestedKey] = [] if tasks is None else ["task"]
    mask: list[NestedKey] = [] if action_masks is None else ["action_mask"]
    state_action: list[NestedKey] = ["latent", "action", *task]
    of_state, of_state_action = latent + embedding, latent + embedding + action
    two_hot = TwoHot(num_bins, vmin, vmax)

    encoder: TensorDictModuleBase
    encoder_net, observation = _encoder(
        base_env, observation_key, embedding, sizes, num_channels, simnorm_dim
    )
    encoder = TensorDictModule(encoder_net, [observation_key, *task], ["latent"])
    if tasks is not None:
        embed = TaskEmbedding(tasks, task_dim, action_masks)
        encoder = TensorDictSequential(
            TensorDictModule(embed, ["task_id"], [*task, *mask]), encoder
        )
    dynamics = simplicial_network((of_state_action, hidden, hidden, latent), simnorm_dim)
    reward = Concat(network(of_state_action, hidden, num_bins, zero=True))
    done_head = None
    if episodic:
        logits: NestedKey = ("next", "terminated_logits")
        end = Concat(network(of_state, hidden, 1))
        done_head = TensorDictSequential(
            TensorDictModule(end, [("next", "latent"), *task], [logits]),
            TensorDictModule(nn.Sigmoid(), [logits], [("next", "terminated")]),
        )
    world_model = WorldModel(
        encoder,
        TensorDictModule(dynamics, state_action, [("next", "latent")]),
        TensorDictSequential(
            TensorDictModule(reward, state_action, ["reward_logits"]),
            TensorDictModule(two_hot, ["reward_logits"], [("next", "reward")]),
        ),
        done_head=done_head,
    )
    prior = PolicyPrior(
        network(of_state, hidden, 2 * action),
        masked=action_masks is not None,
        log_std_min=log_std_min,
        log_std_max=log_std_max,
    )
    policy_in: list[NestedKey] = ["latent", *task, *mask]
    q = QEnsemble(of_state_action, hidden, num_bins, num_q=sizes["num_q"], dropout=dropout)
    q_logits: list[NestedKey] = ["state_action_value_logits"]
    return Family(
        "tdmpc2",
        {
            **sizes, "observation": observation, "action": action, "tasks": tasks, "episodic": episodic,
            "masked": action_masks is not None, "task_dim": embedding, "simnorm_dim": simnorm_dim,
            "num_bins": num_bins, "vmin": vmin, "vmax": vmax,
            "log_std_min": log_std_min, "log_std_max": log_std_max,
        },
        world_model,
        policy=TensorDictModule(prior, policy_in, ["action"]),
        value=TensorDictModule(QValues(q, two_hot), state_action, ["state_action_value"]),
        loss=TDMPC2Loss(
            world_model,
            TensorDictModule(
                PolicySample(prior), policy_in, ["action", "action_log_prob", "entropy_bonus"]
            ),
            TensorDictModule(q, state_action, q_logits),
            **{"two_hot": two_hot, "discount": discount, **(loss or {})},
        ),
    )  # fmt: skip


def _action_width(base_env: EnvBase) -> int:
    width = width_of(base_env, "action")
    spec = base_env.full_action_spec["action"]
    if isinstance(spec, Bounded):
        low, high = spec.space.low, spec.space.high
        if (low == -1).all() and (high == 1).all():
            return width
        found = f"{low.min().item():g} to {high.max().item():g}"
    else:
        found = "unbounded"
    raise ValueError(
        f"TD-MPC2 acts in [-1, 1], the env's action is {found}. "
        "TransformedEnv(env, torchrl.envs.ActionScaling()) scales it."
    )


def _encoder(
    base_env: EnvBase,
    key: NestedKey,
    embedding: int,
    sizes: Mapping[str, int],
    num_channels: int,
    group: int,
) -> tuple[nn.Module, int | tuple[int, ...]]:
    """The encoder for what the env emits at ``key``, and the width or shape of that."""
    specs = base_env.full_observation_spec
    shape = ()
    if key in specs.keys(True, True):
        shape = tuple(specs[key].shape[len(base_env.batch_size) :])
    if len(shape) != 3:
        width = width_of(base_env, key)
        hidden = [sizes["enc_dim"]] * max(sizes["num_enc_layers"] - 1, 1)
        return simplicial_network((width + embedding, *hidden, sizes["latent_dim"]), group), width
    if shape[1:] != (64, 64):
        raise ValueError(f"An image must be [C, 64, 64], {key!r} of the env is {list(shape)}.")
    if embedding:
        raise ValueError("Several tasks need vectors as observations, not images.")
    net = PixelEncoder(shape[0], sizes["latent_dim"], num_channels=num_channels, group=group)
    return net, shape


def _check_tasks(
    tasks: int | None,
    masks: Tensor | None,
    action: int,
    episode_length: int | Sequence[int],
) -> None:
    if tasks is None:
        if masks is not None:
            raise ValueError("action_masks are for several tasks: give tasks, too.")
        if not isinstance(episode_length, int):
            raise ValueError("Several episode lengths are for several tasks: give tasks, too.")
        return
    if masks is not None and masks.shape != (tasks, action):
        raise ValueError(f"action_masks must be [{tasks}, {action}]: got {list(masks.shape)}.")
    if not isinstance(episode_length, int) and len(episode_length) != tasks:
        raise ValueError(f"There are {tasks} tasks and {len(episode_length)} episode lengths.")
