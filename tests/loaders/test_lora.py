"""Adapters of pipelines: what counts, what is merged, what other stages see of it, and what is saved."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewTokenizer,
    IcetkTokenizer,
)
from cogview_pipelines.generation import decoders
from cogview_pipelines.generation.decoders import fused_decoding_refusals
from cogview_pipelines.loaders.lora_files import read_lora, write_lora
from cogview_pipelines.loaders.textual_inversion import write_learned_token
from cogview_pipelines.models.adapters import active_adapters, adapter_layers

from ..pipelines.conftest import build, build_cogview
from ..utils import make_image_tokens
from ..utils_cogview import make_cogview_tokenizer
from .conftest import STAGES, random_adapter

NAN = float("nan")


def draw(pipe, **options):
    """The tokens of a fixed prompt and seed."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="latent", **options).tokens


def draft(pipe):
    """The low-resolution tokens alone."""
    return draw(pipe, height=pipe.sizes[0][0])


def logits(model):
    ids = make_image_tokens(2)
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits


def context(pipe):
    """What direct super-resolution reads of fixed tokens, through its borrowed backbone."""
    from cogview_pipelines.models.cogview2.sequences import direct_super_resolution

    model = pipe.direct_sr_transformer
    tokens = make_image_tokens(1).unflatten(1, (4, 4))
    sequence = direct_super_resolution([[]], tokens, model.config.num_text_slots, model.config.layout)
    with torch.no_grad():
        return torch.stack(model.encode_context(sequence).keys)


def adapters_of(pipe):
    """Which adapters count in each stage."""
    return {stage: active_adapters(getattr(pipe, stage)) for stage in STAGES}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# Loading and choosing ------------------------------------------------------------------------------------------------


def test_an_adapter_changes_the_stage_that_it_is_for_alone(pipe, adapters):
    before, drafted, read = draw(pipe), draft(pipe), context(pipe)
    pipe.load_lora_weights(adapters["draft"])
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert pipe.get_active_adapters() == ["default_0"]
    assert not torch.equal(draft(pipe), drafted)
    assert torch.equal(context(pipe), read)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)
    assert not list(adapter_layers(pipe.transformer)) and pipe.get_list_adapters() == {}
    pipe.load_lora_weights(adapters["sr"], "fine")
    assert torch.equal(draft(pipe), drafted)
    assert not torch.equal(draw(pipe), before)


def test_adapters_add_up_by_their_weights(pipe, adapters, tmp_path):
    plain = logits(pipe.transformer)
    other = random_adapter({"transformer": pipe.transformer}, tmp_path, seed=7)
    pipe.load_lora_weights(adapters["draft"], "one")
    one = logits(pipe.transformer)
    pipe.load_lora_weights(other, "two")
    both = logits(pipe.transformer)
    assert not torch.equal(one, both)
    assert pipe.get_active_adapters() == ["one", "two"]
    pipe.set_adapters("one")
    assert torch.equal(logits(pipe.transformer), one)
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(logits(pipe.transformer), plain)
    pipe.set_adapters(["two", "one"], [1.0, 1.0])
    assert torch.allclose(logits(pipe.transformer), both, atol=1e-5)
    pipe.disable_lora()
    assert torch.equal(logits(pipe.transformer), plain)
    pipe.enable_lora()
    assert torch.allclose(logits(pipe.transformer), both, atol=1e-5)
    pipe.delete_adapters("two")
    assert torch.equal(logits(pipe.transformer), one)


