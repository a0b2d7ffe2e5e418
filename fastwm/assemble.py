"""From a rollout's stacked tensors to the TensorDict that the eager path would have returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_tensorclass

__all__ = ["Template", "leaves"]

Path = tuple[str, ...]
_new = TensorDict.__new__


def leaves(tensordict: TensorDictBase) -> dict[Path, torch.Tensor]:
    """Leaf tensors by path, in the tensordict's own order.

    Raises:
        TypeError: the tensordict holds something else than tensors, or a lazy stack.
    """
    found: dict[Path, torch.Tensor] = {}
    _collect(tensordict, (), found)
    return found


def _collect(node: TensorDictBase, path: Path, found: dict[Path, torch.Tensor]) -> None:
    if isinstance(node, LazyStackedTensorDict):
        raise TypeError(f"a lazily stacked tensordict at {path or 'the root'}")
    for key, item in node._tensordict.items() if type(node) is TensorDict else node.items():
        if type(item) is TensorDict or isinstance(item, TensorDictBase):
            _collect(item, (*path, key), found)
        elif isinstance(item, torch.Tensor):
            found[(*path, key)] = item
        else:
            kind = "tensorclass or non-tensor data" if is_tensorclass(item) else type(item).__name__
            raise TypeError(f"{kind} at {(*path, key)}")


@dataclass
class Template:
    """The nested structure of one step's tensordict, to be filled with a time dim inserted."""

    batch_size: torch.Size
    device: torch.device | None
    names: list[str | None] | None
    entries: dict[str, Template | None] = field(default_factory=dict)
    _blank: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, tensordict: TensorDictBase) -> Template:
        names = tensordict.names if any(tensordict.names) else None
        template = cls(tensordict.batch_size, tensordict.device, names)
        for key, item in tensordict.items():
            nested = isinstance(item, TensorDictBase)
            template.entries[key] = cls.of(item) if nested else None
        return template

    def fill(self, values: dict[Path, Any], steps: int, dim: int, path: Path = ()) -> TensorDict:
        """The TensorDict of ``steps`` steps stacked along ``dim``; ``values`` holds a tensor per path."""
        blank = self._blank
        if not blank or blank[:3] != (steps, dim, path):
            blank = self._blank = (steps, dim, path, *self._make_blank(steps, dim, path))
        *_, state, names, paths = blank
        out = _new(TensorDict)
        out.__dict__.update(state)
        out._tensordict = {
            key: values[at] if node is None else node.fill(values, steps, dim, at)
            for key, node, at in paths
        }
        out._td_dim_names = [*names]
        return out

    def _make_blank(self, steps: int, dim: int, path: Path) -> tuple[Any, ...]:
        """What every tensordict of so many steps shares: its attributes, names, and entries with paths.

        The constructor's checks cost more than a whole step at batch 1, and every shape here is known;
        copying the attributes of one that was made spares what is left of them.
        """
        size = self.batch_size
        names: list[str | None] = list(self.names) if self.names else [None] * len(size)
        names.insert(dim, "time")
        blank = TensorDict._new_unsafe(
            {},
            batch_size=torch.Size([*size[:dim], steps, *size[dim:]]),
            device=self.device,
            names=names,
        )
        paths = [(key, node, (*path, key)) for key, node in self.entries.items()]
        return dict(vars(blank)), names, paths
