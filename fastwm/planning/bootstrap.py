"""What the last latent of a candidate is worth: the policy's action there, and the value of both."""

from __future__ import annotations

from typing import cast

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torchrl.data import TensorSpec

from fastwm.planning.imagination import Keys, path_of, shown

__all__ = ["bootstrap"]


def bootstrap(
    policy: TensorDictModuleBase | None,
    value: TensorDictModuleBase | None,
    keys: Keys,
    action: TensorSpec,
) -> TensorDictSequential | None:
    """The two as one module: action, then value; None without a value.

    Raises:
        KeyError: a key that no module provides, or that a module does not write.
    """
    if policy is not None:
        plays = [path_of(key) for key in cast(list[NestedKey], policy.out_keys)]
        if keys.action not in plays:
            raise KeyError(
                f"The policy writes {policy.out_keys}, not the action {shown(keys.action)!r}."
            )
    if value is None:
        return None
    written = [path_of(key) for key in cast(list[NestedKey], value.out_keys)]
    if keys.value not in written:
        raise KeyError(f"The value writes {value.out_keys}, not value_key={shown(keys.value)!r}.")
    if policy is None:
        if keys.action in [path_of(key) for key in cast(list[NestedKey], value.in_keys)]:
            raise KeyError(
                f"The value reads the action {shown(keys.action)!r}, which no module provides: give a policy."
            )
        return TensorDictSequential(_Still(value.in_keys[:1], keys.action, action), value)
    return TensorDictSequential(policy, value)


class _Still(TensorDictModuleBase):
    """Writes an action of zeros, for a step whose action nobody reads."""

    def __init__(self, in_keys: list[NestedKey], action_key: NestedKey, spec: TensorSpec) -> None:
        super().__init__()
        self.in_keys, self.out_keys = in_keys, [action_key]
        self.shape, self.dtype = spec.shape, spec.dtype

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        like = tensordict.get(self.in_keys[0])
        size = *tensordict.batch_size, *self.shape
        return tensordict.set(self.out_keys[0], like.new_zeros(size, dtype=self.dtype))
