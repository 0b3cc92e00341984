"""One set of weights for all pipelines, and folders from which each of them can be loaded."""

import json

import pytest
import torch

import cogview_pipelines
from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
)

from ...utils import make_image_tokens

PIPELINES = (CogView2Pipeline, CogView2InpaintPipeline, CogView2UpscalePipeline, CogView2CaptionPipeline)


def use(pipe):
    """What a pipeline makes of a fixed input."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    tokens = make_image_tokens(1).unflatten(1, (4, 4))
    if isinstance(pipe, CogView2CaptionPipeline):
        return pipe(tokens=tokens, end="length").token_ids
    if isinstance(pipe, CogView2UpscalePipeline):
        return pipe(tokens=tokens, prompt="a cat", generator=generator).tokens[0].tolist()
    if isinstance(pipe, CogView2InpaintPipeline):
        mask = torch.zeros(60, 60)
        mask[20:40, 10:40] = 1
        return pipe("a cat", torch.full((3, 60, 60), 0.3), mask, generator=generator, output_type="pt").images.tolist()
    return pipe("a cat", generator=generator).tokens.tolist()


@pytest.mark.parametrize("target", PIPELINES)
@pytest.mark.parametrize("source", ["pipe", "shared_pipe"])
def test_from_pipe_shares_every_component(target, source, request):
    pipe = request.getfixturevalue(source)
    new = target.from_pipe(pipe)
    assert len(new.components) >= 3
    for name, component in new.components.items():
        assert component is pipe.components[name]
    assert new.config.compression_rate == pipe.config.compression_rate


@pytest.mark.parametrize("middle", PIPELINES)
def test_what_a_pipeline_has_no_use_for_comes_back(pipe, middle):
    there_and_back = CogView2Pipeline.from_pipe(middle.from_pipe(pipe), **pipe.components)
    assert there_and_back.config.styles == pipe.config.styles
    assert there_and_back.config.default_style == pipe.config.default_style
    assert use(there_and_back) == use(pipe)


def test_from_pipe_leaves_number_formats_alone(tokenizer):
    from ..conftest import build

    pipe = build(tokenizer)
    pipe.transformer.to(torch.bfloat16)
    CogView2InpaintPipeline.from_pipe(pipe)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vqvae.dtype == torch.float32


def test_what_is_missing_is_named(low_pipe, pipe):
    with pytest.raises(ValueError, match=r"lacks .*direct_sr_transformer"):
        CogView2UpscalePipeline.from_pipe(low_pipe)
    parts = {name: pipe.components[name] for name in ("direct_sr_transformer", "direct_sr_scheduler")}
    assert CogView2UpscalePipeline.from_pipe(low_pipe, **parts).scale == (3, 3)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("source", ["pipe", "shared_pipe"])
def test_saved_and_loaded_pipelines_do_the_same(kind, source, request, tmp_path):
    pipe = kind.from_pipe(request.getfixturevalue(source))
    expected = use(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == kind.__name__
    assert {value[0] for value in index.values() if isinstance(value, list) and value[0]} == {"cogview_pipelines"}
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert use(loaded) == expected


@pytest.mark.parametrize("kind", PIPELINES[1:])
@pytest.mark.parametrize("source", ["pipe", "shared_pipe"])
def test_every_pipeline_loads_from_the_folder_of_text_to_image(kind, source, request, tmp_path):
    pipe = request.getfixturevalue(source)
    pipe.save_pretrained(tmp_path)
    assert use(kind.from_pretrained(tmp_path)) == use(kind.from_pipe(pipe))


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_are_public(kind):
    assert getattr(cogview_pipelines, kind.__name__) is kind
    assert kind.__module__ == "cogview_pipelines"
