"""`CogLMModel`: what it computes, logits, labels, and files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.modeling_coglm import CogLMConfig, CogLMModel
from cogview_pipelines.models.cogview2.sequences import (
    caption,
    direct_super_resolution,
    iterative_super_resolution,
    text_to_image,
)

from ...utils import (
    MAX_TEXT_TOKENS,
    NUM_IMAGE_TOKENS,
    START_OF_CHINESE,
    START_OF_ENGLISH,
    VOCAB_SIZE,
    make_coglm,
    make_image_tokens,
    make_texts,
    text_to_image_arguments,
)

MIXED_LENGTHS = [3, 0, 7, 1]


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
    together = model(**text_to_image_arguments(model, MIXED_LENGTHS)).logits
    for row, text in enumerate(make_texts(MIXED_LENGTHS)):
        image = make_image_tokens(len(MIXED_LENGTHS))[row : row + 1]
        alone = text_to_image([text], model.config.layout, image)
        logits = model(alone.input_ids, alone.position_ids, alone.attention_mask, alone.text_mask, 1.4).logits
        torch.testing.assert_close(together[row, -logits.shape[1] :], logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ids_and_positions_of_padding_do_not_matter():
    model = make_coglm()
    arguments = text_to_image_arguments(model, MIXED_LENGTHS)
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
def test_text_attention_bias_moves_the_output_only_where_there_is_text():
    model = make_coglm()
    with_bias = model(**text_to_image_arguments(model, MIXED_LENGTHS, bias=1.4)).logits
    without = model(**text_to_image_arguments(model, MIXED_LENGTHS, bias=0.0)).logits
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
    arguments = text_to_image_arguments(plain, MIXED_LENGTHS)
    torch.testing.assert_close(relaxed(**arguments).logits, plain(**arguments).logits, atol=2e-5, rtol=1e-4)


def test_gradients_of_input_embeddings_shrink_and_nothing_else_changes():
    found = []
    for scale in (1.0, 0.1):
        model = make_coglm(embedding_gradient_scale=scale)
        arguments = text_to_image_arguments(model, MIXED_LENGTHS)
        logits = model(**arguments).logits
        logits.square().sum().backward()
        with torch.no_grad():
            found.append((model, logits.detach(), model(**arguments).logits))
    (plain, expected, without_gradients), (shrunk, logits, others) = found
    assert torch.equal(others, without_gradients)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    # scores are of image tokens: text tokens are read, and not scored
    read = slice(NUM_IMAGE_TOKENS, None)
    for name, parameter in plain.named_parameters():
        gradient, other = parameter.grad, shrunk.get_parameter(name).grad
        if name == "word_embeddings.weight":
            gradient, other = 0.1 * gradient[read], other[read]
            assert gradient.norm() > 0
        assert (other - gradient).norm() <= 1e-4 * gradient.norm(), name


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
def test_logits_at_some_positions_are_slices_of_all_logits():
    model = make_coglm()
    arguments = text_to_image_arguments(model, MIXED_LENGTHS)
    everywhere = model(**arguments).logits
    shared = torch.tensor([0, 5, 3])
    torch.testing.assert_close(model(**arguments, logits_positions=shared).logits, everywhere[:, shared])
    own = torch.stack([torch.tensor([row, 2 * row + 1]) for row in range(4)])
    expected = torch.stack([everywhere[row, own[row]] for row in range(4)])
    torch.testing.assert_close(model(**arguments, logits_positions=own).logits, expected)


@torch.no_grad()
def test_the_last_layer_computes_the_positions_asked_for_only():
    model = make_coglm()
    arguments, rows = text_to_image_arguments(model, MIXED_LENGTHS), []
    model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model(**arguments, logits_positions=torch.tensor([0, 5, 3]))
    assert rows == [3]


@torch.no_grad()
def test_logits_are_those_of_the_last_states_part_by_part():
    model = make_coglm()
    output = model(**text_to_image_arguments(model, MIXED_LENGTHS), output_hidden_states=True)
    parts = [model.logits(part) for part in output.hidden_states[-1].split(3, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), output.logits)


@torch.no_grad()
def test_image_logits_are_the_first_ones_of_the_full_vocabulary():
    model = make_coglm()
    arguments = text_to_image_arguments(model, MIXED_LENGTHS)
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
    torch.testing.assert_close(output.label_losses, torch.stack(losses))
    torch.testing.assert_close(output.logits, logits[sequence.labels != IGNORED_LABEL])


@pytest.mark.parametrize("kind", [None, "iterative"])
def test_the_last_layer_goes_on_where_there_are_labels_alone_with_the_same_losses_and_gradients(kind):
    model = make_coglm(kind)
    if kind is None:
        arguments = text_to_image_arguments(model, MIXED_LENGTHS)
        shape = arguments["input_ids"].shape
    else:
        shape = (4, model.config.canvas_length)
        context = iterative_super_resolution(make_texts([1, 0, 3, 2]), model.config.num_text_slots)
        arguments = {"canvas_ids": torch.full(shape, model.config.boi_token_id), "context": context}
    labels = make_image_tokens(*shape, seed=2)
    labels[:, ::3], labels[1] = IGNORED_LABEL, IGNORED_LABEL
    rows, found = [], []
    model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    for whole in (False, True):
        output = model(**arguments, labels=labels, output_hidden_states=whole)
        model.zero_grad()
        output.loss.backward()
        found.append(
            (output, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        )
    rows = [count for count in rows if count]  # of the context of a canvas, the last layer gives keys and values
    assert rows == [int((labels != IGNORED_LABEL).sum()), labels.numel()]
    (some, its), (every, all_of_them) = found
    for name in ("loss", "label_losses", "logits"):
        torch.testing.assert_close(getattr(some, name), getattr(every, name))
    assert len(its) == len(all_of_them) > 20
    for one, other in zip(its, all_of_them):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_last_of_the_returned_states_makes_the_logits():
    model = make_coglm()
    output = model(**text_to_image_arguments(model, MIXED_LENGTHS), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers
    torch.testing.assert_close(model.logits(output.hidden_states[-1]), output.logits)
    assert model(**text_to_image_arguments(model, MIXED_LENGTHS)).hidden_states is None


# Training


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # the new name is not in all versions
def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpoint):
        model = make_coglm(hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        arguments = text_to_image_arguments(model, MIXED_LENGTHS)
        labels = make_image_tokens(*arguments["input_ids"].shape, seed=2)
        model(**arguments, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert set(checkpointed) == set(plain)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_dropout_acts_in_training_only():
    model = make_coglm()
    arguments = text_to_image_arguments(model, MIXED_LENGTHS)
    assert torch.equal(model(**arguments).logits, model(**arguments).logits)
    model.train()
    assert not torch.equal(model(**arguments).logits, model(**arguments).logits)


def test_new_weights_are_small_and_unbiased():
    model = CogLMModel(make_coglm(initializer_range=0.05).config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name


# Files


@torch.no_grad()
def test_a_saved_model_gives_the_same_output(tmp_path):
    model = make_coglm()
    arguments = text_to_image_arguments(model, MIXED_LENGTHS)
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
def test_a_model_is_loaded_in_the_dtype_asked_for(tmp_path):
    model = make_coglm()
    model.save_pretrained(tmp_path)
    loaded = CogLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    logits = loaded(**text_to_image_arguments(model, MIXED_LENGTHS)).logits
    assert logits.dtype == torch.float32
    expected = model(**text_to_image_arguments(model, MIXED_LENGTHS)).logits
    assert F.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.99
    loaded.save_pretrained(tmp_path / "half")
    again = CogLMModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**text_to_image_arguments(model, MIXED_LENGTHS)).logits, logits)


def test_the_model_is_one_of_transformers():
    model = make_coglm()
    assert isinstance(model, PreTrainedModel)
    assert model.get_input_embeddings() is model.word_embeddings
    embedding = torch.nn.Embedding(VOCAB_SIZE, 32)
    model.set_input_embeddings(embedding)
    assert model.word_embeddings is embedding


def test_the_default_configuration_is_the_released_one():
    config = CogLMConfig()
    assert (config.layout.image_length, config.longest_sequence) == (400, 510)
    assert config.layout.image_positions[-1] == 912
    assert config.intermediate_size == 4 * config.hidden_size


# Errors


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 100}, "`hidden_size` must be a multiple of .*48.*, but is 100"),
        ({"max_position_embeddings": 912}, "`max_position_embeddings` must be above 912 .*, but is 912"),
        ({"super_resolution": "direct"}, "`super_resolution` must be left out, but is 'direct'"),
    ],
)
def test_impossible_configurations_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CogLMConfig(**fields)


@pytest.mark.parametrize("kind", [None, "direct"])
def test_what_models_of_transformers_do_and_these_do_not_is_refused(kind):
    model = make_coglm(kind)
    arguments = {"input_ids": make_image_tokens(1, 6), "position_ids": torch.arange(6)[None]}
    if kind is not None:
        context = direct_super_resolution(make_texts([3]), make_image_tokens(1), MAX_TEXT_TOKENS, model.config.layout)
        arguments = {"canvas_ids": make_image_tokens(1, 144), "context": context}
    nothing = {"return_dict": True, "use_cache": False, "output_attentions": None, "past_key_values": None}
    with torch.no_grad():
        assert torch.equal(model(**arguments, **nothing).logits, model(**arguments).logits)
    for name, value in {"return_dict": False, "use_cache": True, "output_attentions": True}.items():
        with pytest.raises(TypeError, match=f"`{name}` must be left out, but is {value}"):
            model(**arguments, **{name: value})
    with pytest.raises(TypeError, match="has no argument `last_hidden_state`"):
        model(**arguments, last_hidden_state=torch.zeros(1, 1, 32))
