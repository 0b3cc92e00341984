"""What is drawn for a sample: the same wherever it is computed, in the stated shares."""

import pytest
import torch

from cogview_pipelines.training.data.draws import Draw, WeightedIndex, derived_seed, seeded_generator


def numbers(draw, seed=0):
    return [torch.rand(3, generator=generator).tolist() for generator in draw.generators(seed)]


def test_a_sample_is_the_same_in_whatever_batch_it_stands():
    whole = numbers(Draw(2, range(16, 24)))
    parts = [numbers(Draw(2, range(start, start + 2))) for start in (16, 18, 20, 22)]
    assert whole == [row for part in parts for row in part]
    assert len({tuple(row) for row in whole}) == 8
    assert numbers(Draw(2, range(16, 24)), seed=1) != whole


def test_what_a_step_shares_is_the_same_for_all_of_its_samples_and_not_for_another_step():
    def shared(step, start):
        return torch.rand(4, generator=Draw(step, range(start, start + 2)).shared_generator(0)).tolist()

    assert shared(3, 0) == shared(3, 10) != shared(4, 0)


def test_every_key_has_a_seed_of_its_own():
    keys = [(0, "sample", 1), (0, "sample", 11), (0, "step", 1), (1, "sample", 1), (0, "sample", 1, 1)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)
    assert derived_seed(0, "sample", 1) == derived_seed(0, "sample", 1)


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
