"""Parts of transformers: what is added to scores, and attention that does not overflow."""

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.models import layers
from cogview_pipelines.models.layers import attention_bias, dense_attention, pb_relaxed_attention

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


@pytest.fixture
def computed_in(monkeypatch):
    """The dtypes of what PyTorch's attention is given, as it computes it: under autocast, that of autocast."""
    seen, attend = [], F.scaled_dot_product_attention

    def watched(query, *args, **options):
        cast = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if cast else query.dtype)
        return attend(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_attention_on_a_cpu_are_computed_in_float32(computed_in, monkeypatch, dtype, autocast):
    monkeypatch.setattr(layers, "multiplies", lambda dtype: True)  # even where it could compute otherwise
    source = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, 9, 8, generator=source).to(dtype).double().requires_grad_() for _ in range(3)]
    bias = torch.where(torch.rand(2, 1, 9, 9, generator=source) < 0.3, torch.finfo(dtype).min / 2, 0.0)
    weights = torch.randn(2, 3, 9, 8, generator=source).to(dtype)
    (F.scaled_dot_product_attention(*exact, bias.double()) * weights).sum().backward()
    computed_in.clear()
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = dense_attention(*given, bias.to(dtype))
    assert computed_in == [torch.float32] and output.dtype == dtype
    (output * weights).sum().backward()
    for tensor, expected in zip(given, exact):  # two roundings: of the output, and of the gradient
        error = (tensor.grad.double() - expected.grad).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * expected.grad.abs().max()


@pytest.mark.parametrize("has", [False, True])
def test_without_gradients_it_depends_on_the_processor(computed_in, monkeypatch, has):
    monkeypatch.setattr(layers, "multiplies", lambda dtype: has)
    given = [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]
    with torch.no_grad():
        causal = dense_attention(*given, is_causal=True)
        bias = torch.full((5, 5), torch.finfo(torch.bfloat16).min / 2).triu(1)[None, None].bfloat16()
        torch.testing.assert_close(dense_attention(*given, bias), causal)
    assert computed_in == [torch.bfloat16 if has else torch.float32] * 2 and causal.dtype == torch.bfloat16


@torch.no_grad()
def test_pb_relaxation_holds_scores_that_overflow_half_precision():
    """Scores of about 2e5 are beyond float16; divided by alpha they are not."""
    query = torch.full((1, 1, 4, 16), 220.0, dtype=torch.float16)
    key = query * torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float16)[:, None]
    value = torch.eye(4, dtype=torch.float16)[None, None]
    assert not (query @ key.transpose(-1, -2) / 4).isfinite().all()
    output = pb_relaxed_attention(query, key, value, None, 0.0, 64.0)
    assert torch.equal(output, value[:, :, :1].expand_as(value))
