"""
What is drawn for a sample is a function of the seed and of the sample's number in the run.

So an interrupted run goes on with exactly the samples that it would have seen, the order of the data needs no saving,
and however many processes and forward passes share a step, together they see the same samples.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Draw:
    """
    The samples of one forward pass.

    Args:
        step (`int`): Updates before this one; what all samples of a step share (a resolution, say) is drawn from it.
        samples (`range`): Numbers of the samples, counted through the whole run and over all processes.
    """

    step: int
    samples: range

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


def draw_index(count: int, generator: torch.Generator) -> int:
    """An index below `count`, all equally likely."""
    return int(torch.randint(count, (), generator=generator))


def released_index(number: int, count: int) -> int:
    """
    Which of `count` items is sample `number` of a run of CogView's release: with replacement, and without a seed.

    Source: the CogView release, its behaviour.
    """
    source = random.Random(number)
    return int(np.random.RandomState([source.randint(0, 2**32 - 1) for _ in range(16)]).randint(count))
