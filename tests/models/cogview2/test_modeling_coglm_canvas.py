"""`CogLMCanvasModel`: contexts, windows, labels, starting from a CogLM, and files."""

import dataclasses
import inspect
import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.modeling_coglm import CogLMModel
from cogview_pipelines.models.cogview2.modeling_coglm_canvas import CogLMCanvasConfig, CogLMCanvasModel
from cogview_pipelines.models.cogview2.sequences import (
    direct_super_resolution,
    iterative_super_resolution,
)

from ...utils import (
    BOI,
    FINE_GRID,
    IMAGE_GRID,
    MAX_TEXT_TOKENS,
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE,
    make_coglm,
    make_image_tokens,
    make_texts,
)

CANVAS_LENGTH = FINE_GRID[0] * FINE_GRID[1]
MIXED_LENGTHS = [3, 0, 7, 1]


def make_context(model, texts, seed=0):
    """The sequence that the canvas sees."""
    slots = model.config.num_text_slots
    if model.config.super_resolution == "iterative":
        return iterative_super_resolution(texts, slots)
    return direct_super_resolution(texts, make_image_tokens(len(texts), seed=seed), slots, model.config.layout)


def make_arguments(model, lengths=MIXED_LENGTHS):
    """Arguments of one forward pass."""
    canvas = make_image_tokens(len(lengths), CANVAS_LENGTH, seed=1)
    canvas[:, ::3] = BOI
    return {"canvas_ids": canvas, "context": make_context(model, make_texts(lengths))}


