"""Parts of transformers: what is added to scores, and attention that does not overflow."""

import pytest
import torch

from cogview_pipelines.models.layers import attention_bias, pb_relaxed_attention

from ..utils import make_coglm, text_to_image_arguments


def test_text_attention_bias_is_added_to_the_visible_text_keys_only():
    model = make_coglm()
    arguments = text_to_image_arguments(model, [3, 0, 7, 1])
    mask, text = arguments["attention_mask"], arguments["text_mask"]
    bias = attention_bias(mask, text, 1.5, torch.float32)
    plain = attention_bias(mask, text, 0.0, torch.float32)
    assert bias.shape == plain.shape == (len(mask), 1, *mask.shape[1:])
    visible_text = mask & text[:, None]
    assert (bias[:, 0][visible_text] == 1.5).all()
    assert (bias[:, 0][mask & ~visible_text] == 0).all()
    assert (bias[:, 0][~mask] < -1e30).all()
    assert (plain[:, 0][mask] == 0).all()


def test_no_bias_is_made_where_it_would_be_zero():
    text = torch.ones(1, 3, dtype=torch.bool)
    assert attention_bias(None, text, 0.0, torch.float32) is None
    assert attention_bias(None, None, 1.4, torch.float32) is None
    assert attention_bias(None, text, 1.4, torch.float32).tolist() == [[[pytest.approx([1.4] * 3)]]]


@torch.no_grad()
def test_pb_relaxation_holds_scores_that_overflow_half_precision():
    """Scores of about 2e5 are beyond float16; divided by alpha they are not."""
    query = torch.full((1, 1, 4, 16), 220.0, dtype=torch.float16)
    key = query * torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float16)[:, None]
    value = torch.eye(4, dtype=torch.float16)[None, None]
    assert not (query @ key.transpose(-1, -2) / 4).isfinite().all()
    output = pb_relaxed_attention(query, key, value, None, 0.0, 64.0)
    assert torch.equal(output, value[:, :, :1].expand_as(value))
