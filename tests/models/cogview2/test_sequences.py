"""Order, positions, masks and labels of every task, against definitions written out cell by cell."""

import pytest
import torch

from cogview_pipelines.models.cogview2.sequences import (
    IGNORED_LABEL,
    MASKED_IMAGE_SHARE,
    MASKED_TEXT_SHARE,
    SequenceLayout,
    caption,
    captioning_sample,
    completion,
    completion_sample,
    direct_super_resolution,
    draw_patch_corners,
    draw_rectangles,
    draw_text_spans,
    generation_sample,
    iterative_super_resolution,
    pad_text,
    place_text_spans,
    prefix_causal_mask,
    split_row,
    stack,
    text_sample,
    text_to_image,
)

from ...utils import (
    BOI,
    IMAGE_GRID,
    NUM_IMAGE_TOKENS,
    START_OF_CHINESE,
    START_OF_ENGLISH,
    make_image_tokens,
    make_texts,
)

LAYOUT = SequenceLayout(IMAGE_GRID, image_position=32, boi_token_id=BOI, num_image_tokens=NUM_IMAGE_TOKENS)
LENGTH = LAYOUT.image_length
MIXED_LENGTHS = [3, 0, 7, 1]
PAD = NUM_IMAGE_TOKENS + 3
BEFORE_IMAGE = 12
FIRST_TEXT, SECOND_TEXT = make_texts([4, 5])


def build_mask(length, may_attend):
    """A mask by its definition: `may_attend(row, column)` for every pair of positions."""
    return torch.tensor([[bool(may_attend(row, column)) for column in range(length)] for row in range(length)])


def hole(*cells):
    """A completion mask with these cells."""
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    for row, column in cells:
        mask[row, column] = True
    return mask


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


def test_layout_counts_positions_from_the_start_token():
    layout = SequenceLayout((20, 20), image_position=512, boi_token_id=150000, num_image_tokens=20000)
    assert layout.image_length == 400
    assert layout.image_positions[[0, -1]].tolist() == [513, 912]


def test_texts_are_padded_on_the_left():
    ids, positions, mask = pad_text([[60, 61, 62], [], [63]], num_slots=4)
    assert ids.tolist() == [[0, 60, 61, 62], [0, 0, 0, 0], [0, 0, 0, 63]]
    assert positions.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mask.tolist() == [[False, True, True, True], [False] * 4, [False, False, False, True]]


def test_text_that_does_not_fit_its_slots_is_an_error_that_says_how_long_it_is():
    with pytest.raises(ValueError, match=r"`texts` may have 4 tokens each, but one has 5"):
        pad_text(make_texts([2, 5]), num_slots=4)


def test_only_causal_rows_see_causal_columns():
    prefix = torch.tensor([True, False, False, False])
    causal = torch.tensor([False, True, False, True])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]
    assert prefix_causal_mask(prefix, causal).long().tolist() == expected


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


def test_sequences_are_cut_stacked_and_repeated_row_by_row():
    texts, image = make_texts([4, 4, 4]), make_image_tokens(3)
    starts = [START_OF_ENGLISH] * 3
    whole = caption(image, starts, LAYOUT, texts)
    assert len(whole) == 3
    parts = stack([whole[:1], whole[1:]])
    repeated = whole.repeat_interleave(2)
    moved = whole.to("cpu")
    for name, value in vars(whole).items():
        assert torch.equal(getattr(parts, name), value)
        assert torch.equal(getattr(moved, name), value)
        assert torch.equal(getattr(repeated, name), value[[0, 0, 1, 1, 2, 2]])
    assert stack([text_to_image([text], LAYOUT) for text in texts]).labels is None


# Training samples of CogLM


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
