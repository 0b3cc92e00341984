"""Where pictures are cut and masked: properties beyond what the original code was run for."""

import pytest
import torch

from cogview_pipelines.pipelines.cogview2.completion_geometry import (
    best_window,
    bounding_box,
    covering_token_mask,
    crop_box,
    rectangle_mask,
    token_mask,
)


def mask_of(height, width, *boxes):
    mask = torch.zeros(height, width, dtype=torch.bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def area(mask, box):
    top, left, bottom, right = box
    return int(mask[top:bottom, left:right].sum())


@pytest.mark.parametrize("seed", range(40))
def test_the_crop_is_a_square_in_the_picture_that_holds_the_mask_and_more(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(60, 400, (2,), generator=generator).tolist()
    rows = sorted(torch.randint(0, height, (2,), generator=generator).tolist())
    columns = sorted(torch.randint(0, width, (2,), generator=generator).tolist())
    mask = mask_of(height, width, (rows[0], columns[0], rows[1] + 1, columns[1] + 1))
    top, left, bottom, right = box = crop_box(mask, min_side=20)
    side = bottom - top
    assert side == right - left
    assert 0 <= top < bottom <= height
    assert 0 <= left < right <= width
    extent = max(rows[1] - rows[0], columns[1] - columns[0]) + 1
    if extent < min(height, width):
        assert area(mask, box) == mask.sum()
        assert side in (min(height, width), 20) or extent <= 0.7 * (side + 1)


def test_the_side_of_the_crop_is_bounded():
    mask = mask_of(100, 200, (40, 40, 60, 60))
    assert crop_box(mask, min_side=50) == (24, 24, 74, 74)
    top, left, bottom, right = crop_box(mask, mask_share=0.1)
    assert (bottom - top, right - left) == (100, 100)
    top, left, bottom, right = crop_box(mask, max_side=24)
    assert (bottom - top, right - left) == (24, 24)
    assert top <= 40
    assert bottom >= 60


def test_windows_show_what_is_known_and_paint_everything_in_the_end():
    mask = mask_of(40, 300, (0, 0, 40, 100), (0, 160, 40, 300))
    pieces = 0
    while mask.any():
        box = best_window(mask, 0.7, 40)
        assert 0 < area(mask, box) <= 0.7 * 1600
        mask[box[0] : box[2], box[1] : box[3]] = False
        pieces += 1
    assert 8 <= pieces < 20


def test_the_window_with_the_smallest_part_is_taken_if_all_are_too_full():
    mask = mask_of(40, 100, (0, 0, 40, 95))
    assert best_window(mask, 0.05, 40) == (0, 60, 40, 100)


def test_a_covering_mask_marks_every_token_of_which_a_pixel_is_marked():
    mask = mask_of(32, 32, (0, 9, 1, 10), (23, 8, 24, 17))
    assert covering_token_mask(mask, (4, 4)).nonzero().tolist() == [[0, 1], [2, 1], [2, 2]]
    assert not token_mask(mask, (4, 4)).any()
    assert covering_token_mask(mask_of(5, 5, (2, 2, 3, 3)), (10, 10)).sum() >= 4  # a picture smaller than the grid
    for size in (33, 50, 97):
        odd = mask_of(size, size, (size - 1, size - 1, size, size))
        assert covering_token_mask(odd, (4, 4))[-1, -1]


def test_masks_that_mark_nothing_are_errors():
    with pytest.raises(ValueError, match="marks no pixel"):
        bounding_box(torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="`fractions`"):
        rectangle_mask((0.5, 0.5, 0.5, 0.6))
