"""Training samples, losses and gradients against the original."""

import pytest
import torch

from cogview_pipelines.conversion.cogview.layout import transformer_key
from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.data.draws import released_index
from cogview_pipelines.training.optimizers import LossScale, learning_rate
from cogview_pipelines.training.samples_cogview import (
    CogViewBatch,
    label_weights,
    make_inputs_and_labels,
    picture_and_part,
    position_ids,
    text_and_picture,
    two_pictures,
)

from ...training_scripts.conftest import load_script
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
    return make_inputs_and_labels(samples, data["tokens"].shape[1], layout)


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


def test_positions_of_super_resolution_are_the_originals(transformer, arrays):
    data = arrays("training")
    found = position_ids(longs(data["finetune_tokens"]), transformer.config.layout)
    assert_same(found, data["finetune_position_ids"])


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_learning_rates_are_the_originals(arrays, scheduler):
    steps = [0, 1, 1000, 2000, 2001, 5000, 12345, 19999, 20000, 22000]
    config = TrainConfig("", learning_rate=4e-4, max_steps=20000, warmup_steps=2000, lr_scheduler=scheduler)
    ours = [learning_rate(config, step) for step in steps]
    theirs = arrays("training")[f"lr_{scheduler}_f64"]
    assert ours == pytest.approx(theirs[: len(steps)].tolist(), rel=1e-12, abs=1e-18)


def test_the_loss_scale_is_the_originals(arrays):
    data, scale = arrays("training"), LossScale(2.0**16, interval=4, patience=2, least=1.0)
    for overflow, expected in zip(data["scaler_overflow"].tolist(), data["scaler_scale"].tolist()):
        scale.update(not overflow)
        assert scale.scale == expected


def test_the_order_of_the_data_is_the_originals(arrays):
    data = arrays("training")
    for count in (7, 1000):
        assert [released_index(number, count) for number in range(40)] == data[f"random_map_{count}"].tolist()


@pytest.mark.parametrize("scale", [1, 5])
def test_the_losses_of_the_training_script_are_the_originals(transformer, arrays, scale):
    script = load_script("train_cogview")
    data, layout = arrays("training"), transformer.config.layout
    input_ids, labels = batch_of(data, layout)
    weights = label_weights(input_ids, layout, float(scale))
    batch = CogViewBatch(input_ids, position_ids(input_ids, layout), labels, weights)
    with torch.no_grad():
        loss, metrics = script.compute_loss(layout.num_image_tokens, transformer, batch.to(transformer.device))
    assert_close(loss.cpu() / script.loss_weight(batch), data[f"loss_scale{scale}"], 1e-3)
    for name, key in (("image_loss", "img_loss"), ("text_loss", "txt_loss")):
        total, count = metrics[name]
        assert_close(total.cpu() / count.cpu(), data[f"{key}_scale{scale}"], 1e-3, name)
