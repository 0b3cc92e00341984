"""Orders of any number of things that need no memory: where each one goes is computed from a key."""

from typing import TypeVar

import numpy as np

from .draws import derived_seed

Numbers = TypeVar("Numbers", int, np.ndarray)

_ROUNDS = 6
_BITS_64 = (1 << 64) - 1


class Permutation:
    """
    A permutation of `range(count)`, drawn by a key: a Feistel network over the next power of two, walked on from until
    the number is below `count`.

    Args:
        count (`int`): How many, from 1 to 2^62.
        key: What it is drawn from: a seed, and what else tells it from others.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), for the walk; the rounds mix as SplitMix64
    does, which is made for statistics and not for secrets.
    """

    def __init__(self, count: int, *key: int | str):
        if not 1 <= count <= 1 << 62:
            raise ValueError(f"`count` must be from 1 to 2^62, but is {count}.")
        self.count = count
        bits = max(2, (count - 1).bit_length())
        self.low_bits, self.high_bits = bits // 2, bits - bits // 2
        self.keys = [derived_seed(0, "permutation", *key, number) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        """Where a number of `range(count)` goes."""
        if not 0 <= number < self.count:
            raise IndexError(f"{number} is outside of 0..{self.count - 1}.")
        number = self._step(number)
        while number >= self.count:
            number = self._step(number)
        return number

    def many(self, numbers: np.ndarray) -> np.ndarray:
        """Where each of an array of numbers goes, as uint64."""
        result = self._step(numbers.astype(np.uint64))
        while len(beyond := np.flatnonzero(result >= self.count)):
            result[beyond] = self._step(result[beyond])
        return result

    def _step(self, number: Numbers) -> Numbers:
        """One pass through the network: a permutation of all numbers of so many bits."""
        low_bits, high_bits = self.low_bits, self.high_bits
        for key in self.keys:
            low, high = number & ((1 << low_bits) - 1), number >> low_bits
            number = (low << high_bits) | (high ^ (_mixed(low, key) & ((1 << high_bits) - 1)))
            low_bits, high_bits = high_bits, low_bits  # what was low is high now
        return number


def _mixed(number: Numbers, key: int) -> Numbers:
    number = (number + key) & _BITS_64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _BITS_64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _BITS_64
    return number ^ (number >> 31)
