"""Token order, positions and masks of CogView, and the geometry of its sliding windows."""

import pytest
import torch

from cogview_pipelines.models.cogview.sequences import (
    SlidingWindow,
    caption,
    check_text_length,
    fine_positions,
    image_positions,
    restarted_positions,
    sliding_windows,
    super_resolution,
    text_to_image,
    unwritten,
    window_entries,
    window_rounds,
)

from ...utils_cogview import COMMANDS, make_image_tokens, make_layout, make_texts

LAYOUT = make_layout()
RELEASED = make_layout(image_grid=(32, 32), max_length=1089, max_super_resolution_length=1345)


def names(*tokens):
    return [LAYOUT.command(token) for token in tokens]


def test_text_to_image_is_causal_with_positions_from_the_first_token():
    texts, codes = make_texts([3, 5]), make_image_tokens(2)
    sequence = text_to_image(texts, LAYOUT, codes)
    assert sequence.input_ids[1].tolist() == names("[ROI1]") + texts[1] + names("[BASE]", "[BOI1]") + codes[1].tolist()
    assert sequence.input_ids[0, :3].tolist() == names("[PAD]", "[PAD]", "[ROI1]")
    assert sequence.position_ids[0].tolist() == [0, 0, *range(22)]
    assert sequence.position_ids[1].tolist() == [*range(24)]
    assert sequence.key_mask.sum(1).tolist() == [22, 24]
    assert sequence.text_mask.sum(1).tolist() == [3, 5]
    for row, padding in ((0, 2), (1, 0)):
        for query in range(24):
            seen = [query] if query < padding else list(range(padding, query + 1))
            assert sequence.attention_mask[row, query].nonzero()[:, 0].tolist() == seen
    context = text_to_image(texts, LAYOUT)
    assert torch.equal(image_positions(context, 16), sequence.position_ids[:, -16:])


def test_captions_are_padded_after_the_text_and_predict_it_alone():
    texts, codes = make_texts([4, 0, 2]), make_image_tokens(3)
    sequence = caption(codes, LAYOUT, texts)
    assert sequence.input_ids.shape == (3, 24)
    given = names("[BASE]", "[BOI1]") + codes[2].tolist() + names("[EOI1]", "[ROI1]")
    assert sequence.input_ids[2].tolist() == given + texts[2] + names("[PAD]", "[PAD]")
    assert sequence.labels[2, 19:].tolist() == [*texts[2], -100, -100, -100]
    assert (sequence.labels[:, :19] == -100).all() and (sequence.labels[1] == -100).all()
    assert sequence.position_ids[0].tolist() == [*range(24)]
    assert not sequence.attention_mask[2, :22, 22:].any()
    context = caption(codes, LAYOUT)
    assert torch.equal(context.input_ids, sequence.input_ids[:, :20]) and context.labels is None


def test_super_resolution_goes_on_with_position_1_after_the_second_region():
    texts, coarse = make_texts([1, 4]), make_image_tokens(2, 4)
    context = super_resolution(texts, coarse, LAYOUT)
    second = names("[EOI1]", "[ROI2]", "[POS0]", "[BASE]", "[BOI2]")
    first = names("[ROI1]") + texts[1] + names("[BASE]", "[BOI1]") + coarse[1].tolist()
    assert context.input_ids[1].tolist() == first + second
    # [EOI1] and [ROI2] keep their places; what comes after counts from [ROI2] on
    assert context.position_ids[1].tolist() == [*range(13), 1, 2, 3]
    assert context.position_ids[0].tolist() == [0, 0, 0, *range(10), 1, 2, 3]
    assert fine_positions(LAYOUT).tolist() == [*range(4, 20)]


def test_training_positions_start_again_on_the_first_second_region():
    region = LAYOUT.command("[ROI2]")
    ids = torch.zeros(2, 60, dtype=torch.long)
    ids[0, 7], ids[1, 2], ids[1, 9] = region, region, region
    positions = restarted_positions(ids, LAYOUT)
    assert positions[0].tolist() == [*range(7), *range(40), *[39] * 13]
    assert positions[1].tolist() == [0, 1, *range(40), *[39] * 18]
    with pytest.raises(ValueError, match=r"must have \[ROI2\] in every row .* row 1 has none"):
        restarted_positions(torch.tensor([[region], [0]]), LAYOUT)


def test_texts_fit_as_in_the_release():
    assert (RELEASED.max_text_tokens, RELEASED.max_super_resolution_text_tokens) == (62, 57)
    texts = make_texts([2, LAYOUT.max_text_tokens + 1])
    with pytest.raises(ValueError, match="`texts` may have 21 tokens each, but number 1 has 22"):
        text_to_image(texts, LAYOUT)
    with pytest.raises(ValueError, match="`texts` may have 18 tokens each, but number 0 has 19"):
        super_resolution(make_texts([19]), make_image_tokens(1, 4), LAYOUT)
    with pytest.raises(ValueError, match="`texts` may have 20 tokens each, but number 0 has 21"):
        caption(make_image_tokens(1), LAYOUT, make_texts([21]))
    longest = text_to_image(make_texts([21]), LAYOUT, make_image_tokens(1))
    assert longest.input_ids.shape[1] == longest.position_ids.max() + 1 == LAYOUT.max_length
    check_text_length(texts, 30)


def test_commands_are_numbered_from_padding_on():
    assert (LAYOUT.command("[PAD]"), LAYOUT.command("[POS8]")) == (COMMANDS, COMMANDS + 26)
    assert LAYOUT.size_token(64) == LAYOUT.command("[BIG]") and LAYOUT.size_token(5) == LAYOUT.command("[BASE]")


# Sliding windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, RELEASED, make_layout(image_grid=(16, 8))])
def test_windows_write_every_cell_and_see_what_lies_under_it(layout):
    fine = unwritten(1, layout)
    for window in sliding_windows(layout):
        rows, columns = window.fine(layout)
        coarse_rows, coarse_columns = window.coarse(layout)
        assert (coarse_rows.start * 2, coarse_columns.start * 2) == (rows.start, columns.start)
        assert coarse_rows.stop * 2 >= rows.stop and coarse_columns.stop * 2 == columns.stop
        assert coarse_rows.stop <= layout.image_grid[0] and coarse_columns.stop <= layout.image_grid[1]
        entries = window_entries(fine, window, layout)
        assert (entries == -1).any()
        fine[:, rows, columns] = 0
    assert (fine == 0).all()


def test_released_windows():
    assert [window.num_rows for window in sliding_windows(RELEASED)] == [18, 30, 30, 30, 30, 30, 32, 32, 32]
    window = SlidingWindow(1, 2, 30)
    assert window.coarse(RELEASED) == (slice(8, 24), slice(16, 32))
    assert window.fine(RELEASED) == (slice(16, 46), slice(32, 64))


@pytest.mark.parametrize("layout", [LAYOUT, RELEASED])
def test_windows_of_one_round_share_no_cell_and_follow_all_they_share_cells_with(layout):
    windows, rounds = sliding_windows(layout), window_rounds(layout)
    assert sorted(index for one in rounds for index in one) == list(range(9))
    number = {index: at for at, one in enumerate(rounds) for index in one}
    masks = []
    for window in windows:
        mask = torch.zeros(2 * layout.image_grid[0], 2 * layout.image_grid[1], dtype=torch.bool)
        mask[window.fine(layout)] = True
        masks.append(mask)
    for later in range(9):
        for earlier in range(later):
            if (masks[later] & masks[earlier]).any():
                assert number[earlier] < number[later]
    assert any(len(one) > 1 for one in rounds)
