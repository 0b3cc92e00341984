"""The transformer against the original: norms, attention, logits of every task."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.generation.cache import KeyValueCache
from cogview_pipelines.models.cogview.modeling_cogview import RelaxedLayerNorm
from cogview_pipelines.models.cogview.sequences import (
    caption,
    fine_positions,
    image_positions,
    restarted_positions,
    super_resolution,
    text_to_image,
)
from cogview_pipelines.models.layers import pb_relaxed_attention
from cogview_pipelines.ops.gelu import gelu

from ..comparing import assert_close, assert_logits, assert_same, assert_same_decisions, cases, longs, run


def split(ids, layout):
    """Texts and image codes of a sequence, in order."""
    ids = [int(index) for index in ids]
    text = [index for index in ids if layout.num_image_tokens <= index < layout.command_token_id]
    return text, torch.tensor([[index for index in ids if 0 <= index < layout.num_image_tokens]])


@torch.no_grad()
def logits_of(model, ids, positions, mask=None):
    """Logits over the whole vocabulary, `(length, tokens)`, on the CPU."""
    return run(model.forward, ids, positions, mask, full_vocabulary=True).logits[0]


def assert_decisions(logits, data, num_image_tokens, prefix="", image=True):
    assert_same_decisions(logits.argmax(-1), data[f"{prefix}argmax"], data[f"{prefix}margin"])
    assert_close(logits.logsumexp(-1), data[f"{prefix}logsumexp"])
    if image:
        image_argmax = logits[:, :num_image_tokens].argmax(-1)
        assert_same_decisions(image_argmax, data["img_argmax"], data["img_margin"])


def test_relaxed_norms_are_the_originals(arrays):
    data = {key: torch.from_numpy(value) for key, value in arrays("norm_attention").items()}
    norms = {
        scale: RelaxedLayerNorm(data["ln_weight"].shape[0], 1e-5, scale) for scale in ("tensor", "sequence", None)
    }
    for norm in norms.values():
        norm.load_state_dict({"weight": data["ln_weight"], "bias": data["ln_bias"]})
    for case in cases(data, "_ordinary"):
        assert_close(norms["tensor"](data[f"{case}_in"]).detach(), data[f"{case}_out"], 1e-4, case)
        assert_close(norms[None](data[f"{case}_in"]).detach(), data[f"{case}_ordinary"], 1e-4, case)
    alone = data["ln_batch_outlier_row0_alone"]
    in_batch = norms["sequence"](data["ln_batch_outlier_in"]).detach()[:1]
    assert_close(in_batch, alone, 1e-4)  # a batch does not matter to ours by default
    inputs = data["ln_grad_in"].clone().requires_grad_()
    norms["tensor"](inputs).backward(data["ln_grad_up"])
    assert_close(inputs.grad, data["ln_grad"], 1e-4)


def test_attention_is_the_originals_with_and_without_relaxation(arrays):
    data = {key: torch.from_numpy(value) for key, value in arrays("norm_attention").items()}
    bias = torch.zeros(data["mask"].shape).masked_fill(data["mask"] == 0, torch.finfo(torch.float32).min / 2)
    inputs = data["q"], data["k"], data["v"]
    assert_close(F.scaled_dot_product_attention(*inputs, bias), data["attention_out"], 1e-5)
    assert_close(pb_relaxed_attention(*inputs, bias, 0.0, 32.0), data["pbrelax_out"], 1e-4)


def test_gelu_is_the_originals(arrays):
    data = arrays("norm_attention")
    assert_close(gelu(torch.from_numpy(data["gelu_in"])), data["gelu_out"], 1e-5)


def test_text_to_image_is_the_originals(transformer, arrays):
    data, layout = arrays("t2i"), transformer.config.layout
    text, codes = split(data["tokens"], layout)
    context, sequence = text_to_image([text], layout), text_to_image([text], layout, codes)
    assert_same(sequence.input_ids[0], data["tokens"])
    assert_same(sequence.position_ids[0], data["position_ids"])
    assert_same(sequence.attention_mask[0].sum(-1), data["mask_row_sums"])
    assert context.input_ids.shape[1] == data["context_length"]
    assert_same(
        torch.cat([context.position_ids, image_positions(context, codes.shape[1])], 1)[0], data["position_ids"]
    )
    logits = logits_of(transformer, sequence.input_ids, sequence.position_ids, sequence.attention_mask)
    assert_logits(logits[longs(data["logit_positions"])], data["logits"])
    assert_decisions(logits, data, layout.num_image_tokens)
    # without a mask attention is causal by itself
    assert_close(logits_of(transformer, sequence.input_ids, sequence.position_ids), logits, 1e-4)


@torch.no_grad()
def test_hidden_states_are_the_originals(transformer, arrays):
    data = arrays("t2i")
    output = run(
        transformer.forward, longs(data["tokens"])[None], longs(data["position_ids"])[None], output_hidden_states=True
    )
    states = torch.cat(output.hidden_states)[:, longs(data["logit_positions"])]
    assert_close(states, data["hidden_rows"])


def test_super_resolution_is_the_originals(transformer, arrays):
    data, layout = arrays("super_resolution"), transformer.config.layout
    text, codes = split(data["tokens"], layout)
    coarse, fine = codes[:, : layout.coarse_length], codes[:, layout.coarse_length :]
    context = super_resolution([text], coarse, layout)
    assert_same(context.input_ids[0], data["query_ids"][: int(data["context_length"])])
    positions = torch.cat([context.position_ids[0], fine_positions(layout)])
    assert_same(positions, data["inference_position_ids"])
    ids = torch.cat([context.input_ids, fine], 1)
    assert_same(ids[0], data["tokens"])
    assert_same(restarted_positions(ids, layout)[0], data["training_position_ids"])
    logits = logits_of(transformer, ids, positions[None])
    assert_logits(logits[longs(data["logit_positions"])], data["logits"])
    assert_decisions(logits, data, layout.num_image_tokens)
    logits = logits_of(transformer, ids, restarted_positions(ids, layout))
    assert_logits(logits[longs(data["logit_positions"])], data["logits_training_pos"])
    assert_decisions(logits, data, layout.num_image_tokens, "training_", image=False)


def test_positions_start_again_at_the_first_second_picture_and_stop_at_the_table(transformer, arrays):
    data = arrays("training")
    ours = restarted_positions(longs(data["finetune_tokens"]), transformer.config.layout)
    assert_same(ours, data["finetune_position_ids"])


@torch.no_grad()
def test_scores_of_captions_are_the_originals(transformer, arrays):
    data, layout = arrays("caption"), transformer.config.layout
    texts, codes = zip(*(split(ids, layout) for ids in data["sequences"]))
    sequence = caption(torch.cat(codes), layout, texts)
    assert_same(sequence.input_ids, data["sequences"])
    output = run(transformer.forward, sequence.input_ids, sequence.position_ids, full_vocabulary=True)
    labelled = sequence.labels >= 0
    assert_same(labelled.sum(1), [len(text) for text in texts])
    scores = output.logits[..., layout.num_image_tokens :].log_softmax(-1)  # image codes are out of the question
    chosen = scores.gather(-1, (sequence.labels - layout.num_image_tokens).clamp(0)[..., None])[..., 0]
    assert_close(chosen[labelled].view(len(texts), -1), data["token_logprob"])
    assert_close((chosen * labelled).sum(1), data["scores"])


@pytest.fixture(scope="module")
def with_outlier(fixture_folder, notes, arrays, device):
    """The original's norms, and ours by default, in a model with one large embedding."""
    from .conftest import load_transformer

    models = {}
    for scale in ("tensor", "sequence"):
        models[scale] = load_transformer(fixture_folder, notes, norm_scale=scale).to(device)
        with torch.no_grad():
            models[scale].word_embeddings.weight[int(arrays("outlier")["outlier_id"]), 3] = 400
    return models


