"""What is masked and predicted in training, against definitions written out cell by cell and what generation reads."""

import pytest
import torch

from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.sequences import SequenceLayout, caption, completion, text_to_image
from cogview_pipelines.training.samples_cogview2 import (
    MASKED_IMAGE_SHARE,
    MASKED_TEXT_SHARE,
    captioning_sample,
    completion_sample,
    draw_patch_corners,
    draw_rectangles,
    draw_text_spans,
    generation_sample,
    place_text_spans,
    split_row,
    text_sample,
)

from ..utils import (
    BOI,
    IMAGE_GRID,
    NUM_IMAGE_TOKENS,
    START_OF_CHINESE,
    START_OF_ENGLISH,
    build_mask,
    hole,
    make_image_tokens,
    make_texts,
)

LAYOUT = SequenceLayout(IMAGE_GRID, image_position=32, boi_token_id=BOI, num_image_tokens=NUM_IMAGE_TOKENS)
LENGTH = LAYOUT.image_length
PAD = NUM_IMAGE_TOKENS + 3
BEFORE_IMAGE = 12
FIRST_TEXT, SECOND_TEXT = make_texts([4, 5])


def make_row(*texts):
    """A row of training data: texts that end with <pad>, more <pad> up to the image, 16 image tokens."""
    start = [token for text in texts for token in (*text, PAD)]
    start += [PAD] * (BEFORE_IMAGE - len(start))
    return torch.cat([torch.tensor(start), make_image_tokens(1)[0]])


def pick(sequence, columns):
    """The given positions of a sequence, in the given order."""
    columns = torch.as_tensor(columns)
    mask = sequence.attention_mask[:, columns][:, :, columns]
    others = [getattr(sequence, name)[:, columns] for name in ("input_ids", "position_ids", "text_mask", "labels")]
    return mask, *others


def test_generation_samples_read_what_text_to_image_reads():
    """The chosen text, <start_of_image> and the image have the order, positions and mask of generation."""
    row = make_row(FIRST_TEXT, SECOND_TEXT)
    tail = list(range(BEFORE_IMAGE - 1, BEFORE_IMAGE + LENGTH))
    for second_text, text, start in ((False, FIRST_TEXT, 0), (True, SECOND_TEXT, len(FIRST_TEXT) + 1)):
        sample = generation_sample(row, LAYOUT, PAD, second_text=second_text)
        expected = text_to_image([text], LAYOUT, row[None, BEFORE_IMAGE:])
        mask, ids, positions, text_mask, labels = pick(sample, [*range(start, start + len(text)), *tail])
        assert torch.equal(mask, expected.attention_mask)
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(positions, expected.position_ids)
        assert torch.equal(text_mask, expected.text_mask)
        # <start_of_image> and all image tokens but the last predict the next image token, and nothing else is trained
        assert labels[0, len(text) :].tolist() == [*row[BEFORE_IMAGE:].tolist(), IGNORED_LABEL]
        assert (sample.labels != IGNORED_LABEL).sum() == LENGTH
        # and whatever else stands in the row is seen by none of them
        seen = sample.attention_mask[0, tail].any(0)
        assert seen.nonzero()[:, 0].tolist() == sorted([*range(start, start + len(text)), *tail])


def test_captioning_samples_without_patches_read_what_captioning_reads():
    row = make_row(FIRST_TEXT, SECOND_TEXT)
    sample = captioning_sample(row, LAYOUT, PAD, [START_OF_ENGLISH, START_OF_CHINESE], corners=[])
    image = list(range(BEFORE_IMAGE, BEFORE_IMAGE + LENGTH))
    places = {0: (START_OF_ENGLISH, FIRST_TEXT), len(FIRST_TEXT) + 1: (START_OF_CHINESE, SECOND_TEXT)}
    for start, (start_token, text) in places.items():
        expected = caption(row[None, BEFORE_IMAGE:], [start_token], LAYOUT, [text])
        mask, ids, positions, text_mask, labels = pick(sample, [*image, *range(start, start + 1 + len(text))])
        assert torch.equal(mask, expected.attention_mask)
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(positions, expected.position_ids)
        assert torch.equal(text_mask, expected.text_mask)
        assert torch.equal(labels, expected.labels)
    assert (sample.labels != IGNORED_LABEL).sum() == len(FIRST_TEXT) + len(SECOND_TEXT)
    first, second = (slice(start, start + 1 + len(text)) for start, (_, text) in places.items())
    assert not sample.attention_mask[0, first, second].any()
    assert not sample.attention_mask[0, second, first].any()


