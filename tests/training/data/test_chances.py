"""Which pictures are drawn: by weight in the stated shares, or in epochs that lose and double none."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from cogview_pipelines.training.data.chances import Chances, EpochOrder, MixedChances, WeightedIndex
from cogview_pipelines.training.data.draws import seeded_generator
from cogview_pipelines.training.data.permutation import Permutation
from cogview_pipelines.training.data.shards import ShardChances, TokenShards

MILLION = 1_000_000


def shares(weights, count, groups):
    """Of `count` draws, the share that falls on each group of items."""
    index, generator = WeightedIndex(weights), seeded_generator(0)
    drawn = torch.tensor([index.draw(generator) for _ in range(count)])
    return torch.bincount(groups[drawn], minlength=int(groups.max()) + 1) / count


@pytest.mark.parametrize("num_pictures", [10, 3_000_000, 2**24 + 10])
def test_light_pictures_get_their_share_among_any_number_of_heavy_ones(num_pictures):
    """`torch.multinomial` never drew the light ones of three million, and refused more than 2^24."""
    light = torch.arange(num_pictures) % 2
    share = shares(torch.where(light == 1, 1.0, 20.0), 4000, light)[1].item()
    assert share == pytest.approx(1 / 21, abs=5 * (1 / 21 / 4000) ** 0.5)


def test_light_pictures_after_very_heavy_ones_are_not_lost():
    index = WeightedIndex(torch.tensor([2.0**26, 1.0, 1.0, 1.0]))
    assert index.bounds.tolist() == [2**26, 2**26 + 1, 2**26 + 2, 2**26 + 3]


def test_pictures_of_weight_zero_are_never_drawn_wherever_they_stand():
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0, 0.0])
    drawn = shares(weights, 4000, torch.arange(6))
    assert drawn[[0, 2, 3, 5]].sum() == 0
    assert drawn[1].item() == pytest.approx(0.25, abs=0.035)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_say_nothing_are_an_error(weights):
    with pytest.raises(ValueError, match="`weights` must be finite numbers of at least 0"):
        WeightedIndex(torch.tensor(weights))


class Equal(Chances):
    """So many items of one weight."""

    equal = True

    def __init__(self, count):
        self.count, self.total = count, float(count)

    def __len__(self):
        return self.count

    def find(self, place):
        return min(int(place), self.count - 1)


def shards_of(weights, count):
    """Shards of `count` pictures each, all of the weight that the shard has, without their files."""
    shards = TokenShards.__new__(TokenShards)
    shards.folder, shards.counts = "somewhere", [count] * len(weights)
    shards.first = [0, *itertools.accumulate(shards.counts)]
    shards.weights, shards.equal_weights = [weight * count for weight in weights], [True] * len(weights)
    return shards


# Orders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 1000, 4097, MILLION])
def test_a_permutation_has_each_number_once_and_moves_them(count):
    order = Permutation(count, 7, "epoch", 0).many(np.arange(count))
    assert np.array_equal(np.sort(order), np.arange(count))
    if count > 30:
        moved = np.abs(order.astype(np.int64) - np.arange(count)).mean()
        assert moved == pytest.approx(count / 3, rel=0.35 if count < 1000 else 0.05)
        neighbours = np.abs(np.diff(order.astype(np.int64))).mean()
        assert neighbours == pytest.approx(count / 3, rel=0.35 if count < 1000 else 0.05)


@pytest.mark.parametrize("count", [5, 1000, 100 * MILLION, 2**40 + 3, 2**62])
def test_one_number_is_as_many_and_inside(count):
    order = Permutation(count, 0)
    numbers = np.linspace(0, count - 1, 50).astype(np.uint64)
    numbers = numbers[numbers < count]
    assert [order[int(number)] for number in numbers] == order.many(numbers).tolist()
    assert max(order.many(numbers).tolist()) < count
    with pytest.raises(IndexError):
        order[count]


def test_orders_of_different_keys_have_no_more_in_common_than_chance():
    orders = [Permutation(10_000, *key).many(np.arange(10_000)) for key in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() <= 8  # expected: 1
        assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 0.05
    assert np.array_equal(orders[0], Permutation(10_000, 0, 0).many(np.arange(10_000)))


@pytest.mark.parametrize("count", [0, -1, 2**62 + 1])
def test_a_permutation_of_nothing_or_too_much_is_an_error(count):
    with pytest.raises(ValueError, match=r"`count` must be from 1 to 2\^62"):
        Permutation(count)


def test_an_epoch_loses_and_doubles_no_picture_and_the_next_has_another_order():
    order = EpochOrder(Equal(1000), seed=3)
    epochs = [[order.index(number) for number in range(start, start + 1000)] for start in (0, 1000, 2000)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [EpochOrder(Equal(1000), seed=3).index(number) for number in (2000, 5, 1000)] == [
        epochs[2][0],
        epochs[0][5],
        epochs[1][0],
    ]
    assert [EpochOrder(Equal(1000), seed=4).index(number) for number in range(1000)] != epochs[0]


def test_weights_say_how_often_a_picture_comes_in_an_epoch_rounded_up_or_down():
    weights = torch.tensor([1.0, 2.5, 0.0, 0.5, 4.0, 1.0, 0.1])
    order, expected = EpochOrder(WeightedIndex(weights), seed=0), weights * 7 / weights.sum()
    totals = Counter()
    for epoch in range(200):
        counts = Counter(order.index(number) for number in range(7 * epoch, 7 * epoch + 7))
        for index, mean in enumerate(expected.tolist()):
            assert int(mean) <= counts[index] <= int(mean) + 1
        totals += counts
    assert [totals[index] / 200 for index in range(7)] == pytest.approx(expected.tolist(), abs=0.12)
    assert totals[2] == 0


@pytest.mark.parametrize("weights", [torch.ones(11), torch.tensor([1.0, 2.5, 0.0, 4.0, 1.0])])
def test_samples_that_are_looked_up_together_are_those_of_one_by_one(weights):
    """Over the ends of epochs, and of several sets."""
    chances = MixedChances([WeightedIndex(weights), Equal(7)], (0.7, 0.3))
    numbers = [*range(5, 60), 3, 10**9]
    one_by_one, together = EpochOrder(chances, seed=1), EpochOrder(chances, seed=1)
    assert together.indices(numbers) == [one_by_one.index(number) for number in numbers]


# Shares --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.0, 1.0), (0.2, 0.3, 0.5), (1 / 3, 1 / 3, 1 / 3)]
)
def test_every_stretch_of_a_run_has_the_shares_of_the_sets(shares):
    order = EpochOrder(MixedChances([Equal(10**8)] * len(shares), shares), seed=0)
    places = [order.place(number) for number in range(3000)]
    for which in range(len(shares)):
        assert [position for found, position in places if found == which] == list(
            range(sum(found == which for found, _ in places))
        )  # each set is gone through in its order, nothing left out
    for end in (10, 99, 1000, 3000):
        for which, share in enumerate(shares):
            count = sum(found == which for found, _ in places[:end])
            assert abs(count - share * end) <= len(shares) - 1 + 1e-9


def test_shares_stay_exact_after_a_million_million_samples():
    order = EpochOrder(MixedChances([Equal(1000)] * 2, (0.7, 0.3)), seed=0)
    start = 10**12
    places = [order.place(number) for number in range(start, start + 1000)]
    assert abs(sum(which == 0 for which, _ in places) - 700) <= 1
    assert all(abs(position - 0.7 * start) < 800 for which, position in places if which == 0)


def test_shares_of_draws_among_100_million_pairs_are_within_three_sigma():
    """By weight, with replacement: three sets of different size, one with shards of different weight."""
    heavy = shards_of([1.0, 3.0] * 2500, 10_000)  # 50 million
    mixed = MixedChances([ShardChances(heavy), Equal(30 * MILLION), Equal(20 * MILLION)], (0.2, 0.3, 0.5))
    assert len(mixed) == 100 * MILLION
    generator, count = seeded_generator(1), 40_000
    drawn = np.array([mixed.draw(generator) for _ in range(count)])
    for share, first, end in ((0.2, 0, 50), (0.3, 50, 80), (0.5, 80, 100)):
        inside = ((drawn >= first * MILLION) & (drawn < end * MILLION)).sum()
        assert abs(inside - count * share) < 3 * (count * share * (1 - share)) ** 0.5
    inside = drawn[drawn < 50 * MILLION]
    odd = (inside // 10_000 % 2 == 1).sum()
    assert abs(odd - 0.75 * len(inside)) < 3 * (len(inside) * 0.75 * 0.25) ** 0.5
    within = inside % 10_000 / 10_000  # evenly within shards
    assert abs(within.mean() - 0.5) < 3 * (1 / 12 / len(inside)) ** 0.5
    assert len(np.unique(drawn)) > 0.999 * count


def test_an_epoch_of_100_million_pairs_is_drawn_evenly_and_none_comes_twice():
    order = EpochOrder(Equal(100 * MILLION), seed=0)
    drawn = np.array([order.index(number) for number in range(40_000, 60_000)])
    assert len(np.unique(drawn)) == len(drawn)
    counts = np.bincount(drawn // (10 * MILLION), minlength=10)
    assert len(counts) == 10 and (np.abs(counts - 2000) < 4 * (20_000 * 0.09) ** 0.5).all()


def test_shards_of_any_weight_find_what_one_list_of_weights_finds():
    weights = [1.0, 0.0, 2.5, 1.0]
    shards, whole = ShardChances(shards_of(weights, 3)), WeightedIndex(torch.tensor(weights).repeat_interleave(3))
    places = np.linspace(0, shards.total, 200)
    assert [shards.find(place) for place in places] == [whole.find(place) for place in places]
    assert not shards.equal and ShardChances(shards_of([2.0, 2.0], 3)).equal
    with pytest.raises(ValueError, match="`data` has no pictures of a `weight` above 0 in somewhere"):
        ShardChances(shards_of([0.0], 3))
