"""Text to image: what belongs to a prompt, a seed and a style, and what the output holds."""

import warnings

import numpy as np
import pytest
import torch

from cogview_pipelines import CogView2InpaintPipeline

from ..conftest import FINE, LOW

PROMPTS = ["a cat on a blue background.", "一只老虎,红色背景。"]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe, prompt, *numbers, **call):
    return pipe(prompt, generator=seeds(*numbers), **{"output_type": "latent", **call}).tokens


def test_the_pictures_are_what_the_tokens_decode_to_in_every_output_type(pipe):
    made = {kind: pipe(PROMPTS[0], generator=seeds(3), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    tokens = made["latent"].images
    assert tokens.shape == (1, 12, 12)
    assert all(torch.equal(output.tokens, tokens) for output in made.values())
    assert torch.equal(made["pt"].images, pipe._decode_pixels(tokens))
    assert np.array_equal(made["np"].images, made["pt"].images.permute(0, 2, 3, 1).numpy())
    bytes_ = (made["np"].images[0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.array(made["pil"].images[0]), bytes_)


@pytest.mark.parametrize("size, grid", [({}, 12), ({"height": FINE, "width": FINE}, 12), ({"width": LOW}, 4)])
def test_the_size_says_whether_there_is_super_resolution(pipe, size, grid):
    assert draw(pipe, PROMPTS[0], 1, **size).shape == (1, grid, grid)


def test_seeds_of_the_output_make_its_pictures_again_alone(pipe):
    output = pipe(PROMPTS, num_images_per_prompt=2, generator=torch.Generator().manual_seed(5), output_type="latent")
    assert len(set(output.seeds)) == 4
    assert output.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    for prompt, seed, tokens in zip(output.prompts, output.seeds, output.tokens):
        assert torch.equal(draw(pipe, prompt, seed)[0], tokens)


def test_used_generators_give_seeds_that_make_the_pictures_again(pipe):
    used = seeds(3, 4)
    for generator in used:
        torch.rand(2, generator=generator)
    output = pipe(PROMPTS, generator=used, height=LOW, output_type="latent")
    assert not {3, 4} & set(output.seeds)
    for prompt, seed, tokens in zip(PROMPTS, output.seeds, output.tokens):
        assert torch.equal(draw(pipe, prompt, seed, height=LOW)[0], tokens)


def test_a_style_adds_its_suffix_in_the_language_of_the_prompt(pipe):
    suffixes = pipe.config.styles["cool"]["suffix"]
    for prompt, language in zip(PROMPTS, ("en", "zh")):
        expected = draw(pipe, prompt + suffixes[language], 1, temperature=0.8)
        assert torch.equal(draw(pipe, prompt, 1, style="cool"), expected)
        assert not torch.equal(draw(pipe, prompt, 1), expected)


def test_negative_prompts_go_with_their_prompts(pipe):
    call = {"guidance_scale": 3.0, "height": LOW}
    negatives = ["a car", "一棵树"]
    together = draw(pipe, PROMPTS, 1, 2, 3, 4, negative_prompt=negatives, num_images_per_prompt=2, **call)
    alone = [
        draw(pipe, prompt, *numbers, negative_prompt=negative, num_images_per_prompt=2, **call)
        for prompt, negative, numbers in zip(PROMPTS, negatives, ((1, 2), (3, 4)))
    ]
    assert torch.equal(together, torch.cat(alone))
    swapped = draw(pipe, PROMPTS, 1, 2, 3, 4, negative_prompt=negatives[::-1], num_images_per_prompt=2, **call)
    assert not torch.equal(together, swapped)


def test_one_prompt_may_have_several_negative_ones_by_turns(pipe):
    call = {"guidance_scale": 3.0, "height": LOW}
    together = draw(pipe, [PROMPTS[0]] * 2, 1, 1, negative_prompt=["a car", ""], **call)
    assert torch.equal(together[:1], draw(pipe, PROMPTS[0], 1, negative_prompt="a car", **call))
    assert torch.equal(together[1:], draw(pipe, PROMPTS[0], 1, **call))


@pytest.mark.parametrize(
    "negative, message",
    [(["a", "b", "c"], r"one per prompt \(2\), but there are 3"), ([1, 2], "list of strings"), ("\ud800", "Unicode")],
)
def test_negative_prompts_that_fit_nothing_are_errors(pipe, negative, message):
    with pytest.raises(ValueError, match=f"`negative_prompt`.*{message}"):
        pipe(PROMPTS, negative_prompt=negative, guidance_scale=2.0)


@pytest.mark.parametrize("prompt", ["\ud800", ["a cat", "b\udfff"]])
def test_half_a_character_is_no_prompt(pipe, prompt):
    with pytest.raises(ValueError, match="`prompt` must be Unicode text"):
        pipe(prompt)


def test_a_token_forced_by_a_callback_is_read_by_the_model(low_pipe):
    def force(step_to_force):
        def change(pipe, step, timestep, kwargs):
            if step != step_to_force:
                return None
            tokens = kwargs["tokens"].clone()
            tokens.view(1, -1)[0, step] = 0
            return {"tokens": tokens}

        return change

    free = draw(low_pipe, PROMPTS[0], 1, temperature=1e-6).flatten()
    first = int(free.nonzero()[0])
    forced = draw(low_pipe, PROMPTS[0], 1, temperature=1e-6, callback_on_step_end=force(first)).flatten()
    assert forced[first] == 0
    assert torch.equal(forced[:first], free[:first])
    assert not torch.equal(forced[first + 1 :], free[first + 1 :])


def test_pictures_whose_memory_is_read_only_give_no_warning(pipe):
    inpaint = CogView2InpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    picture = np.asarray(pipe(PROMPTS[0], generator=seeds(1)).images[0])
    mask = np.zeros(picture.shape[:2], bool)
    mask[20:40, 20:60] = True
    for array in (picture, mask):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inpaint(PROMPTS[0], picture, mask, generator=seeds(1))
