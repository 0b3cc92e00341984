"""Captions and their losses: language, strategies, where a caption ends, and what is refused."""

import numpy as np
import PIL.Image
import pytest
import torch

from cogview_pipelines.evaluation.likelihood import caption_losses, image_losses
from cogview_pipelines.generation import decoders
from cogview_pipelines.generation.decoders import Decoder, Decoding, StaticDecoder
from cogview_pipelines.generation.texts import WrittenText
from cogview_pipelines.models.cogview2.sequences import text_to_image
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2_caption import CogView2CaptionPipeline

from ...utils import NUM_IMAGE_TOKENS, make_image_tokens
from ..conftest import LOW


@pytest.fixture(scope="module")
def caption(pipe):
    caption = CogView2CaptionPipeline.from_pipe(pipe)
    caption.set_progress_bar_config(disable=True)
    return caption


def tokens_of(count):
    return make_image_tokens(count).unflatten(1, (4, 4))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def picture(height=LOW, width=LOW, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam", "best_of"])
def test_captions_hold_pieces_of_their_language_and_common_ones_only(caption, language, strategy):
    tokenizer = caption.tokenizer
    low, high = tokenizer.language_ranges[language]
    output = caption(tokens=tokens_of(3), language=language, strategy=strategy, end="length", max_length=20)
    assert len(output.captions) == 3
    for ids in output.token_ids:
        assert len(ids) == 20
        for index in ids:
            common = NUM_IMAGE_TOKENS <= index < tokenizer.language_ranges["en"][0]
            assert low <= index < high or common
            assert index not in tokenizer.all_special_ids
            assert not tokenizer.convert_ids_to_tokens(index).startswith("<")
    assert output.captions == [tokenizer.decode(ids).strip() for ids in output.token_ids]


def test_pictures_are_seen_at_low_resolution_by_their_middle(caption):
    image = picture(LOW, LOW)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    tokens = caption.vqvae.encode(pixels).tokens
    wide = np.concatenate([picture(LOW, 10, 1), image, picture(LOW, 10, 2)], 1)
    expected = caption(tokens=tokens, end="length").token_ids
    for given in (image, PIL.Image.fromarray(wide), pixels, [image]):
        assert caption(given, end="length").token_ids == expected
    assert caption(picture(70, 50)).captions


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam", "best_of"])
def test_a_caption_does_not_depend_on_its_batch(caption, strategy):
    count = {"sample": 2, "best_of": 4}.get(strategy, 1)
    call = {"strategy": strategy, "num_candidates": 4, "num_captions_per_image": 1 if strategy == "greedy" else 2}
    together = caption(tokens=tokens_of(3), generator=seeds(*range(3 * count)) if count > 1 else None, **call)
    apart = caption(
        tokens=tokens_of(3), generator=seeds(*range(3 * count)) if count > 1 else None, max_batch_size=1, **call
    )
    assert together.captions == apart.captions
    assert together.seeds == apart.seeds
    number = call["num_captions_per_image"]
    for row in range(3):
        own = seeds(*range(row * count, (row + 1) * count)) if count > 1 else None
        alone = caption(tokens=tokens_of(3)[row : row + 1], generator=own, **call)
        assert alone.captions == together.captions[row * number : (row + 1) * number]


def test_a_seed_of_the_output_writes_the_caption_again(caption):
    output = caption(tokens=tokens_of(1), strategy="best_of", num_candidates=5, num_captions_per_image=2)
    for text, seed in zip(output.captions, output.seeds):
        assert caption(tokens=tokens_of(1), strategy="sample", generator=seeds(seed)).captions == [text]


def test_best_of_ranks_by_the_picture_or_by_the_caption(caption):
    call = {"tokens": tokens_of(1), "strategy": "best_of", "num_candidates": 6, "num_captions_per_image": 6}
    by_image = caption(**call, generator=seeds(*range(6)))
    losses = image_losses(caption.transformer, tokens_of(1).expand(6, -1, -1), by_image.token_ids)
    torch.testing.assert_close(torch.tensor(by_image.scores), -losses)
    by_caption = caption(**call, generator=seeds(*range(6)), rank_by="caption")
    for output in (by_image, by_caption):
        count = len(set(output.captions))
        assert output.scores[:count] == sorted(output.scores[:count], reverse=True)
    assert set(by_image.captions) == set(by_caption.captions)
    assert by_image.captions != by_caption.captions


def test_captions_drawn_twice_come_after_all_others(caption):
    call = {"strategy": "best_of", "num_candidates": 12, "num_captions_per_image": 12}
    output = caption(tokens=tokens_of(1), **call, top_k=3, max_length=1, end="length", generator=seeds(*range(12)))
    texts = [tuple(ids) for ids in output.token_ids]
    count = len(set(texts))
    assert 1 < count < 12
    assert len(set(texts[:count])) == count
    assert output.scores[:count] == sorted(output.scores[:count], reverse=True)


def test_a_full_stop_ends_a_caption_and_is_no_part_of_it(caption):
    output = caption(
        tokens=tokens_of(1), strategy="sample", num_captions_per_image=60, generator=seeds(*range(60)), max_length=30
    )
    stops = set(caption.tokenizer.convert_tokens_to_ids([".", "。"]))
    assert not any(stops & set(ids) for ids in output.token_ids)
    assert len({len(ids) for ids in output.token_ids}) > 1
    free = caption(tokens=tokens_of(1), end="length", strategy="sample", num_captions_per_image=60, max_length=30)
    assert any(stops & set(ids) for ids in free.token_ids)


def test_a_caption_without_an_end_is_cut_where_the_picture_is_most_likely(caption):
    whole = caption(tokens=tokens_of(2), end="length", max_length=12)
    cut = caption(tokens=tokens_of(2), end="likelihood", max_length=12)
    tokenizer = caption.tokenizer
    for row in range(2):
        ids, shorter = whole.token_ids[row], cut.token_ids[row]
        assert ids[: len(shorter)] == shorter
        pieces = tokenizer.convert_ids_to_tokens(ids)
        lengths = [
            n
            for n in range(1, 13)
            if (n == 12 or pieces[n].startswith("▁")) and any(one.isalnum() for one in pieces[n - 1])
        ]
        losses = image_losses(
            caption.transformer, tokens_of(2)[row : row + 1].expand(len(lengths), -1, -1), [ids[:n] for n in lengths]
        )
        assert len(shorter) == lengths[int(losses.argmin())]


def test_texts_that_are_complete_are_not_cut(caption, monkeypatch):
    ids = caption.tokenizer.encode("a cat on a blue background")
    written = [[WrittenText(ids, [-1.0] * 7, True)]]
    monkeypatch.setattr(caption, "_write", lambda *args: written)
    assert caption(tokens=tokens_of(1)).captions == ["a cat on a blue background"]


@torch.no_grad()
def test_image_losses_are_those_of_text_to_image(caption):
    texts = [caption.tokenizer.encode(text) for text in ("a cat", "a tiger on a blue background", "a red car")]
    losses = image_losses(caption.transformer, tokens_of(3), texts, text_attention_bias=1.4, max_batch_size=2)
    for row in range(3):
        tokens = tokens_of(3)[row].flatten()
        sequence = text_to_image([texts[row]], caption.layout, tokens[None])
        logits = caption.transformer(
            sequence.input_ids, sequence.position_ids, sequence.attention_mask, sequence.text_mask, 1.4
        ).logits[0, -17:-1]
        expected = torch.nn.functional.cross_entropy(logits, tokens)
        torch.testing.assert_close(losses[row], expected, atol=1e-5, rtol=1e-5)


def test_scores_are_caption_losses_of_pairs(caption):
    texts = ["a cat", "一只老虎,红色背景。", "a red car"]
    expected = caption_losses(caption.transformer, caption.tokenizer, tokens_of(3), texts)
    for loss in (caption.score, caption.caption_loss):
        torch.testing.assert_close(loss(None, texts, tokens=tokens_of(3)), expected)
    images = [picture(seed=seed) for seed in range(3)]
    pairs = caption.score(images, texts, max_batch_size=2)
    for row in range(3):
        assert caption.score(images[row], texts)[row] == pytest.approx(pairs[row].item(), abs=1e-5)
        assert caption.score(images, texts[row])[row] == pytest.approx(pairs[row].item(), abs=1e-5)
    other = caption.score(images[0], "a cat", languages=["zh"])
    assert other.item() != pytest.approx(pairs[0].item(), abs=1e-4)


def test_tuples(caption):
    captions, scores, token_ids = caption(tokens=tokens_of(2), return_dict=False)
    assert len(captions) == len(scores) == len(token_ids) == 2
    assert len(caption(tokens=tokens_of(2), strategy="sample", return_dict=False)) == 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({}, ValueError, "Give either `image` or `tokens`"),
        ({"image": "cat.png"}, TypeError, "`image` must be a PIL image"),
        ({"tokens": [1]}, TypeError, "`tokens` must be a torch tensor"),
        ({"tokens": tokens_of(1)[:, :3]}, ValueError, "`tokens` must have the shape"),
        ({"tokens": tokens_of(1) + NUM_IMAGE_TOKENS}, ValueError, "`tokens` must be image codes"),
        ({"language": "de"}, ValueError, r"`language` must be one of \('en', 'zh'\), but is 'de'"),
        ({"strategy": "nucleus"}, ValueError, "`strategy` must be one of"),
        ({"end": "stop"}, ValueError, "`end` must be one of"),
        ({"rank_by": "clip"}, ValueError, "`rank_by` must be one of"),
        ({"temperature": 0}, ValueError, r"`temperature` must be a number from 1e-06 to 1e\+06, but is 0"),
        ({"max_length": 31}, ValueError, "`max_length` may be 30 with this model"),
        ({"max_length": 0}, ValueError, "`max_length` must be a whole number"),
        ({"num_captions_per_image": 2}, ValueError, "may be 1 with `strategy='greedy'`"),
        ({"num_captions_per_image": 5, "strategy": "beam"}, ValueError, "may be 4 with `strategy='beam'`"),
        ({"strategy": "sample", "generator": [1]}, ValueError, "`generator` must be one generator"),
    ],
)
def test_arguments_that_cannot_be_used_are_errors(caption, call, error, message):
    given = call if {"tokens", "image"} & set(call) or not call else {"tokens": tokens_of(1), **call}
    with pytest.raises(error, match=message):
        caption(**given)


