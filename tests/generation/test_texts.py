"""The loops that write texts, against the model's own probabilities and against trying everything."""

import itertools

import pytest
import torch

from cogview_pipelines.generation import decoders
from cogview_pipelines.generation.decoders import Decoder, Decoding, FusedDecoder, StaticDecoder
from cogview_pipelines.generation.sampling import sample_tokens
from cogview_pipelines.generation.texts import search_texts, write_texts
from cogview_pipelines.models.cogview2.sequences import caption
from cogview_pipelines.ops import native

from ..utils import START_OF_ENGLISH, VOCAB_SIZE, make_coglm, make_image_tokens

MODEL = make_coglm()
LAYOUT = MODEL.config.layout


def mask_of(*ids):
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[list(ids)] = True
    return mask


ALLOWED, ENDS = mask_of(*range(60, 72)), mask_of(61)


def contexts(count):
    return caption(make_image_tokens(count), [START_OF_ENGLISH] * count, LAYOUT)


def greedy(logits, noise):
    return logits.argmax(-1)


@torch.no_grad()
def log_probabilities(row, ids):
    """Of each token, from one whole forward, among those that are allowed."""
    image = make_image_tokens(row + 1)[row:]
    sequence = caption(image, [START_OF_ENGLISH], LAYOUT, [ids])
    logits = MODEL(sequence.input_ids, sequence.position_ids, sequence.attention_mask, full_vocabulary=True).logits[
        0, image.shape[1] : -1
    ]
    scores = []
    for step, index in enumerate(ids):
        allowed = ALLOWED if step else ALLOWED & ~ENDS
        scores.append(logits[step].masked_fill(~allowed, float("-inf")).log_softmax(-1)[index].item())
    return scores


def whole(text):
    return [*text.token_ids, 61] if text.is_complete else text.token_ids


@pytest.mark.parametrize("choose", [greedy, sample_tokens])
def test_log_probabilities_are_those_of_one_whole_forward(choose):
    texts = write_texts(MODEL, contexts(3), choose, ALLOWED, ENDS, 7, generator=torch.Generator().manual_seed(2))
    for row, text in enumerate(texts):
        assert len(text.log_probabilities) == len(whole(text))
        expected = log_probabilities(row, whole(text))
        torch.testing.assert_close(text.log_probabilities, expected, atol=1e-4, rtol=1e-4)


def test_greedy_takes_the_most_likely_allowed_token_at_each_step():
    for row, text in enumerate(write_texts(MODEL, contexts(2), greedy, ALLOWED, mask_of(), 5)):
        assert not text.is_complete
        for step in range(1, 5):
            best = max(
                (index for index in range(60, 72)),
                key=lambda index: log_probabilities(row, [*text.token_ids[:step], index])[-1],
            )
            assert text.token_ids[step] == best


def test_texts_hold_only_what_is_allowed_and_stop_at_their_end():
    texts = write_texts(
        MODEL, contexts(2), sample_tokens, ALLOWED, ENDS, 12, num_texts_per_context=20, generator=torch.Generator()
    )
    assert len(texts) == 40
    assert {index for text in texts for index in text.token_ids} <= set(range(60, 72)) - {61}
    assert {text.is_complete for text in texts} == {True, False}
    assert all(text.token_ids for text in texts)  # the first token is no end
    assert all(len(text.token_ids) == 12 for text in texts if not text.is_complete)


