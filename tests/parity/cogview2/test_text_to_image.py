"""Text-to-image and caption scores against the original: sequences, logits, decisions."""

import re

import torch

from cogview_pipelines.generation.decoders import Decoding
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.generation.tokens import generate
from cogview_pipelines.models.cogview2 import sequences

from .conftest import (
    CLEAR_MARGIN,
    LOGITS_TOLERANCE,
    assert_close,
    assert_logits,
    assert_same,
    assert_same_decisions,
    assert_thinned,
    bools,
    longs,
    run,
    stored,
)


def forward(model, sequence, text_attention_bias, **kwargs):
    with torch.no_grad():
        return run(
            model,
            sequence.input_ids,
            sequence.position_ids,
            sequence.attention_mask,
            sequence.text_mask,
            text_attention_bias,
            **kwargs,
        )


def whole_sequence(model, data):
    text = data["text_ids"][: int(data["txt_len"])]
    return sequences.text_to_image([text], model.config.layout, longs(data["image_ids"])[None])


class Follow:
    """A sampler that writes given tokens and keeps the logits it is shown."""

    def __init__(self, tokens):
        self.tokens, self.logits = tokens, []

    def __call__(self, logits, noise):
        token = self.tokens[:, len(self.logits)]
        self.logits.append(logits.cpu())
        return token.to(logits.device)


def test_sequence_positions_mask_and_bias_are_the_originals(coglm, arrays):
    data = arrays("coglm_t2i")
    sequence, bias = whole_sequence(coglm, data), float(data["attn_plus"])
    assert_same(sequence.input_ids[0], data["seq"], "ids")
    assert_same(sequence.position_ids[0], data["position_ids"], "positions")
    assert_same(sequence.attention_mask[0], bools(data["attention_mask"]), "mask")
    ours = (sequence.text_mask[0] * bias).expand(len(data["seq"]), -1)
    assert_close(ours, data["log_attention_weights"], 1e-6, "bias")
    assert data["text_ids"][int(data["txt_len"])] == coglm.config.boi_token_id


def test_prompt_is_encoded_as_by_the_original(text_tokenizer, arrays):
    data = arrays("coglm_t2i")
    for prefix in ("", "greedy_"):
        text = str(data[f"{prefix}text"]).removesuffix("<start_of_image>")
        assert text_tokenizer.encode(text) == data[f"{prefix}text_ids"][: int(data[f"{prefix}txt_len"])].tolist()


def test_logits_and_decisions_are_the_originals(coglm, arrays):
    data = arrays("coglm_t2i")
    output = forward(coglm, whole_sequence(coglm, data), float(data["attn_plus"]), output_hidden_states=True)
    logits = output.logits[0]
    assert_logits(logits[longs(data["logit_positions"])], data["logits"], what="logits")
    assert_close(logits.logsumexp(-1), data["logsumexp"], what="logsumexp")
    assert_same_decisions(logits.argmax(-1), data["argmax"], data["margin"])
    names = [name for name in data if re.fullmatch(r"hidden_layer\d+", name)]
    for layer, name in enumerate(sorted(names)):
        assert_thinned(output.hidden_states[layer][0], data, name)


def test_cached_decoding_takes_the_original_decisions(coglm, arrays):
    data = arrays("coglm_t2i")
    layout, tokens = coglm.config.layout, longs(data["greedy_tokens"])[None]
    context = sequences.text_to_image([data["greedy_text_ids"][: int(data["greedy_txt_len"])]], layout)
    follow = Follow(tokens)
    written = generate(
        coglm,
        context,
        follow,
        torch.full_like(tokens, -1),
        layout.image_positions,
        text_attention_bias=float(data["attn_plus"]),
        decoding=Decoding(parallel=1),
    )
    assert_same(written, tokens)
    logits = torch.cat(follow.logits)
    assert_same_decisions(logits.argmax(-1), data["greedy_tokens"], data["greedy_margin"])
    start = int(data["greedy_txt_len"])
    assert_close(logits.logsumexp(-1), data["greedy_logsumexp"][start : start + len(logits)], what="logsumexp")


