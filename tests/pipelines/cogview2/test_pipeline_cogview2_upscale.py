"""Super-resolution by itself: the same as in text to image, in tiles without seams, and what is refused."""

import itertools

import numpy as np
import PIL.Image
import pytest
import torch

from cogview_pipelines.pipelines.cogview2.pipeline_cogview2_upscale import CogView2UpscalePipeline

from ...utils import NUM_IMAGE_TOKENS
from ..conftest import FINE, LOW, build

PROMPT = "a cat on a blue background."
# draw the most likely token of the most likely cluster, whatever the seed
GREEDY = {"direct_sr_top_k_clusters": 1, "direct_sr_cluster_temperature": 1e-4, "iterative_sr_top_k": 1}


@pytest.fixture(scope="module")
def upscale(pipe):
    upscale = CogView2UpscalePipeline.from_pipe(pipe)
    upscale.set_progress_bar_config(disable=True)
    return upscale


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def grid_of(rows, columns, count=1, seed=0):
    return torch.randint(NUM_IMAGE_TOKENS, (count, rows, columns), generator=torch.Generator().manual_seed(seed))


def test_tokens_become_what_text_to_image_makes_of_them(pipe, upscale):
    prompts = [PROMPT, "a red car"]
    whole = pipe(prompts, generator=seeds(1, 2), output_type="pt", **GREEDY)
    low = pipe(prompts, generator=seeds(1, 2), height=LOW, output_type="latent").tokens
    again = upscale(tokens=low, prompt=prompts, output_type="pt", **GREEDY)
    assert torch.equal(torch.stack(again.tokens), whole.tokens)
    assert torch.equal(again.images, whole.images)


def test_a_picture_is_encoded_and_enlarged(upscale):
    image = picture(LOW, LOW)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    low = upscale.vqvae.encode(pixels).tokens
    from_tokens = upscale(tokens=low, prompt=PROMPT, generator=seeds(3)).images[0]
    from_picture = upscale(image, PROMPT, generator=seeds(3), faithful=False).images[0]
    assert from_picture.size == (FINE, FINE)
    assert np.array_equal(np.asarray(from_tokens), np.asarray(from_picture))


@pytest.mark.parametrize("height, width", [(LOW, LOW), (10, 20), (45, 33), (70, 32), (101, 64)])
def test_pictures_of_any_size_get_three_times_as_large(upscale, height, width):
    image = upscale(PIL.Image.fromarray(picture(height, width)), PROMPT).images[0]
    assert image.size == (3 * width, 3 * height)


@pytest.mark.parametrize("height, width", [(LOW, LOW), (10, 20)])
def test_a_faithful_result_reduced_again_is_the_picture(upscale, height, width):
    smooth = PIL.Image.fromarray(picture(5, 4)).resize((width, height), PIL.Image.Resampling.BICUBIC)
    smooth = np.asarray(smooth) // 2 + 64  # away from black and white, where values are cut off

    def distance(**call):
        large = upscale(smooth, PROMPT, generator=seeds(1), output_type="np", **call).images[0]
        small = large.reshape(height, 3, width, 3, 3).mean((1, 3))
        return np.abs(small - smooth / 255).max()

    assert distance() < 0.02
    assert distance(faithful=False) > 0.1


def test_pictures_of_different_sizes_come_back_in_order(upscale):
    images = [picture(32, 32), picture(40, 32), picture(32, 32, 1), picture(40, 32, 2), picture(32, 32, 3)]
    prompts = [PROMPT, "a red car", "", "一只老虎,红色背景。", PROMPT]
    together = upscale(images, prompts, generator=seeds(*range(5)), max_batch_size=2)
    for index, image in enumerate(images):
        alone = upscale(image, prompts[index], generator=seeds(index))
        assert torch.equal(together.tokens[index], alone.tokens[0])
        assert together.images[index].size == alone.images[0].size
        difference = np.asarray(together.images[index]).astype(int) - np.asarray(alone.images[0])
        assert np.abs(difference).max() <= 1  # a batch may be rounded in another way
    assert together.prompts == prompts
    arrays = upscale(images[:2], output_type="np").images
    assert [array.shape for array in arrays] == [(96, 96, 3), (120, 96, 3)]


def test_tiles_keep_what_their_neighbours_made_up_to_the_middle_of_the_overlap(upscale):
    """Tiles of 4 with an overlap of 2 start at 0, 2, 4: of 6 shared fine cells the first 3 stay."""
    canvases = []
    upscale(
        tokens=grid_of(4, 8),
        prompt=PROMPT,
        tile_overlap=0.5,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: canvases.append(kwargs["tokens"][0]),
    )
    passes = 1 + len(upscale.iterative_sr_scheduler.timesteps)
    finals = canvases[passes - 1 :: passes]
    assert len(finals) == 3
    for before, after in itertools.pairwise(finals):
        assert torch.equal(before[:, 6:9], after[:, :3])
        assert not torch.equal(before[:, 9:], after[:, 3:6])


def test_tiles_cover_both_axes_and_agree_where_they_meet(upscale):
    tiles = []
    output = upscale(
        tokens=grid_of(7, 6),
        prompt=PROMPT,
        tile_overlap=0.5,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: tiles.append(kwargs["tokens"][0]),
    )
    starts = [(row, column) for row in (0, 2, 3) for column in (0, 2)]
    passes = 1 + len(upscale.iterative_sr_scheduler.timesteps)
    finals = tiles[passes - 1 :: passes]
    assert len(finals) == len(starts)
    whole = torch.full((21, 18), -1)
    for (row, column), tile in zip(starts, finals):
        inside = (slice(3 * row, 3 * row + 12), slice(3 * column, 3 * column + 12))
        above, left = {0: 0, 2: 3, 3: 5}[row], {0: 0, 2: 3}[column]  # half of what overlaps
        before = whole[inside].clone()
        assert torch.equal(tile[:above], before[:above])
        assert torch.equal(tile[above:, :left], before[above:, :left])
        whole[inside] = tile
    assert torch.equal(output.tokens[0], whole)
    assert (whole >= 0).all()


