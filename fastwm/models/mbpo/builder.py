"""`mbpo`: builds the ensemble of MBPO, or of PETS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.envs import EnvBase

from fastwm.models.family import Family, width_of
from fastwm.models.mbpo.dynamics import DrawMember, EnsembleDynamics, Termination
from fastwm.models.mbpo.ensemble import Elites, Ensemble
from fastwm.models.mbpo.loss import EnsembleLoss
from fastwm.specs import next_key
from fastwm.world_model import WorldModel

__all__ = ["mbpo"]

PROPAGATIONS = ("random", "TS1", "TSinf")


def mbpo(
    base_env: EnvBase,
    *,
    members: int = 7,
    elites: int = 5,
    hidden: Sequence[int] = (200,) * 4,
    activation: type[nn.Module] = nn.SiLU,
    propagation: str = "random",
    termination: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    deterministic: bool = False,
    sample: bool = True,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    reward_key: NestedKey = "reward",
    member_key: NestedKey = "member",
) -> Family:
    """The probabilistic ensemble of MBPO (Janner et al. 2019) and PETS (Chua et al. 2018).

    The latent is the observation itself, under its own key, so that what is imagined looks like
    what the real env gives and goes into the same replay buffers and losses. The reward is predicted along
    with the observation's change.

    Args:
        base_env: whose observation and action are predicted from and for.

    Keyword Args:
        members, elites: networks, and how many of them imagination draws from. 7 and 5 (MBPO's code:
            ``num_networks``, ``num_elites``; the paper's appendix C says 7). PETS has 5 and all.
        hidden: 4 x 200 (MBPO's code: ``hidden_dim``; 400 for Humanoid; PETS: 3 x 200 or 3 x 250).
        activation: SiLU, which both papers' code calls ``swish``.
        propagation: which elite sends a row on. ``"random"`` or ``"TS1"``, MBPO's and PETS's name for the
            same: one drawn anew for each row at each step. ``"TSinf"``: one drawn by
            ``world_model.encode`` at the start and kept, under ``member_key``.
        termination: ``(observation, action, next_observation) -> terminated``, bool ``[*B, 1]``; e.g. of
            :mod:`fastwm.models.mbpo.terminations`. Default: nothing terminates.
        deterministic: members give points instead of Gaussians, and are trained by squared error (PETS's
            "DE").
        sample: draw from the member's Gaussian. False takes its mean (MBPO's code: ``deterministic``
            of its ``FakeEnv``). ``world_model.dynamics.module.sample`` changes it at any time.
        observation_key, action_key, reward_key: of the base env.
        member_key: of the member under TSinf, int64 ``[*B, 1]``.

    Returns:
        A :class:`~fastwm.models.Family` with the loss :class:`EnsembleLoss`. Train it with :func:`fit`.

    Raises:
        ValueError: more elites than members, no hidden layer's width, or an unknown propagation.
        KeyError: the env has no such key; names those that it has.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import mbpo
        >>> base_env = GymEnv("Pendulum-v1")
        >>> family = mbpo(base_env, hidden=(32, 32))
        >>> env = family.env(base_env)
        >>> start = TensorDict({"observation": torch.randn(16, 3)}, [16])
        >>> rollout = env.rollout(5, tensordict=start)
        >>> rollout.shape, rollout["next", "observation"].shape, rollout["next", "reward"].shape
        (torch.Size([16, 5]), torch.Size([16, 5, 3]), torch.Size([16, 5, 1]))
    """
    if propagation not in PROPAGATIONS:
        raise ValueError(
            f"Unknown propagation {propagation!r}; choose one of {', '.join(PROPAGATIONS)}."
        )
    observation, action = unravel_key(observation_key), unravel_key(action_key)
    following, reward, member = next_key(observation), next_key(reward_key), unravel_key(member_key)
    wide, narrow = width_of(base_env, observation), width_of(base_env, action)
    chosen = Elites(members, elites)
    ensemble = Ensemble(
        wide + narrow, wide + 1,
        members=members, hidden=hidden, activation=activation, deterministic=deterministic,
    )  # fmt: skip
    dynamics = EnsembleDynamics(ensemble, chosen, sample=sample)
    keeps = propagation == "TSinf"
    encoder = (
        TensorDictModule(DrawMember(chosen), [observation], [observation, member])
        if keeps
        else TensorDictModule(nn.Identity(), [observation], [observation])
    )
    done_head = None
    if termination is not None:
        flag = next_key(_beside(reward_key, "terminated"))
        done_head = TensorDictModule(
            Termination(termination), [observation, action, following], [flag]
        )
    world_model = WorldModel(
        encoder,
        TensorDictModule(dynamics, [observation, action, *[member] * keeps], [following, reward]),
        # The ensemble has predicted it already.
        TensorDictModule(nn.Identity(), [reward], [reward]),
        done_head=done_head,
    )
    loss = EnsembleLoss(dynamics)
    loss.set_keys(observation=observation, action=action, reward=unravel_key(reward_key))
    settings = {
        "observation": wide,
        "action": narrow,
        "members": members,
        "elites": elites,
        "hidden": tuple(hidden),
        "activation": activation.__name__,
        "propagation": "TSinf" if keeps else "TS1",
        "deterministic": deterministic,
    }
    return Family("mbpo", settings, world_model, latent_key=observation, loss=loss)


def _beside(key: NestedKey, leaf: str) -> NestedKey:
    """Another entry of the group that holds ``key``."""
    return leaf if isinstance(key, str) else (*key[:-1], leaf)