def test_a_weight_of_a_half_is_half_of_the_matrix(pipe, adapters):
    """One layer by hand: `W + weight * alpha / rank * B A`."""
    file = load_file(adapters["draft"] / "pytorch_lora_weights.safetensors")
    name = "layers.0.attention.query_key_value"
    up, down = (file[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
    layer = pipe.transformer.get_submodule(name)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    pipe.load_lora_weights(adapters["draft"], "one")
    pipe.set_adapters("one", 0.5)
    states = torch.randn(3, 32)
    expected = states @ (weight + 0.5 * up @ down).T + bias
    assert torch.allclose(pipe.transformer.get_submodule(name)(states), expected, atol=1e-5)


def test_weights_may_differ_by_component(pipe, adapters):
    expected = draft(pipe)
    pipe.load_lora_weights(adapters["all"], "style")
    pipe.set_adapters("style", {"transformer": 0.0, "direct_sr_transformer": 0.5})
    assert torch.equal(draft(pipe), expected)
    scalings = {stage: next(layer for *_, layer in adapter_layers(getattr(pipe, stage))).scaling for stage in STAGES}
    assert [scalings[stage]["style"] for stage in STAGES] == [0.0, 0.5, 1.0]


MISTAKES = [
    (lambda pipe, folder: pipe.load_lora_weights(folder, "one"), "'one' is loaded already"),
    (lambda pipe, folder: pipe.load_lora_weights(folder, "a.b"), "without dots"),
    (lambda pipe, folder: pipe.set_adapters("two"), "must be of \\['one'\\]"),
    (lambda pipe, folder: pipe.set_adapters("one", [1.0, 2.0]), "must be one for each"),
    (lambda pipe, folder: pipe.set_adapters("one", {"vqvae": 1.0}), "names \\['vqvae'\\]"),
    (lambda pipe, folder: pipe.delete_adapters("two"), "names \\['two'\\]"),
    (lambda pipe, folder: pipe.fuse_lora(adapter_names=["two"]), "no adapter to fuse"),
    (lambda pipe, folder: pipe.fuse_lora(components=["vqvae"]), "`components` may name"),
    (lambda pipe, folder: pipe.save_adapter(folder, "two"), "must be one of \\['one'\\]"),
    (lambda pipe, folder: pipe.save_lora_weights(folder), "must be given"),
    (lambda pipe, folder: pipe.save_adapter(folder, "one", "foo.bin"), "ends in .safetensors"),
    (lambda pipe, folder: pipe.save_adapter(folder, "one", "in/foo.safetensors"), "without folders"),
    (lambda pipe, folder: pipe.set_adapters("one", NAN), "`adapter_weights` must be a finite number, but is nan"),
    (lambda pipe, folder: pipe.set_adapters("one", {"transformer": NAN}), "`adapter_weights` must be a finite"),
    (lambda pipe, folder: pipe.set_adapters(["one"], [-NAN]), "`adapter_weights` must be a finite number"),
    (lambda pipe, folder: pipe.set_adapters(["one"], ["0.5"]), "must be a finite number, but is '0.5'"),
    (lambda pipe, folder: pipe.set_adapters("one", "0.5"), "must be a finite number, but is '0.5'"),
    (lambda pipe, folder: pipe.set_adapters("one", {"transformer": {}}), "must be a finite number, but is {}"),
    (lambda pipe, folder: pipe.set_adapters(None), "`adapter_names` must be a name or several, but is None"),
    (lambda pipe, folder: pipe.delete_adapters(3), "`adapter_names` must be a name or several, but is 3"),
    (lambda pipe, folder: pipe.fuse_lora(lora_scale=NAN), "`lora_scale` must be a finite number, but is nan"),
    (lambda pipe, folder: pipe.fuse_lora(lora_scale=float("inf")), "`lora_scale` must be a finite number"),
    (lambda pipe, folder: pipe.fuse_lora("vqvae"), "names \\['vqvae'\\]"),
    *(
        (lambda pipe, folder, name=name: pipe.load_lora_weights(folder, name), "`adapter_name` must be a short")
        for name in ("", "me/style", "me\\style", "a\nb", "a\x7f", "虎" * 90, 3)
    ),
    (lambda pipe, folder: pipe.load_lora_weights(folder, "train"), "a word that PyTorch needs"),
]


def test_mistakes_are_named(pipe, adapters):
    pipe.load_lora_weights(adapters["draft"], "one")
    expected = draft(pipe)
    for call, message in MISTAKES:
        with pytest.raises(ValueError, match=message):
            call(pipe, adapters["draft"])
        assert adapters_of(pipe)["transformer"] == ["one"], message
    assert torch.equal(draft(pipe), expected)


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(pipe, adapters, tmp_path):
    file = load_file(adapters["all"] / "pytorch_lora_weights.safetensors")
    expected = draw(pipe)

    def refuse(tensors, message):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path / "bad.safetensors")
        assert pipe.get_list_adapters() == {}
        assert torch.equal(draw(pipe), expected)

    last = "iterative_sr_transformer.layers.1.mlp.dense.lora_A.weight"
    refuse({**file, last: torch.zeros(4, 32)}, "adapts layers.1.mlp.dense, which the model lacks")
    name = "iterative_sr_transformer.layers.0.attention.dense.lora_A.weight"
    refuse({**file, name: torch.zeros(4, 33)}, "has 33 inputs")
    refuse({"unet.x.lora_A.weight": torch.zeros(1)}, "no matrix of an adapter")
    refuse({"transformer.layers.0.attention.dense.weight": torch.zeros(1)}, "no matrix of an adapter")
    (tmp_path / "bad.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="a pickle can run code"):
        pipe.load_lora_weights(tmp_path / "bad.bin")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        pipe.load_lora_weights(tmp_path / "bad.safetensors")


def test_names_and_weights_may_be_given_in_several_ways(pipe, adapters):
    pipe.load_lora_weights(adapters["all"], "one")
    layer = next(layer for *_, layer in adapter_layers(pipe.transformer))
    for weight in (0.25, torch.tensor(0.25), torch.tensor([0.25]), [0.25], (0.25,), {"transformer": 0.25}):
        pipe.set_adapters({"one"}, weight)
        assert layer.scaling["one"] == 0.25
        pipe.set_adapters("one")
        assert layer.scaling["one"] == 1
    pipe.fuse_lora("transformer", adapter_names="one")
    assert [active_adapters(getattr(pipe, stage)) for stage in STAGES] == [["one"]] * 3
    assert [bool(list(adapter_layers(getattr(pipe, stage)))) for stage in STAGES] == [False, True, True]
    pipe.unfuse_lora("transformer")
    expected = weights_of(pipe.transformer)
    pipe.fuse_lora(adapter_names=["one", "one"])
    pipe.unfuse_lora()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.transformer.state_dict().items())


def test_arguments_that_are_none_are_refused(pipe, adapters):
    with pytest.raises(TypeError, match="`load_lora_weights` has no argument 'adpater_name'"):
        pipe.load_lora_weights(adapters["draft"], adpater_name="x", hotswap=True)
    with pytest.raises(TypeError, match="`lora_state_dict` has no argument 'proxies'"):
        pipe.lora_state_dict(adapters["draft"], proxies=None)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(adapters["draft"], local_files_only=True)


def test_a_path_that_is_not_there_is_named(pipe):
    for source in ("runs/style/final", "/runs", "./runs", "../runs/style", "runs\\style"):
        for load in (pipe.load_lora_weights, pipe.load_textual_inversion):
            with pytest.raises(OSError, match="There is no file or folder") as caught:
                load(source)
            assert source in str(caught.value)


LAYER = "layers.1.mlp.dense_h_to_4h"


DAMAGES = [
    ({}, {f"{LAYER}.lora_A.weight": lambda value: value[:2]}, r"shapes are \(2, 32\) and \(128, 4\)"),
    ({}, {f"{LAYER}.lora_A.weight": lambda value: value[0]}, "do not fit together"),
    ({}, {f"{LAYER}.lora_A.weight": None}, f"lacks {LAYER}.lora_A.weight"),
    ({}, {f"{LAYER}.lora_B.weight": None}, f"lacks {LAYER}.lora_B.weight"),
    ({}, {f"{LAYER}.lora_B.weight": lambda value: value * float("inf")}, "are not all finite"),
    ({}, {f"{LAYER}.lora_B.weight": lambda value: value.long()}, "is no tensor of floating-point numbers"),
    (
        {},
        {"layers.0.lora_A.weight": torch.zeros(4, 32), "layers.0.lora_B.weight": torch.zeros(32, 4)},
        "no linear",
    ),
    ({}, {f"{LAYER}.lora_embedding_A": torch.zeros(4, 32)}, "no place for its .*embedding_A"),
    ({"r": 2}, {}, "is 4 by its matrices, but 2 by"),
    ({"rank_pattern": {"dense_h_to_4h": 2}}, {}, "is 4 by its matrices, but 2 by"),
    ({"rank_pattern": {"(": 2}}, {}, "no pattern"),
    ({"rank_pattern": {"dense": "4"}}, {}, "whose values are each a whole number"),
    ({"alpha_pattern": {"dense": "a"}}, {}, "whose values are each a finite number"),
    ({"r": "4"}, {}, "`r` must be a whole number of at least 1, but is '4'"),
    ({"r": 0}, {}, "`r` must be a whole number"),
    ({"r": -1}, {}, "`r` must be a whole number"),
    ({"lora_alpha": "x"}, {}, "`lora_alpha` must be a finite number, but is 'x'"),
    ({"lora_alpha": float("nan")}, {}, "`lora_alpha` must be a finite number"),
    ({"lora_dropout": 1.5}, {}, "`lora_dropout` must be"),
    ({"use_rslora": "no"}, {}, "`use_rslora` must be true or false"),
    ({"use_dora": True}, {}, "it lacks .*lora_magnitude_vector"),
    ({"bias": "all"}, {}, "`bias` = 'all', which is not supported"),
    ({"modules_to_save": ["word_embeddings"]}, {}, "`modules_to_save` = "),
    ({"init_lora_weights": "pissa"}, {}, "`init_lora_weights` = 'pissa'"),
]


def test_a_damaged_adapter_is_refused_and_leaves_no_trace(pipe, adapters, tmp_path):
    """Not in the first stage that it is for: that one has it already when it is found out."""
    stage = "iterative_sr_transformer"
    pipe.load_lora_weights(adapters["sr"], "other")
    pipe.set_adapters("other", 0.5)
    names, before = pipe.get_list_adapters(), logits(pipe.transformer)
    expected = weights_of(getattr(pipe, stage))
    for fields, changes, message in DAMAGES:
        weights, configs, _ = read_lora(adapters["all"], list(STAGES))
        for name, change in changes.items():
            old = weights[stage].pop(name, None)
            if change is not None:
                weights[stage][name] = change(old) if callable(change) else change
        configs[stage] |= fields
        write_lora(tmp_path, weights, configs)
        with pytest.raises(ValueError, match=message) as caught:
            pipe.load_lora_weights(tmp_path, "style")
        assert "\n" not in str(caught.value)
        assert pipe.get_list_adapters() == names and pipe.get_active_adapters() == ["other"], message
        found = getattr(pipe, stage).state_dict()
        assert found.keys() == expected.keys(), message
        assert all(torch.equal(found[name], expected[name]) for name in found), message
    assert torch.equal(logits(pipe.transformer), before)
    pipe.load_lora_weights(adapters["all"], "style")  # nothing is in the way of a good one


def test_an_error_within_peft_leaves_no_trace(pipe, adapters, monkeypatch):
    import peft

    def fail(*args):
        raise RuntimeError("two\nlines")

    expected = logits(pipe.transformer)
    pipe.load_lora_weights(adapters["all"], "other")
    pipe.disable_lora()
    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    with pytest.raises(ValueError, match=r"cannot be put on a CogLMModel: two\.$"):
        pipe.load_lora_weights(adapters["draft"], "style")
    assert pipe.get_active_adapters() == [] and pipe.get_list_adapters()["transformer"] == ["other"]
    assert torch.equal(logits(pipe.transformer), expected)
    monkeypatch.undo()
    pipe.load_lora_weights(adapters["all"], "style")
    pipe.delete_adapters("style")
    assert pipe.get_active_adapters() == []  # none takes the place of another
    assert torch.equal(logits(pipe.transformer), expected)


def test_a_file_that_is_something_else_is_named(pipe, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_text("<!DOCTYPE html><title>Log in</title>")
    with pytest.raises(ValueError, match="is a web page, not the file itself"):
        pipe.load_lora_weights(tmp_path)


def test_without_peft_a_sentence_says_what_to_install(pipe, adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'cogview_pipelines\[lora\]'"):
        pipe.load_lora_weights(adapters["draft"])
    draw(pipe)  # nothing else needs it


def test_parts_for_components_that_a_pipeline_lacks_are_left_out_loudly(tokenizer, adapters, caplog):
    low = build(tokenizer, stages=())
    with pytest.raises(ValueError, match="which this CogView2Pipeline does not have"):
        low.load_lora_weights(adapters["sr"])
    low.load_lora_weights(adapters["all"], "style")
    assert low.get_list_adapters() == {"transformer": ["style"]}
    assert "there is no direct_sr_transformer and no iterative_sr_transformer" in caplog.text


def test_pipelines_of_the_same_components_share_adapters(pipe, adapters):
    pipe.load_lora_weights(adapters["all"], "style")
    expected = draw(pipe)
    other = CogView2UpscalePipeline.from_pipe(pipe)
    assert "style" in other.get_active_adapters()
    assert torch.equal(draw(CogView2Pipeline.from_pipe(pipe)), expected)
    CogView2CaptionPipeline.from_pipe(pipe).unload_lora_weights()
    assert "transformer" not in pipe.get_list_adapters()


# Fusing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["draft", "sr", "all"])
def test_fused_adapters_give_the_same_tokens_and_unfusing_brings_the_weights_back(pipe, adapters, kind):
    plain = {stage: weights_of(getattr(pipe, stage)) for stage in STAGES}
    pipe.load_lora_weights(adapters[kind], "style")
    expected = draw(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"style"} and pipe.num_fused_loras == 1
    assert not any(list(adapter_layers(getattr(pipe, stage))) for stage in STAGES)
    assert torch.equal(draw(pipe), expected)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and pipe.get_active_adapters() == ["style"]
    assert torch.equal(draw(pipe), expected)
    pipe.unload_lora_weights()
    for stage in STAGES:
        for name, value in getattr(pipe, stage).state_dict().items():
            assert torch.allclose(value, plain[stage][name], atol=1e-5), name


def test_fusing_into_one_stage_leaves_the_one_that_shares_its_weights_alone(pipe, adapters):
    read, plain = context(pipe), weights_of(pipe.transformer)
    pipe.load_lora_weights(adapters["draft"], "style")
    pipe.fuse_lora()
    assert torch.equal(context(pipe), read)
    for new in (CogView2Pipeline.from_pipe(pipe), CogView2UpscalePipeline.from_pipe(pipe)):
        assert torch.equal(context(new), read)  # the backbone is lent again
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert all(torch.equal(value, plain[name]) for name, value in pipe.transformer.state_dict().items())
    lent = dict(pipe.direct_sr_transformer.named_parameters())
    assert all(lent[name] is parameter for name, parameter in pipe.transformer.named_parameters())
    pipe.load_lora_weights(adapters["sr"], "style")
    pipe.fuse_lora()
    assert not torch.equal(context(pipe), read)
    assert all(torch.equal(value, plain[name]) for name, value in pipe.transformer.state_dict().items())
    again = CogView2Pipeline.from_pipe(pipe)
    assert not torch.equal(context(again), read)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(context(pipe), read)


def test_fused_adapters_stay_when_they_are_unloaded(pipe, adapters):
    read = context(pipe)
    pipe.load_lora_weights(adapters["draft"], "style")
    expected = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), expected) and pipe.get_list_adapters() == {}
    with pytest.raises(ValueError, match="have been unloaded"):
        pipe.unfuse_lora()
    assert torch.equal(context(CogView2Pipeline.from_pipe(pipe)), read)
    pipe.load_lora_weights(adapters["draft"], "again")
    twice = draft(pipe)
    pipe.fuse_lora()
    assert torch.equal(draft(pipe), twice) and torch.equal(context(pipe), read)


@pytest.mark.parametrize("shared", [True, False])
def test_unfusing_leaves_an_adapter_that_was_fused_and_unloaded_earlier(tokenizer, adapters, shared, tmp_path):
    pipe = build(tokenizer, shares_backbone=shared)
    other = random_adapter({"transformer": pipe.transformer}, tmp_path, seed=7).parent
    plain, read = weights_of(pipe.transformer), context(pipe)
    pipe.load_lora_weights(adapters["draft"], "one")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    one = weights_of(pipe.transformer)
    name = "transformer.layers.0.attention.dense"
    few = {key: value for key, value in pipe.lora_state_dict(other).items() if key.startswith(f"{name}.")}
    for source in (other, few, other):
        pipe.load_lora_weights(adapters["draft"], "off")
        pipe.load_lora_weights(source, "two")
        pipe.fuse_lora(adapter_names="two")
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    found = pipe.transformer.state_dict()
    assert all(torch.allclose(found[name], one[name], atol=1e-5) for name in one)
    assert torch.equal(context(CogView2Pipeline.from_pipe(pipe)), read)  # the weights of before are lent
    assert pipe.direct_sr_transformer._backbone_differs() == shared
    with pytest.raises(ValueError, match="have been unloaded"):
        pipe.unfuse_lora()
    if shared:
        lent = {name: value for name, value in pipe.direct_sr_transformer.state_dict().items() if name in plain}
        assert lent and all(torch.equal(lent[name], plain[name]) for name in lent)


def test_unfusing_takes_out_what_is_loaded_where_another_component_keeps_its_own(pipe, adapters):
    read = context(pipe)
    pipe.load_lora_weights(adapters["draft"], "draft")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapters["sr"], "fine")
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(context(pipe), read)