def test_a_text_depends_on_its_picture_and_seed_only():
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = write_texts(
        MODEL, contexts(2), sample_tokens, ALLOWED, ENDS, 9, num_texts_per_context=2, generator=generators
    )
    for index, text in enumerate(together):
        alone = write_texts(
            MODEL,
            contexts(2)[index // 2 : index // 2 + 1],
            sample_tokens,
            ALLOWED,
            ENDS,
            9,
            generator=[torch.Generator().manual_seed(index)],
        )
        assert alone[0].token_ids == text.token_ids


def test_a_wide_beam_finds_the_best_of_all_texts():
    allowed, ends, length = mask_of(61, 65, 70), ENDS, 3
    found = search_texts(MODEL, contexts(2), allowed, ends, length, num_beams=12)
    for row, texts in enumerate(found):
        everything = {}
        for count in range(1, length + 1):
            for ids in itertools.product((65, 70), repeat=count):
                if count < length:
                    everything[(*ids, 61)] = None
                else:
                    everything[ids] = None
        image = make_image_tokens(row + 1)[row:]
        for ids in everything:
            sequence = caption(image, [START_OF_ENGLISH], LAYOUT, [list(ids)])
            with torch.no_grad():
                logits = MODEL(
                    sequence.input_ids, sequence.position_ids, sequence.attention_mask, full_vocabulary=True
                ).logits[0, image.shape[1] : -1]
            scores = [
                logits[step].masked_fill(~(allowed if step else allowed & ~ends), float("-inf")).log_softmax(-1)[index]
                for step, index in enumerate(ids)
            ]
            everything[ids] = float(sum(scores) / len(ids))
        complete = {ids: score for ids, score in everything.items() if ids[-1] == 61}
        best = max(complete, key=complete.get)
        assert (*texts[0].token_ids, 61) == best
        assert texts[0].mean_log_probability == pytest.approx(complete[best], abs=1e-4)
        assert len(texts) == 12
        for text in texts:  # each with the score that the model gives it
            assert text.mean_log_probability == pytest.approx(everything[tuple(whole(text))], abs=1e-4)
        ordered = [text.mean_log_probability for text in texts if text.is_complete]
        assert ordered == sorted(ordered, reverse=True)


def test_one_beam_is_greedy():
    texts = write_texts(MODEL, contexts(3), greedy, ALLOWED, mask_of(), 6)
    found = search_texts(MODEL, contexts(3), ALLOWED, mask_of(), 6, num_beams=1)
    assert [text[0].token_ids for text in found] == [text.token_ids for text in texts]


def test_beams_of_a_picture_do_not_depend_on_its_batch():
    together = search_texts(MODEL, contexts(3), ALLOWED, ENDS, 8, num_beams=3)
    for row in range(3):
        alone = search_texts(MODEL, contexts(3)[row : row + 1], ALLOWED, ENDS, 8, num_beams=3)
        assert [text.token_ids for text in alone[0]] == [text.token_ids for text in together[row]]
        assert len({tuple(text.token_ids) for text in together[row]}) == 3


WAYS = {"plain": {"fused": False}, "fused": {}, "fixed": {"compile": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 5, 30])
@pytest.mark.parametrize("choose", [greedy, sample_tokens])
def test_texts_of_windows_are_those_of_one_by_one_in_no_more_passes(choose, size, way, monkeypatch):
    monkeypatch.setattr(decoders, "_compiled_prediction", lambda device_type: decoders._predict)

    def write(**decoding):
        passes = []
        texts = write_texts(
            MODEL,
            contexts(3),
            choose,
            ALLOWED,
            ENDS,
            12,
            num_texts_per_context=4,
            generator=[torch.Generator().manual_seed(seed) for seed in range(12)],
            decoding=Decoding(**decoding),
            on_pass=lambda: passes.append(1),
        )
        return texts, len(passes)

    if way == "fused" and native.library() is None:
        pytest.skip("the kernels are not built")
    expected, most = write(fused=False, parallel=1)
    assert most <= 11  # the first follows from the picture alone
    texts, passes = write(**WAYS[way], parallel=size)
    assert passes <= most
    for text, one_by_one in zip(texts, expected):
        assert (text.token_ids, text.is_complete) == (one_by_one.token_ids, one_by_one.is_complete)
        torch.testing.assert_close(text.log_probabilities, one_by_one.log_probabilities, atol=1e-4, rtol=1e-4)


def test_repeated_words_take_few_passes():
    model = make_coglm()
    with torch.no_grad():  # the next token hardly depends on what is read
        for embeddings in (model.word_embeddings, model.position_embeddings):
            embeddings.weight.mul_(0.01)
        model.final_layernorm.bias.mul_(100)
    passes = []
    arguments = (model, contexts(1), greedy, ALLOWED, mask_of(), 12)
    write_texts(*arguments, decoding=Decoding(parallel=6), on_pass=lambda: passes.append(1))
    assert len(passes) <= 3


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_the_same_however_steps_run(way, monkeypatch):
    monkeypatch.setattr(decoders, "_compiled_prediction", lambda device_type: decoders._predict)
    used, find = [], Decoding.decoder
    kinds = {"plain": Decoder, "fused": FusedDecoder, "fixed": StaticDecoder}

    def record(decoding, *arguments):
        used.append(find(decoding, *arguments))
        return used[-1]

    def texts(decoding):
        generator = torch.Generator().manual_seed(2)
        drawn = write_texts(
            MODEL,
            contexts(2),
            sample_tokens,
            ALLOWED,
            ENDS,
            6,
            num_texts_per_context=2,
            generator=generator,
            decoding=decoding,
        )
        searched = search_texts(MODEL, contexts(2), ALLOWED, ENDS, 6, num_beams=3, decoding=decoding)
        return [text.token_ids for text in [*drawn, *itertools.chain(*searched)]]

    if way == "fused" and native.library() is None:
        pytest.skip("the kernels are not built")
    expected = texts(Decoding(fused=False))
    monkeypatch.setattr(Decoding, "decoder", record)
    assert texts(Decoding(**WAYS[way])) == expected
    assert {type(decoder) for decoder in used} == {kinds[way]}


@torch.no_grad()
def test_a_16_bit_model_on_a_cpu_keeps_keys_and_values_of_texts_in_float32(monkeypatch):
    used, find = [], Decoding.decoder
    monkeypatch.setattr(Decoding, "decoder", lambda *arguments: used.append(find(*arguments)) or used[-1])
    model = make_coglm().to(torch.bfloat16)
    write_texts(model, contexts(1), greedy, ALLOWED, ENDS, 3)
    assert used[0].cache.dtype == torch.float32
