"""Order, positions, masks and labels of every task, against definitions written out cell by cell."""

import pytest
import torch

from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.sequences import (
    SequenceLayout,
    caption,
    completion,
    direct_super_resolution,
    iterative_super_resolution,
    text_to_image,
)

from ...utils import (
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
MIXED_LENGTHS = [3, 0, 7, 1]


def test_layout_counts_positions_from_the_start_token():
    layout = SequenceLayout((20, 20), image_position=512, boi_token_id=150000, num_image_tokens=20000)
    assert layout.image_length == 400
    assert layout.image_positions[[0, -1]].tolist() == [513, 912]


@pytest.mark.parametrize("with_image", [False, True])
def test_text_to_image_order_positions_and_mask(with_image):
    texts, image = make_texts(MIXED_LENGTHS), make_image_tokens(4)
    sequence = text_to_image(texts, LAYOUT, image if with_image else None)
    slots = max(MIXED_LENGTHS)
    for row, text in enumerate(texts):
        padding = slots - len(text)
        tail = image[row].tolist() if with_image else []
        assert sequence.input_ids[row].tolist() == [0] * padding + text + [BOI] + tail
        positions = [*range(len(text)), *range(32, 33 + len(tail))]
        assert sequence.position_ids[row].tolist() == [0] * padding + positions

        def may_attend(query, key, padding=padding):
            if query < padding or key < padding:
                return query == key
            if query < slots:
                return key < slots
            return key <= query

        length = slots + 1 + len(tail)
        assert torch.equal(sequence.attention_mask[row], build_mask(length, may_attend))
        assert sequence.text_mask[row].tolist() == [padding <= key < slots for key in range(length)]
        assert sequence.key_mask[row].tolist() == [key >= padding for key in range(length)]


def test_image_tokens_may_come_as_a_grid():
    texts, image = make_texts([2, 3]), make_image_tokens(2)
    flat, grid = text_to_image(texts, LAYOUT, image), text_to_image(texts, LAYOUT, image.unflatten(1, IMAGE_GRID))
    assert torch.equal(flat.input_ids, grid.input_ids)


def test_contexts_are_the_beginnings_of_whole_sequences():
    """What `generate` starts from is what the transformer is trained on, cut off."""
    texts, image = make_texts(MIXED_LENGTHS), make_image_tokens(4)
    starts = [START_OF_ENGLISH] * 4
    pairs = [
        (text_to_image(texts, LAYOUT), text_to_image(texts, LAYOUT, image)),
        (caption(image, starts, LAYOUT), caption(image, starts, LAYOUT, texts)),
    ]
    task = completion(texts, image, hole((1, 2), (3, 0)), LAYOUT)
    pairs.append((task.context, task.whole_sequence()))
    for context, whole in pairs:
        length = context.input_ids.shape[1]
        for name in ("input_ids", "position_ids", "text_mask", "key_mask"):
            assert torch.equal(getattr(context, name), getattr(whole, name)[:, :length]), name
        assert torch.equal(context.attention_mask, whole.attention_mask[:, :length, :length])


def test_caption_order_positions_mask_and_labels():
    texts, image = make_texts(MIXED_LENGTHS), make_image_tokens(4)
    starts = [START_OF_ENGLISH, START_OF_CHINESE, START_OF_ENGLISH, START_OF_CHINESE]
    sequence = caption(image, starts, LAYOUT, texts)
    slots = max(MIXED_LENGTHS)
    for row, text in enumerate(texts):
        padding = slots - len(text)
        assert sequence.input_ids[row].tolist() == [*image[row].tolist(), starts[row], *text] + [0] * padding
        positions = [*range(33, 33 + LENGTH), *range(1 + len(text))]
        assert sequence.position_ids[row].tolist() == positions + [0] * padding
        end = LENGTH + 1 + len(text)

        def may_attend(query, key, end=end):
            if query >= end or key >= end:
                return query == key
            return key < LENGTH or (query >= LENGTH and key <= query)

        assert torch.equal(sequence.attention_mask[row], build_mask(LENGTH + 1 + slots, may_attend))
        assert sequence.text_mask[row].tolist() == [LENGTH <= key < end for key in range(LENGTH + 1 + slots)]
        assert sequence.labels[row].tolist() == [IGNORED_LABEL] * LENGTH + text + [IGNORED_LABEL] * (1 + padding)


def test_caption_without_texts_has_no_labels():
    assert caption(make_image_tokens(2), [START_OF_ENGLISH] * 2, LAYOUT).labels is None


def test_completion_puts_every_hole_after_its_left_neighbour():
    image = make_image_tokens(1)
    task = completion(make_texts([2]), image, hole((0, 2), (0, 3), (2, 0)), LAYOUT)
    tokens = image[0].tolist()
    assert task.cells.tolist() == [1, 2, 3, 8]  # cell 1 is known; cell 8 is in the first column
    assert task.entries.tolist() == [[tokens[1], -1, -1, -1]]
    assert task.positions.tolist() == [33 + cell for cell in (1, 2, 3, 8)]
    known = [cell for cell in range(LENGTH) if cell not in (1, 2, 3, 8)]
    assert task.context.input_ids[0, 3:].tolist() == [tokens[cell] for cell in known]
    assert task.context.position_ids[0, 3:].tolist() == [33 + cell for cell in known]


def test_completion_mask():
    texts, image = make_texts([3, 1]), make_image_tokens(2)
    task = completion(texts, image, hole((1, 1), (1, 2), (3, 3)), LAYOUT)
    whole, slots = task.whole_sequence(), 3
    length, num_entries = whole.input_ids.shape[1], task.entries.shape[1]
    assert length == slots + 1 + LENGTH
    for row, text in enumerate(texts):
        padding = slots - len(text)

        def may_attend(query, key, padding=padding):
            if query < padding or key < padding:
                return query == key
            if query < slots:
                return key < slots
            if query == slots:  # <start_of_image>
                return key <= slots
            if query < length - num_entries:
                return key < length - num_entries
            return key <= query

        assert torch.equal(whole.attention_mask[row], build_mask(length, may_attend))


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(4, 4), r"`mask` must be boolean of shape \(4, 4\), but is torch.float32 of shape \(4, 4\)"),
        (torch.zeros(4, 5, dtype=torch.bool), r"`mask` must be boolean of shape \(4, 4\), but .* shape \(4, 5\)"),
        (torch.zeros(4, 4, dtype=torch.bool), "`mask` marks no cell"),
        (torch.ones(4, 4, dtype=torch.bool), "`mask` marks every cell"),
    ],
)
def test_impossible_completion_masks_are_errors(mask, message):
    with pytest.raises(ValueError, match=message):
        completion(make_texts([2]), make_image_tokens(1), mask, LAYOUT)


