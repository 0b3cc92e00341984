"""What every family's sequences are written with."""

import pytest
import torch

from cogview_pipelines.generation.token_sequence import pad_text, prefix_causal_mask, stack
from cogview_pipelines.models.cogview2.sequences import SequenceLayout, caption, text_to_image

from ..utils import BOI, IMAGE_GRID, NUM_IMAGE_TOKENS, START_OF_ENGLISH, make_image_tokens, make_texts

LAYOUT = SequenceLayout(IMAGE_GRID, image_position=32, boi_token_id=BOI, num_image_tokens=NUM_IMAGE_TOKENS)


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