def with_ids(context, ids, position_ids=None):
    """The same sequence with other tokens."""
    return dataclasses.replace(
        context, input_ids=ids, position_ids=context.position_ids if position_ids is None else position_ids
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
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
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_the_last_layer_computes_the_positions_asked_for_only(kind):
    model = make_coglm(kind)
    arguments, rows = make_arguments(model), []
    model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model(**arguments, logits_positions=torch.tensor([0, 5, 3]))
    # of a context for a canvas, the last layer has but keys and values
    assert rows == [0, 3]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_logits_can_be_computed_later_from_the_last_states(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    positions = torch.tensor([7, 2])
    output = model(**arguments, logits_positions=positions, output_logits=False)
    assert output.logits is None
    expected = model(**arguments, logits_positions=positions).logits
    assert torch.equal(model.logits(output.last_hidden_state), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_image_logits_are_the_first_ones_of_the_full_vocabulary(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    some, every = model(**arguments).logits, model(**arguments, full_vocabulary=True).logits
    assert some.dtype == every.dtype == torch.float32
    assert every.shape[-1] == VOCAB_SIZE
    torch.testing.assert_close(some, every[..., :NUM_IMAGE_TOKENS])


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
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_the_last_of_the_returned_states_makes_the_logits(kind):
    model = make_coglm(kind)
    output = model(**make_arguments(model), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers
    torch.testing.assert_close(model.logits(output.hidden_states[-1]), output.logits)
    assert model(**make_arguments(model)).hidden_states is None


# What is seen


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_context_encoded_before_gives_the_same_canvas(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    canvas, sequence = arguments["canvas_ids"], arguments["context"]
    first = model(canvas, sequence)
    context = model.encode_context(sequence)
    assert len(context) == len(first.context) == 4
    assert torch.equal(model(canvas, context).logits, first.logits)
    assert torch.equal(model(canvas, first.context).logits, first.logits)
    twice = model(canvas.repeat_interleave(2, 0), context.repeat_interleave(2)).logits
    torch.testing.assert_close(twice, first.logits.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_ids_and_positions_of_context_padding_do_not_matter(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model, [2, 3])
    expected, context = model(**arguments).logits, arguments["context"]
    padding = ~context.key_mask
    assert padding.any()
    other = with_ids(context, *(ids.masked_fill(padding, 7) for ids in (context.input_ids, context.position_ids)))
    torch.testing.assert_close(model(arguments["canvas_ids"], other).logits, expected, atol=1e-6, rtol=1e-6)


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
    ids = arguments["context"].input_ids.clone()
    cell = model.config.num_text_slots + 2 * 4 + 3  # row 2, column 3: at the right border
    ids[0, cell] = (ids[0, cell] + 1) % NUM_IMAGE_TOKENS
    expected = torch.zeros(FINE_GRID, dtype=torch.bool)
    expected[3:12, 6:12] = True
    assert torch.equal(changed_cells(model, arguments, context=with_ids(arguments["context"], ids)), expected)


@torch.no_grad()
def test_direct_super_resolution_sees_text_through_the_low_resolution_tokens_only():
    texts = make_texts([3])
    other = [[text[0] + 1, *text[1:]] for text in texts]

    def change(num_layers):
        model = make_coglm("direct", num_hidden_layers=num_layers)
        arguments = make_arguments(model, [3])
        context = make_context(model, other)
        assert not torch.equal(context.input_ids, arguments["context"].input_ids)
        return changed_cells(model, arguments, context=context)

    assert not change(num_layers=1).any()  # no text key stands under the softmax of a canvas cell
    assert change(num_layers=2).all()  # but low-resolution tokens have read the text


@torch.no_grad()
def test_iterative_super_resolution_sees_every_text_slot_from_every_cell():
    model = make_coglm("iterative", num_hidden_layers=1)
    arguments = make_arguments(model, [4])
    for slot in range(4):
        ids = arguments["context"].input_ids.clone()
        ids[0, slot] += 1
        assert changed_cells(model, arguments, context=with_ids(arguments["context"], ids)).all()


@torch.no_grad()
def test_iterative_super_resolution_of_an_empty_text_is_the_canvas_alone():
    model = make_coglm("iterative")
    arguments = make_arguments(model, [0])
    logits = model(**arguments).logits
    assert logits.isfinite().all()
    other = with_ids(arguments["context"], arguments["context"].input_ids + 60)
    assert torch.equal(model(arguments["canvas_ids"], other).logits, logits)


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
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    def gradients(checkpoint):
        model = make_coglm(kind, hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        arguments = make_arguments(model)
        labels = make_image_tokens(*arguments["canvas_ids"].shape, seed=2)
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


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_dropout_acts_in_training_only(kind):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    assert torch.equal(model(**arguments).logits, model(**arguments).logits)
    model.train()
    assert not torch.equal(model(**arguments).logits, model(**arguments).logits)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_new_weights_are_small_and_unbiased(kind):
    model = CogLMCanvasModel(make_coglm(kind, initializer_range=0.05).config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name


# Starting from a transformer


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_super_resolution_starts_from_the_transformer(kind):
    transformer = make_coglm(seed=3)
    model = CogLMCanvasModel.from_transformer(transformer, kind, FINE_GRID, kernel_size=(5, 3), num_text_slots=8)
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
    assert CogLMCanvasModel.from_transformer(transformer, "direct", FINE_GRID).config.num_text_slots == 96
    assert CogLMCanvasModel.from_transformer(transformer, "iterative", FINE_GRID).config.num_text_slots == 16


def shared_pair():
    transformer = make_coglm(seed=3)
    settings = {"kernel_size": (5, 3), "cross_kernel_size": (3, 3), "num_text_slots": MAX_TEXT_TOKENS}
    model = CogLMCanvasModel.from_transformer(transformer, "direct", FINE_GRID, shares_backbone=True, **settings)
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
    loaded, report = CogLMCanvasModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with pytest.raises(ValueError, match=r"`shares_backbone`\). Lend it first"):
        loaded(**arguments)
    loaded.share_backbone(transformer)
    assert torch.equal(loaded.eval()(**arguments).logits, expected)


def test_a_backbone_that_was_given_more_tokens_is_lent_saved_and_loaded(tmp_path):
    transformer, model = shared_pair()
    arguments = make_arguments(model)
    expected = model(**arguments).logits
    rows = transformer.config.vocab_size + 2
    transformer.resize_token_embeddings(rows)
    for name, part in (("transformer", transformer), ("canvas", model)):
        part.save_pretrained(tmp_path / name)
    backbone = CogLMModel.from_pretrained(tmp_path / "transformer").eval()
    loaded = CogLMCanvasModel.from_pretrained(tmp_path / "canvas").eval()
    loaded.share_backbone(backbone)
    assert loaded.config.vocab_size == len(loaded.word_embeddings.weight) == rows
    assert torch.equal(loaded(**arguments).logits, expected)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 64),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 2),
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


def test_only_direct_super_resolution_shares():
    model = make_coglm("iterative")
    with pytest.raises(ValueError, match=r"`share_backbone` is for `super_resolution='direct'`, .* has 'iterative'"):
        model.share_backbone(make_coglm())
    assert not model.config.shares_backbone


@pytest.mark.parametrize("num_layers", [1, 3])
def test_super_resolution_of_another_depth_is_an_error(num_layers):
    with pytest.raises(ValueError, match=r"`config` must keep the layers of `transformer`, but layers\.[12]\."):
        CogLMCanvasModel.from_transformer(make_coglm(), "direct", FINE_GRID, num_hidden_layers=num_layers)


# Files


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_saved_model_gives_the_same_output(kind, tmp_path):
    model = make_coglm(kind)
    arguments = make_arguments(model)
    expected = model(**arguments).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "coglm_canvas"
    loaded, report = CogLMCanvasModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not loaded.training
    assert torch.equal(loaded(**arguments).logits, expected)
    assert loaded.config.to_dict() == model.config.to_dict() | {
        name: loaded.config.to_dict()[name] for name in ("_name_or_path", "dtype") if name in loaded.config.to_dict()
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_model_is_loaded_in_the_dtype_asked_for(kind, tmp_path):
    model = make_coglm(kind)
    model.save_pretrained(tmp_path)
    loaded = CogLMCanvasModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    logits = loaded(**make_arguments(model)).logits
    assert logits.dtype == torch.float32
    expected = model(**make_arguments(model)).logits
    assert F.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.99
    loaded.save_pretrained(tmp_path / "half")
    again = CogLMCanvasModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**make_arguments(model)).logits, logits)


def test_the_arguments_of_saving_are_in_its_signature():
    """diffusers reads it to know what it may ask for; what it does not find, such as a variant, it leaves out."""
    parameters = inspect.signature(CogLMCanvasModel.save_pretrained).parameters
    assert set(inspect.signature(PreTrainedModel.save_pretrained).parameters) - set(parameters) <= {
        "save_original_format",
        "distributed_checkpoint",
    }


@pytest.mark.parametrize("shares", [False, True])
def test_variants_are_saved_side_by_side(shares, tmp_path):
    model = shared_pair()[1] if shares else make_coglm("direct")
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", "model.fp16.safetensors"}
    half = CogLMCanvasModel.from_pretrained(tmp_path, variant="fp16", dtype="auto")
    assert half.canvas_position_embeddings.weight.dtype == torch.float16


def test_a_model_of_the_other_kind_is_refused(tmp_path):
    make_coglm("direct").save_pretrained(tmp_path / "canvas")
    make_coglm().save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match="`CogLMModel` reads models of the type 'coglm', but this one is a 'coglm_canvas'"
    ):
        CogLMModel.from_pretrained(tmp_path / "canvas")
    with pytest.raises(ValueError, match="`CogLMCanvasModel` reads models of the type 'coglm_canvas'"):
        CogLMCanvasModel.from_pretrained(tmp_path / "dense")


def test_the_default_configuration_is_the_released_one():
    config = CogLMCanvasConfig()
    assert (config.super_resolution, config.canvas_length, config.num_text_slots) == ("direct", 3600, 96)
    assert config.layout.image_length == 400
    assert CogLMCanvasConfig(super_resolution="iterative").num_text_slots == 16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"super_resolution": "best"}, r"`super_resolution` must be one of .*'direct', 'iterative'.*, but is 'best'"),
        ({"super_resolution": "iterative", "shares_backbone": True}, "`shares_backbone` is for"),
        (
            {"fine_grid": (60, 50)},
            r"`fine_grid` must be a multiple of `image_grid` \(20, 20\), but is \(60, 50\)",
        ),
    ],
)
def test_impossible_configurations_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CogLMCanvasConfig(**fields)


# Errors


def test_a_canvas_of_the_wrong_size_is_an_error():
    model = make_coglm("direct")
    arguments = make_arguments(model, [2])
    arguments["canvas_ids"] = arguments["canvas_ids"][:, 1:]
    with pytest.raises(ValueError, match=r"`canvas_ids` must have 144 positions, but has 143"):
        model(**arguments)
