"""Settings are declared once: calls, docstrings, command line, requests and metadata know the same, within bounds."""

import inspect
import math

import numpy as np
import pytest
import torch

import cogview_pipelines
from cogview_pipelines.cli.generate import generate
from cogview_pipelines.cli.requests import ARGUMENTS, CAPTION, INPAINT, UPSCALE, check_arguments
from cogview_pipelines.ops.int8_linear import Int8Linear, is_built
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from cogview_pipelines.pipelines.cogview2.settings import CaptionSettings, SamplingSettings
from cogview_pipelines.serving.schemas import CaptionRequest, DrawsTokens, UpscaleRequest

from ..conftest import LOW

PIPELINES = ("CogView2Pipeline", "CogView2InpaintPipeline", "CogView2UpscalePipeline", "CogView2CaptionPipeline")
PROMPT = "a cat on a blue background."


def settings_of(pipeline):
    return CaptionSettings if pipeline == "CogView2CaptionPipeline" else SamplingSettings


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_call_takes_its_settings_and_its_docstring_explains_them(pipeline):
    call = getattr(cogview_pipelines, pipeline).__call__
    parameters, text = inspect.signature(call).parameters, inspect.getdoc(call)
    declared = settings_of(pipeline).declared(pipeline)
    assert len(declared) >= 2
    for name in declared:
        default = parameters[name].default
        assert default is None or default == getattr(settings_of(pipeline), name)
        assert name in text
    others = set(SamplingSettings.declared()) - set(declared) - set(CaptionSettings.declared())
    assert not others & set(parameters)


def test_lists_of_requests_take_the_settings_of_their_pipeline():
    assert set(SamplingSettings.declared("CogView2Pipeline")) <= set(ARGUMENTS)
    assert set(SamplingSettings.declared("CogView2InpaintPipeline")) <= set(INPAINT.arguments)
    assert set(SamplingSettings.declared("CogView2UpscalePipeline")) <= set(UPSCALE.arguments)
    assert set(CaptionSettings.declared()) <= set(CAPTION.arguments)


@pytest.mark.parametrize("name", SamplingSettings.declared())
def test_every_setting_is_an_option_with_its_help(name):
    option, declared = inspect.signature(generate).parameters[name].default, SamplingSettings.declared()[name]
    assert option.help == declared.help
    if declared.is_whole and not declared.is_per_pass:
        assert (option.min, option.max) == (declared.least, declared.most)


@pytest.mark.parametrize(
    "request_type, declared",
    [
        (DrawsTokens, SamplingSettings.declared("CogView2Pipeline")),
        (UpscaleRequest, SamplingSettings.declared("CogView2UpscalePipeline")),
        (CaptionRequest, {"temperature": CaptionSettings.declared()["temperature"]}),
    ],
)
def test_requests_have_the_bounds_and_the_help_of_the_settings(request_type, declared):
    schema = request_type.model_json_schema()["properties"]
    for name, setting in declared.items():
        field = schema[name]
        kind = field if "type" in field else field["anyOf"][0]
        assert (kind["minimum"], kind["maximum"]) == (setting.least, setting.most)
        assert kind["type"] == ("integer" if setting.is_whole else "number")
        assert field["description"] == setting.help


@pytest.mark.parametrize("name", SamplingSettings.declared())
def test_bounds_are_kept_everywhere_and_both_ends_are_allowed(pipe, name):
    declared = SamplingSettings.declared()[name]
    assert getattr(SamplingSettings(**{name: declared.least}), name) == declared.least
    assert getattr(SamplingSettings(**{name: declared.most}), name) == declared.most
    below = declared.least - 1 if declared.is_whole else math.nextafter(declared.least, -math.inf)
    for value in (below, declared.most * 2, math.nan, math.inf, -math.inf, 1e300, True, "1", [], torch.ones(())):
        with pytest.raises(ValueError, match=f"`{name}` must be a (whole )?number"):
            SamplingSettings(**{name: value})
    for value in (below, declared.most * 2):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            pipe(PROMPT, **{name: value})
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            pipe.check_inputs(PROMPT, **{name: value})
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            check_arguments({name: value})
        with pytest.raises(ValueError, match=name):
            DrawsTokens(prompt=PROMPT, **{name: value})


