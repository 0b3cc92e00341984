"""`CogViewModel`: causality, caches, batches, orders of norms, relaxation, losses, save and load, errors."""

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines import CogViewConfig, CogViewModel
from cogview_pipelines.generation.cache import KeyValueCache
from cogview_pipelines.models.cogview.modeling_cogview import RelaxedLayerNorm
from cogview_pipelines.models.cogview.sequences import text_to_image

from ...utils_cogview import NUM_IMAGE_TOKENS, VOCAB_SIZE, make_cogview, make_image_tokens, make_layout, make_texts

LAYOUT = make_layout()


@pytest.fixture(scope="module")
def model():
    return make_cogview()


def sequence_of(*lengths):
    return text_to_image(make_texts(list(lengths)), LAYOUT, make_image_tokens(len(lengths)))


@torch.no_grad()
def logits(model, sequence, rows=slice(None), mask=True):
    part = sequence[rows]
    mask = part.attention_mask if mask else None
    return model(part.input_ids, part.position_ids, mask, full_vocabulary=True).logits


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"pb_relaxation_alpha": 32.0}, {"layer_norm_order": "pre"}])
def test_a_token_changes_no_logits_before_it_but_for_the_scale_of_norms(config):
    model = make_cogview(norm_scale=None, **config)
    sequence = sequence_of(4)
    before = logits(model, sequence, mask=False)
    sequence.input_ids[0, 10] = (sequence.input_ids[0, 10] + 1) % NUM_IMAGE_TOKENS
    after = logits(model, sequence, mask=False)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


@torch.no_grad()
def test_without_a_mask_attention_is_causal(model):
    assert torch.allclose(logits(model, sequence_of(4, 4)), logits(model, sequence_of(4, 4), mask=False), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm_scale", ["sequence", None])
def test_a_sequence_has_the_same_logits_in_any_batch_whatever_its_padding(norm_scale):
    model = make_cogview(norm_scale=norm_scale)
    with torch.no_grad():
        model.word_embeddings.weight[LAYOUT.command("[PAD]")] = 300.0  # an outlier, if anything sees it
        model.word_embeddings.weight[5, 0] = 500.0
    sequence = sequence_of(2, 6)
    sequence.input_ids[1, -3] = 5
    together = logits(model, sequence)
    alone = text_to_image(make_texts([2, 6])[:1], LAYOUT, make_image_tokens(2)[:1])
    assert torch.allclose(together[0, 4:], logits(model, alone)[0], atol=1e-4)
    assert torch.allclose(together[1], logits(model, sequence, slice(1, 2))[0], atol=1e-4)


@torch.no_grad()
def test_over_the_whole_tensor_an_outlier_in_another_row_does_change_them():
    model = make_cogview(norm_scale="tensor")
    model.word_embeddings.weight[5, 0] = 500.0
    sequence = sequence_of(6, 6)
    sequence.input_ids[1, -3] = 5
    assert not torch.allclose(logits(model, sequence)[0], logits(model, sequence, slice(0, 1))[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"pb_relaxation_alpha": 32.0}, {"layer_norm_order": "post"}])
def test_cached_decoding_is_one_whole_forward(config):
    """Up to the scale of norms, which each piece has of its own: so without one."""
    model = make_cogview(norm_scale=None, **config)
    sequence = sequence_of(5)
    whole = logits(model, sequence, mask=False)
    cache = KeyValueCache(model.config, 1, whole.shape[1], torch.float32, "cpu")
    pieces = []
    for start, stop in ((0, 8), (8, 9), (9, 14), (14, whole.shape[1])):
        part = slice(start, stop)
        output = model(sequence.input_ids[:, part], sequence.position_ids[:, part], cache=cache, full_vocabulary=True)
        pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    assert cache.length == whole.shape[1]