def test_full_forward_over_the_generated_picture_takes_the_original_decisions(coglm, arrays):
    data = arrays("coglm_t2i")
    start = int(data["greedy_txt_len"])
    tokens = longs(data["greedy_tokens"])[None]
    sequence = sequences.text_to_image([data["greedy_text_ids"][:start]], coglm.config.layout, tokens)
    assert_same(sequence.input_ids[0], data["greedy_seq"], "ids")
    logits = forward(coglm, sequence, float(data["attn_plus"])).logits[0]
    assert_close(logits.logsumexp(-1), data["greedy_logsumexp"], what="logsumexp")
    assert_same_decisions(logits[start:-1].argmax(-1), data["greedy_tokens"], data["greedy_margin"])


def test_greedy_pictures_are_the_originals(coglm, arrays):
    data = arrays("coglm_t2i")
    layout = coglm.config.layout
    context = sequences.text_to_image([data["greedy_text_ids"][: int(data["greedy_txt_len"])]], layout)
    tokens = generate(
        coglm,
        context,
        lambda logits, noise: logits.argmax(-1),
        torch.full((1, layout.image_length), -1),
        layout.image_positions,
        text_attention_bias=float(data["attn_plus"]),
    )
    # from the first unclear decision on, two correct programs may go different ways
    unclear = (torch.from_numpy(data["greedy_margin"]) <= CLEAR_MARGIN / 10).nonzero()[:, 0].tolist()
    end = unclear[0] if unclear else layout.image_length
    assert end > 50
    assert_same(tokens[0, :end], data["greedy_tokens"][:end])


def test_bias_and_bidirectional_text_make_a_difference(coglm, arrays):
    data = arrays("coglm_t2i")
    sequence = whole_sequence(coglm, data)
    positions, logits = longs(data["logit_positions"]), torch.from_numpy(data["logits"])
    without = forward(coglm, sequence, 0.0).logits[0, positions]
    assert (stored(without, logits) - logits).abs().max() > 100 * LOGITS_TOLERANCE
    sequence.attention_mask = sequence.attention_mask.tril()
    causal = forward(coglm, sequence, float(data["attn_plus"])).logits[0, positions]
    assert (stored(causal, logits) - logits).abs().max() > 100 * LOGITS_TOLERANCE


def caption(model, data, image, text):
    start = [int(data["start_of_chinese"])]
    return sequences.caption(longs(data["image_ids"][image : image + 1]), start, model.config.layout, [text])


def token_log_probabilities(model, sequence):
    logits = forward(model, sequence, 0.0, full_vocabulary=True).logits[0]
    scored = sequence.labels[0] != IGNORED_LABEL
    return logits.log_softmax(-1)[scored].gather(-1, sequence.labels[0][scored, None])[:, 0], scored


def test_caption_scores_are_the_originals(coglm, arrays):
    data = arrays("caption_score")
    for pair, score in enumerate(data["score"]):
        sequence = caption(coglm, data, pair, data[f"text_ids_{pair}"])
        assert_same(sequence.input_ids[0], data[f"seq_{pair}"], "ids")
        assert_same(sequence.position_ids[0], data[f"position_ids_{pair}"], "positions")
        assert_same(sequence.attention_mask[0], bools(data[f"attention_mask_{pair}"]), "mask")
        values, scored = token_log_probabilities(coglm, sequence)
        assert_same(scored[:-1], bools(data[f"loss_mask_{pair}"])[1:], "scored tokens")
        assert_close(values, data[f"token_logprob_{pair}"][scored[:-1].numpy()], what="log probabilities")
        assert abs(values.mean().item() - score) <= LOGITS_TOLERANCE
        loss = run(
            coglm,
            sequence.input_ids,
            sequence.position_ids,
            sequence.attention_mask,
            labels=sequence.labels,
            full_vocabulary=True,
        ).loss
        assert abs(-loss.item() - score) <= LOGITS_TOLERANCE


def test_captions_rank_pictures_as_the_original_does(coglm, arrays):
    data = arrays("caption_score")
    scores = torch.stack(
        [
            token_log_probabilities(coglm, caption(coglm, data, image, data["text_ids_0"]))[0].mean()
            for image in range(len(data["image_ids"]))
        ]
    )
    assert_close(scores, data["score_text0_all_images"])
    assert scores.argsort(descending=True).tolist() == data["order_best_first"].tolist()
