"""What a suite is: one model family, what it computes, and its JAX twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Model", "Parts", "Suite", "activations_of", "linear_macs", "normal_start"]


@dataclass(frozen=True)
class Parts:
    """The step as TensorDict modules: what an environment is made of."""

    dynamics: TensorDictModuleBase
    reward: TensorDictModuleBase
    policy: TensorDictModuleBase


class Model(nn.Module):
    """What a provider needs of a model: the step twice over, on the same weights.

    Both draw the same random numbers: with the same torch calls, of the same shapes, in the same
    order.
    """

    #: The plain step, without TensorDict: ``(*carry) -> (action, *next carry, reward)``.
    step: Callable[..., tuple[Tensor, ...]]

    def parts(self) -> Parts:
        """The step as TensorDict modules."""
        raise NotImplementedError


Draws = Callable[[int], tuple[Tensor, ...]]
Start = Callable[[Model, int, int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A model family, what it computes, and its sizes.

    Args:
        make: builds the torch module from the default generator.
        jax_step: the plain step over a dict of arrays: ``(weights, carry, noise) -> (action, *next
            carry, reward)``; None where there is no JAX twin. Weights have the names of the
            state_dict, two-dimensional ones transposed.
        carry: key and width of every tensor that a step hands to the next.
        action: width.
        macs: multiply-adds of the matrix products that the result needs, per row and step.
        activations: floats that one step writes per row when it keeps every intermediate.
        draws: the random numbers of one step for a batch, drawn by the calls that the step makes,
            in their order; None where nothing is random.
        jax_draws: numbers of the same distribution from a JAX key.
        start: the carry of the first step, ``(model, batch, horizon, generator) -> carry``.
        macs_done: what the peers multiply, where that is more than what is needed.
        macs_to_inputs: in the backward pass, the products towards the inputs, where they are not as
            many as ``macs``.
        weights_read: numbers of weights that one step of a batch has to read; None: all.
    """

    name: str
    make: Callable[[], Model]
    jax_step: (
        Callable[[Mapping[str, Any], tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] | None
    )
    carry: Mapping[str, int]
    action: int
    macs: int
    activations: int
    start: Start
    draws: Draws | None = None
    jax_draws: Callable[[Any, int], tuple[Any, ...]] | None = None
    macs_done: int | None = None
    macs_to_inputs: int | None = None
    weights_read: Callable[[int], float] | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What every provider returns, stacked over time: the state a step starts from, what was
        done there, and what came of it."""
        return (*self.carry, "action", *(f"next_{key}" for key in self.carry), "reward")

    def model(self, device: str = "cpu", seed: int = 0) -> Model:
        """The module with seeded weights; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(device)

    def flop(self, batch: int, horizon: int, backward: bool) -> int:
        """Floating-point operations of the matrix products that one rollout needs.

        The backward pass has two products of the same size per product of the forward pass (towards
        the input and towards the weights), so forward and backward together are three times the
        forward, unless the suite says otherwise.
        """
        to_inputs = self.macs if self.macs_to_inputs is None else self.macs_to_inputs
        macs = 2 * self.macs + to_inputs if backward else self.macs
        return 2 * macs * batch * horizon

    def flop_done(self, batch: int, horizon: int, backward: bool) -> int:
        """The same as the peers do it, needed or not."""
        macs = self.macs if self.macs_done is None else self.macs_done
        return 2 * macs * batch * horizon * (3 if backward else 1)

    def output_bytes(self, batch: int, horizon: int) -> int:
        """Size of the stacked outputs in float32."""
        return 4 * batch * horizon * (2 * sum(self.carry.values()) + self.action + 1)


def linear_macs(model: nn.Module) -> int:
    """Multiply-adds per row of all linear layers and GRU cells."""
    macs = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            macs += module.in_features * module.out_features
        elif isinstance(module, nn.GRUCell):
            macs += 3 * module.hidden_size * (module.input_size + module.hidden_size)
    return macs


class _Written(TorchDispatchMode):
    """Counts the numbers that ops write into memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    # Kept, so that no later storage takes its address.
                    self.seen[storage.data_ptr()] = tensor
                    self.numbers += storage.nbytes() // 4
        return result


def activations_of(model: Model, carry: Mapping[str, int]) -> int:
    """Floats that one plain step of ``model`` writes per row; counted by running it."""
    rows = 8
    start = [torch.zeros(rows, width) for width in carry.values()]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _Written() as written:
        written.seen.update({t.untyped_storage().data_ptr(): t for t in start})
        written.seen.update({p.untyped_storage().data_ptr(): p for p in model.parameters()})
        model.step(*start)
    return -(-written.numbers // rows)


def normal_start(carry: Mapping[str, int]) -> Start:
    """Standard normal numbers."""

    def start(
        model: Model, batch: int, horizon: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {k: torch.randn((batch, n), generator=generator) for k, n in carry.items()}

    return start