def test_tiles_decoded_and_blended_show_no_seam(upscale):
    """All tokens equal: the picture must be as even at the borders of tiles as in one tile decoded at once."""
    fine = torch.full((1, 30, 24), 7)
    blended = upscale._decode_tiles(fine)
    assert blended.shape == (1, 3, 240, 192)
    inner = blended[:, :, 40:-40, 40:-40]
    period = 8 * 6  # tiles start every half side
    steps = inner.diff(dim=-1).abs().amax((0, 1, 2))
    assert steps.max() <= 4 * steps.median() + 0.05
    assert period < inner.shape[-1]
    one = upscale._decode_tiles(fine[:, :12, :12])
    assert torch.equal(one, upscale._decode_pixels(fine[:, :12, :12]))


def test_blending_gives_what_one_decoder_pass_gives_where_the_decoder_is_local(upscale, monkeypatch):
    """With a decoder that looks at single tokens, tiles and whole are the same picture."""

    def decode(tokens):
        values = (tokens.float() / NUM_IMAGE_TOKENS).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return values[:, None].expand(-1, 3, -1, -1)

    monkeypatch.setattr(upscale, "_decode_pixels", decode)
    tokens = grid_of(31, 20, count=2)
    torch.testing.assert_close(upscale._decode_tiles(tokens), decode(tokens).clone())


def test_two_levels_enlarge_twice(upscale):
    image = picture(12, 20)
    once = upscale(image, PROMPT, output_type="pt", **GREEDY).images
    expected = upscale(once, PROMPT, output_type="pt", **GREEDY).images
    twice = upscale(image, PROMPT, num_levels=2, output_type="pt", **GREEDY).images
    assert twice.shape == (1, 3, 108, 180)
    assert torch.equal(twice, expected)


def test_settings_of_super_resolution_count(upscale):
    def enlarge(**call):
        return upscale(tokens=grid_of(4, 4), prompt=PROMPT, generator=seeds(1), **call).tokens[0]

    plain = enlarge()
    assert torch.equal(plain, enlarge())
    assert not torch.equal(plain, enlarge(direct_sr_top_k_clusters=1, direct_sr_temperature=0.5))
    assert not torch.equal(plain, enlarge(num_lopar_steps=0))
    assert not torch.equal(plain, enlarge(style="cool"))
    assert not torch.equal(plain, upscale(tokens=grid_of(4, 4), generator=seeds(1)).tokens[0])


def test_latent_output_and_tuples(upscale):
    output = upscale(tokens=grid_of(4, 5, count=2), output_type="latent")
    assert [tuple(tokens.shape) for tokens in output.images] == [(12, 15)] * 2
    images, tokens, seeds_, prompts = upscale(tokens=grid_of(4, 4), return_dict=False)
    assert len(images) == len(tokens) == len(seeds_) == len(prompts) == 1


def test_without_iterative_super_resolution_one_pass_is_enough(tokenizer):
    upscale = CogView2UpscalePipeline.from_pipe(build(tokenizer, stages=("direct",)))
    upscale.set_progress_bar_config(disable=True)
    assert upscale(picture(40, 40), PROMPT).images[0].size == (120, 120)


def test_a_backbone_that_is_missing_is_named(shared_pipe):
    parts = {name: part for name, part in shared_pipe.components.items() if name != "transformer"}
    with pytest.raises(ValueError, match="`transformer` must be given"):
        CogView2UpscalePipeline(**parts)


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({}, ValueError, "Give either `image` or `tokens`"),
        ({"image": picture(9, 9), "tokens": grid_of(4, 4)}, ValueError, "Give either `image` or `tokens`"),
        ({"image": "cat.png"}, TypeError, "`image` must be a PIL image"),
        ({"tokens": [[1]]}, TypeError, "`tokens` must be a torch tensor"),
        ({"tokens": grid_of(3, 4)}, ValueError, "at least 4 x 4 tokens"),
        ({"tokens": grid_of(4, 4)[0]}, ValueError, r"\(num_images, rows, columns\)"),
        ({"tokens": grid_of(4, 4) + NUM_IMAGE_TOKENS}, ValueError, "`tokens` must be image codes"),
        ({"tokens": grid_of(4, 4).float()}, ValueError, "`tokens` must be image codes"),
        ({"tokens": grid_of(4, 4), "num_levels": 0}, ValueError, "`num_levels` must be a whole number"),
        ({"tokens": grid_of(4, 4), "tile_overlap": 0.9}, ValueError, "`tile_overlap` must be from 0 to 0.75"),
        ({"tokens": grid_of(4, 4), "prompt": ["a", "b"]}, ValueError, r"one or one per picture \(1\)"),
        ({"tokens": grid_of(4, 4), "prompt": "a cat " * 40}, ValueError, "`prompt` may have 30 tokens"),
        ({"tokens": grid_of(4, 4), "output_type": "png"}, ValueError, "`output_type` must be one of"),
        ({"tokens": grid_of(4, 4), "generator": 3}, ValueError, "`generator` must be a `torch.Generator`"),
    ],
)
def test_arguments_that_cannot_be_used_are_errors(upscale, call, error, message):
    with pytest.raises(error, match=message):
        upscale(**call)