@pytest.mark.parametrize("kind, shared", [("all", True), ("draft", True), ("draft", False)])
def test_models_may_be_moved_while_adapters_are_fused(tokenizer, adapters, kind, shared):
    moved, fused = (build(tokenizer, shares_backbone=shared) for _ in range(2))
    for each in (moved, fused):
        each.load_lora_weights(adapters[kind], "style")
    moved.to(torch.bfloat16)
    fused.fuse_lora()
    fused.to(torch.bfloat16)
    fused.unfuse_lora()
    for stage in STAGES:
        found, expected = getattr(fused, stage).state_dict(), getattr(moved, stage).state_dict()
        assert found.keys() == expected.keys()
        assert {value.dtype for value in found.values()} == {torch.bfloat16}
        exact = shared and stage != "iterative_sr_transformer"  # otherwise it is subtracted
        assert all(torch.allclose(found[name], expected[name], atol=0 if exact else 0.05) for name in found)
    if shared:
        assert fused.transformer.word_embeddings.weight is fused.direct_sr_transformer.word_embeddings.weight
        lent = dict(fused.direct_sr_transformer.named_parameters())
        name = "layers.0.attention.dense.{}weight"
        own = fused.transformer.get_parameter(name.format("base_layer."))
        assert own is lent[name.format("base_layer." if kind == "all" else "")]
    fused.set_progress_bar_config(disable=True)
    draft(fused)


