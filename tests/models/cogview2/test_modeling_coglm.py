"""`CogLMModel`: attention, caches, contexts, labels, starting from another model, and files."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.modeling_coglm import (
    CogLMCache,
    CogLMConfig,
    CogLMModel,
    attention_bias,
    pb_relaxed_attention,
)
from cogview_pipelines.models.cogview2.sequences import (
    caption,
    direct_super_resolution,
    iterative_super_resolution,
    text_to_image,
)

from ...utils import (
    BOI,
    FINE_GRID,
    IMAGE_GRID,
    MAX_TEXT_TOKENS,
    NUM_IMAGE_TOKENS,
    START_OF_CHINESE,
    START_OF_ENGLISH,
    VOCAB_SIZE,
    make_coglm,
    make_image_tokens,
    make_texts,
)

KINDS = (None, "direct", "iterative")
CANVAS_LENGTH = FINE_GRID[0] * FINE_GRID[1]
MIXED_LENGTHS = [3, 0, 7, 1]


def text_to_image_arguments(model, lengths=MIXED_LENGTHS, bias=1.4):
    texts, image = make_texts(lengths), make_image_tokens(len(lengths))
    sequence = text_to_image(texts, model.config.layout, image)
    return {
        "input_ids": sequence.input_ids,
        "position_ids": sequence.position_ids,
        "attention_mask": sequence.attention_mask,
        "text_mask": sequence.text_mask,
        "text_attention_bias": bias,
    }


def make_context(model, texts, seed=0):
    """The sequence that the canvas of a super-resolution model sees."""
    slots = model.config.num_text_slots
    if model.config.super_resolution == "iterative":
        return iterative_super_resolution(texts, slots)
    return direct_super_resolution(texts, make_image_tokens(len(texts), seed=seed), slots, model.config.layout)


def context_arguments(sequence):
    return {
        "input_ids": sequence.input_ids,
        "position_ids": sequence.position_ids,
        "attention_mask": sequence.attention_mask,
        "key_mask": sequence.key_mask,
    }


def make_arguments(model, lengths=MIXED_LENGTHS):
    """Arguments of one forward pass of a model of any kind."""
    if model.config.super_resolution is None:
        return text_to_image_arguments(model, lengths)
    sequence = make_context(model, make_texts(lengths))
    canvas = make_image_tokens(len(lengths), CANVAS_LENGTH, seed=1)
    canvas[:, ::3] = BOI
    return {**context_arguments(sequence), "canvas_ids": canvas}


def dense_reference(model, input_ids, position_ids, attention_mask, text_mask, text_attention_bias):
    """The transformer written out for one sequence, in float64: all logits of the image tokens."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    scores_bias = text_attention_bias * text_mask.double()
    scores_bias = scores_bias.masked_fill(~attention_mask, -math.inf)

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = state["word_embeddings.weight"][input_ids] + state["position_embeddings.weight"][position_ids]
    for layer in range(model.config.num_hidden_layers):
        name = f"layers.{layer}"
        projected = linear(norm(x, f"{name}.attention_layernorm"), f"{name}.attention.query_key_value")
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in projected.split(width, -1))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(width // heads) + scores_bias
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        x = x + norm(linear(attended, f"{name}.attention.dense"), f"{name}.attention_output_layernorm")
        inner = linear(norm(x, f"{name}.mlp_layernorm"), f"{name}.mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + norm(linear(inner, f"{name}.mlp.dense_4h_to_h"), f"{name}.mlp_output_layernorm")
    return norm(x, "final_layernorm") @ state["word_embeddings.weight"][:NUM_IMAGE_TOKENS].T


# The dense transformer


@torch.no_grad()
def test_forward_is_the_sandwich_transformer_written_out():
    model = make_coglm()
    arguments = text_to_image_arguments(model, [5])
    one = {name: value[0] if torch.is_tensor(value) else value for name, value in arguments.items()}
    expected = dense_reference(model, **one)
    torch.testing.assert_close(model(**arguments).logits[0].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_of_a_batch_changes_no_real_row():
    model = make_coglm()
    together = model(**text_to_image_arguments(model)).logits
    for row, text in enumerate(make_texts(MIXED_LENGTHS)):
        image = make_image_tokens(len(MIXED_LENGTHS))[row : row + 1]
        alone = text_to_image([text], model.config.layout, image)
        logits = model(alone.input_ids, alone.position_ids, alone.attention_mask, alone.text_mask, 1.4).logits
        torch.testing.assert_close(together[row, -logits.shape[1] :], logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ids_and_positions_of_padding_do_not_matter():
    model = make_coglm()
    arguments = text_to_image_arguments(model)
    expected = model(**arguments).logits
    padding = torch.arange(max(MIXED_LENGTHS)) < max(MIXED_LENGTHS) - torch.tensor(MIXED_LENGTHS)[:, None]
    ids, positions = arguments["input_ids"].clone(), arguments["position_ids"].clone()
    ids[:, : padding.shape[1]][padding] = 77
    positions[:, : padding.shape[1]][padding] = 9
    changed = model(**{**arguments, "input_ids": ids, "position_ids": positions}).logits
    real = F.pad(~padding, (0, ids.shape[1] - padding.shape[1]), value=True)
    assert torch.equal(changed[real], expected[real])
    assert not torch.equal(changed[~real], expected[~real])


@torch.no_grad()
def test_captions_of_a_batch_score_as_each_alone():
    model, image, texts = make_coglm(), make_image_tokens(3), make_texts([5, 2, 4])
    starts = [START_OF_ENGLISH, START_OF_CHINESE, START_OF_ENGLISH]

    def losses(rows):
        sequence = caption(
            image[rows], [starts[row] for row in rows], model.config.layout, [texts[row] for row in rows]
        )
        arguments = (sequence.input_ids, sequence.position_ids, sequence.attention_mask)
        logits = model(*arguments, full_vocabulary=True).logits
        return F.cross_entropy(logits.transpose(1, 2), sequence.labels, reduction="none").sum(1)

    alone = torch.cat([losses([row]) for row in range(3)])
    torch.testing.assert_close(losses([0, 1, 2]), alone, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pb_relaxation_alpha", [None, 8.0])
def test_decoding_with_a_cache_equals_one_whole_forward(pb_relaxation_alpha):
    model = make_coglm(pb_relaxation_alpha=pb_relaxation_alpha)
    whole = text_to_image_arguments(model)
    expected = model(**whole).logits
    length, start = whole["input_ids"].shape[1], max(MIXED_LENGTHS) + 1
    cache = CogLMCache(model.config, len(MIXED_LENGTHS), length, model.dtype, model.device)
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
    cache = CogLMCache(model.config, 2, length + 5, model.dtype, model.device)
    bias = attention_bias(whole["attention_mask"], whole["text_mask"], 1.4, torch.float32)[:, 0]
    model(whole["input_ids"][:, :5], whole["position_ids"][:, :5], bias[:, :5, :5], cache=cache)
    for slot in range(5, length):
        step = CogLMCache.at_slot(cache.layers, torch.tensor([slot]), length + 2)
        seen = F.pad(bias[:, slot : slot + 1], (0, 2), value=torch.finfo(torch.float32).min / 2)
        one = slice(slot, slot + 1)
        logits = model(whole["input_ids"][:, one], whole["position_ids"][:, one], seen, cache=step).logits
        torch.testing.assert_close(logits, expected[:, one], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_repeated_cache_continues_every_copy_alike():
    model = make_coglm()
    whole = text_to_image_arguments(model, [4, 2])
    length = whole["input_ids"].shape[1]
    cache = CogLMCache(model.config, 2, length, model.dtype, model.device)
    context = {
        name: value if not torch.is_tensor(value) else value[:, :5] if name != "attention_mask" else value[:, :5, :5]
        for name, value in whole.items()
    }
    model(**context, cache=cache)
    cache = cache.repeat_interleave(3)
    rest = {name: value.repeat_interleave(3, 0) for name, value in whole.items() if torch.is_tensor(value)}
    logits = model(
        rest["input_ids"][:, 5:],
        rest["position_ids"][:, 5:],
        rest["attention_mask"][:, 5:],
        rest["text_mask"],
        1.4,
        cache=cache,
    ).logits
    expected = model(**whole).logits[:, 5:].repeat_interleave(3, 0)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_text_attention_bias_is_added_to_the_visible_text_keys_only():
    model = make_coglm()
    arguments = text_to_image_arguments(model)
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
def test_text_attention_bias_moves_the_output_only_where_there_is_text():
    model = make_coglm()
    with_bias = model(**text_to_image_arguments(model, bias=1.4)).logits
    without = model(**text_to_image_arguments(model, bias=0.0)).logits
    image = slice(max(MIXED_LENGTHS), None)
    for row, length in enumerate(MIXED_LENGTHS):
        same = torch.equal(with_bias[row, image], without[row, image])
        assert same == (length == 0)


@torch.no_grad()
def test_an_empty_text_leaves_image_rows_to_themselves():
    model = make_coglm()
    logits = model(**text_to_image_arguments(model, [0])).logits
    assert logits.shape == (1, 17, NUM_IMAGE_TOKENS)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.5, 16.0, 181.0])
def test_pb_relaxation_gives_plain_attention(alpha):
    plain, relaxed = make_coglm(), make_coglm(pb_relaxation_alpha=alpha)
    arguments = text_to_image_arguments(plain)
    torch.testing.assert_close(relaxed(**arguments).logits, plain(**arguments).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_pb_relaxation_holds_scores_that_overflow_half_precision():
    """Scores of about 2e5 are beyond float16; divided by alpha they are not."""
    query = torch.full((1, 1, 4, 16), 220.0, dtype=torch.float16)
    key = query * torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float16)[:, None]
    value = torch.eye(4, dtype=torch.float16)[None, None]
    assert not (query @ key.transpose(-1, -2) / 4).isfinite().all()
    output = pb_relaxed_attention(query, key, value, None, 0.0, 64.0)
    assert torch.equal(output, value[:, :, :1].expand_as(value))


def test_without_an_attention_mask_every_row_sees_every_key():
    model = make_coglm()
    ids = make_image_tokens(1, 6)
    positions = torch.arange(6)[None]
    everything = torch.ones(1, 6, 6, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids, positions, everything).logits
        torch.testing.assert_close(model(ids, positions).logits, expected, atol=1e-6, rtol=1e-6)


# Logits, labels, states


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_some_positions_are_slices_of_all_logits(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    everywhere = model(**arguments).logits
    shared = torch.tensor([0, 5, 3])
    torch.testing.assert_close(model(**arguments, logits_positions=shared).logits, everywhere[:, shared])
    own = torch.stack([torch.tensor([row, 2 * row + 1]) for row in range(4)])
    expected = torch.stack([everywhere[row, own[row]] for row in range(4)])
    torch.testing.assert_close(model(**arguments, logits_positions=own).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_computes_the_positions_asked_for_only(kind):
    model = make_coglm(kind)
    arguments, rows = make_arguments(model), []
    model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model(**arguments, logits_positions=torch.tensor([0, 5, 3]))
    # of a context for a canvas, the last layer has but keys and values
    assert rows == ([3] if kind is None else [0, 3])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_can_be_computed_later_from_the_last_states(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    positions = torch.tensor([7, 2])
    output = model(**arguments, logits_positions=positions, output_logits=False)
    assert output.logits is None
    expected = model(**arguments, logits_positions=positions).logits
    assert torch.equal(model(last_hidden_state=output.last_hidden_state).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_image_logits_are_the_first_ones_of_the_full_vocabulary(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    some, every = model(**arguments).logits, model(**arguments, full_vocabulary=True).logits
    assert some.dtype == every.dtype == torch.float32
    assert every.shape[-1] == VOCAB_SIZE
    torch.testing.assert_close(some, every[..., :NUM_IMAGE_TOKENS])


@torch.no_grad()
def test_loss_is_the_mean_over_the_labelled_positions():
    model = make_coglm()
    texts = make_texts([3, 5])
    sequence = caption(make_image_tokens(2), [START_OF_ENGLISH] * 2, model.config.layout, texts)
    arguments = (sequence.input_ids, sequence.position_ids, sequence.attention_mask)
    output = model(*arguments, labels=sequence.labels, full_vocabulary=True)
    logits = model(*arguments, full_vocabulary=True).logits
    losses = [
        -logits[row, 16 + index].log_softmax(-1)[token]
        for row, text in enumerate(texts)
        for index, token in enumerate(text)
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    torch.testing.assert_close(output.logits, logits[sequence.labels != IGNORED_LABEL])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_loss_of_a_canvas_counts_its_labelled_cells(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    labels = torch.full((4, CANVAS_LENGTH), IGNORED_LABEL)
    labels[:, ::5] = make_image_tokens(4, labels[:, ::5].shape[1], seed=3)
    expected = F.cross_entropy(model(**arguments).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(**arguments, labels=labels).loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_of_the_returned_states_makes_the_logits(kind):
    model = make_coglm(kind)
    output = model(**make_arguments(model), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers
    torch.testing.assert_close(model.logits(output.hidden_states[-1]), output.logits)
    assert model(**make_arguments(model)).hidden_states is None


# The canvas


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_context_encoded_before_gives_the_same_canvas(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    expected = model(**arguments).logits
    canvas = arguments.pop("canvas_ids")
    encoded = model(**arguments)
    assert encoded.logits is None
    assert torch.equal(model(canvas_ids=canvas, context=encoded.context).logits, expected)
    repeated = encoded.context.repeat_interleave(2)
    twice = model(canvas_ids=canvas.repeat_interleave(2, 0), context=repeated).logits
    torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_ids_and_positions_of_context_padding_do_not_matter(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model, [2, 3])
    expected = model(**arguments).logits
    padding = ~arguments["key_mask"]
    assert padding.any()
    ids, positions = (arguments[name].masked_fill(padding, 7) for name in ("input_ids", "position_ids"))
    changed = model(**{**arguments, "input_ids": ids, "position_ids": positions}).logits
    torch.testing.assert_close(changed, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_the_canvas_of_one_image_does_not_depend_on_the_batch(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    together = model(**arguments).logits
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in arguments.items()}
        torch.testing.assert_close(model(**one).logits, together[row : row + 1], atol=1e-5, rtol=1e-5)


def changed_cells(model, arguments, **changes):
    """Which cells of a 12 x 12 canvas get other logits when arguments change."""
    before, after = model(**arguments).logits, model(**{**arguments, **changes}).logits
    return (before - after).abs().amax(-1).unflatten(1, FINE_GRID)[0] > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_canvas_cell_is_seen_through_the_window_of_each_layer(kind):
    """Two layers with a window of 5 rows and 3 columns reach 4 rows and 2 columns."""
    model = make_coglm(kind)
    arguments = make_arguments(model, [3])
    canvas = arguments["canvas_ids"].clone()
    canvas[0, 6 * 12 + 5] = (canvas[0, 6 * 12 + 5] + 1) % NUM_IMAGE_TOKENS
    expected = torch.zeros(FINE_GRID, dtype=torch.bool)
    expected[2:11, 3:8] = True
    assert torch.equal(changed_cells(model, arguments, canvas_ids=canvas), expected)


@torch.no_grad()
def test_a_low_resolution_token_is_seen_through_the_cross_window():
    """With one layer, a low-resolution cell is seen from the 3 x 3 cells of 3 x 3 in and around it."""
    model = make_coglm("direct", num_hidden_layers=1)
    arguments = make_arguments(model, [3])
    ids = arguments["input_ids"].clone()
    cell = model.config.num_text_slots + 2 * 4 + 3  # row 2, column 3: at the right border
    ids[0, cell] = (ids[0, cell] + 1) % NUM_IMAGE_TOKENS
    expected = torch.zeros(FINE_GRID, dtype=torch.bool)
    expected[3:12, 6:12] = True
    assert torch.equal(changed_cells(model, arguments, input_ids=ids), expected)


@torch.no_grad()
def test_direct_super_resolution_sees_text_through_the_low_resolution_tokens_only():
    texts = make_texts([3])
    other = [[text[0] + 1, *text[1:]] for text in texts]

    def change(num_layers):
        model = make_coglm("direct", num_hidden_layers=num_layers)
        arguments = make_arguments(model, [3])
        ids = make_context(model, other).input_ids
        assert not torch.equal(ids, arguments["input_ids"])
        return changed_cells(model, arguments, input_ids=ids)

    assert not change(num_layers=1).any()  # no text key stands under the softmax of a canvas cell
    assert change(num_layers=2).all()  # but low-resolution tokens have read the text


@torch.no_grad()
def test_iterative_super_resolution_sees_every_text_slot_from_every_cell():
    model = make_coglm("iterative", num_hidden_layers=1)
    arguments = make_arguments(model, [4])
    for slot in range(4):
        ids = arguments["input_ids"].clone()
        ids[0, slot] += 1
        assert changed_cells(model, arguments, input_ids=ids).all()


@torch.no_grad()
def test_iterative_super_resolution_of_an_empty_text_is_the_canvas_alone():
    model = make_coglm("iterative")
    arguments = make_arguments(model, [0])
    logits = model(**arguments).logits
    assert logits.isfinite().all()
    other = {**arguments, "input_ids": arguments["input_ids"] + 60}
    assert torch.equal(model(**other).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_canvas_that_is_all_unknown_differs_by_position(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model, [3])
    logits = model(**{**arguments, "canvas_ids": torch.full((1, CANVAS_LENGTH), BOI)}).logits
    assert logits.shape == (1, CANVAS_LENGTH, NUM_IMAGE_TOKENS)
    assert len(logits[0].round(decimals=3).unique(dim=0)) == CANVAS_LENGTH


# Training


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # the new name is not in all versions
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    def gradients(checkpoint):
        model = make_coglm(kind, hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        arguments = make_arguments(model)
        shape = arguments.get("canvas_ids", arguments["input_ids"]).shape
        labels = make_image_tokens(shape[0], shape[1], seed=2)
        model(**arguments, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    # of the last layer, the canvas sees only keys and values of the context
    unused = {f"layers.1.attention.dense.{name}" for name in ("weight", "bias")} if kind == "direct" else set()
    assert {name for name, gradient in plain.items() if gradient is None} == unused
    for name in set(plain) - unused:
        gradient = plain[name]
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    assert torch.equal(model(**arguments).logits, model(**arguments).logits)
    model.train()
    assert not torch.equal(model(**arguments).logits, model(**arguments).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_small_and_unbiased(kind):
    model = CogLMModel(make_coglm(kind, initializer_range=0.05).config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name


# Starting from another model


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_super_resolution_starts_from_the_transformer(kind):
    transformer = make_coglm(seed=3)
    model = CogLMModel.from_transformer(transformer, kind, FINE_GRID, kernel_size=(5, 3), num_text_slots=8)
    assert model.config.super_resolution == kind
    assert (model.config.fine_grid, model.config.kernel_size, model.config.num_text_slots) == (FINE_GRID, (5, 3), 8)
    own, given = model.state_dict(), transformer.state_dict()
    for name, value in given.items():
        assert torch.equal(own[name], value), name
        assert own[name].data_ptr() != value.data_ptr(), name
    added = set(own) - set(given)
    assert all("canvas_" in name for name in added)
    assert any("canvas_attention" in name for name in added) == (kind == "direct")
    for name in added - {"canvas_position_embeddings.weight"}:
        assert torch.equal(own[name], given[name.replace("canvas_attention", "attention")]), name
    positions = own["canvas_position_embeddings.weight"].unflatten(0, FINE_GRID)
    for row in range(FINE_GRID[0]):
        for column in range(FINE_GRID[1]):
            cell = (row // 3) * IMAGE_GRID[1] + column // 3
            position = transformer.config.image_position + 1 + cell
            assert torch.equal(positions[row, column], given["position_embeddings.weight"][position])


def test_text_slots_follow_the_kind_of_super_resolution_by_default():
    transformer = make_coglm()
    assert CogLMModel.from_transformer(transformer, "direct", FINE_GRID).config.num_text_slots == 96
    assert CogLMModel.from_transformer(transformer, "iterative", FINE_GRID).config.num_text_slots == 16


def shared_pair():
    transformer = make_coglm(seed=3)
    settings = {"kernel_size": (5, 3), "cross_kernel_size": (3, 3), "num_text_slots": MAX_TEXT_TOKENS}
    model = CogLMModel.from_transformer(transformer, "direct", FINE_GRID, shares_backbone=True, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "canvas_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return transformer, model.eval()


def test_a_shared_backbone_is_the_same_parameters():
    transformer, model = shared_pair()
    lent, own = dict(transformer.named_parameters()), dict(model.named_parameters())
    for name, parameter in lent.items():
        assert own[name] is parameter, name
    assert all("canvas_" in name for name in set(own) - set(lent))
    arguments = make_arguments(model)
    with torch.no_grad():
        before = model(**arguments).logits
        transformer.word_embeddings.weight.mul_(2)
        assert not torch.equal(model(**arguments).logits, before)


@torch.no_grad()
def test_a_shared_backbone_computes_what_a_copy_computes():
    _, model = shared_pair()
    copy = make_coglm("direct")
    copy.load_state_dict(model.state_dict())
    arguments = make_arguments(model)
    assert torch.equal(model(**arguments).logits, copy(**arguments).logits)


@torch.no_grad()
def test_a_saved_model_that_shares_holds_only_the_canvas_weights(tmp_path):
    transformer, model = shared_pair()
    arguments = make_arguments(model)
    expected = model(**arguments).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {name for name, _ in model.named_parameters() if "canvas_" in name}
    loaded, report = CogLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with pytest.raises(ValueError, match=r"`shares_backbone`\). Lend it first"):
        loaded(**arguments)
    loaded.share_backbone(transformer)
    assert torch.equal(loaded.eval()(**arguments).logits, expected)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 64),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 2),
        ("vocab_size", 120),
        ("image_grid", (6, 6)),
        ("image_position", 33),
    ],
)
def test_a_backbone_of_another_shape_is_refused_and_changes_nothing(field, value):
    transformer, model = shared_pair()
    other = make_coglm(**{"max_position_embeddings": 80, field: value})
    own = getattr(model.config, field)
    with pytest.raises(ValueError, match=re.escape(f"must have `{field}` = {own} like this model, but has {value}.")):
        model.share_backbone(other)
    assert model.word_embeddings.weight is transformer.word_embeddings.weight
    assert model.layers[0].mlp.dense_h_to_4h.weight is transformer.layers[0].mlp.dense_h_to_4h.weight


@pytest.mark.parametrize("kind", [None, "iterative"])
def test_only_direct_super_resolution_shares(kind):
    model = make_coglm(kind)
    with pytest.raises(ValueError, match=f"`share_backbone` is for `super_resolution='direct'`, .* has {kind!r}"):
        model.share_backbone(make_coglm())
    assert not model.config.shares_backbone


@pytest.mark.parametrize("num_layers", [1, 3])
def test_super_resolution_of_another_depth_is_an_error(num_layers):
    with pytest.raises(ValueError, match=r"`config` must keep the layers of `transformer`, but layers\.[12]\."):
        CogLMModel.from_transformer(make_coglm(), "direct", FINE_GRID, num_hidden_layers=num_layers)


# Files


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_output(kind, tmp_path):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    expected = model(**arguments).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "coglm"
    loaded, report = CogLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not loaded.training
    assert torch.equal(loaded(**arguments).logits, expected)
    assert loaded.config.to_dict() == model.config.to_dict() | {
        name: loaded.config.to_dict()[name] for name in ("_name_or_path", "dtype") if name in loaded.config.to_dict()
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_in_the_dtype_asked_for(kind, tmp_path):
    model = make_coglm(kind)
    model.save_pretrained(tmp_path)
    loaded = CogLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    logits = loaded(**make_arguments(model)).logits
    assert logits.dtype == torch.float32
    expected = model(**make_arguments(model)).logits
    assert F.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.99
    loaded.save_pretrained(tmp_path / "half")
    again = CogLMModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**make_arguments(model)).logits, logits)


def test_the_model_is_one_of_transformers():
    model = make_coglm()
    assert isinstance(model, PreTrainedModel)
    assert model.get_input_embeddings() is model.word_embeddings
    embedding = torch.nn.Embedding(VOCAB_SIZE, 32)
    model.set_input_embeddings(embedding)
    assert model.word_embeddings is embedding


def test_the_default_configuration_is_the_released_one():
    config = CogLMConfig()
    assert (config.layout.image_length, config.canvas_length) == (400, 3600)
    assert config.layout.image_positions[-1] == 912
    assert config.intermediate_size == 4 * config.hidden_size
    assert CogLMConfig(super_resolution="direct").num_text_slots == 96
    assert CogLMConfig(super_resolution="iterative").num_text_slots == 16


# Errors


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"super_resolution": "best"}, r"`super_resolution` must be one of .*'direct', 'iterative'.*, but is 'best'"),
        ({"hidden_size": 30}, "`hidden_size` must be a multiple of .*48.*, but is 30"),
        ({"shares_backbone": True}, "`shares_backbone` is for `super_resolution='direct'`"),
        ({"shares_backbone": True, "super_resolution": "iterative"}, "`shares_backbone` is for"),
        (
            {"super_resolution": "direct", "fine_grid": (60, 50)},
            r"`fine_grid` must be a multiple of `image_grid` \(20, 20\), but is \(60, 50\)",
        ),
        ({"max_position_embeddings": 912}, "`max_position_embeddings` must be above 912 .*, but is 912"),
    ],
)
def test_impossible_configurations_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CogLMConfig(**fields)


def test_a_canvas_for_a_model_without_one_is_an_error():
    model = make_coglm()
    arguments = text_to_image_arguments(model, [2])
    with pytest.raises(ValueError, match=r"`canvas_ids` came, but this model has no canvas"):
        model(**arguments, canvas_ids=torch.zeros(1, CANVAS_LENGTH, dtype=torch.long))


def test_a_canvas_of_the_wrong_size_is_an_error():
    model = make_coglm("direct")
    arguments = make_arguments(model, [2])
    arguments["canvas_ids"] = arguments["canvas_ids"][:, 1:]
    with pytest.raises(ValueError, match=r"`canvas_ids` must have 144 positions, but has 143"):
        model(**arguments)


def test_the_context_must_come_once():
    model = make_coglm("iterative")
    arguments = make_arguments(model, [2])
    canvas = arguments.pop("canvas_ids")
    context = model(**arguments).context
    for wrong in ({**arguments, "context": context}, {}):
        with pytest.raises(ValueError, match="Give either `input_ids` or the `context`"):
            model(**wrong, canvas_ids=canvas)
