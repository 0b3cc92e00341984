"""Painting anew inside of a mask: what stays, what changes, and what is refused."""

import numpy as np
import PIL.Image
import pytest
import torch

from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.pictures.sizes import resize
from cogview_pipelines.pipelines.cogview2 import completion_geometry as geometry
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2_inpaint import CogView2InpaintPipeline

from ..conftest import FINE, LOW

PROMPT = "a cat on a blue background."


@pytest.fixture(scope="module")
def inpaint(pipe):
    inpaint = CogView2InpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    return inpaint


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def picture(height=70, width=90, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(height=70, width=90, *boxes):
    mask = np.zeros((height, width), dtype=bool)
    for top, left, bottom, right in boxes or [(20, 30, 45, 52)]:
        mask[top:bottom, left:right] = True
    return mask


def blob(height, width):
    """A round hole and a thin stroke: no rectangle anywhere."""
    rows, columns = np.mgrid[:height, :width]
    mask = (rows - height // 2) ** 2 + (columns - width // 3) ** 2 < 100
    mask[5, : width // 2] = True
    return mask


# What stays, and what changes


@pytest.mark.parametrize("height, width", [(70, 90), (90, 50), (33, 200), (FINE, FINE), (9, 7), (301, 40)])
@pytest.mark.parametrize("super_resolve", [None, True, False])
def test_pixels_outside_of_the_mask_stay_bit_for_bit(inpaint, height, width, super_resolve):
    image = picture(height, width)
    mask = blob(height, width) if height > 20 else mask_of(height, width, (3, 2, 6, 5))
    output = inpaint(PROMPT, PIL.Image.fromarray(image), PIL.Image.fromarray(mask), super_resolve=super_resolve)
    painted = np.asarray(output.images[0])
    assert painted.shape == image.shape
    assert np.array_equal(painted[~mask], image[~mask])
    assert (painted[mask] != image[mask]).any(-1).mean() > 0.9


@pytest.mark.parametrize("kind", ["pil", "bytes", "floats", "tensor", "byte tensor"])
def test_every_kind_of_picture_gives_the_same_result(inpaint, kind):
    image, mask = picture(), mask_of()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    given = {
        "pil": (PIL.Image.fromarray(image), PIL.Image.fromarray(mask).convert("L")),
        "bytes": (image, mask.astype(np.uint8) * 255),
        "floats": (image.astype(np.float32) / 255, mask.astype(np.float64)),
        "tensor": (pixels.float() / 255, torch.from_numpy(mask)[None]),
        "byte tensor": (pixels[None], torch.from_numpy(mask)),
    }[kind]
    expected = inpaint(PROMPT, PIL.Image.fromarray(image), mask, generator=seeds(1)).images[0]
    output = inpaint(PROMPT, *given, generator=seeds(1))
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected))


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_and_tensors_keep_their_numbers_outside_of_the_mask(inpaint, output_type):
    image = np.random.RandomState(0).rand(70, 90, 3).astype(np.float32)
    mask = mask_of()
    output = inpaint(PROMPT, image, mask, num_images_per_prompt=2, output_type=output_type)
    painted = output.images if output_type == "np" else output.images.permute(0, 2, 3, 1).numpy()
    assert painted.shape == (2, 70, 90, 3)
    assert np.array_equal(painted[:, ~mask], np.stack([image[~mask]] * 2))
    shape = (FINE, FINE, 3) if output_type == "np" else (3, FINE, FINE)
    assert tuple(output.crops[1][0].shape) == shape


def test_transparency_stays_outside_of_the_mask_and_goes_inside(inpaint):
    image = np.concatenate([picture(), np.random.RandomState(1).randint(0, 255, (70, 90, 1), dtype=np.uint8)], -1)
    mask = mask_of()
    painted = inpaint(PROMPT, PIL.Image.fromarray(image), mask).images[0]
    assert painted.mode == "RGBA"
    painted = np.asarray(painted)
    assert np.array_equal(painted[~mask], image[~mask])
    assert (painted[mask][:, 3] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_modes_are_painted_in_colour(inpaint, mode):
    image, mask = PIL.Image.fromarray(picture()).convert(mode), mask_of()
    painted = inpaint(PROMPT, image, mask).images[0]
    assert painted.mode == "RGB"
    assert np.array_equal(np.asarray(painted)[~mask], np.asarray(image.convert("RGB"))[~mask])


def test_the_raw_crop_is_what_is_seen_inside_of_the_mask(inpaint):
    image, mask = picture(120, 150), mask_of(120, 150, (45, 70, 80, 95))
    output = inpaint(PROMPT, image, mask, output_type="pt")
    ((top, left, bottom, right),), (crop,) = output.crop_boxes[0], output.crops[0]
    assert (top, left, bottom, right) == geometry.crop_box(torch.from_numpy(mask))
    assert crop.shape == (3, FINE, FINE)
    pasted = resize(crop[None], (bottom - top, right - left))[0]
    inside = torch.from_numpy(mask)
    crop_inside = inside[top:bottom, left:right]
    assert torch.equal(output.images[0][:, inside], pasted[:, crop_inside])


# The algorithm


def test_small_crops_stay_at_low_resolution_and_large_ones_are_super_resolved(inpaint):
    image = picture(90, 90)
    for box, size in (((30, 30, 40, 40), LOW), ((20, 20, 60, 60), FINE)):
        crop = inpaint(PROMPT, image, mask_of(90, 90, box)).crops[0][0]
        assert crop.size == (size, size)
    for side, size in ((LOW, LOW), (LOW + 1, FINE)):
        output = inpaint(PROMPT, image, mask_of(90, 90, (30, 30, 36, 36)), min_crop_size=side)
        ((top, _, bottom, _),) = output.crop_boxes[0]
        assert bottom - top == side and output.crops[0][0].size == (size, size)


def test_known_tokens_stay_and_only_masked_ones_are_drawn(inpaint):
    image, mask = picture(FINE, FINE), mask_of(FINE, FINE, (24, 48, 60, 72))
    seen = []
    inpaint(
        PROMPT,
        image,
        mask,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(
            (step, kwargs["stage"], kwargs["tokens"])
        ),
    )
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    top, left, bottom, right = geometry.crop_box(torch.from_numpy(mask))
    crop = pixels[..., top:bottom, left:right]
    crop_mask = torch.from_numpy(mask)[top:bottom, left:right]
    for stage, size, grid in (("transformer", LOW, (4, 4)), ("iterative_sr_transformer", FINE, (12, 12))):
        known = inpaint.vqvae.encode(resize(crop, (size, size))).tokens[0]
        marked = geometry.covering_token_mask(crop_mask, grid)
        tokens = [tokens for _, name, tokens in seen if name == stage]
        assert torch.equal(tokens[-1][0][~marked], known[~marked])
        if stage == "transformer":
            assert len(tokens) == marked.sum()  # one step for each masked token
            assert [int((one == -1).sum()) for one in tokens] == list(range(len(tokens)))[::-1]
    assert [step for step, _, _ in seen] == list(range(len(seen)))


def test_iterative_super_resolution_reads_the_original_around_the_mask(inpaint, monkeypatch):
    """The cell mask reaches `refine`, and what surrounds it is the original's fine tokens."""
    calls = []
    module = "cogview_pipelines.pipelines.cogview2.base.refine"
    monkeypatch.setattr(module, lambda *args, **kwargs: (calls.append((args, kwargs)), refine(*args, **kwargs))[1])
    image, mask = picture(FINE, FINE), mask_of(FINE, FINE, (0, 0, 60, 40), (70, 80, 90, 90))
    inpaint(PROMPT, image, mask)
    (direct, direct_options), (iterative, options) = calls
    assert direct[3] is None
    assert direct_options["cell_mask"] is None
    fine = inpaint.vqvae.encode(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255).tokens
    marked = geometry.covering_token_mask(torch.from_numpy(mask), (12, 12))
    assert torch.equal(options["cell_mask"], marked)
    assert torch.equal(iterative[3][:, ~marked], fine[:, ~marked])
    assert (iterative[3][:, marked] != fine[:, marked]).any()


def test_results_do_not_depend_on_the_batch_they_are_made_in(inpaint):
    images = [picture(70, 90), picture(60, 130, 1)]
    masks = [mask_of(), mask_of(60, 130, (0, 0, 60, 100))]
    prompts = [PROMPT, "一只老虎,红色背景。"]
    together = inpaint(prompts, images, masks, num_images_per_prompt=3, generator=seeds(*range(6)))
    apart = inpaint(prompts, images, masks, num_images_per_prompt=3, generator=seeds(*range(6)), max_batch_size=2)
    assert together.prompts == [prompts[0]] * 3 + [prompts[1]] * 3
    assert len(together.crop_boxes[3]) > 1  # the long mask is painted piece by piece
    for index in range(6):
        case = index // 3
        alone = inpaint(prompts[case], images[case], masks[case], generator=seeds(index))
        for other in (together, apart):
            assert np.array_equal(np.asarray(other.images[index]), np.asarray(alone.images[0]))
            assert other.seeds[index] == index
            assert other.crop_boxes[index] == alone.crop_boxes[0]
    assert not np.array_equal(np.asarray(together.images[0]), np.asarray(together.images[1]))


def test_one_picture_or_mask_or_prompt_serves_all_of_the_others(inpaint):
    output = inpaint([PROMPT, "a red car"], picture(), mask_of(), generator=seeds(1, 1))
    assert len(output.images) == 2
    assert not np.array_equal(np.asarray(output.images[0]), np.asarray(output.images[1]))


def test_a_long_mask_is_painted_piece_by_piece_until_nothing_is_left(inpaint):
    image, mask = picture(40, 240), mask_of(40, 240, (0, 60, 40, 240))
    output = inpaint(PROMPT, image, mask, output_type="np")
    covered = np.zeros_like(mask)
    for top, left, bottom, right in output.crop_boxes[0]:
        assert (mask & ~covered)[top:bottom, left:right].mean() <= 0.7
        assert bottom - top == right - left
        covered[top:bottom, left:right] = True
    assert covered[mask].all()
    assert len(output.crops[0]) == len(output.crop_boxes[0]) > 2
    assert (np.round(output.images[0] * 255)[mask] != image[mask]).any(-1).mean() > 0.9


def test_max_crop_size_bounds_the_crops(inpaint):
    image, mask = picture(100, 100), mask_of(100, 100, (10, 10, 90, 60))
    output = inpaint(PROMPT, image, mask, max_crop_size=48)
    assert max(bottom - top for top, _, bottom, _ in output.crop_boxes[0]) == 48


def test_mask_share_and_min_crop_size_choose_the_crop(inpaint):
    image, mask = picture(90, 90), mask_of(90, 90, (40, 40, 50, 50))

    def side(**call):
        ((top, _, bottom, _),) = inpaint(PROMPT, image, mask, **call).crop_boxes[0]
        return bottom - top

    assert side() == LOW // 2
    assert side(min_crop_size=30) == 30
    assert side(mask_share=0.25) == 40
    assert side(min_crop_size=500) == 90


def test_a_model_of_whole_pictures_sees_all_of_them(inpaint):
    whole = CogView2InpaintPipeline.from_pipe(inpaint, whole_pictures=True)
    whole.set_progress_bar_config(disable=True)
    image, mask = picture(60, 90), mask_of(60, 90, (30, 30, 34, 34))
    assert inpaint(PROMPT, image, mask).crop_boxes[0] != [(0, 1, 60, 61)]
    assert whole(PROMPT, image, mask).crop_boxes[0] == [(0, 1, 60, 61)]
    ((top, _, bottom, _),) = whole(PROMPT, image, mask, min_crop_size=20).crop_boxes[0]
    assert bottom - top == 20
    ((top, _, bottom, _),) = whole(PROMPT, image, mask, max_crop_size=40).crop_boxes[0]
    assert bottom - top == 40


def test_the_rule_of_the_release_leaves_out_tokens_that_are_masked_in_part(inpaint):
    image, mask = picture(LOW, LOW), mask_of(LOW, LOW, (5, 5, 20, 20))

    def count_steps(rule):
        calls = []
        inpaint(PROMPT, image, mask, mask_rule=rule, mask_share=0.5, callback_on_step_end=lambda *a: calls.append(a))
        return len(calls)

    assert count_steps("cover") == 9
    assert count_steps("nearest") == 4


def test_without_super_resolution_stages_low_resolution_is_pasted(low_pipe):
    inpaint = CogView2InpaintPipeline.from_pipe(low_pipe)
    inpaint.set_progress_bar_config(disable=True)
    output = inpaint(PROMPT, picture(), mask_of())
    assert output.crops[0][0].size == (LOW, LOW)
    with pytest.raises(ValueError, match="`super_resolve` needs a pipeline with a `direct_sr_transformer`"):
        inpaint(PROMPT, picture(), mask_of(), super_resolve=True)


def test_guidance_and_styles_reach_the_masked_tokens(inpaint):
    def paint(**call):
        return np.asarray(inpaint(PROMPT, picture(), mask_of(), generator=seeds(3), **call).images[0])

    plain = paint()
    assert np.array_equal(plain, paint(guidance_scale=1.0))
    assert not np.array_equal(plain, paint(guidance_scale=4.0))
    assert np.array_equal(paint(style="cool"), paint(style="cool", temperature=0.8))
    assert not np.array_equal(plain, paint(style="cool"))


def test_a_tuple_holds_what_the_output_holds(inpaint):
    images, crops, boxes, seeds_, prompts = inpaint(PROMPT, picture(), mask_of(), return_dict=False)
    assert len(images) == len(crops) == len(boxes) == len(seeds_) == len(prompts) == 1


# Larger canvases


def test_outpainting_keeps_the_picture_on_a_larger_canvas(inpaint):
    image = picture(50, 60)
    output = inpaint.outpaint(PROMPT, PIL.Image.fromarray(image), top=7, left=20, right=90, generator=seeds(1))
    painted = np.asarray(output.images[0])
    assert painted.shape == (57, 170, 3)
    assert np.array_equal(painted[7:, 20:80], image)
    assert len(np.unique(painted[:, 90:].reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("margins", [{}, {"left": -1}, {"top": 1.5}, {"right": True}])
def test_margins_that_make_no_sense_are_errors(inpaint, margins):
    with pytest.raises(ValueError, match=r"`(top|left|right)`"):
        inpaint.outpaint(PROMPT, picture(), **margins)


# Bad input


@pytest.mark.parametrize(
    "mask, message",
    [
        (mask_of(70, 91), r"as large as its picture \(70 x 90 pixels\), but is 70 x 91"),
        (PIL.Image.new("RGB", (90, 70)), '`mask_image` must have the mode "1" or "L"'),
        (PIL.Image.new("RGBA", (90, 70)), r'"RGBA".*`.getchannel\("A"\)`'),
        (np.zeros((70, 90), bool), "marks nothing to paint"),
        (PIL.Image.new("L", (90, 70), 127), "marks nothing to paint"),
        (np.ones((70, 90), bool), "marks the whole picture.*Use `CogView2Pipeline`"),
        (np.pad(np.zeros((1, 1), bool), ((0, 69), (0, 89)), constant_values=True), "leaves nothing to complete"),
        (np.full((70, 90), 2.0), "values from 0 to 1"),
        (np.full((70, 90), np.nan), "values from 0 to 1"),
        (np.zeros((70, 90), np.int64), "bytes or floating point numbers"),
        (np.zeros((2, 70, 90, 3)), r"must have the shape \(height, width\)"),
        ([], "at least one mask"),
        ([mask_of(), mask_of(), mask_of()], "must be as many, or one"),
    ],
)
def test_masks_that_cannot_be_used_are_errors(inpaint, mask, message):
    with pytest.raises(ValueError, match=message):
        inpaint([PROMPT, PROMPT] if isinstance(mask, list) and mask else PROMPT, picture(), mask)


@pytest.mark.parametrize(
    "image, error, message",
    [
        ("cat.png", TypeError, "`image` must be a PIL image, a numpy array or a torch tensor, but is of type `str`"),
        (None, TypeError, "but is of type `NoneType`"),
        ([picture(), 3], TypeError, r"`image\[1\]`"),
        ([], ValueError, "at least one picture"),
        (PIL.Image.new("I", (90, 70), 2**20), ValueError, "`image` holds numbers from 1048576 to 1048576"),
        (PIL.Image.new("F", (90, 70), 255), ValueError, "`image` holds floating point numbers from 255 to 255"),
        (np.zeros((70, 90)), ValueError, r"must have the shape \(height, width, 3\), but has \(70, 90\)"),
        (np.zeros((70, 90, 4)), ValueError, r"must have the shape \(height, width, 3\)"),
        (torch.zeros(70, 90, 3), ValueError, r"must have the shape \(3, height, width\)"),
        (picture().astype(np.float32), ValueError, "values from 0 to 1"),
        (np.full((70, 90, 3), np.nan), ValueError, "values from 0 to 1"),
        (picture().astype(np.int32), ValueError, "bytes or floating point"),
        (np.zeros((0, 90, 3)), ValueError, "at least one pixel"),
        (np.zeros((70, 90, 3), dtype=object), ValueError, "must hold numbers"),
    ],
)
def test_pictures_that_cannot_be_used_are_errors(inpaint, image, error, message):
    with pytest.raises(error, match=message):
        inpaint(PROMPT, image, mask_of())


def test_an_animation_is_an_error(inpaint, tmp_path):
    frames = [PIL.Image.fromarray(picture(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with PIL.Image.open(tmp_path / "a.gif") as animation, pytest.raises(ValueError, match="animation of 3 frames"):
        inpaint(PROMPT, animation, mask_of())


@pytest.mark.parametrize(
    "call, message",
    [
        ({"prompt": "a cat " * 40}, "`prompt` may have 30 tokens with its style"),
        ({"prompt": " "}, "`prompt` must not be empty"),
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a whole number from 1 to 10000"),
        ({"max_crop_size": 0}, "`max_crop_size` must be a whole number of at least 1"),
        ({"mask_share": 0}, "`mask_share` must be from 0.01 to 1"),
        ({"mask_rule": "all"}, r"`mask_rule` must be one of \('cover', 'nearest'\)"),
        ({"output_type": "latent"}, r"`output_type` must be one of \('pil', 'np', 'pt'\)"),
        ({"style": "oil"}, r"`style` must be one of \['cool', 'none'\]"),
        ({"generator": [torch.Generator()] * 2}, r"one per picture \(1\)"),
        ({"callback_on_step_end_tensor_inputs": ["logits"]}, "may name"),
        ({"temperature": 0.0}, r"`temperature` must be a number from 1e-06 to 1e\+06, but is 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_errors(inpaint, call, message):
    with pytest.raises(ValueError, match=message):
        inpaint(**{"prompt": PROMPT, "image": picture(), "mask_image": mask_of(), **call})