def test_one_model_moved_while_fused_leaves_the_weights_that_another_uses(pipe, adapters):
    pipe.load_lora_weights(adapters["draft"], "style")
    pipe.fuse_lora()
    pipe.transformer.to(torch.float64)
    lent = pipe.direct_sr_transformer.layers[0].attention.dense.weight
    pipe.unfuse_lora()
    assert {value.dtype for value in pipe.transformer.layers.parameters()} == {torch.float64}
    assert lent is pipe.direct_sr_transformer.layers[0].attention.dense.weight and lent.dtype == torch.float32


def test_what_is_fused_is_left_alone_until_it_is_unfused(pipe, adapters):
    pipe.load_lora_weights(adapters["draft"], "style")
    whole = logits(pipe.transformer)
    pipe.fuse_lora(lora_scale=0.5)
    half = draft(pipe)
    for call in (
        lambda: pipe.fuse_lora(),
        lambda: pipe.set_adapters("style"),
        lambda: pipe.delete_adapters("style"),
        lambda: pipe.load_lora_weights(adapters["draft"], "more"),
    ):
        with pytest.raises(ValueError, match="Call `unfuse_lora` first"):
            call()
    assert torch.equal(draft(pipe), half)
    pipe.unfuse_lora()
    assert torch.allclose(logits(pipe.transformer), whole, atol=1e-5)
    pipe.set_adapters("style", 0.5)
    assert torch.equal(draft(pipe), half)


def test_nothing_changes_where_one_component_is_fused(pipe, adapters):
    pipe.load_lora_weights(adapters["all"], "style")
    pipe.load_lora_weights(adapters["draft"], "other")
    pipe.fuse_lora("iterative_sr_transformer")
    before, names = adapters_of(pipe), pipe.get_list_adapters()
    for call in (
        pipe.disable_lora,
        pipe.enable_lora,
        lambda: pipe.set_adapters("style", 0.5),
        lambda: pipe.delete_adapters("style"),
        lambda: pipe.load_lora_weights(adapters["all"], "more"),
        lambda: pipe.fuse_lora(),
    ):
        with pytest.raises(ValueError, match="Call `unfuse_lora` first"):
            call()
        assert adapters_of(pipe) == before and pipe.get_list_adapters() == names
    pipe.delete_adapters("other")  # which is not in the component that is fused
    assert pipe.get_list_adapters()["transformer"] == ["style"]


