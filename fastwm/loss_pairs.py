"""What the sub-losses of a `WorldModelLoss` compare: pairs of a prediction and a target, with their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey, unravel_key
from torch.compiler import is_compiling

__all__ = ["Pair", "check_probabilities", "leading", "listed", "missing", "paired", "path_of"]


def path_of(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def listed(tensordict: TensorDictBase) -> str:
    return str(sorted(tensordict.keys(True, True), key=str))


def missing(name: str, key: NestedKey, tensordict: TensorDictBase) -> KeyError:
    return KeyError(
        f"The {name!r} loss needs {key!r}, which the input lacks (set_keys() changes the key). "
        f"The input has {listed(tensordict)}."
    )


@dataclass
class Pair:
    """What a sub-loss compares, or an entry of it."""

    name: str
    key: NestedKey
    prediction: torch.Tensor
    target: torch.Tensor


def paired(
    name: str,
    key: NestedKey,
    prediction: Any,
    target_key: NestedKey,
    target: Any,
    pairs: list[Pair],
) -> Any:
    """Append what is to be compared to ``pairs``; return the index of its loss, or a dict of such
    where prediction and target are tensordicts."""
    if is_tensor_collection(prediction) and is_tensor_collection(target):
        if set(prediction.keys()) != set(target.keys()):
            raise KeyError(
                f"The {name!r} loss compares {key!r}, which has {listed(prediction)}, with "
                f"{target_key!r}, which has {listed(target)}."
            )
        return {
            entry: paired(
                name,
                unravel_key((key, entry)),
                value,
                unravel_key((target_key, entry)),
                target.get(entry),
                pairs,
            )
            for entry, value in prediction.items()
        }
    if prediction.shape != target.shape:
        raise RuntimeError(
            f"The {name!r} loss compares the prediction {key!r} of shape "
            f"{tuple(prediction.shape)} with the target {target_key!r} of shape "
            f"{tuple(target.shape)}. The shapes must be equal; nothing is broadcast."
        )
    if name == "done":
        # Either may be bool, integer or any float; the fused kernel reads bool as it is.
        prediction = prediction.float()
        target = target if target.dtype == torch.bool else target.float()
    pairs.append(Pair(name, key, prediction, target))
    return len(pairs) - 1


def leading(mask: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor | None:
    """``mask`` without the last dimensions of size 1 that keep it from being over the first
    dimensions of ``prediction``; None where it is not over those."""
    while mask.ndim and mask.shape != prediction.shape[: mask.ndim] and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    return mask if mask.shape == prediction.shape[: mask.ndim] else None


def check_probabilities(pair: Pair) -> None:
    """Raise for what is no probability; on the CPU only, elsewhere to look is to wait."""
    probability = pair.prediction
    if probability.device.type != "cpu" or is_compiling():
        return
    valid = (probability >= 0) & (probability <= 1)
    # Not all(): this a trace keeps as a check of its own.
    if not torch._is_all_true(valid | probability.isnan()):
        raise RuntimeError(
            f"The 'done' loss was given {pair.key!r} as probabilities, but it has values from "
            f"{probability.min().item():.3g} to {probability.max().item():.3g}. For a head that "
            "emits logits: done_loss='binary_cross_entropy_with_logits'."
        )
