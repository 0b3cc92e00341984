"""What can be seen and done while a call runs: previews, streams, statistics, stopping, and running out of memory."""

import gc
import threading

import numpy as np
import pytest
import torch

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2PipelineOutput,
    CogView2PreviewOutput,
    CogView2UpscalePipeline,
    GenerationInterrupted,
    IcetkVQModel,
)
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.models.cogview2.modeling_coglm import CogLMModel
from cogview_pipelines.models.cogview2.modeling_coglm_canvas import CogLMCanvasModel
from cogview_pipelines.pipelines.common.code_patches import code_patches

from ...utils import make_image_tokens
from ..cogview2.test_shared_components import PIPELINES
from ..conftest import LOW

PROMPTS = ["a cat on a blue background.", "一只老虎,红色背景。"]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def make(pipe, **call):
    call = {"generator": seeds(1, 2, 3, 4), **call}
    return pipe(PROMPTS, num_images_per_prompt=2, output_type="latent", **call)


def inputs(kind):
    """Arguments of a call of each pipeline."""
    tokens = make_image_tokens(1).unflatten(1, (4, 4))
    mask = torch.zeros(60, 60)
    mask[20:40, 10:40] = 1
    return {
        "CogView2Pipeline": {"prompt": "a cat"},
        "CogView2InpaintPipeline": {"prompt": "a cat", "image": torch.full((3, 60, 60), 0.3), "mask_image": mask},
        "CogView2UpscalePipeline": {"tokens": tokens},
        "CogView2CaptionPipeline": {"tokens": tokens, "max_length": 3},
    }[kind.__name__]


# Memory runs out -----------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    """The transformers have no memory for more than two sequences at a time."""

    def limit(function):
        def limited(self, rows, *arguments, **named):
            if len(rows) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return function(self, rows, *arguments, **named)

        return limited

    def use_it():
        monkeypatch.setattr(CogLMModel, "forward", limit(CogLMModel.forward))
        monkeypatch.setattr(CogLMCanvasModel, "forward", limit(CogLMCanvasModel.forward))

    return use_it


def test_pictures_are_the_same_when_memory_runs_out(pipe, little_memory):
    expected = make(pipe).tokens
    guided = make(pipe, guidance_scale=2.0, height=LOW).tokens
    chosen = make(pipe, height=LOW, generator=seeds(*range(6)), num_candidates=3)
    little_memory()
    assert torch.equal(make(pipe).tokens, expected)
    assert torch.equal(make(pipe, guidance_scale=2.0, height=LOW).tokens, guided)
    again = make(pipe, height=LOW, generator=seeds(*range(6)), num_candidates=3)
    assert torch.equal(again.tokens, chosen.tokens)


def test_other_pipelines_go_on_with_less_memory_too(pipe, little_memory):
    tokens = make_image_tokens(3).unflatten(1, (4, 4))
    mask = torch.zeros(60, 60)
    mask[20:40, 10:40] = 1
    inpaint, upscale, caption = (
        kind.from_pipe(pipe) for kind in (CogView2InpaintPipeline, CogView2UpscalePipeline, CogView2CaptionPipeline)
    )

    def run():
        picture = torch.full((3, 60, 60), 0.3)
        painted = inpaint("a cat", picture, mask, num_images_per_prompt=3, generator=seeds(1, 2, 3), output_type="pt")
        enlarged = upscale(tokens=tokens, generator=seeds(1, 2, 3)).tokens
        drawn = caption(tokens=tokens, strategy="sample", generator=seeds(1, 2, 3), end="length", max_length=5)
        return painted.images.tolist(), [one.tolist() for one in enlarged], drawn.token_ids

    expected = run()
    little_memory()
    assert run() == expected


def test_stages_follow_each_other_for_all_pictures(pipe):
    order = []

    def watch(pipe, step, timestep, kwargs):
        if kwargs["stage"] not in order[-1:]:
            order.append(kwargs["stage"])

    make(pipe, max_batch_size=1, callback_on_step_end=watch)
    assert order == ["transformer", "direct_sr_transformer", "iterative_sr_transformer"]