def test_a_fused_adapter_runs_in_the_fused_step_and_another_says_why_not(pipe, adapters, caplog):
    if fused_decoding_refusals(pipe.transformer, 1, 50, "cpu"):
        pytest.skip("the kernels are not built")
    decoders._tell_once.cache_clear()
    pipe.load_lora_weights(adapters["draft"], "style")
    with caplog.at_level(logging.WARNING):
        expected = draft(pipe)
        draft(pipe)
    told = [record for record in caplog.records if "instead of in one kernel" in record.message]
    assert len(told) == 1 and "has an adapter (`pipe.fuse_lora()`" in told[0].message
    pipe.fuse_lora()
    assert not fused_decoding_refusals(pipe.transformer, 1, 50, "cpu")
    assert torch.equal(draft(pipe), expected)


def test_a_weight_that_changes_counts_in_steps_that_are_kept(pipe, adapters):
    pipe.load_lora_weights(adapters["draft"], "style")
    before = decoders._state(pipe.transformer)
    pipe.set_adapters("style", 0.25)
    after = decoders._state(pipe.transformer)
    assert before != after and after == decoders._state(pipe.transformer)
    pipe.disable_lora()
    assert decoders._state(pipe.transformer) != after


def test_an_error_while_fusing_leaves_everything_as_it_was(pipe, adapters):
    pipe.load_lora_weights(adapters["all"], "style")
    expected = draw(pipe)
    layers = list(adapter_layers(pipe.iterative_sr_transformer))
    layers[-1][2].lora_B["style"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True)
    assert pipe.num_fused_loras == 0
    layers[-1][2].lora_B["style"].weight.data.copy_(
        load_file(adapters["all"] / "pytorch_lora_weights.safetensors")[
            "iterative_sr_transformer.layers.1.mlp.dense_4h_to_h.lora_B.weight"
        ]
    )
    assert torch.equal(draw(pipe), expected)


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_those_of_diffusers(pipe, adapters, tmp_path):
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    pipe.load_lora_weights(adapters["all"], "style")
    file = pipe.save_adapter(tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert "transformer.layers.0.attention.query_key_value.lora_A.weight" in opened.keys()  # noqa: SIM118
    metadata = _load_sft_state_dict_metadata(str(file))
    assert metadata["transformer.r"] == 4 and metadata["iterative_sr_transformer.peft_type"] == "LORA"
    source, saved = load_file(adapters["all"] / file.name), load_file(file)
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name]) for name in source)


def test_files_of_rank_8_for_the_shipped_model_are_as_small_as_the_pages_say(tmp_path):
    from cogview_pipelines.environment import SHIPPED_MODEL

    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    models = {stage: getattr(pipe, stage) for stage in STAGES}
    bounds = {"transformer": 1_000_000, "direct_sr_transformer": 1_100_000, "iterative_sr_transformer": 1_000_000}
    for stage, bound in bounds.items():
        assert random_adapter({stage: models[stage]}, tmp_path / stage, rank=8).stat().st_size < bound
    assert 2_650_000 < random_adapter(models, tmp_path / "all", rank=8).stat().st_size < 2_750_000  # "2.7 MB"


def test_matrices_alone_are_enough(pipe, adapters):
    state_dict = CogView2Pipeline.lora_state_dict(adapters["draft"])
    pipe.load_lora_weights(adapters["draft"], "file")
    expected = draft(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(state_dict, "memory")
    assert torch.equal(draft(pipe), expected)


def test_save_lora_weights_writes_what_it_is_given(pipe, adapters, tmp_path):
    matrices = {
        name.removeprefix("transformer."): value
        for name, value in CogView2Pipeline.lora_state_dict(adapters["draft"]).items()
    }
    CogView2Pipeline.save_lora_weights(tmp_path / "none", transformer_lora_layers=matrices, is_main_process=False)
    assert not (tmp_path / "none").exists()
    CogView2Pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=matrices, transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 8}
    )
    pipe.load_lora_weights(tmp_path, "style")
    assert next(layer for *_, layer in adapter_layers(pipe.transformer)).scaling["style"] == 2
    with pytest.raises(TypeError, match="unet_lora_layers"):
        CogView2Pipeline.save_lora_weights(tmp_path, unet_lora_layers=matrices)


@pytest.mark.parametrize("kind", ["draft", "all"])
def test_a_pipeline_saved_with_an_adapter_says_so_and_loads_with_it(pipe, adapters, kind, tmp_path, caplog):
    pipe.load_lora_weights(adapters[kind], "style")
    pipe.load_lora_weights(adapters["sr"], "off")
    pipe.set_adapters("style", 0.75)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert "saved without the adapters ['style', 'off']" in caplog.text
    assert torch.equal(draw(pipe), expected)
    loaded = CogView2Pipeline.from_pretrained(tmp_path)
    assert loaded.get_active_adapters() == ["style"]
    assert torch.equal(draw(loaded), expected)
    loaded.unload_lora_weights()
    pipe.unload_lora_weights()
    assert torch.equal(draw(loaded), draw(pipe))
    loaded.save_pretrained(tmp_path)  # now without any
    assert CogView2Pipeline.from_pretrained(tmp_path).get_list_adapters() == {}


@pytest.mark.parametrize("kind", ["draft", "sr", "all"])
@pytest.mark.parametrize("unload", [False, True])
def test_a_pipeline_saved_with_a_fused_adapter_holds_it_in_its_weights(pipe, adapters, kind, unload, tmp_path):
    pipe.load_lora_weights(adapters[kind], "style")
    pipe.fuse_lora()
    if unload:
        pipe.unload_lora_weights()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    loaded = CogView2Pipeline.from_pretrained(tmp_path)
    assert loaded.get_list_adapters() == {} and torch.equal(draw(loaded), expected)
    assert torch.equal(draw(pipe), expected)


