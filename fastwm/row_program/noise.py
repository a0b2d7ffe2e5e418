"""Random numbers by counter: each is worked out from where it is wanted, and none is kept.

The generator is Philox 4x32 with 10 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011). Its key is drawn once per rollout, its counter is (column, row, step, draw). So the
same number is had in any order, in tiles of any size, and once more in the backward pass. The Triton kernels
draw so where they are asked to (``fastwm/kernels/row_program/noise.py``); here is the same in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["MOST_ROWS", "Law", "Noise", "new_key", "numbers", "philox"]

Tensor = torch.Tensor

#: Rows of a batch are counted in 32 bits.
MOST_ROWS = 1 << 32
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Law:
    """A distribution.

    Attributes:
        name: ``"normal"`` (mean, standard deviation), ``"uniform"`` (from, up to and without) or
            ``"exponential"`` (rate; the other is not used).
        a, b: its parameters.
    """

    name: str
    a: float
    b: float = 0.0

    def numbers(self, dtype: torch.dtype) -> tuple[float, ...]:
        """What makes its numbers of those of the standard law.

        Of a uniform one the last is the most that it may be: a sum may round up to the bound itself.
        """
        if self.name == "uniform":
            low, high = (torch.tensor(v, dtype=dtype) for v in (self.a, self.b))
            return self.a, self.b - self.a, torch.nextafter(high, low).item()
        return (self.a,) if self.name == "exponential" else (self.a, self.b)


@dataclass(frozen=True)
class Noise:
    """One draw of a step.

    Attributes:
        law: how its numbers are distributed.
        number: which of the step's draws it is.
    """

    law: Law
    number: int


def new_key(device: torch.device | str) -> Tensor:
    """The key of a rollout, ``[1]`` int64: from torch's generator for the device, which moves on.

    Example:
        >>> import torch
        >>> from fastwm.row_program.noise import new_key
        >>> torch.manual_seed(0), new_key("cpu"), new_key("cpu")  # doctest: +ELLIPSIS
        (<torch._C.Generator object at ...>, tensor([...]), tensor([...]))
    """
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def philox(counter: Sequence[Tensor], key: Tensor) -> list[Tensor]:
    """Four words of 32 bits for each counter.

    Args:
        counter: four words, int64 tensors of shapes that broadcast.
        key: ``[1]`` int64, two words.

    Example:
        >>> import torch
        >>> from fastwm.row_program.noise import philox
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(word) for word in torch.cat(philox([zero] * 4, zero)).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        # A product of two words has 64 bits, of which the sign is one: shifted out and masked.
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def numbers(
    noise: Noise, key: Tensor, rows: int, steps: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """What a kernel draws: ``[rows, steps, *shape]``, to the last bits of a logarithm and a cosine.

    Args:
        key: of the rollout.
        dtype: float32, of 24 bits of a word, or float64, of 53 bits of two.

    Example:
        >>> import torch
        >>> from fastwm.row_program.noise import Law, Noise, numbers
        >>> key = torch.tensor([5])
        >>> drawn = numbers(Noise(Law("uniform", 1.0, 3.0), 0), key, 4, 100, (7,), torch.float32)
        >>> drawn.shape, bool((drawn >= 1).all()), bool((drawn < 3).all())
        (torch.Size([4, 100, 7]), True, True)
    """

    def counted(n: int, dim: int) -> Tensor:
        at = torch.arange(n, device=key.device)
        return at.reshape([n if d == dim else 1 for d in range(3)])

    columns, number = math.prod(shape), torch.full_like(key, noise.number)
    words = philox([counted(columns, 2), counted(rows, 0), counted(steps, 1), number], key)
    drawn = _distributed(noise.law, words, dtype)
    return drawn.reshape(rows, steps, *shape)


def _distributed(law: Law, words: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    double = dtype is torch.float64

    def whole(at: int) -> Tensor:
        """The random bits from the word ``at`` on."""
        return (words[at] << 21) | (words[at + 1] >> 11) if double else words[at]

    def fraction(at: int) -> Tensor:
        """In [0, 1), evenly spaced."""
        return whole(at).to(dtype) * 2.0**-53 if double else (whole(at) >> 8).to(dtype) * 2.0**-24

    def positive(at: int) -> Tensor:
        """In (0, 1], the finer the nearer to 0."""
        return (whole(at).to(dtype) + 0.5) * (2.0**-53 if double else 2.0**-32)

    if law.name == "uniform":
        low, scale, most = law.numbers(dtype)
        return (fraction(0) * scale + low).clamp(max=most)
    if law.name == "exponential":
        least = 2.0**-54 if double else 2.0**-25
        return (-positive(0).log()).clamp(min=least) / law.a
    radius = (positive(0).log() * -2.0).sqrt()
    angle = fraction(2 if double else 1) * (2.0 * math.pi)
    return radius * angle.cos() * law.b + law.a
