"""A pair out of an ensemble of values, evaluated alone where the ensemble lets that be done."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.func import functional_call

from fastwm.planning.imagination import Path
from fastwm.tracing import preserved_random_state
from fastwm.watch import TooLarge, Watch

__all__ = ["Found", "Members", "members_of"]


class Members(TensorDictModuleBase):
    """Two members of a value whose parameters are stacked over its members: ``[members, ...]``.

    Args:
        value: writes one number per member, ``[..., members]``.
        count: of members.

    Attributes:
        pair: which two, int64 ``[2]``: written before a call.
    """

    pair: Tensor

    def __init__(self, value: TensorDictModuleBase, count: int, device: torch.device) -> None:
        super().__init__()
        self.in_keys, self.out_keys = value.in_keys, value.out_keys
        self.value = value
        self.count = count
        self.register_buffer("pair", torch.tensor([0, 1], device=device))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        held = self.value.named_parameters()
        chosen = {
            name: p.index_select(0, self.pair) for name, p in held if p.shape[:1] == (self.count,)
        }
        return functional_call(self.value, chosen, (tensordict,))


class Found:
    """What was found about a value, and what that rests on.

    Attributes:
        members: evaluates a pair of it alone; None where that is no less work, or where it was tried and
            did not give what the whole ensemble gave.
    """

    def __init__(self, value: nn.Module, members: Members | None) -> None:
        self.value = value
        self.members = members
        self.watch: Watch | None = None
        try:
            self.watch = Watch([value])
        except TooLarge:
            self.members = None

    def holds(self) -> bool:
        return self.watch is None or self.watch.unchanged() or self.watch.reconcile()[0]


def members_of(
    value: TensorDictModuleBase, key: Path, state: TensorDictBase, found: Found | None
) -> Found:
    """Whether a pair of an ensemble's members can be evaluated alone.

    Args:
        value: the ensemble.
        key: of what it writes.
        state: something for it to read.
        found: what was found before, of this value or another.
    """
    if found is not None and found.value is value and found.holds():
        return found
    with preserved_random_state(state.device):
        return Found(value, _tried(value, key, state))


def _tried(value: TensorDictModuleBase, key: Path, state: TensorDictBase) -> Members | None:
    try:
        whole = value(state.clone()).get(key)
        count = whole.shape[-1]
        if count < 3:
            return None
        members = Members(value, count, whole.device)
        bound = 1e-5 * max(1.0, whole.abs().max().item())
        for pair in ([0, 1], [count - 1, count - 2]):
            members.pair.copy_(torch.tensor(pair))
            got = members(state.clone()).get(key)
            if got.shape != (*whole.shape[:-1], 2):
                return None
            if not torch.allclose(got, whole[..., pair], rtol=1e-5, atol=bound, equal_nan=True):
                return None
    except (
        Exception
    ):  # it takes other parameters badly; the whole ensemble will say what is wrong, if anything
        return None
    return members