def test_a_pipeline_saved_with_one_adapter_fused_and_another_left_out_draws_the_same_again(pipe, adapters, tmp_path):
    pipe.load_lora_weights(adapters["draft"], "fused")
    pipe.load_lora_weights(adapters["all"], "left_out")
    pipe.set_adapters(["fused", "left_out"])
    pipe.fuse_lora(components=["transformer"], adapter_names=["fused"])
    assert adapters_of(pipe) == {
        "transformer": ["fused"],
        "direct_sr_transformer": ["left_out"],
        "iterative_sr_transformer": ["left_out"],
    }
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = CogView2Pipeline.from_pretrained(tmp_path)
    assert adapters_of(loaded) == {**adapters_of(pipe), "transformer": []}
    assert torch.equal(draw(loaded), expected)
    pipe.unfuse_lora()
    assert adapters_of(pipe)["transformer"] == ["fused", "left_out"]


def test_an_adapter_fused_into_one_component_is_saved_for_the_others(pipe, adapters, tmp_path):
    pipe.load_lora_weights(adapters["all"], "style")
    pipe.fuse_lora(components=["iterative_sr_transformer"])
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = CogView2Pipeline.from_pretrained(tmp_path)
    assert loaded.get_list_adapters() == {"transformer": ["style"], "direct_sr_transformer": ["style"]}
    assert torch.equal(draw(loaded), expected)


def test_an_adapter_whose_alpha_is_zero_changes_nothing_and_is_saved(pipe, tmp_path):
    random_adapter({"transformer": pipe.transformer}, tmp_path / "none", alpha=0)
    expected = draw(pipe)
    pipe.load_lora_weights(tmp_path / "none", "none")
    pipe.save_pretrained(tmp_path / "model")
    loaded = CogView2Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.get_active_adapters() == ["none"]
    assert torch.equal(draw(pipe), expected) and torch.equal(draw(loaded), expected)


def test_a_new_process_makes_the_same_picture(pipe, adapters, tmp_path):
    copy_of = CogView2Pipeline(**copy.deepcopy(pipe.components))
    copy_of.save_pretrained(tmp_path / "model")
    code = f"""
import torch
from cogview_pipelines import CogView2Pipeline
pipe = CogView2Pipeline.from_pretrained({str(tmp_path / "model")!r})
pipe.load_lora_weights({str(adapters["all"])!r}, "style")
print(pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="latent").tokens.flatten().tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    pipe.load_lora_weights(adapters["all"], "style")
    assert json.loads(result.stdout.splitlines()[-1]) == draw(pipe).flatten().tolist()


# Words ---------------------------------------------------------------------------------------------------------------

PROMPT = "a red tiger, 红色老虎"


@pytest.fixture
def worded(tokenizer, tmp_path):
    """A pipeline that knows some words, and the folder of an adapter that knows two more."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipe = build(IcetkTokenizer.from_pretrained(tmp_path / "tokenizer", known_words=["a", "tiger", "老虎"]))
    path = random_adapter({stage: getattr(pipe, stage) for stage in STAGES}, tmp_path / "warm")
    weights, configs, words = read_lora(path, list(STAGES))
    assert words == []
    write_lora(tmp_path / "warm", weights, configs, known_words=["red", "红色"])
    return pipe, tmp_path / "warm"


def test_words_of_an_adapter_are_known_as_long_as_it_counts(worded, adapters):
    pipe, folder = worded
    unknown = pipe.tokenizer.unknown_parts
    assert unknown(PROMPT) == ["red", "红色"]
    for remove in (pipe.unload_lora_weights, lambda: pipe.delete_adapters("warm")):
        pipe.load_lora_weights(folder, "warm")
        assert unknown(PROMPT) == []
        assert pipe.tokenizer.known_words == ["a", "tiger", "老虎"]
        remove()
        assert unknown(PROMPT) == ["red", "红色"]
    pipe.load_lora_weights(folder, "warm")
    pipe.load_lora_weights(adapters["all"], "other")
    assert unknown(PROMPT) == []
    chosen = (lambda: pipe.set_adapters("other"), lambda: pipe.set_adapters("warm"))
    for off, on in (chosen, (pipe.disable_lora, pipe.enable_lora)):
        off()
        assert unknown(PROMPT) == ["red", "红色"]
        on()
        assert unknown(PROMPT) == []
    upscale = CogView2UpscalePipeline.from_pipe(pipe)
    upscale.set_adapters("other")  # which does not touch the words of CogLM's adapters
    CogView2CaptionPipeline.from_pipe(pipe).delete_adapters("warm")
    assert unknown(PROMPT) == ["red", "红色"]


def test_words_of_an_adapter_of_weight_0_are_unknown(worded, adapters, tmp_path):
    pipe, folder = worded
    unknown = pipe.tokenizer.unknown_parts
    pipe.load_lora_weights(folder, "warm")
    write_lora(tmp_path / "blue", *read_lora(adapters["draft"], list(STAGES))[:2], known_words=["blue", "红色"])
    pipe.load_lora_weights(tmp_path / "blue", "blue")
    prompt = f"blue, {PROMPT}"
    for weights, left in (
        ([0.0, 1.0], ["red"]),
        ([1.0, 0], ["blue"]),
        ([0.0, 0.0], ["blue", "red", "红色"]),
        ([{"transformer": 0.0}, 0.0], ["blue", "red", "红色"]),
        ([{"direct_sr_transformer": 0.0}, -0.5], []),
    ):
        pipe.set_adapters(["warm", "blue"], weights)
        assert unknown(prompt) == left
        pipe.disable_lora()
        assert unknown(prompt) == ["blue", "red", "红色"]
        pipe.enable_lora()
        assert unknown(prompt) == left
    pipe.set_adapters(["warm", "blue"], [0.0, 1.0])
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = CogView2Pipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.tokenizer.unknown_parts(prompt) == ["red"]
    pipe.delete_adapters("blue")
    assert unknown(prompt) == ["blue", "red", "红色"]
    pipe.load_lora_weights(adapters["all"], "other")  # which leaves the weight of the first one alone
    assert unknown(prompt) == ["blue", "red", "红色"]
    pipe.set_adapters("warm")
    assert unknown(prompt) == ["blue"]


@pytest.mark.parametrize("weight, scale", [(0.0, 1.0), (1.0, 0.0)])
def test_words_of_an_adapter_that_is_fused_with_weight_0_stay_unknown(worded, weight, scale):
    pipe, folder = worded
    pipe.load_lora_weights(folder, "warm")
    pipe.set_adapters("warm", weight)
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]
    pipe.unfuse_lora()
    assert pipe.tokenizer.unknown_parts(PROMPT) == ([] if weight else ["red", "红色"])
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    assert pipe.tokenizer.known_words == ["a", "tiger", "老虎"]
    assert pipe.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]