def test_numbers_of_other_libraries_become_plain_ones():
    settings = SamplingSettings(temperature=np.float32(0.5), top_k_clusters=np.int64(3), num_lopar_steps=np.uint8(0))
    assert (settings.temperature, settings.top_k_clusters, settings.num_lopar_steps) == (0.5, 3, 0)
    assert [type(value) for value in (settings.temperature, settings.top_k_clusters)] == [float, int]
    assert SamplingSettings(iterative_sr_top_k=(np.int32(3), 2)).iterative_sr_top_k == [3, 2]
    with pytest.raises(ValueError, match=r"`iterative_sr_top_k\[1\]`"):
        SamplingSettings(iterative_sr_top_k=[3, 0])


def test_what_is_given_comes_before_the_preset_and_that_before_the_default():
    settings = SamplingSettings.choose({"temperature": 0.5, "top_k_clusters": 3}, {"temperature": 0.7, "prompt": "x"})
    assert (settings.temperature, settings.top_k_clusters, settings.cluster_temperature) == (0.7, 3, 1.0)
    assert SamplingSettings.choose({"temperature": 0.5}, {"temperature": None}).temperature == 0.5


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("bias", [-100, 100])
def test_at_all_bounds_together_something_can_be_drawn(pipe, temperature, bias):
    extreme = {name: temperature for name in SamplingSettings.declared() if name.endswith("temperature")}
    output = pipe(PROMPT, **extreme, text_attention_bias=bias, guidance_scale=100, output_type="latent")
    assert 0 <= int(output.tokens.min()) <= int(output.tokens.max()) < pipe.vqvae.config.num_embeddings


@pytest.mark.parametrize(
    "counts",
    [
        {"num_images_per_prompt": 10**9},
        {"num_candidates": 10**8},
        {"num_images_per_prompt": 10_001},
        {"num_images_per_prompt": 2.0},
        {"num_candidates": True},
    ],
)
def test_counts_that_no_memory_has_room_for_are_refused(low_pipe, counts):
    with pytest.raises(ValueError, match=f"`{next(iter(counts))}` must be a whole number from 1 to 10000"):
        low_pipe(PROMPT, **counts)
    with pytest.raises(ValueError, match="`num_images_per_prompt` may be 2000 for 50 at a time, but is 10000"):
        low_pipe([PROMPT] * 50, num_images_per_prompt=10_000)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", ["transformer", "direct_sr_transformer", "iterative_sr_transformer"])
def test_broken_weights_are_told_from_indices_out_of_bounds(tokenizer, stage, value):
    from ..conftest import build

    pipe = build(tokenizer)
    getattr(pipe, stage).final_layernorm.weight.data[0] = value
    with pytest.raises(ValueError, match=r"logits are not finite.*Either its weights hold NaN"):
        pipe(PROMPT)
    if stage == "transformer":
        captions = cogview_pipelines.CogView2CaptionPipeline.from_pipe(pipe)
        captions.set_progress_bar_config(disable=True)
        for strategy in ("greedy", "beam"):
            with pytest.raises(ValueError, match="logits are not finite"):
                captions(torch.full((3, 40, 40), 0.5), strategy=strategy, max_length=2)


# How super-resolution computes


def drawn(pipe, **settings):
    return pipe("a red tiger", generator=torch.Generator().manual_seed(3), output_type="latent", **settings).tokens


@pytest.mark.skipif(not is_built(), reason="the kernels are not built")
def test_super_resolution_in_int8_is_as_good_as_the_same_and_can_be_undone(pipe, low_pipe, tmp_path):
    before = drawn(pipe)
    low = drawn(pipe, height=LOW, width=LOW)
    try:
        pipe.set_super_resolution(int8=True)
        rounded = drawn(pipe)
        assert rounded.shape == before.shape
        models = pipe.direct_sr_transformer, pipe.iterative_sr_transformer
        layers = [layer for model in models for layer in model.layers.modules()]
        assert any(isinstance(layer, Int8Linear) for layer in layers)
        assert not any(type(layer) is torch.nn.Linear for layer in layers)
        assert not any(isinstance(module, Int8Linear) for module in pipe.transformer.modules())
        assert torch.equal(drawn(pipe, height=LOW, width=LOW), low)
        assert torch.equal(drawn(pipe), rounded)
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.set_super_resolution()
    assert torch.equal(drawn(pipe), before)
    assert torch.equal(drawn(CogView2Pipeline.from_pretrained(tmp_path)), before)
    with pytest.raises(ValueError, match=r"`int8=True` is about super-resolution, but this pipeline has none"):
        low_pipe.set_super_resolution(int8=True)
