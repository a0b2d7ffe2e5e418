"""`SpecsEnv`: a base env that is never run."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

__all__ = ["SpecsEnv"]


class SpecsEnv(EnvBase):
    """Holds specs for an imagined env to take; subclasses, or their makers, set them."""

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        raise NotImplementedError("this env only holds specs")

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError("this env only holds specs")

    def _set_seed(self, seed: int | None) -> None:
        raise NotImplementedError("this env only holds specs")