def test_a_callback_learns_which_pictures_it_sees(pipe):
    seen = []
    make(
        pipe, max_batch_size=3, callback_on_step_end=lambda *about: seen.append((about[1], about[3]["image_indices"]))
    )
    assert [indices for step, indices in seen if step == 0] == [[0, 1, 2], [3]]
    assert [indices for step, indices in seen if step == 17] == [[0, 1, 2], [3]]  # the first pass of the last stage


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_statistics_of_every_stage_come_when_asked_for(pipe, kind):
    pipe = kind.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = inputs(kind)
    assert pipe(**call).statistics is None
    statistics = pipe(**call, return_statistics=True).statistics
    expected = {
        "CogView2UpscalePipeline": {"direct_sr_transformer", "iterative_sr_transformer", "vqvae"},
        "CogView2CaptionPipeline": {"transformer"},
    }
    stages = {"transformer", "direct_sr_transformer", "iterative_sr_transformer", "vqvae"}
    assert set(statistics) == expected.get(kind.__name__, stages)
    for stage in statistics.values():
        assert stage.seconds > 0
        # the process holds this interpreter at least, where the system tells
        assert stage.peak_memory_bytes is None or stage.peak_memory_bytes > 2**25


# Stopping ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_call_stops_at_the_next_step_and_the_next_call_is_whole(pipe):
    steps = []

    def stop(pipe, step, timestep, kwargs):
        steps.append(step)
        if step == 5:
            pipe.interrupt = True

    with pytest.raises(GenerationInterrupted):
        make(pipe, callback_on_step_end=stop)
    assert steps == list(range(6))
    expected = make(pipe).tokens
    assert not pipe.interrupt
    assert torch.equal(make(pipe).tokens, expected)


def test_another_thread_may_interrupt(pipe):
    started = threading.Event()

    def interrupt():
        started.wait(60)
        pipe.interrupt = True

    def watch(pipe, step, timestep, kwargs):
        started.set()
        if step == 1:
            thread.join(60)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(GenerationInterrupted):
        make(pipe, callback_on_step_end=watch)


def test_captions_can_be_interrupted_between_batches(pipe, monkeypatch):
    caption = CogView2CaptionPipeline.from_pipe(pipe)
    write = caption._write

    def stop(*arguments):
        caption.interrupt = True
        return write(*arguments)

    monkeypatch.setattr(caption, "_write", stop)
    with pytest.raises(GenerationInterrupted):
        caption(tokens=make_image_tokens(2).unflatten(1, (4, 4)), max_batch_size=1, max_length=2)


# Previews ------------------------------------------------------------------------------------------------------------


def test_a_preview_is_grey_where_nothing_is_written(pipe):
    tokens = make_image_tokens(2).unflatten(1, (4, 4))
    tokens[:, 2, 1:] = -1
    tokens[:, 3] = -1
    for image in pipe.preview(tokens):
        pixels = torch.from_numpy(np.array(image))
        assert pixels.shape == (LOW, LOW, 3)
        assert (pixels[24:] == 128).all()
        assert (pixels[16:24, 8:] == 128).all()
        assert pixels[:16].float().std() > 1
        assert pixels[16:24, :8].float().std() > 1


def test_a_preview_of_what_is_complete_is_the_picture(pipe):
    output = pipe("a cat", generator=seeds(1))
    assert [image.tobytes() for image in pipe.preview(output.tokens)] == [image.tobytes() for image in output.images]
    assert pipe.preview(torch.full((1, 4, 4), -1))[0].getcolors() == [(LOW * LOW, (128, 128, 128))]


def test_a_stream_gives_every_row_and_every_pass_and_then_the_pictures_of_the_call(pipe):
    expected = make(pipe).tokens
    call = {"num_images_per_prompt": 2, "generator": seeds(1, 2, 3, 4), "max_batch_size": 3}
    *previews, output = pipe.stream(PROMPTS, **call, max_preview_share=None)
    assert isinstance(output, CogView2PipelineOutput)
    assert torch.equal(output.tokens, expected)
    assert all(isinstance(preview, CogView2PreviewOutput) for preview in previews)
    rows = [[0, 1, 2], [3]]
    stages = [("transformer", 4 * row) for row in (1, 2, 3, 4)]
    assert [(p.stage, p.timestep, p.image_indices) for p in previews] == [
        *((stage, timestep, indices) for indices in rows for stage, timestep in stages),
        *(("direct_sr_transformer", 1, indices) for indices in rows),
        *(("iterative_sr_transformer", timestep, indices) for indices in rows for timestep in (1, 2)),
    ]
    for number, preview in enumerate(previews[:4], 1):
        assert (preview.tokens[:, :number] >= 0).all()
        assert (preview.tokens[:, number:] == -1).all()
        assert [image.size for image in preview.images] == [(LOW, LOW)] * 3
    assert torch.equal(previews[-1].tokens[0], expected[3])


