"""What `check_inputs` promises: the errors of a call and the settings of a call, without computing anything."""

import pytest
import torch

from cogview_pipelines.models.cogview2.modeling_coglm import CogLMModel

from ..conftest import FINE, LOW

PROMPT = "a tiger on a blue background."


@pytest.mark.parametrize(
    "given",
    [{}, {"style": "cool"}, {"style": "cool", "temperature": 1.1}, {"height": LOW}, {"num_lopar_steps": 1}],
)
def test_a_call_with_the_settings_found_makes_the_same_picture(pipe, given):
    def tokens(**call):
        return pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent", **call).tokens

    assert torch.equal(tokens(**given), tokens(**pipe.check_inputs(PROMPT, **given)))


def test_the_settings_are_those_given_else_of_the_style_else_the_defaults(pipe):
    found = pipe.check_inputs(PROMPT, style="cool", cluster_temperature=0.4)
    assert (found["temperature"], found["cluster_temperature"], found["top_k_clusters"]) == (0.8, 0.4, 16)
    assert (found["style"], found["height"], found["width"]) == ("cool", FINE, FINE)
    assert pipe.check_inputs(PROMPT)["style"] == pipe.config.default_style


def test_the_size_is_the_largest_that_the_pipeline_makes(low_pipe):
    assert low_pipe.check_inputs(PROMPT)["height"] == LOW


@pytest.mark.parametrize(
    "prompt, given, message",
    [
        ("", {}, "`prompt`"),
        ([PROMPT, 5], {}, "`prompt`"),
        ("\u200b", {}, "`prompt` must not be empty"),
        ("tiger " * 40, {}, r"'(tiger ){9}tiger…' has \d+\. Shorten it"),
        (PROMPT, {"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        (PROMPT, {"num_images_per_prompt": 3, "num_candidates": 2}, "`num_candidates`"),
        (PROMPT, {"max_batch_size": -1}, "`max_batch_size`"),
        (PROMPT, {"style": "baroque"}, "`style`"),
        (PROMPT, {"height": 41}, "`height`"),
        (PROMPT, {"temperature": 0.0}, "`temperature`"),
        (PROMPT, {"num_lopar_steps": 99}, "99"),
        (PROMPT, {"negative_prompt": "a cat"}, "`guidance_scale`"),
    ],
)
def test_the_errors_are_those_of_the_call_and_nothing_is_computed(pipe, monkeypatch, prompt, given, message):
    def forward(*arguments, **named):
        raise AssertionError("the transformer ran")

    monkeypatch.setattr(CogLMModel, "forward", forward)
    for function in (pipe.check_inputs, pipe):
        with pytest.raises(ValueError, match=message):
            function(prompt, **given)


def test_unknown_settings_are_refused(pipe):
    with pytest.raises(TypeError, match="'top_p'"):
        pipe.check_inputs(PROMPT, top_p=0.9)