def test_captioning_samples_predict_patches_from_what_is_outside_and_before():
    row, corners = make_row(FIRST_TEXT), [(0, 1), (1, 2)]
    sample = captioning_sample(row, LAYOUT, PAD, [START_OF_ENGLISH], corners, patch_size=2)
    in_patch = {(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)}
    patch = {4 * r + c for r, c in in_patch}
    image_mask = sample.attention_mask[0, BEFORE_IMAGE:, BEFORE_IMAGE:]

    def may_attend(query, key):
        return key not in patch or (query in patch and key <= query)

    assert torch.equal(image_mask, build_mask(LENGTH, may_attend))
    tokens = row[BEFORE_IMAGE:].tolist()
    predicting = {4 * r + c for r, c in ((0, 1), (1, 1), (1, 2), (2, 2))}  # all but the last column of each patch
    expected = [tokens[cell + 1] if cell in predicting else IGNORED_LABEL for cell in range(LENGTH)]
    assert sample.labels[0, BEFORE_IMAGE:].tolist() == expected
    # what a position predicts is hidden from it
    for cell in predicting:
        assert not image_mask[cell, cell + 1]
    # texts see the whole image
    assert sample.attention_mask[0, : 1 + len(FIRST_TEXT), BEFORE_IMAGE:].all()


def test_completion_samples_read_what_completion_reads_and_predict_the_hole():
    row, mask = make_row(FIRST_TEXT, SECOND_TEXT), hole((0, 2), (0, 3), (2, 0))
    image = row[None, BEFORE_IMAGE:]
    sample = completion_sample(row, LAYOUT, PAD, mask)
    task = completion([FIRST_TEXT], image, mask, LAYOUT)
    task.entries = image[:, task.cells]  # as when all has been generated
    expected = task.whole_sequence()
    length = expected.input_ids.shape[1]
    assert length < sample.input_ids.shape[1] == len(row)
    assert torch.equal(sample.attention_mask[:, :length, :length], expected.attention_mask)
    for name in ("input_ids", "position_ids", "text_mask", "key_mask"):
        assert torch.equal(getattr(sample, name)[:, :length], getattr(expected, name)), name
    # each masked cell is predicted by the entry before it, and nothing else is trained
    predicting = (sample.labels[0] != IGNORED_LABEL).nonzero()[:, 0]
    assert sample.labels[0, predicting].tolist() == [int(image[0, cell]) for cell in (2, 3, 8)]
    cells = sample.position_ids[0, predicting + 1] - LAYOUT.image_position - 1
    assert cells.tolist() == [2, 3, 8]
    # what fills the row up is seen by nothing, and sees something
    assert not sample.attention_mask[0, :, length:].any()
    assert sample.attention_mask[0].any(1).all()
    assert not sample.key_mask[0, length:].any()


def test_text_samples_predict_spans_from_all_around_and_before():
    ids = torch.tensor(make_texts([12])[0])
    sample = text_sample(ids, [(3, 2), (8, 1)])
    is_open = {0, 1, 2, 6, 7}  # the token after a span, which the span's last position predicts, is not open

    def may_attend(query, key):
        return key in is_open or (query not in is_open and key <= query)

    assert torch.equal(sample.attention_mask[0], build_mask(12, may_attend))
    expected = [IGNORED_LABEL] * 12
    for position in (3, 4, 8):
        expected[position] = int(ids[position + 1])
        assert not sample.attention_mask[0, position, position + 1]
    assert sample.labels[0].tolist() == expected
    assert sample.position_ids[0].tolist() == list(range(12))


