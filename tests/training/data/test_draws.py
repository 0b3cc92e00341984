"""What is drawn for a sample: the same wherever it is computed, in the stated shares."""

import torch

from cogview_pipelines.training.data.draws import Draw, derived_seed


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
