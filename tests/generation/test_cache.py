"""Keys and values of sequences that grow, are cut back, repeated and put in another order."""

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.generation.cache import KeyValueCache, SlotCache
from cogview_pipelines.models.layers import attention_bias

from ..utils import make_coglm, text_to_image_arguments

MIXED_LENGTHS = [3, 0, 7, 1]


@torch.no_grad()
@pytest.mark.parametrize("pb_relaxation_alpha", [None, 8.0])
def test_decoding_with_a_cache_equals_one_whole_forward(pb_relaxation_alpha):
    model = make_coglm(pb_relaxation_alpha=pb_relaxation_alpha)
    whole = text_to_image_arguments(model, MIXED_LENGTHS)
    expected = model(**whole).logits
    length, start = whole["input_ids"].shape[1], max(MIXED_LENGTHS) + 1
    cache = KeyValueCache(model.config, len(MIXED_LENGTHS), length, model.dtype, model.device)
    logits, done = [], 0
    for end in (start, start + 1, start + 2, start + 6, length):  # the context, single tokens, several at once
        logits.append(
            model(
                whole["input_ids"][:, done:end],
                whole["position_ids"][:, done:end],
                whole["attention_mask"][:, done:end, :end],
                whole["text_mask"][:, :end],
                1.4,
                cache=cache,
            ).logits
        )
        done = end
        assert cache.length == done
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keys_at_a_slot_are_those_of_a_growing_cache():
    model = make_coglm()
    whole = text_to_image_arguments(model, [4, 2])
    length = whole["input_ids"].shape[1]
    expected = model(**whole).logits
    cache = KeyValueCache(model.config, 2, length + 5, model.dtype, model.device)
    bias = attention_bias(whole["attention_mask"], whole["text_mask"], 1.4, torch.float32)[:, 0]
    model(whole["input_ids"][:, :5], whole["position_ids"][:, :5], bias[:, :5, :5], cache=cache)
    for slot in range(5, length):
        step = SlotCache(cache.layers, torch.full((2, 1), slot), length + 2)
        seen = F.pad(bias[:, slot : slot + 1], (0, 2), value=torch.finfo(torch.float32).min / 2)
        one = slice(slot, slot + 1)
        logits = model(whole["input_ids"][:, one], whole["position_ids"][:, one], seen, cache=step).logits
        torch.testing.assert_close(logits, expected[:, one], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_repeated_cache_continues_every_copy_alike():
    model = make_coglm()
    whole = text_to_image_arguments(model, [4, 2])
    length = whole["input_ids"].shape[1]
    cache = KeyValueCache(model.config, 2, length, model.dtype, model.device)
    context = {
        name: value if not torch.is_tensor(value) else value[:, :5] if name != "attention_mask" else value[:, :5, :5]
        for name, value in whole.items()
    }
    model(**context, cache=cache)
    repeated = KeyValueCache(model.config, 6, length, model.dtype, model.device)
    repeated.load(cache, 3)
    rest = {name: value.repeat_interleave(3, 0) for name, value in whole.items() if torch.is_tensor(value)}
    logits = model(
        rest["input_ids"][:, 5:],
        rest["position_ids"][:, 5:],
        rest["attention_mask"][:, 5:],
        rest["text_mask"],
        1.4,
        cache=repeated,
    ).logits
    expected = model(**whole).logits[:, 5:].repeat_interleave(3, 0)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def filled(lengths, max_length=9):
    """A cache of two layers whose sequences have these lengths, and the `(2, rows, 4, length, 8)` put into each."""
    model = make_coglm()
    cache = KeyValueCache(model.config, len(lengths), max_length, torch.float32, "cpu")
    given = [torch.randn(2, len(lengths), 4, max(lengths), 8) for _ in range(2)]
    for layer, each in enumerate(given):
        cache.update(layer, each)
    if len(set(lengths)) > 1:
        cache.truncate(torch.tensor(lengths))
    return cache, given


def test_a_cache_that_was_cut_back_goes_on_from_there():
    cache, given = filled([6, 6])
    cache.truncate(4)
    new = torch.randn(2, 2, 4, 2, 8)
    seen = [cache.update(layer, new) for layer in range(2)]
    assert cache.length == 6
    for layer in range(2):
        assert torch.equal(seen[layer], torch.cat([given[layer][:, :, :, :4], new], 3))


def test_sequences_of_different_lengths_get_their_new_tokens_where_each_ends():
    lengths = [5, 2, 3]
    cache, given = filled(lengths)
    new = torch.randn(2, 3, 4, 2, 8)
    seen = [cache.update(layer, new) for layer in range(2)]
    assert cache.length == 7 and cache.lengths.tolist() == [7, 4, 5]
    for layer in range(2):
        for row, length in enumerate(lengths):
            expected = torch.cat([given[layer][:, row, :, :length], new[:, row]], 2)
            assert torch.equal(seen[layer][:, row, :, : length + 2], expected)
    cache.truncate(4)
    assert cache.length == 4 and cache.lengths is None


def test_rows_go_on_in_another_order():
    cache, given = filled([4, 2, 3])
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.lengths.tolist() == [3, 4, 4]
    for layer in range(2):
        assert torch.equal(cache.layers[layer][:, :, :, :4], given[layer][:, [2, 0, 0]])


@pytest.mark.parametrize("length", [7, torch.tensor([7, 1])])
def test_a_cache_is_not_cut_back_to_more_than_it_holds(length):
    cache, _ = filled([6, 6])
    with pytest.raises(ValueError, match="`length` may be 6 here, but is 7"):
        cache.truncate(length)
