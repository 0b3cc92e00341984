"""Settings that a CogView folder brings in place of the released ones."""

import pytest
import torch

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline, CogViewUpscalePipeline

from ...utils_cogview import make_image_tokens

SETTINGS = {
    "CogViewPipeline": {"top_k": 1},
    "CogViewUpscalePipeline": {"temperature": 0.5, "top_k": 1},
    "CogViewCaptionPipeline": {"top_k": 1},
}


def parts(pipe):
    return {name: part for name, part in pipe.components.items() if name != "settings"}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_folder_brings_settings_and_calls_override_them(pipe, tmp_path):
    CogViewPipeline(**parts(pipe), settings=SETTINGS).save_pretrained(tmp_path)
    loaded = CogViewPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.check_inputs("a cat") == {"temperature": 1.0, "top_k": 1, "top_p": None}
    greedy = pipe("a cat", generator=generators(1), top_k=1).tokens
    for seed in (1, 2):
        assert torch.equal(loaded("a cat", generator=generators(seed)).tokens, greedy)
    released = pipe("a cat", generator=generators(1)).tokens
    assert torch.equal(loaded("a cat", generator=generators(1), top_k=200).tokens, released)
    assert not torch.equal(released, greedy)

    tokens = make_image_tokens(1).view(1, 4, 4)
    upscale, captioner = CogViewUpscalePipeline.from_pipe(loaded), CogViewCaptionPipeline.from_pipe(loaded)
    for own in (upscale, captioner):
        own.set_progress_bar_config(disable=True)
    fine = [upscale(tokens=tokens[:, :2, :2], generator=generators(seed)).tokens for seed in (1, 2)]
    assert torch.equal(*fine)
    captions = [captioner(tokens=tokens, generator=generators(seed)).token_ids for seed in (1, 2)]
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"CogView2Pipeline": {}}, "`settings` must have settings by name for"),
        ({"CogViewPipeline": {"guidance_scale": 2}}, r"for CogViewPipeline, but has \['guidance_scale'\]"),
        ({"CogViewPipeline": {"top_k": 0}}, "`top_k` must be a whole number"),
        ("warm", "`settings` must have settings by name"),
    ],
)
def test_settings_that_there_are_not_are_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        CogViewPipeline(**parts(pipe), settings=settings)


def test_checked_inputs_are_those_of_the_call(pipe):
    for arguments, message in (
        ({"prompt": ""}, "`prompt` must not be empty"),
        ({"prompt": "a cat " * 40}, "`prompt` may have 21 tokens"),
        ({"prompt": "a", "top_p": 2}, "`top_p` must be a number from 0 to 1"),
        ({"prompt": "a", "num_candidates": 1, "num_images_per_prompt": 2}, "`num_candidates` must be at least"),
    ):
        for call in (pipe.check_inputs, pipe):
            with pytest.raises(ValueError, match=message):
                call(**arguments)
    with pytest.raises(TypeError, match="There are no settings"):
        pipe.check_inputs("a", style="cool")
