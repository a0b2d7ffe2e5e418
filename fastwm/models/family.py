"""`Family`: a world model together with the parts that its algorithm trains and acts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.envs import EnvBase

from fastwm.env import WorldModelEnv
from fastwm.world_model import WorldModel

__all__ = ["Family", "width_of"]


class Family(nn.Module):
    """What a builder of :mod:`fastwm.models` returns: the world model and, where the family has them,
    policy, value and loss, under one ``state_dict``.

    The settings that it was built with travel in the ``state_dict``, so that a checkpoint of another
    size is refused by name and not by a list of shapes.

    Args:
        name: of the builder, e.g. ``"mbpo"``.
        settings: what it was built with: plain numbers, strings, booleans and tuples of them.
        world_model: see :class:`fastwm.WorldModel`.

    Keyword Args:
        latent_key: the main latent: of :meth:`env`.
        policy: acts in imagination, and in the real env behind ``world_model.encode``.
        value: the family's critic.
        loss: trains the world model (and what the family trains with it).
        parts: further named modules.

    Attributes:
        world_model, policy, value, loss: as given; the last three may be None.
        settings: as given, as a dict.
    """

    policy: TensorDictModuleBase | None
    value: TensorDictModuleBase | None
    loss: nn.Module | None

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        world_model: WorldModel,
        *,
        latent_key: NestedKey = "latent",
        policy: TensorDictModuleBase | None = None,
        value: TensorDictModuleBase | None = None,
        loss: nn.Module | None = None,
        **parts: nn.Module | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.settings = dict(settings)
        self.latent_key = latent_key
        self.world_model = world_model
        self.policy = policy
        self.value = value
        self.loss = loss
        for part, module in parts.items():
            self.add_module(part, module)

    def env(self, base_env: EnvBase, **kwargs: Any) -> WorldModelEnv:
        """The world model as an env that imagines; ``kwargs`` are those of :class:`fastwm.WorldModelEnv`.

        The default ``batch_size=[]`` takes starts of any batch size.
        """
        kwargs = {"batch_size": [], "latent_key": self.latent_key, **kwargs}
        return WorldModelEnv(self.world_model, base_env, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        """Name and settings, for the ``state_dict``."""
        return {"name": self.name, **self.settings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore: :meth:`load_state_dict` compares."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``torch.nn.Module.load_state_dict``.

        Raises:
            RuntimeError: the checkpoint is of another family or was built with other settings; names
                each that differs, with both values.
        """
        saved = state_dict.get("_extra_state")
        if saved is not None:
            own = self.get_extra_state()
            differ = [
                f"{key}: {saved.get(key, 'absent')!r} in the checkpoint, {own.get(key, 'absent')!r} here"
                for key in dict.fromkeys([*own, *saved])
                if saved.get(key) != own.get(key)
            ]
            if differ:
                raise RuntimeError(
                    f"The checkpoint does not fit this {self.name} model: {'; '.join(differ)}."
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def width_of(env: EnvBase, key: NestedKey) -> int:
    """The width of a vector that ``env`` emits or takes, e.g. of ``"observation"`` or ``"action"``.

    Raises:
        KeyError: the env has no such key; names those that it has.
        ValueError: it is no vector.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models.family import width_of
        >>> width_of(GymEnv("Pendulum-v1"), "observation")
        3
    """
    for specs in (env.full_observation_spec, env.full_action_spec, env.full_state_spec):
        if key in specs.keys(True, True):
            shape = specs[key].shape[len(env.batch_size) :]
            if len(shape) != 1:
                raise ValueError(
                    f"{key!r} of the env must be a vector, its shape is {tuple(shape)}."
                )
            return shape[0]
    known = [
        *env.full_observation_spec.keys(True, True),
        *env.full_action_spec.keys(True, True),
    ]
    raise KeyError(f"The env has no {key!r}; it has {known}.")