@torch.no_grad()
def test_logits_of_some_positions_are_those_of_all(model):
    sequence = sequence_of(3, 3)
    whole = model(sequence.input_ids, sequence.position_ids).logits
    assert whole.shape[-1] == NUM_IMAGE_TOKENS
    some = torch.tensor([0, 7, -1])
    picked = model(sequence.input_ids, sequence.position_ids, logits_positions=some).logits
    torch.testing.assert_close(picked, whole[:, some], atol=1e-5, rtol=1e-5)
    each = torch.tensor([[1, 2], [3, 4]])
    picked = model(sequence.input_ids, sequence.position_ids, logits_positions=each).logits
    torch.testing.assert_close(picked, torch.stack([whole[0, [1, 2]], whole[1, [3, 4]]]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_text_bias_alone_leaves_attention_causal(model):
    sequence = sequence_of(4)
    options = {"text_mask": sequence.text_mask, "text_attention_bias": 1.5, "full_vocabulary": True}
    with_mask = model(sequence.input_ids, sequence.position_ids, sequence.attention_mask, **options).logits
    without = model(sequence.input_ids, sequence.position_ids, **options).logits
    assert torch.allclose(with_mask, without, atol=1e-5)
    assert not torch.allclose(without, logits(model, sequence), atol=1e-2)


# Norms ---------------------------------------------------------------------------------------------------------------


def reference_layer(layer, hidden_states):
    """A layer written out from the paper's formulas, with ordinary norms."""

    def norm(name, states):
        own = getattr(layer, name)
        return F.layer_norm(states, own.normalized_shape, own.weight, own.bias, own.eps)

    def attend(states):
        query, key, value = (part.transpose(1, 2) for part in layer.attention.project(states))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        return layer.attention.dense(attended.transpose(1, 2).flatten(2))

    if layer.order == "post":
        hidden_states = norm("attention_layernorm", hidden_states + attend(hidden_states))
        return norm("mlp_layernorm", hidden_states + layer.mlp(hidden_states))
    if layer.order == "pre":
        hidden_states = hidden_states + attend(norm("attention_layernorm", hidden_states))
        return hidden_states + layer.mlp(norm("mlp_layernorm", hidden_states))
    attended = attend(norm("attention_layernorm", hidden_states))
    hidden_states = hidden_states + norm("attention_output_layernorm", attended)
    return hidden_states + norm("mlp_output_layernorm", layer.mlp(norm("mlp_layernorm", hidden_states)))


@torch.no_grad()
@pytest.mark.parametrize("order", ["sandwich", "pre", "post"])
def test_each_order_of_norms_is_the_papers(order):
    layer = make_cogview(layer_norm_order=order, norm_scale=None).layers[0]
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(states), reference_layer(layer, states), atol=1e-5)
    assert hasattr(layer, "mlp_output_layernorm") == (order == "sandwich")


def test_a_relaxed_norm_grows_the_epsilon_with_the_largest_value():
    norm = RelaxedLayerNorm(8, 1e-2, "sequence")
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    states[1] *= 100
    for row in states:
        epsilon = 1e-2 * (row.abs().max() / 8) ** 2
        expected = F.layer_norm(row, (8,), norm.weight, norm.bias, float(epsilon))
        assert torch.allclose(norm(row[None])[0], expected, atol=1e-4)
    assert torch.allclose(norm(states), torch.stack([norm(row[None])[0] for row in states]), atol=1e-5)


def test_zeros_and_values_near_the_end_of_float16_stay_finite():
    norm = RelaxedLayerNorm(8, 1e-5, "sequence").half()
    states = torch.zeros(2, 3, 8, dtype=torch.float16)
    states[1, 0] = torch.linspace(-60000, 60000, 8)
    assert norm(states).isfinite().all()


def test_padding_does_not_count_for_the_largest_value():
    norm = RelaxedLayerNorm(8, 1.0, "sequence")
    states = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    alone = norm(states[:, 1:])
    states[:, 0] = 1e4
    assert torch.allclose(norm(states, torch.tensor([[False, True, True]]))[:, 1:], alone)


# Training ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_mean_over_labels(model):
    sequence = sequence_of(3, 3)
    labels = sequence.input_ids.roll(-1, 1)
    labels[:, -1], labels[0, :5] = -100, -100
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    whole = model(sequence.input_ids, sequence.position_ids, full_vocabulary=True).logits
    losses = F.cross_entropy(whole.mT, labels, reduction="none", ignore_index=-100)
    counted = labels != -100
    arguments = {"labels": labels, "full_vocabulary": True}
    loss = model(sequence.input_ids, sequence.position_ids, **arguments).loss
    assert torch.allclose(loss, losses[counted].mean())
    loss = model(sequence.input_ids, sequence.position_ids, label_weights=weights, **arguments).loss
    assert torch.allclose(loss, (losses * weights)[counted].sum() / weights[counted].sum())


def test_embedding_gradients_shrink_and_nothing_else_changes():
    gradients, losses = {}, {}
    for scale in (1.0, 0.1):
        model = make_cogview(embedding_gradient_scale=scale).double()  # in float32 small gradients are half rounding
        sequence = sequence_of(3)
        labels = sequence.input_ids.clone()
        # embeddings of tokens that are scored get gradients as outputs, too; a text token of the input is not
        output = model(sequence.input_ids, sequence.position_ids, labels=labels.masked_fill(labels >= 48, -100))
        output.loss.backward()
        text = sequence.input_ids[sequence.text_mask]
        gradients[scale], losses[scale] = model.word_embeddings.weight.grad[text], output.loss.detach()
        other = model.layers[0].attention.dense.weight.grad
        assert other.abs().sum() > 0
    assert torch.allclose(losses[1.0], losses[0.1])
    assert torch.allclose(gradients[0.1], 0.1 * gradients[1.0], rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_cogview(hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequence = sequence_of(3)
        model(
            sequence.input_ids, sequence.position_ids, labels=sequence.input_ids, full_vocabulary=True
        ).loss.backward()
        gradients.append(model.layers[0].mlp.dense_h_to_4h.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_new_weights_are_the_originals_distribution():
    model = CogViewModel(make_cogview(hidden_size=256, num_hidden_layers=8).config)
    layer = model.layers[3]
    for weight in (model.word_embeddings.weight, model.position_embeddings.weight, layer.mlp.dense_h_to_4h.weight):
        assert abs(float(weight.detach().std()) / 0.02 - 1) < 0.1
    for weight in (layer.attention.dense.weight, layer.mlp.dense_4h_to_h.weight):
        assert abs(float(weight.detach().std()) / (0.02 / 4) - 1) < 0.1
    assert (layer.attention.query_key_value.bias == 0).all() and (layer.mlp_layernorm.weight == 1).all()


# Configuration -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_released_model():
    config = CogViewConfig()
    with torch.device("meta"):
        model = CogViewModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3928849920
    assert (config.max_text_tokens, config.longest_sequence, config.pad_token_id) == (62, 1345, 58192)


@torch.no_grad()
def test_save_and_load_gives_the_same_logits(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = CogViewModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, sequence_of(4)), logits(model, sequence_of(4)))
    assert loaded.config.layout == model.config.layout == LAYOUT


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 30}, "`hidden_size` must be a multiple of the 4 heads, but is 30"),
        ({"layer_norm_order": "middle"}, "`layer_norm_order` must be one of"),
        ({"norm_scale": "batch"}, "`norm_scale` must be one of"),
        ({"command_token_id": VOCAB_SIZE - 3}, "`command_token_id` must leave room for 27 commands"),
        ({"image_grid": (3, 4)}, "`image_grid` must have even sides"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_cogview(**config)


# Sparse attention ----------------------------------------------------------------------------------------------------

SPARSE = {"window_size": 4, "num_windows": 2, "num_pivots": 16}


def test_training_is_sparse_with_new_pivots_for_each_layer_and_evaluation_is_dense():
    model = make_cogview(sparse_attention=SPARSE, hidden_dropout=0.0, attention_dropout=0.0)
    sequence = sequence_of(6)
    dense = model(sequence.input_ids, sequence.position_ids).logits
    assert torch.equal(dense, make_cogview()(sequence.input_ids, sequence.position_ids).logits)
    pivots = model.draw_pivots(sequence.input_ids)
    assert len(pivots) == 2 and not torch.equal(*pivots)
    model.train()
    given = model(sequence.input_ids, sequence.position_ids, pivots=pivots).logits
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(sequence.input_ids, sequence.position_ids).logits)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(given, dense, atol=1e-3)


def test_sparse_training_reaches_every_parameter_and_checkpointing_keeps_the_pivots():
    gradients = []
    for checkpointing in (False, True):
        model = make_cogview(sparse_attention=SPARSE, hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequence = sequence_of(6)
        torch.manual_seed(5)
        model(
            sequence.input_ids, sequence.position_ids, labels=sequence.input_ids, full_vocabulary=True
        ).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append(model.layers[0].attention.query_key_value.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_sparse_attention_takes_no_mask_and_needs_its_numbers():
    model = make_cogview(sparse_attention=SPARSE).train()
    sequence = sequence_of(6)
    with pytest.raises(ValueError, match="must be left out with sparse attention"):
        model(sequence.input_ids, sequence.position_ids, sequence.attention_mask)
    with pytest.raises(
        ValueError, match="`sparse_attention` must have window_size, num_windows, num_pivots, but has x"
    ):
        make_cogview(sparse_attention={"x": 1})
