"""Training samples and the training loss against the original, given its random choices."""

import re

import numpy as np
import torch

from cogview_pipelines.conversion.cogview2.layout import released_transformer_key, transformer_key
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.sequences import SequenceLayout
from cogview_pipelines.training import samples_cogview2 as samples

from .conftest import assert_close, assert_same, bools, cases, longs, run

PAD_TOKEN_ID = 20003
FIRST_CHINESE_ID = 83823
LAYOUT = {"image_grid": (20, 20), "image_position": 512, "num_image_tokens": 20000}


def layout_of(boi_token_id: int) -> SequenceLayout:
    return SequenceLayout(boi_token_id=boi_token_id, **LAYOUT)


def assert_is_sample(sample, data, case):
    assert_same(sample.input_ids[0], data[f"{case}_token"], f"{case} tokens")
    assert_same(sample.position_ids[0], data[f"{case}_pos"], f"{case} positions")
    assert_same(sample.attention_mask[0], bools(data[f"{case}_attn_mask"]), f"{case} mask")
    predicted = sample.labels[0] != IGNORED_LABEL
    assert_same(predicted, bools(data[f"{case}_loss_mask"]), f"{case} loss mask")
    assert_same(sample.labels[0][predicted], data[f"{case}_label"][predicted.numpy()], f"{case} labels")


def test_generation_samples_are_the_originals(arrays):
    data = arrays("training_masks")
    for case in cases(data, "_coin"):
        layout = layout_of(int(data[f"{case}_token"][-layout_of(0).image_length - 1]))
        assert layout.boi_token_id >= LAYOUT["num_image_tokens"]
        second = float(data[f"{case}_coin"]) < 0.5
        sample = samples.generation_sample(longs(data[f"{case}_x"]), layout, PAD_TOKEN_ID, second_text=second)
        assert_is_sample(sample, data, case)


def test_captioning_samples_are_the_originals(arrays):
    data = arrays("training_masks")
    for case in cases(data, "_corners"):
        row = longs(data[f"{case}_x"])
        texts, _ = samples.split_row(row, layout_of(0), PAD_TOKEN_ID)
        # <start_of_english> and <start_of_chinese> follow <start_of_image>; the sample begins with one of them
        offsets = [1 if (row[text] < FIRST_CHINESE_ID).all() else 2 for text in texts]
        layout = layout_of(int(data[f"{case}_token"][0]) - offsets[0])
        assert layout.boi_token_id >= LAYOUT["num_image_tokens"]
        start_tokens = [layout.boi_token_id + offset for offset in offsets]
        corners = [(int(corner) // 16, int(corner) % 16) for corner in data[f"{case}_corners"]]
        sample = samples.captioning_sample(row, layout, PAD_TOKEN_ID, start_tokens, corners)
        assert_is_sample(sample, data, case)


def test_text_samples_are_the_originals(arrays):
    data = arrays("training_masks")
    for case in cases(data, "_poisson_draws"):
        row = longs(data[f"{case}_x"])
        starts = longs(data[f"{case}_sampled_starts"])
        spans = samples.place_text_spans(len(row), data[f"{case}_poisson_draws"].tolist(), starts)
        assert len(spans) == len(starts)
        assert_is_sample(samples.text_sample(row, spans), data, case)


def loss_of(model, data, case):
    labels = longs(data[f"{case}_labels"]).masked_fill(~bools(data[f"{case}_loss_mask"]), IGNORED_LABEL)
    output = run(
        model,
        longs(data[f"{case}_tokens"]),
        longs(data[f"{case}_position_ids"]),
        bools(data[f"{case}_attention_mask"]),
        labels=labels,
        full_vocabulary=True,
    )
    return output, labels


def test_loss_and_gradients_are_the_originals(coglm, arrays):
    data = arrays("training_loss")
    for case in cases(data, "_loss_mask"):
        coglm.zero_grad()
        output, _ = loss_of(coglm, data, case)
        assert abs(output.loss.item() - float(data[f"{case}_loss"])) <= 1e-4
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in coglm.named_parameters()}
        assert {released_transformer_key(name) for name in gradients} == set(map(str, data[f"{case}_grad_names"]))
        for name, norm in zip(data[f"{case}_grad_names"], data[f"{case}_grad_norms"]):
            ours = gradients[transformer_key(str(name))].norm().item()
            assert abs(ours - norm) <= 1e-3 * max(norm, 1e-3), f"{case} {name}: {ours} is not {norm}"
        first = gradients["layers.0.attention.query_key_value.weight"]
        scale = float(np.abs(data[f"{case}_grad_qkv0"]).max())
        assert_close(first, data[f"{case}_grad_qkv0"], 1e-3 * scale, f"{case} gradient")
        coglm.zero_grad()


def test_losses_by_kind_of_token_are_the_originals(coglm, arrays):
    data = arrays("training_loss")
    kinds = {"image": (0, 20000), "english": (20101, FIRST_CHINESE_ID), "chinese": (FIRST_CHINESE_ID, 145653)}
    for case in cases(data, "_loss_mask"):
        with torch.no_grad():
            output, labels = loss_of(coglm, data, case)
        labels = labels[labels != IGNORED_LABEL]
        losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
        for kind, (first, end) in kinds.items():
            chosen = (labels >= first) & (labels < end)
            ours = losses[chosen].sum().item() / max(int(chosen.sum()), 1)
            assert abs(ours - float(data[f"{case}_{kind}_loss"])) <= 1e-3, f"{case} {kind}"


def test_stored_names_are_those_of_the_release(arrays):
    for name in map(str, arrays("training_loss")["b0_grad_names"]):
        assert re.match(r"transformer\.", name)
        assert released_transformer_key(transformer_key(name)) == name
