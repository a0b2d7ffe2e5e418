"""`insert_resets`: from transitions to the rows that recurrent models are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey

from fastwm.models.rssm.keys import ACTION, IS_INIT

__all__ = ["insert_resets"]


def insert_resets(
    transitions: TensorDictBase, *, observation_keys: Sequence[NestedKey] = ("observation",)
) -> TensorDictBase:
    """Rows of what led to each observation, from transitions: each reset becomes a row of its own.

    A transition ``(observation, action, is_init, next: {observation, reward, ...})`` says what its
    action led to, but no transition leads to an episode's first observation. A recurrent model that
    is to see it needs a row for it: action and reward zero, ``is_init`` set, not done. All other rows
    are the transitions, without ``is_init``. With them sequences may cross episodes at any place.

    Args:
        transitions: batch ``[N]``, in the order of time, of one env; ``is_init`` from torchrl's
            ``InitTracker``.

    Keyword Args:
        observation_keys: what is at the root and under ``"next"``.

    Returns:
        A new tensordict ``[N + resets]``, without gradients: ``action``, ``is_init`` and, under
        ``"next"``, the observations, ``reward`` and the done flags that there are.

    Raises:
        ValueError: the batch is not ``[N]``.
        KeyError: a key is missing; names it.

    Example:
        >>> import torch
        >>> from torchrl.envs import GymEnv, InitTracker, TransformedEnv
        >>> from fastwm.models import insert_resets
        >>> env = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker())
        >>> rows = insert_resets(env.rollout(5))
        >>> rows.shape, rows["is_init"].flatten().tolist()
        (torch.Size([6]), [True, False, False, False, False, False])

    Source: the layout of replay in the official Dreamer repositories.
    """
    if transitions.batch_dims != 1:
        raise ValueError(
            "insert_resets takes the transitions of one env in the order of time, a batch [N]; got "
            f"{list(transitions.batch_size)}. Take the envs of a batch one by one."
        )
    flags = [("next", key) for key in ("done", "terminated", "truncated")]
    keys: list[NestedKey] = [
        ACTION,
        ("next", "reward"),
        *(("next", key) for key in observation_keys),
    ]
    for key in [*keys, *observation_keys, IS_INIT]:
        if transitions.get(key, None) is None:
            raise KeyError(
                f"The transitions have no {key!r}; they have "
                f"{sorted(map(str, transitions.keys(True, True)))}."
            )
    first = transitions.get(IS_INIT).reshape(-1)
    place = torch.arange(len(first), device=first.device) + first.cumsum(0)
    before = place[first] - 1
    rows = TensorDict({}, [len(first) + int(first.sum())], device=transitions.device)
    for key in [*keys, *(key for key in flags if transitions.get(key, None) is not None)]:
        value = transitions.get(key).detach()
        rows.set(
            key, value.new_zeros(*rows.batch_size, *value.shape[1:]).index_copy(0, place, value)
        )
    for key in observation_keys:
        rows.get(("next", key))[before] = transitions.get(key)[first].detach()
    is_init = torch.zeros(*rows.batch_size, 1, dtype=torch.bool, device=first.device)
    is_init[before] = True
    return rows.set(IS_INIT, is_init)
