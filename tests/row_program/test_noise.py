"""Numbers by counter, in torch: the words, what is made of them, and what they are independent of."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastwm.row_program.noise import Law, Noise, new_key, numbers, philox

KEY = torch.tensor([0x2545F4914F6CDD1D])
DTYPES = [torch.float32, torch.float64]

# Random123's test vectors, kat_vectors: philox4x32, 10 rounds. Counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_is_the_published_one(counter: list[int], key: list[int], words: list[int]) -> None:
    whole = key[0] | key[1] << 32
    whole -= (whole >> 63) << 64
    found = philox([torch.tensor([word]) for word in counter], torch.tensor([whole]))
    assert torch.cat(found).tolist() == words


def distance(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's, times the root of the sample's size: above 1.95 once in a thousand."""
    x = sample.double().flatten().sort().values
    n = len(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    at = cdf(x)
    largest = torch.maximum((steps[1:] - at).max(), (at - steps[:-1]).max())
    return largest.item() * math.sqrt(n)


LAWS: dict[str, tuple[Law, Callable[[Tensor], Tensor], float, float]] = {
    # law, distribution function, mean, standard deviation
    "normal": (
        Law("normal", 0.5, 2.0), lambda x: torch.special.ndtr((x - 0.5) / 2.0), 0.5, 2.0,
    ),
    "uniform": (
        Law("uniform", -1.0, 3.0), lambda x: ((x + 1.0) / 4.0).clamp(0, 1), 1.0, 4 / 12**0.5,
    ),
    "exponential": (Law("exponential", 4.0), lambda x: 1 - (-4.0 * x).exp(), 0.25, 0.25),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_numbers_are_distributed_by_their_law(name: str, dtype: torch.dtype) -> None:
    law, cdf, mean, std = LAWS[name]
    for number in range(3):
        drawn = numbers(Noise(law, number), KEY, 200, 50, (4, 5), dtype)
        assert drawn.shape == (200, 50, 4, 5)
        assert drawn.dtype is dtype
        assert distance(drawn, cdf) < 1.95
        few = std / math.sqrt(drawn.numel())
        assert abs(drawn.double().mean().item() - mean) < 4 * few
        assert (
            abs(drawn.double().std().item() - std) < 8 * few
        )  # an exponential's fourth moment is 9
        assert drawn.unique().numel() > 0.95 * drawn.numel()


def test_the_ends() -> None:
    """Words of all zeros and all ones: no infinity, no exponential of 0, no number at an upper bound."""
    from fastwm.row_program.noise import _distributed

    for dtype in DTYPES:
        for word in (0, 0xFFFFFFFF):
            words = [torch.tensor([word])] * 4
            normal = _distributed(Law("normal", 0.0, 1.0), words, dtype)
            uniform = _distributed(Law("uniform", 1.0, 2.0), words, dtype)
            exponential = _distributed(Law("exponential", 1.0), words, dtype)
            assert normal.isfinite().all()
            assert normal.abs() < 9
            assert 1.0 <= uniform.item() < 2.0
            assert 0.0 < exponential.item() < 40.0


@pytest.mark.parametrize("dim", range(3))
def test_rows_steps_and_columns_are_independent(dim: int) -> None:
    drawn = numbers(Noise(Law("normal", 0.0, 1.0), 0), KEY, 60, 60, (60,), torch.float64)
    there, next_one = (drawn.narrow(dim, at, 59).flatten() for at in (0, 1))
    few = 1 / math.sqrt(there.numel())
    assert abs((there * next_one).mean().item()) < 4 * few
    assert abs((there.abs() * next_one.abs()).mean().item() - 2 / math.pi) < 4 * few


def test_draws_and_keys_are_independent() -> None:
    law = Law("normal", 0.0, 1.0)
    one, another, elsewhere = (
        numbers(Noise(law, number), key, 50, 50, (50,), torch.float64)
        for number, key in ((0, KEY), (1, KEY), (0, KEY + 1))
    )
    few = 1 / math.sqrt(one.numel())
    assert abs((one * another).mean().item()) < 4 * few
    assert abs((one * elsewhere).mean().item()) < 4 * few


def test_more_rows_and_steps_do_not_change_those_before() -> None:
    noise = Noise(Law("uniform", 0.0, 1.0), 2)
    few = numbers(noise, KEY, 3, 4, (5,), torch.float32)
    assert torch.equal(few, numbers(noise, KEY, 7, 9, (5,), torch.float32)[:3, :4])


def test_keys_come_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = new_key("cpu"), new_key("cpu")
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(new_key("cpu"), first)
    assert torch.equal(new_key("cpu"), second)