def test_a_sketch_has_the_patch_of_each_code_and_grey_where_nothing_is_written(pipe):
    patches = pipe.code_patches()
    assert patches.shape == (pipe.vqvae.config.num_embeddings, 3, 4, 4)
    assert pipe.code_patches() is patches  # made once
    tokens = torch.tensor([[[0, 5], [-1, 31]]])
    [image] = pipe.sketch(tokens)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    rate = pipe.config.compression_rate
    assert pixels.shape == (3, 2 * rate, 2 * rate)
    for row, column, code in ((0, 0, 0), (0, 1, 5), (1, 1, 31)):
        cell = pixels[:, row * rate : (row + 1) * rate, column * rate : (column + 1) * rate]
        assert (cell[:, ::2, ::2] - patches[code]).abs().max() < 1 / 255
    assert (pixels[:, rate:, :rate] - 0.5).abs().max() < 1 / 255


def test_patches_have_the_colours_of_the_decoded_picture():
    """With the shipped image tokenizer: most of what differs from token to token is in the patches."""
    vqvae = IcetkVQModel.from_pretrained(SHIPPED_MODEL, subfolder="vqvae", dtype=torch.float32)
    colours = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(colours, (80, 80), mode="bicubic").clamp(0, 1)
    tokens = vqvae.encode(pixels, 8).tokens
    decoded = torch.nn.functional.avg_pool2d(vqvae.decode(tokens, 8).sample.clamp(0, 1), 8)[0]
    patches = code_patches(vqvae, 8, torch.device("cpu"))[tokens[0]].mean((3, 4)).permute(2, 0, 1)
    spread = (decoded - decoded.mean((1, 2), keepdim=True)).square().mean()
    assert (patches - decoded).square().mean() < 0.5 * spread


def test_patches_follow_the_codes(pipe):
    before, weight = pipe.code_patches(), pipe.vqvae.quantize.embed.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        assert not torch.equal(pipe.code_patches(), before)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert torch.equal(pipe.code_patches(), before)


def test_a_stream_decodes_its_previews_if_asked_to(pipe):
    call = {"num_lopar_steps": 1, "max_preview_share": None}
    for full, draw in ((True, pipe.preview), (False, pipe.sketch)):
        *previews, _ = pipe.stream("a cat", generator=seeds(1), full_previews=full, **call)
        for preview in previews:
            assert [one.tobytes() for one in preview.images] == [one.tobytes() for one in draw(preview.tokens)]


def test_fewer_previews_cost_less(pipe):
    kinds = [
        report.stage if isinstance(report, CogView2PreviewOutput) else "end"
        for report in pipe.stream("a cat", rows_per_preview=2, max_preview_share=None, num_lopar_steps=1)
    ]
    assert kinds == ["transformer"] * 2 + ["direct_sr_transformer", "iterative_sr_transformer", "end"]


@pytest.mark.parametrize("kind", [CogView2InpaintPipeline, CogView2UpscalePipeline])
def test_other_pipelines_stream_what_a_call_returns(pipe, kind):
    pipe = kind.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = inputs(kind)
    expected = pipe(**call, generator=seeds(1), output_type="pt").images
    *previews, output = pipe.stream(**call, generator=seeds(1), output_type="pt")
    assert torch.equal(output.images, expected)
    assert {preview.image_indices[0] for preview in previews} == {0}


def test_closing_a_stream_ends_its_thread(pipe):
    before = set(threading.enumerate())
    stream = pipe.stream(PROMPTS)
    assert not set(threading.enumerate()) - before  # nothing runs before somebody looks
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before
    next(pipe.stream(PROMPTS))  # and is forgotten
    gc.collect()
    assert not set(threading.enumerate()) - before


def test_a_stream_raises_what_the_call_raises(pipe):
    with pytest.raises(ValueError, match="`height`"):
        list(pipe.stream("a cat", height=41))

    def fail(pipe, step, timestep, kwargs):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(pipe.stream("a cat", callback_on_step_end=fail))
    with pytest.raises(ValueError, match="`rows_per_preview`"):
        pipe.stream("a cat", rows_per_preview=0)


def test_a_stream_calls_the_callers_callback_with_what_it_asked_for(pipe):
    seen = []

    def watch(pipe, step, timestep, kwargs):
        seen.append(set(kwargs))

    list(pipe.stream("a cat", height=LOW, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=()))
    assert seen == [{"stage", "image_indices"}] * 16