def test_direct_super_resolution_order_positions_and_mask():
    texts, image, slots = make_texts([5, 0, 2]), make_image_tokens(3), 5
    sequence = direct_super_resolution(texts, image, slots, LAYOUT)
    for row, text in enumerate(texts):
        padding = slots - len(text)
        assert sequence.input_ids[row].tolist() == [0] * padding + text + image[row].tolist()
        positions = [*range(len(text)), *range(33, 33 + LENGTH)]
        assert sequence.position_ids[row].tolist() == [0] * padding + positions

        def may_attend(query, key, padding=padding):
            if key < padding:
                return query < padding
            return key < slots or query >= slots

        assert torch.equal(sequence.attention_mask[row], build_mask(slots + LENGTH, may_attend))
        assert sequence.key_mask[row].tolist() == [key >= padding for key in range(slots + LENGTH)]


def test_direct_super_resolution_refuses_a_text_that_is_too_long():
    with pytest.raises(ValueError, match="may have 4 tokens each, but one has 5"):
        direct_super_resolution(make_texts([5]), make_image_tokens(1), 4, LAYOUT)


def test_iterative_super_resolution_sees_the_first_tokens_of_a_text():
    texts = make_texts([2, 6, 0])
    sequence = iterative_super_resolution(texts, 4)
    assert sequence.input_ids.tolist() == [[0, 0, *texts[0]], texts[1][:4], [0] * 4]
    assert sequence.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0] * 4]
    assert sequence.key_mask.sum(1).tolist() == [2, 4, 0]
    assert torch.equal(sequence.attention_mask, sequence.key_mask[:, None].expand(-1, 4, -1))


def test_empty_texts_leave_the_start_token_and_the_image():
    sequence = text_to_image([[]], LAYOUT)
    assert sequence.input_ids.tolist() == [[BOI]]
    assert sequence.attention_mask.tolist() == [[[True]]]
    assert not sequence.text_mask.any()


def test_every_row_of_a_mask_that_is_trained_on_sees_something():
    texts, image = make_texts(MIXED_LENGTHS), make_image_tokens(4)
    for sequence in (
        text_to_image(texts, LAYOUT, image),
        caption(image, [START_OF_ENGLISH] * 4, LAYOUT, texts),
        completion(texts, image, hole((0, 0)), LAYOUT).whole_sequence(),
        direct_super_resolution(texts, image, 7, LAYOUT),
    ):
        assert sequence.attention_mask.any(-1).all()
