"""What is drawn for a sample: the same wherever it is computed, in the stated shares."""

import pytest
import torch

from cogview_pipelines.training.data.draws import (
    Draw,
    derived_seed,
    draw_index,
    draw_place,
    draw_two_indices,
    seeded_generator,
)


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


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000, 2**31 + 5, 2**32 - 1])
def test_a_number_alone_is_what_pytorch_draws_and_leaves_the_generator_as_that_does(count):
    """Runs of before go on with the samples that they would have seen."""
    for seed in range(40):
        one, other = seeded_generator(seed), seeded_generator(seed)
        assert draw_index(count, one) == int(torch.randint(count, (), generator=other))
        assert draw_place(one) == float(torch.rand((), dtype=torch.float64, generator=other))
        assert torch.rand(3, generator=one).tolist() == torch.rand(3, generator=other).tolist()


def test_numbers_that_are_drawn_while_a_model_is_used_can_be_drawn_afterwards():
    with torch.inference_mode():
        draw_index(3, seeded_generator(0))
    assert draw_index(3, seeded_generator(0)) == int(torch.randint(3, (), generator=seeded_generator(0)))


@pytest.mark.parametrize("counts", [(1, 1), (2, 5), (3, 1), (1, 7), (1000, 999), (2**28 - 1, 2**28 - 1)])
def test_two_indices_at_once_are_those_that_are_drawn_one_after_the_other(counts):
    for seed in range(40):
        one, other = seeded_generator(seed), seeded_generator(seed)
        expected = tuple(int(torch.randint(count, (), generator=other)) for count in counts)
        assert draw_two_indices(counts[0], {expected[0]: counts[1]}.get, one) == expected
        assert torch.rand(3, generator=one).tolist() == torch.rand(3, generator=other).tolist()