def test_words_of_an_adapter_that_was_not_fused_with_others_are_unknown_meanwhile(worded, adapters):
    pipe, folder = worded
    pipe.load_lora_weights(adapters["draft"], "other")
    other = logits(pipe.transformer)
    pipe.load_lora_weights(folder, "warm")
    pipe.fuse_lora(adapter_names=["other"])
    assert torch.allclose(logits(pipe.transformer), other, atol=1e-3)  # without what was left out
    assert pipe.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]
    pipe.unfuse_lora()
    assert pipe.tokenizer.unknown_parts(PROMPT) == []


def test_words_of_an_adapter_are_saved_with_it(worded, tmp_path):
    pipe, folder = worded
    pipe.load_lora_weights(folder, "warm")
    pipe.save_adapter(tmp_path / "again", "warm")
    assert read_lora(tmp_path / "again", list(STAGES)).known_words == ["red", "红色"]
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = CogView2Pipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.tokenizer.unknown_parts(PROMPT) == []
    loaded.unload_lora_weights()
    assert loaded.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]


@pytest.mark.parametrize("unload", [False, True], ids=["loaded", "unloaded"])
def test_words_of_a_fused_adapter_are_those_of_the_model(worded, unload, tmp_path):
    pipe, folder = worded
    pipe.load_lora_weights(folder, "warm")
    pipe.fuse_lora()
    assert pipe.tokenizer.unknown_parts(PROMPT) == []
    if unload:
        pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipeline")
    for each in (pipe, CogView2Pipeline.from_pretrained(tmp_path / "pipeline")):
        assert each.tokenizer.known_words == ["a", "tiger", "老虎", "red", "红色"]
        assert each.tokenizer.unknown_parts(PROMPT) == []
    if not unload:
        pipe.unfuse_lora()
        assert pipe.tokenizer.unknown_parts(PROMPT) == []
        pipe.unload_lora_weights()
        assert pipe.tokenizer.known_words == ["a", "tiger", "老虎"]
        assert pipe.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]


@pytest.fixture
def worded_cogview(tmp_path):
    """A CogView that knows some words, and the folder of adapters that know another: of what draws, of what scores."""
    make_cogview_tokenizer(tmp_path).save_pretrained(tmp_path / "tokenizer")
    pipe = build_cogview(CogViewTokenizer.from_pretrained(tmp_path / "tokenizer", known_words=["a", "tiger"]))
    for part, word in (("transformer", "red"), ("caption_transformer", "blue")):
        path = random_adapter({part: getattr(pipe, part)}, tmp_path / word)
        weights, configs, _ = read_lora(path, [part])
        write_lora(tmp_path / word, weights, configs, known_words=[word])
    return pipe, tmp_path


def unknown_of(pipe):
    """What a CogView does not know of a text that it draws, and of one that it scores."""
    tokenizer, prompt = pipe.tokenizer, "a red tiger blue"
    drawn = tokenizer.unknown_parts(prompt)
    assert tokenizer.known_text(prompt).split() == [word for word in prompt.split() if word not in drawn]
    return drawn, tokenizer.unknown_parts(prompt, CogViewCaptionPipeline.from_pipe(pipe).caption_component)


def test_words_of_an_adapter_are_known_to_the_model_that_it_is_for(worded_cogview):
    pipe, folder = worded_cogview
    nothing = (["red", "blue"], ["red", "blue"])
    assert unknown_of(pipe) == nothing
    pipe.load_lora_weights(folder / "red", "red")
    assert unknown_of(pipe) == (["blue"], ["red", "blue"])
    pipe.load_lora_weights(folder / "blue", "blue")
    assert unknown_of(pipe) == (["blue"], ["red"])
    for off, on in (
        (lambda: pipe.set_adapters("red"), lambda: pipe.set_adapters(["red", "blue"])),
        (lambda: pipe.set_adapters(["red", "blue"], [1.0, 0.0]), lambda: pipe.set_adapters(["red", "blue"])),
        (lambda: pipe.delete_adapters("blue"), lambda: pipe.load_lora_weights(folder / "blue", "blue")),
    ):
        off()
        assert unknown_of(pipe) == (["blue"], ["red", "blue"])
        on()
        assert unknown_of(pipe) == (["blue"], ["red"])
    pipe.disable_lora()
    assert unknown_of(pipe) == nothing
    pipe.enable_lora()
    assert unknown_of(pipe) == (["blue"], ["red"])
    pipe.unload_lora_weights()
    assert unknown_of(pipe) == nothing


@pytest.mark.parametrize("way", ["loaded", "fused", "unloaded"])
def test_words_that_one_model_of_several_knows_are_saved(worded_cogview, way):
    pipe, folder = worded_cogview
    for word in ("red", "blue"):
        pipe.load_lora_weights(folder / word, word)
    if way != "loaded":
        pipe.fuse_lora()
    if way == "unloaded":
        pipe.unload_lora_weights()
    assert unknown_of(pipe) == (["blue"], ["red"])
    for name in ("first", "second"):  # what was saved is saved again
        pipe.save_pretrained(folder / name)
        pipe = CogViewPipeline.from_pretrained(folder / name)
        assert unknown_of(pipe) == (["blue"], ["red"])
        assert pipe.tokenizer.known_words == ["a", "tiger", *(["red"] if way != "loaded" else [])]
    assert pipe.tokenizer.add_known_words(["red, blue"]) == ["red", "blue"]  # to all of them
    pipe.save_pretrained(folder / "third")
    assert unknown_of(pipe) == unknown_of(CogViewPipeline.from_pretrained(folder / "third")) == ([], [])


def test_words_that_a_model_learns_are_its_own_whatever_adapters_know(worded):
    pipe, folder = worded
    pipe.load_lora_weights(folder, "warm")
    assert pipe.tokenizer.add_known_words(["a red tiger"]) == ["red"]
    pipe.unload_lora_weights()
    assert pipe.tokenizer.unknown_parts(PROMPT) == ["红色"]


