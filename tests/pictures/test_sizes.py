"""Pictures resized, cut, and made to agree with others."""

import itertools

import pytest
import torch

from cogview_pipelines.pictures.sizes import agree_with, center_crop, resize, resize_shorter_side


def test_pictures_are_resized_and_cut_in_the_middle():
    image = torch.arange(3 * 20 * 40, dtype=torch.float32).view(3, 20, 40)
    assert resize_shorter_side(image, 10).shape == (3, 10, 20)
    assert resize_shorter_side(image, 20) is image
    assert torch.equal(center_crop(image, 20), image[:, :, 10:30])
    assert resize(image[None], (7, 9)).shape == (1, 3, 7, 9)
    assert resize(image[None], (20, 40)).data_ptr() == image.data_ptr()
    with pytest.raises(ValueError, match="at least 30 x 30"):
        center_crop(image, 30)


def test_a_picture_that_becomes_a_whole_number_of_times_smaller_gets_the_means_of_its_pixels():
    pixels = torch.rand(2, 3, 12, 18)
    assert torch.equal(resize(pixels, (12, 18)), pixels)
    means = pixels.view(2, 3, 4, 3, 6, 3).mean((3, 5))
    torch.testing.assert_close(resize(pixels, (4, 6)), means)
    assert resize(pixels, (5, 6)).shape == (2, 3, 5, 6)


def test_what_agrees_with_a_picture_is_that_picture_when_reduced_and_keeps_its_own_detail():
    original = 0.3 + 0.4 * torch.rand(1, 3, 6, 8)
    detail = 0.1 * torch.rand(1, 3, 18, 24)
    corrected = agree_with(0.4 + detail, original, num_passes=30)
    torch.testing.assert_close(resize(corrected, (6, 8)), original, atol=5e-3, rtol=0)
    plain = agree_with(torch.full_like(detail, 0.4), original, num_passes=30)
    own = detail - resize(detail, (6, 8)).repeat_interleave(3, -2).repeat_interleave(3, -1)
    left = corrected - plain
    left = left - resize(left, (6, 8)).repeat_interleave(3, -2).repeat_interleave(3, -1)
    assert torch.corrcoef(torch.stack([left.flatten(), own.flatten()]))[0, 1] > 0.9


def test_each_pass_leaves_less_than_half_of_the_difference_and_by_default_three_percent():
    original, enlarged = 0.3 + 0.4 * torch.rand(1, 3, 6, 8), 0.4 + 0.1 * torch.rand(1, 3, 18, 24)

    def difference(**passes):
        return (resize(agree_with(enlarged, original, **passes), (6, 8)) - original).abs().mean()

    left = [difference(num_passes=count) for count in range(5)]
    assert all(after < before / 2 for before, after in itertools.pairwise(left))
    assert difference() < 0.03 * left[0]