@pytest.mark.parametrize(
    "prompt, call, message",
    [
        ("", {}, "`prompt` must not be empty"),
        (["a", "b"], {}, r"one, or one per picture \(3\)"),
        ("a cat " * 40, {}, "must have 1 to 30 tokens"),
        ("a cat", {"languages": ["en"]}, "`languages` must be one of"),
        ("a cat", {"languages": ["de"] * 3}, "`languages` must be one of"),
        ("a cat", {"max_batch_size": 0}, "`max_batch_size` must be a whole number"),
    ],
)
def test_pairs_that_cannot_be_scored_are_errors(caption, prompt, call, message):
    with pytest.raises(ValueError, match=message):
        caption.score(None, prompt, tokens=tokens_of(3), **call)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_what_is_set_for_decoding_holds_for_captions_and_pipelines_made_of_this_one(pipe, strategy, monkeypatch):
    used, find = [], Decoding.decoder
    monkeypatch.setattr(Decoding, "decoder", lambda *arguments: used.append(find(*arguments)) or used[-1])
    monkeypatch.setattr(decoders, "_compiled_prediction", lambda device_type: decoders._predict)
    first = CogView2Pipeline.from_pipe(pipe)
    first.set_decoding(compile=True)
    captions = CogView2CaptionPipeline.from_pipe(first)
    captions(tokens=tokens_of(1), strategy=strategy, max_length=3)
    captions.set_decoding(fused=False)
    captions(tokens=tokens_of(1), strategy=strategy, max_length=3)
    assert [type(decoder) for decoder in used] == [StaticDecoder, Decoder]