@torch.no_grad()
def test_an_outlier_changes_the_whole_tensor_as_in_the_original(with_outlier, arrays):
    data = arrays("outlier")
    tokens = torch.stack([longs(data["tokens"]), longs(data["second_row"])])
    positions = torch.arange(tokens.shape[1]).expand(2, -1)
    step = -(-with_outlier["tensor"].config.vocab_size // data["logits_sub"].shape[1])
    rows = torch.linspace(0, tokens.shape[1] - 1, len(data["logits_sub"])).round().long()

    def some(model, *which):
        output = run(model.forward, tokens[list(which)], positions[: len(which)], full_vocabulary=True)
        return output.logits[:, rows, ::step]

    assert_close(some(with_outlier["tensor"], 0)[0], data["logits_sub"])
    assert_close(some(with_outlier["tensor"], 0, 1)[1], data["second_in_batch_sub"])
    assert_close(some(with_outlier["tensor"], 1)[0], data["second_alone_sub"])
    assert np.abs(data["second_in_batch_sub"] - data["second_alone_sub"]).max() > 0.01
    assert_close(some(with_outlier["sequence"], 0, 1)[1], data["second_alone_sub"])


@torch.no_grad()
def test_cached_pieces_have_largest_values_of_their_own_as_in_the_original(with_outlier, arrays, device):
    data, model = arrays("outlier"), with_outlier["tensor"]
    tokens = longs(data["tokens"])[None].to(device)
    positions = torch.arange(tokens.shape[1], device=device)[None]
    num_rows = len(data["logits_cached_sub"])
    first = (tokens.shape[1] - 1) * (len(data["logits_sub"]) - num_rows) // (len(data["logits_sub"]) - 1)
    cache = KeyValueCache(model.config, 1, tokens.shape[1], torch.float32, device)
    model(tokens[:, :first], positions[:, :first], cache=cache)
    logits = model(tokens[:, first:], positions[:, first:], cache=cache, full_vocabulary=True).logits[0].cpu()
    rows = torch.linspace(0, len(logits) - 1, num_rows).round().long()
    step = -(-model.config.vocab_size // data["logits_cached_sub"].shape[1])
    assert_close(logits[rows, ::step], data["logits_cached_sub"])
