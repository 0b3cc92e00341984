"""Training samples, losses and gradients against the original."""

import pytest
import torch

from cogview_pipelines.conversion.cogview.layout import transformer_key
from cogview_pipelines.training.samples_cogview import (
    label_weights,
    make_batch,
    picture_and_part,
    text_and_picture,
    two_pictures,
)

from ..comparing import assert_close, assert_same, longs
from .conftest import load_transformer
from .test_model import split

NUM_TEXT_SLOTS = 64


def batch_of(data, layout):
    """The items of the original's binary file: text in slots, -1 where there is none, then codes."""
    samples = []
    for row in data["bin_rows"]:
        text = [index for index in row[:NUM_TEXT_SLOTS].tolist() if index >= 0]
        samples.append(text_and_picture(text, row[NUM_TEXT_SLOTS:].tolist(), layout))
    return make_batch(samples, data["tokens"].shape[1], layout)


def test_items_and_batches_are_the_originals(transformer, arrays):
    data = arrays("training")
    input_ids, labels = batch_of(data, transformer.config.layout)
    assert_same(input_ids, data["tokens"])
    mask = torch.from_numpy(data["label_mask"]) > 0
    assert_same(labels >= 0, mask)
    assert_same(labels[mask], longs(data["labels"])[mask])


def test_templates_are_the_originals(transformer, texts, arrays):
    layout, templates = transformer.config.layout, texts["templates"]
    text, codes = split(templates["text_code"], layout)
    assert text_and_picture(text, codes[0].tolist(), layout) == templates["text_code"]
    text, codes = split(templates["code2code"], layout)
    first = text_and_picture(text, codes[0, :64].tolist(), layout)
    assert first == templates["code2code"][: len(first)]
    assert two_pictures(text, codes[0, :64].tolist(), codes[0, 64:].tolist(), layout) == templates["code2code"]
    data = arrays("preprocess")
    for position, sample in zip(data["sr_positions"].tolist(), data["sr_samples"]):
        text, codes = split(sample, layout)
        halves = codes[0, : layout.image_length].tolist(), codes[0, layout.image_length :].tolist()
        assert picture_and_part(text, *halves, position, layout) == sample.tolist()


@pytest.mark.parametrize("scale", [1, 5])
def test_losses_are_the_originals(transformer, arrays, scale):
    data, model = arrays("training"), transformer
    input_ids, labels = batch_of(data, model.config.layout)
    weights = label_weights(input_ids, model.config.layout, float(scale))
    positions = longs(data["position_ids"])
    with torch.no_grad():
        # the largest value of the whole tensor reaches across the batch, so all of it goes in at once
        output = model(
            input_ids.to(model.device),
            positions.to(model.device),
            labels=labels.to(model.device),
            label_weights=weights.to(model.device),
            full_vocabulary=True,
        )
    assert_close(output.loss.cpu(), data[f"loss_scale{scale}"], 1e-3)


def test_gradients_are_the_originals(fixture_folder, notes, arrays, device):
    data, model = arrays("training"), load_transformer(fixture_folder, notes).to(device)
    input_ids, labels = batch_of(data, model.config.layout)
    weights = label_weights(input_ids, model.config.layout, 5.0)
    inputs = (input_ids.to(device), longs(data["position_ids"]).to(device))
    model(*inputs, labels=labels.to(device), label_weights=weights.to(device), full_vocabulary=True).loss.backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    compared = 0
    for name, theirs in data.items():
        kind, _, key = name.partition(".")
        if kind in ("grad", "gradnorm"):
            ours = gradients[transformer_key(key)]
            assert_close(ours if kind == "grad" else ours.norm(), theirs, 1e-4 + 1e-3 * abs(theirs).max(), key)
            compared += 1
    assert compared == len(gradients)