def test_where_one_model_draws_and_scores_it_knows_the_words_in_both(worded_cogview):
    pipe, folder = worded_cogview
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "vqvae", "transformer")}
    pipe = CogViewPipeline(**parts)
    pipe.load_lora_weights(folder / "red", "red")
    assert unknown_of(pipe) == (["blue"], ["blue"])
    CogViewCaptionPipeline.from_pipe(pipe).load_lora_weights(folder / "blue", "blue")
    assert unknown_of(pipe) == ([], [])


def test_words_of_an_adapter_of_two_models_are_known_to_both(worded_cogview, tmp_path):
    pipe, folder = worded_cogview
    found = [read_lora(folder / word, ["transformer", "caption_transformer"]) for word in ("red", "blue")]
    weights, configs = ({**found[0][part], **found[1][part]} for part in (0, 1))
    write_lora(tmp_path / "both", weights, configs, known_words=["red", "blue"])
    pipe.load_lora_weights(tmp_path / "both", "both")
    assert unknown_of(pipe) == ([], [])
    pipe.save_adapter(tmp_path / "again", "both")
    assert read_lora(tmp_path / "again", ["transformer", "caption_transformer"]).known_words == ["red", "blue"]
    pipe.set_adapters("both", {"transformer": 0.0})
    assert unknown_of(pipe) == (["red", "blue"], [])


def test_the_warning_is_that_of_the_model_that_reads_the_text(worded_cogview, caplog):
    caplog.set_level("WARNING", "cogview_pipelines.unknown_words")
    pipe, folder = worded_cogview
    pipe.load_lora_weights(folder / "blue")
    pipe.check_inputs("a blue tiger")
    CogViewCaptionPipeline.from_pipe(pipe).check_texts("a blue tiger")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "cogview_pipelines.unknown_words"]
    assert message == "The model does not know this part of `prompt`, and goes by the rest: ['blue']."


def test_a_learned_word_is_known_whatever_adapters_count(worded, tmp_path):
    pipe, folder = worded
    prompt = "a <my-car>, red tiger"
    pipe.load_lora_weights(folder, "warm")
    assert pipe.tokenizer.unknown_parts(prompt) == ["<my-car>"]
    assert pipe.tokenizer.known_text(prompt) == "a, red tiger"
    write_learned_token(tmp_path, "<my-car>", torch.zeros(pipe.transformer.config.hidden_size), "tiger")
    pipe.load_textual_inversion(tmp_path)
    assert pipe.tokenizer.unknown_parts(prompt) == []
    for change in (pipe.disable_lora, pipe.enable_lora, lambda: pipe.set_adapters("warm", 0.0), pipe.fuse_lora):
        change()
        assert "<my-car>" not in pipe.tokenizer.unknown_parts(prompt)
        assert "<my-car>" in pipe.tokenizer.known_text(prompt)
    pipe.unload_lora_weights()
    assert pipe.tokenizer.unknown_parts(f"{prompt}, <your-car>") == ["red", "<your-car>"]


@pytest.mark.parametrize("words", ['"warm"', "[1]", "{", "[" * 100_000])
def test_words_that_are_no_list_of_texts_are_refused(worded, words, tmp_path):
    pipe, folder = worded
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), tmp_path / "bad.safetensors", {"known_words": words})
    with pytest.raises(ValueError, match="damaged"):
        pipe.load_lora_weights(tmp_path / "bad.safetensors")
    assert pipe.get_list_adapters() == {} and pipe.tokenizer.unknown_parts(PROMPT) == ["red", "红色"]


# Weights that are not plain ------------------------------------------------------------------------------------------


def test_adapters_work_on_weights_of_eight_bits(tokenizer, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    build(tokenizer, shares_backbone=True).save_pretrained(tmp_path)
    pipe = CogView2Pipeline.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    plain, read = logits(pipe.transformer), context(pipe)
    exact = build(tokenizer, shares_backbone=True)
    folder = random_adapter({"transformer": exact.transformer}, tmp_path / "adapter").parent
    exact.load_lora_weights(folder, "style")
    pipe.load_lora_weights(folder, "style")
    adapted = logits(pipe.transformer)
    moved = (logits(exact.transformer) - adapted).std()
    assert moved < 0.1 * (plain - adapted).std()
    assert torch.equal(context(pipe), read)
    pipe.fuse_lora()
    fused = logits(pipe.transformer)
    assert not torch.equal(fused, plain) and (fused - adapted).std() < 0.1 * (plain - adapted).std()
    assert torch.equal(context(pipe), read)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(logits(pipe.transformer), plain)
    assert torch.equal(context(pipe), read)


def test_adapters_work_on_weights_of_four_bits(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build(tokenizer, shares_backbone=True).save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    configuration = BitsAndBytesConfig(load_in_4bit=True, **options)
    pipe = CogView2Pipeline.from_pretrained(tmp_path, quantization_config=configuration)
    plain, read = logits(pipe.transformer), context(pipe)
    exact = build(tokenizer, shares_backbone=True)
    before = logits(exact.transformer)
    folder = random_adapter({"transformer": exact.transformer}, tmp_path / "adapter").parent
    for each in (exact, pipe):
        each.load_lora_weights(folder, "style")
    adapted, wanted = logits(pipe.transformer), logits(exact.transformer) - before
    assert ((adapted - plain) - wanted).std() < 0.5 * wanted.std()  # it moves them as it moves exact ones
    assert torch.equal(context(pipe), read)
    pipe.fuse_lora()
    assert 0 < (logits(pipe.transformer) - adapted).std() < 0.5 * wanted.std()  # the sum is rounded to 4 bits
    assert torch.equal(context(pipe), read)
    pipe.unfuse_lora()
    assert torch.equal(logits(pipe.transformer), adapted)
    pipe.fuse_lora()  # nothing of before is in the way
    pipe.unfuse_lora()
    assert torch.equal(logits(pipe.transformer), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(logits(pipe.transformer), plain)


def test_adapters_of_half_precision_models_stay_exact(pipe, adapters):
    pipe.load_lora_weights(adapters["draft"], "style")
    expected = logits(pipe.transformer)
    pipe.unload_lora_weights()
    pipe.transformer.bfloat16()
    pipe.load_lora_weights(adapters["draft"], "style")
    assert (logits(pipe.transformer) - expected).std() < 0.1 * expected.std()


def test_layers_that_are_offloaded_one_by_one_refuse_to_be_changed(pipe, adapters):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.transformer.layers[0].attention.dense, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        pipe.load_lora_weights(adapters["draft"])
