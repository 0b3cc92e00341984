"""
What is drawn for a sample is a function of the seed and of the sample's number in the run.

So an interrupted run goes on with exactly the samples that it would have seen, the order of the data needs no saving,
and however many processes and forward passes share a step, together they see the same samples.
"""

import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Draw:
    """
    The samples of one forward pass.

    Args:
        step (`int`): Updates before this one; what all samples of a step share (a resolution, say) is drawn from it.
        samples (sequence of `int`): Numbers of the samples, counted through the whole run and over all processes.
    """

    step: int
    samples: Sequence[int]

    def generators(self, seed: int) -> Iterator[torch.Generator]:
        """For each sample the generator of all its random choices, on the CPU."""
        for number in self.samples:
            yield seeded_generator(seed, "sample", number)

    def shared_generator(self, seed: int) -> torch.Generator:
        """The generator of the choices that all samples of the step share, on every process."""
        return seeded_generator(seed, "step", self.step)


def seeded_generator(seed: int, *key: int | str) -> torch.Generator:
    """A generator on the CPU that is the same for the same arguments on every machine, and unlike all others."""
    return torch.Generator().manual_seed(derived_seed(seed, *key))


def derived_seed(seed: int, *key: int | str) -> int:
    """A seed of 56 bits for one use of a run's seed."""
    digest = hashlib.sha256("|".join(map(str, (seed, *key))).encode()).digest()
    return int.from_bytes(digest[:7], "little")


class _Scratch(threading.local):
    """Where single numbers are drawn: to make a tensor for each takes several times as long as to draw it."""

    def __init__(self):
        with torch.inference_mode(False):
            self.index = torch.empty((), dtype=torch.int64, device="cpu")
            self.place = torch.empty((), dtype=torch.float64, device="cpu")


_scratch = _Scratch()


def draw_index(count: int, generator: torch.Generator) -> int:
    """An index below `count`, all equally likely: what `torch.randint(count, ())` draws."""
    return _scratch.index.random_(count, generator=generator).item()


def draw_two_indices(count: int, then: Callable[[int], int], generator: torch.Generator) -> tuple[int, int]:
    """
    An index below `count`, and one below what `then` gives for it: what two calls of [`draw_index`] draw, in one.

    A whole number of 64 bits is two of 32, the first one high, and an index is one of 32 by its remainder: below 2^28,
    from where on PyTorch takes 64. Captions are fewer.
    """
    both = _scratch.index.random_(-(1 << 63), None, generator=generator).item()
    first = (both >> 32) % (1 << 32) % count
    return first, both % (1 << 32) % then(first)


def draw_place(generator: torch.Generator) -> float:
    """A number of 53 bits from 0 to 1, without 1: what `torch.rand((), dtype=torch.float64)` draws."""
    return _scratch.place.uniform_(generator=generator).item()


def released_index(number: int, count: int) -> int:
    """
    Which of `count` items is sample `number` of a run of CogView's release: with replacement, and without a seed.

    Source: the CogView release, its behaviour.
    """
    source = random.Random(number)
    return int(np.random.RandomState([source.randint(0, 2**32 - 1) for _ in range(16)]).randint(count))
