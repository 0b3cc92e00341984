"""Which picture a sample is of: by weight with replacement, or in epochs; of one set, or of several by shares."""

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from .draws import derived_seed, draw_place
from .permutation import Permutation

_WHOLE = 1 << 53


class Chances(ABC):
    """
    How often each of some items is drawn, in memory that does not grow with their number where they are in shards.

    The items lie side by side on a line, each as long as its weight: a place on the line is an item.
    """

    total: float
    """The length of the line."""
    equal: bool
    """Whether all items have the same weight."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def find(self, place: float) -> int:
        """The index of the item at a place from 0 to `total`; never one of weight 0."""

    def draw(self, generator: torch.Generator) -> int:
        """The index of one item by its weight, with replacement: looked up by one random number of 53 bits."""
        return self.find(draw_place(generator) * self.total)

    def parts(self) -> list[tuple[float, int, "Chances"]]:
        """The sets of items that have a share of their own: share, first index, chances within."""
        return [(1.0, 0, self)]


class WeightedIndex(Chances):
    """
    Chances of items whose weights are in memory.

    Args:
        weights (`torch.Tensor` of shape `(count,)`): Relative chances, at least 0 and not all 0.

    Raises:
        ValueError: If no weight is above 0, or one is negative or not finite.
    """

    def __init__(self, weights: torch.Tensor):
        if not len(weights) or not (weights >= 0).all() or not 0 < float(weights.sum(dtype=torch.float64)) < torch.inf:
            raise ValueError("`weights` must be finite numbers of at least 0, and at least one must be above 0.")
        self.last = int(weights.nonzero()[-1])
        self.bounds = weights.to(torch.float64).cumsum(0)
        self.places = self.bounds.numpy()
        self.total = float(self.bounds[-1])
        self.equal = bool((weights == weights[0]).all())

    def __len__(self) -> int:
        return len(self.bounds)

    def find(self, place: float) -> int:
        """See [`Chances`]."""
        return min(int(self.places.searchsorted(place, "right")), self.last)


class MixedChances(Chances):
    """
    Chances of the items of several sets one after the other, of which each set has a share.

    Args:
        sets (sequence of [`Chances`]): The sets.
        shares (sequence of `float`): The share of each, of which the sum is 1.
    """

    equal = False
    total = 1.0

    def __init__(self, sets: Sequence[Chances], shares: Sequence[float]):
        self.sets, self.shares = list(sets), list(shares)
        self.first = list(itertools.accumulate(map(len, self.sets), initial=0))
        self.ends = list(itertools.accumulate(self.shares))
        self.last = max(number for number, share in enumerate(self.shares) if share > 0)

    def __len__(self) -> int:
        return self.first[-1]

    def find(self, place: float) -> int:
        """See [`Chances`]."""
        which = min(bisect.bisect_right(self.ends, place), self.last)
        chances, share = self.sets[which], self.shares[which]
        within = min(max(place - self.ends[which] + share, 0.0) / share, 1.0)
        return self.first[which] + chances.find(within * chances.total)

    def parts(self) -> list[tuple[float, int, Chances]]:
        """See [`Chances`]."""
        return [
            (share * inner, first + start, chances)
            for share, first, part in zip(self.shares, self.first, self.sets)
            for inner, start, chances in part.parts()
        ]


class EpochOrder:
    """
    Items in epochs instead of by chance: each set is gone through in an order of its own, anew in each epoch.

    Sample number `n` of a run is a function of `n` and the seed, whatever the number of processes. Of the first `n`
    samples, each set has its share to within one sample for two sets, and to within as many as there are sets for
    more. In an epoch of a set, as many samples as it has items, each item comes once; where items have weights, as
    often as its weight over the mean says, rounded up or down.

    Args:
        chances ([`Chances`]): Of all items.
        seed (`int`): Draws the orders.
    """

    def __init__(self, chances: Chances, seed: int):
        self.parts, self.seed = chances.parts(), seed
        self._permutations: dict[int, tuple[int, Permutation]] = {}
        left = [sum(share for share, _, _ in self.parts[number:]) for number in range(len(self.parts))]
        # shares of what the sets before leave, in whole numbers: exact for any number of samples
        self.steps = [round((share / rest if rest else 0.0) * _WHOLE) for (share, _, _), rest in zip(self.parts, left)]

    def place(self, number: int) -> tuple[int, int]:
        """Which set a sample of a run is from, and how many of its samples come before."""
        for which, step in enumerate(self.steps[:-1]):
            taken = number * step // _WHOLE
            if (number + 1) * step // _WHOLE > taken:
                return which, taken
            number -= taken
        return len(self.steps) - 1, number

    def index(self, number: int) -> int:
        """The item of a sample of a run."""
        return self.indices([number])[0]

    def indices(self, numbers: Sequence[int]) -> list[int]:
        """The items of some samples of a run: those of a set and epoch are looked up together."""
        together: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for slot, number in enumerate(numbers):
            which, position = self.place(number)
            epoch, position = divmod(position, len(self.parts[which][2]))
            slots, positions = together.setdefault((which, epoch), ([], []))
            slots.append(slot)
            positions.append(position)
        found = [0] * len(numbers)
        for (which, epoch), (slots, positions) in together.items():
            for slot, index in zip(slots, self._items(which, epoch, positions)):
                found[slot] = index
        return found

    def _items(self, which: int, epoch: int, positions: list[int]) -> list[int]:
        """The items at some places of an epoch of a set."""
        _, first, chances = self.parts[which]
        order = self._permutation(which, epoch)
        if len(positions) == 1:
            places = [order[positions[0]]]
        else:
            places = order.many(np.array(positions, dtype=np.uint64)).tolist()
        if chances.equal:
            return [first + place for place in places]
        offset = derived_seed(self.seed, "offset", which, epoch) / 2**56
        return [first + chances.find((place + offset) / len(chances) * chances.total) for place in places]

    def _permutation(self, which: int, epoch: int) -> Permutation:
        known = self._permutations.get(which)
        if known is None or known[0] != epoch:
            known = (epoch, Permutation(len(self.parts[which][2]), self.seed, which, epoch))
            self._permutations[which] = known
        return known[1]
