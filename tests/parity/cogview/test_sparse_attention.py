"""Three-region sparse attention against the original: training form with gradients, inference form, a whole model."""

import pytest
import torch

from cogview_pipelines.ops.three_region_attention import (
    BACKENDS,
    attend_to_keys,
    draw_inference_keys,
    three_region_attention,
    visible_keys,
)

from ..comparing import assert_close, assert_logits, assert_same, longs, run
from .conftest import load_transformer


@pytest.fixture(scope="module")
def data(arrays):
    return {key: torch.from_numpy(value) for key, value in arrays("sparse_attention").items()}


def heads_last(tensor):
    return tensor.transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_form_and_its_gradients_are_the_originals(data, backend):
    *_, window_size, num_windows, _ = data["dims"].tolist()
    leaves = [heads_last(data[name]).clone().requires_grad_() for name in "qkv"]
    options = {"window_size": window_size, "num_windows": num_windows, "backend": backend}
    output = three_region_attention(*leaves, data["pivot_idx"].long(), **options)
    assert_close(heads_last(output).detach(), data["out"], 1e-5)
    output.backward(heads_last(data["upstream"]))
    for name, leaf in zip("qkv", leaves):
        assert_close(heads_last(leaf.grad), data[f"grad_{name}"], 1e-5, name)


def test_what_lies_left_of_the_window_is_the_originals(data):
    _, _, length, _, window_size, num_windows, _ = data["dims"].tolist()
    _, left = visible_keys(length, window_size, num_windows)
    assert_same(left, data["rmask"])
    assert_same(left[:, data["pivot_idx"].long()].transpose(0, 1), data["pivot_mask"])


def test_inference_form_is_the_originals(data):
    positions, keys = data["inf_idx"].long(), int(data["inf_keys"])
    key, value = (heads_last(data[name])[:, :keys] for name in "kv")
    for name in ("inf_out1", "inf_out5"):
        query = heads_last(data["q"])[:, keys - data[name].shape[2] : keys]
        assert_close(heads_last(attend_to_keys(query, key, value, positions)), data[name], 1e-5)


def test_as_many_keys_are_chosen_as_by_the_original(data, notes):
    tokens, counts = data["inference_tokens"], data["inference_idx_counts"]
    options = {"window_size": 64, "num_windows": 4, "num_pivots": 256, "max_length": 1089}
    is_text = (tokens >= notes["ids"]["image_codes"])[None]
    given = len(tokens) - len(counts)
    ours = [draw_inference_keys(is_text[:, : given + step], **options).shape[1] for step in range(len(counts))]
    assert_same(ours, counts)
    last = draw_inference_keys(is_text[:, : len(tokens) - 1], **options)[0]
    window = options["window_size"] * options["num_windows"]
    for theirs in data["inference_last_idx"].long():
        assert_same(last[-window:], theirs[-window:])
        num_text = int(is_text[0, : len(tokens) - 1 - window].sum())
        assert_same(last[:num_text].sort().values, theirs[:num_text].sort().values)


def test_a_whole_model_is_the_originals(fixture_folder, notes, data, device):
    model = load_transformer(
        fixture_folder, notes, sparse_attention={"window_size": 64, "num_windows": 4, "num_pivots": 256}
    ).to(device)
    ids = data["model_tokens"].long()[None]
    positions = torch.arange(ids.shape[1])[None]
    pivots = [row[None] for row in data["model_pivots"].long()]
    with torch.no_grad():
        logits = run(model.forward, ids, positions, pivots=pivots, full_vocabulary=True).logits[0]
        dense = run(model.forward, ids, positions, full_vocabulary=True).logits[0]
    assert_logits(logits[data["model_logit_positions"].long()], data["model_logits"])
    assert_close(logits.logsumexp(-1), data["model_logsumexp"])
    assert_same(logits.argmax(-1), longs(data["model_argmax"]))
    assert_close((logits - dense).abs().amax(-1), data["model_dense_diff"], 2e-3)
    # what the original counts as text are pivots of every layer
    labels = torch.where(ids != model.config.pad_token_id, ids, -100).roll(-1, 1)
    text = data["model_text_positions"].bool().nonzero()[:, 0]
    for drawn in model.draw_pivots(ids, labels):
        assert_same(drawn[0, : len(text)], text)