def test_training_samples_leave_their_row_alone():
    row = make_row(FIRST_TEXT)
    before = row.clone()
    generation_sample(row, LAYOUT, PAD)
    captioning_sample(row, LAYOUT, PAD, [START_OF_ENGLISH], [(0, 0)], patch_size=2)
    completion_sample(row, LAYOUT, PAD, hole((1, 1)))
    text_sample(row[: len(FIRST_TEXT)], [(0, 1)])
    assert torch.equal(row, before)


@pytest.mark.parametrize(
    "texts, spans",
    [((FIRST_TEXT,), [(0, 4)]), ((FIRST_TEXT, SECOND_TEXT), [(0, 4), (5, 10)]), (([], SECOND_TEXT), [(0, 0), (1, 6)])],
)
def test_texts_of_a_row_end_with_pad(texts, spans):
    found, image = split_row(make_row(*texts), LAYOUT, PAD)
    assert [(text.start, text.stop) for text in found] == spans
    assert (image.start, image.stop) == (BEFORE_IMAGE, BEFORE_IMAGE + LENGTH)


@pytest.mark.parametrize(
    "row, message",
    [
        (make_image_tokens(1)[0], "`row` must have more than 16 tokens, but has 16"),
        (make_row(FIRST_TEXT).flip(0), "`row` must hold text ids .48 and above., then 16 image tokens"),
        (torch.where(make_row(FIRST_TEXT) == PAD, PAD + 2, make_row(FIRST_TEXT)), r"`row` must have <pad> \(51\)"),
    ],
)
def test_impossible_rows_are_errors(row, message):
    with pytest.raises(ValueError, match=message):
        split_row(row, LAYOUT, PAD)


def test_patches_are_distinct_fit_the_grid_and_reach_its_borders():
    layout = SequenceLayout((10, 8), image_position=32, boi_token_id=BOI, num_image_tokens=NUM_IMAGE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(100):
        corners = draw_patch_corners(layout, generator)
        assert len(corners) == len(set(corners)) == int(MASKED_IMAGE_SHARE * 80 / 16)
        seen.update(corners)
    assert seen == {(row, column) for row in range(7) for column in range(5)}


def test_rectangles_fit_completion_and_reach_every_cell():
    masks = [draw_rectangles(LAYOUT, torch.Generator().manual_seed(seed)) for seed in range(64)]
    longest = max(IMAGE_GRID) * 7 // 10
    for mask in masks:
        assert mask.any() and not mask.all()
        completion(make_texts([1]), make_image_tokens(1), mask, LAYOUT)
    one = [mask for mask in masks if mask.any(1).sum() * mask.any(0).sum() == mask.sum()]
    assert max(int(mask.any(0).sum()) for mask in one) == longest
    assert torch.stack(masks).any(0).all()
    assert torch.equal(masks[3], draw_rectangles(LAYOUT, torch.Generator().manual_seed(3)))


def test_a_grid_without_room_for_all_patches_gets_those_that_fit():
    layout = SequenceLayout((4, 4), image_position=32, boi_token_id=BOI, num_image_tokens=NUM_IMAGE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    assert draw_patch_corners(layout, generator, patch_size=4) == []  # 80 % of 16 cells are less than one patch
    assert len(draw_patch_corners(layout, generator, patch_size=2)) == 3


@pytest.mark.parametrize("length", [20, 60, 500])
def test_text_spans_neither_overlap_nor_leave_the_text(length):
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(50):
        spans = draw_text_spans(length, generator)
        covered = [token for start, span in spans for token in range(start, start + span)]
        assert covered == sorted(set(covered))
        assert not covered or (covered[0] >= 0 and covered[-1] < length)
        assert len(covered) <= MASKED_TEXT_SHARE * length
        assert all(span >= 1 for _, span in spans)
        counts.append(len(covered))
    assert sum(counts) > 0


def test_spans_are_placed_in_the_order_of_their_starts():
    starts = torch.tensor([25, 3, 39, 10, 38, 0])
    # 15 % of 40 tokens are 6: lengths 2, 1 (from 0) and 3 stay, and starts must be below 40 - 6
    assert place_text_spans(40, [2, 0, 3, 1], starts) == [(3, 2), (12, 1), (28, 3)]
