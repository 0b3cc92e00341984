"""Models are loaded with all of their weights, or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import cogview_pipelines
from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMCanvasModel,
    CogLMConfig,
    CogLMModel,
    CogViewConfig,
    CogViewVQConfig,
    IcetkVQConfig,
)
from cogview_pipelines.models.loading import WholeModelMixin

from ..utils import make_coglm, make_vq_model

MODELS = [name for name in cogview_pipelines.__all__ if name.endswith("Model") and name != "PreTrainedModel"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_package_is_loaded_whole(name):
    assert issubclass(getattr(cogview_pipelines, name), WholeModelMixin)


COMPONENTS = {
    "transformer": (make_coglm, "layers.1.mlp.dense_h_to_4h.bias"),
    "vqvae": (make_vq_model, "quantize.embed.weight"),
    "direct_sr_transformer": (lambda: make_coglm("direct"), "canvas_position_embeddings.weight"),
    "iterative_sr_transformer": (lambda: make_coglm("iterative"), "word_embeddings.weight"),
}
CHANGES = {
    "missing": ("1 missing", lambda tensors, key: tensors.pop(key)),
    "unknown": ("1 unknown", lambda tensors, key: tensors.update({"surplus." + key: torch.zeros(1)})),
    "of another shape": ("1 of another shape", lambda tensors, key: tensors.update({key: torch.zeros(2, 2)})),
}


def change(folder, function):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", CHANGES)
def test_weights_of_another_model_are_refused_by_name(tmp_path, component, kind):
    make, key = COMPONENTS[component]
    model = make()
    model.save_pretrained(tmp_path)
    type(model).from_pretrained(tmp_path)
    message, function = CHANGES[kind]
    change(tmp_path, lambda tensors: function(tensors, key))
    with pytest.raises(ValueError, match=message) as error:
        type(model).from_pretrained(tmp_path)
    assert key in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_of_another_size_is_refused(tmp_path):
    make_coglm().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ValueError, match=r"missing: layers\.\d\.attention"):
        CogLMModel.from_pretrained(tmp_path)


def test_a_backbone_that_is_lent_is_not_missing(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
    config = CogLMCanvasConfig(super_resolution="direct", shares_backbone=True, **shape)
    model = CogLMCanvasModel(config)
    model.save_pretrained(tmp_path)
    loaded, info = CogLMCanvasModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.shares_backbone and not info["missing_keys"]
    change(tmp_path, lambda tensors: tensors.pop("canvas_position_embeddings.weight"))
    with pytest.raises(ValueError, match=r"1 missing: canvas_position_embeddings\.weight"):
        CogLMCanvasModel.from_pretrained(tmp_path)


def test_weights_are_drawn_for_nothing_that_is_lent():
    """Some versions of transformers have every module of a loaded model made anew that the file lacks."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
    model = CogLMCanvasModel(CogLMCanvasConfig(super_resolution="direct", shares_backbone=True, **shape))
    before = dict(model.named_parameters())
    for module in model.modules():
        model._init_weights(module)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert before and not [name for name in before if "canvas_" not in name]


@pytest.mark.parametrize("count", [0, -1, 10**9, 2.5, "2", None])
def test_models_that_take_for_ever_to_build_are_refused(count):
    with pytest.raises(ValueError, match="`num_hidden_layers` must be a number from 1 to 1000"):
        CogLMConfig(num_hidden_layers=count)
    with pytest.raises(ValueError, match="`num_hidden_layers` must be a number from 1 to 1000"):
        CogLMCanvasConfig(super_resolution="direct", num_hidden_layers=count)
    with pytest.raises(ValueError, match="`num_hidden_layers` must be a number from 1 to 1000"):
        CogViewConfig(num_hidden_layers=count)


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_image_tokenizers_that_take_for_ever_to_build_are_refused(count):
    with pytest.raises(ValueError, match="`num_res_blocks` must be"):
        IcetkVQConfig(num_res_blocks=count)
    with pytest.raises(ValueError, match="`num_halvings` must be"):
        CogViewVQConfig(num_halvings=count)


GRIDS = [
    (CogLMConfig, "image_grid"),
    (CogViewConfig, "image_grid"),
    (CogLMCanvasConfig, "fine_grid"),
    (CogLMCanvasConfig, "kernel_size"),
    (CogLMCanvasConfig, "cross_kernel_size"),
]


@pytest.mark.parametrize(("config", "name"), GRIDS)
@pytest.mark.parametrize("value", [(4,), (4, 4, 4), (4, 0), (-4, 4), (4.0, 4), 4, "ab", None])
def test_what_is_no_grid_is_refused_by_its_name(config, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be two whole numbers from 1 on, but is "):
        config(**{name: value})


@pytest.mark.parametrize(("config", "name"), GRIDS)
def test_a_grid_is_a_pair_however_it_came(config, name):
    assert getattr(config(**{name: [20, 20]}), name) == (20, 20)
