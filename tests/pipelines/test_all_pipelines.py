"""
Properties of every pipeline. A new one joins by a row in `ROWS`.
"""

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import cogview_pipelines
from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewUpscalePipeline,
    GenerationInterrupted,
)
from cogview_pipelines.models.cogview.modeling_cogview import CogViewModel
from cogview_pipelines.models.cogview2.modeling_coglm import CogLMModel
from cogview_pipelines.models.cogview2.modeling_coglm_canvas import CogLMCanvasModel

from ..utils import make_image_tokens
from .conftest import build, build_cogview

PICTURE = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(60, 60)
MASK[20:40, 10:40] = 1


@dataclass(frozen=True)
class Row:
    """
    A pipeline, and what to give it.

    Args:
        kind: The class.
        positional: Makes the arguments that may be given by position, for so many pictures.
        named (`dict`): More arguments of each call.
        seeded (`str`): The argument that makes `generator` matter: how many each picture gets.
        result (`str`): The field of the output that is compared.
        has_steps (`bool`): Whether a callback hears of each step.
        is_cogview (`bool`): Whether it is one of the first CogView.
    """

    kind: type[DiffusionPipeline]
    positional: Callable[[int], tuple]
    named: dict
    result: str
    has_steps: bool = True
    is_cogview: bool = False

    def new(self, request):
        """A pipeline whose components nothing else has."""
        if self.is_cogview:
            return self.pipe(build_cogview(request.getfixturevalue("cogview_tokenizer")))
        return self.pipe(build(request.getfixturevalue("tokenizer")))

    def pipe(self, source):
        pipe = self.kind.from_pipe(source)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, count=1, seeds=None, **more):
        seeds = range(count) if seeds is None else seeds
        named = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], **self.named, **more}
        return pipe(*self.positional(count), **named)

    def of(self, output):
        return plain(output[self.result])


def plain(value):
    """Something that `==` compares."""
    return [plain(one) for one in value] if isinstance(value, list) else np.asarray(value).tolist()


ROWS = [
    Row(CogView2Pipeline, lambda count: (["a cat", "a tree", "a car"][:count],), {"output_type": "pt"}, "images"),
    Row(
        CogView2InpaintPipeline,
        lambda count: (["a cat", "a tree", "a car"][:count], PICTURE, MASK),
        {"output_type": "pt"},
        "images",
    ),
    Row(
        CogView2UpscalePipeline,
        lambda count: ([PICTURE[:, :40, :40]] * count, ["a cat", "a tree", "a car"][:count]),
        {"output_type": "pt"},
        "images",
    ),
    Row(
        CogView2CaptionPipeline,
        lambda count: ([PICTURE, PICTURE.flip(2), PICTURE.flip(1)][:count],),
        {"strategy": "sample", "max_length": 3, "end": "length"},
        "token_ids",
        has_steps=False,
    ),
    Row(
        CogViewPipeline,
        lambda count: (["a cat", "a tree", "a car"][:count],),
        {"output_type": "pt"},
        "images",
        is_cogview=True,
    ),
    Row(
        CogViewUpscalePipeline,
        lambda count: ([PICTURE[:, :40, :40]] * count, ["a cat", "a tree", "a car"][:count]),
        {"output_type": "pt", "size": 16},
        "images",
        is_cogview=True,
    ),
    Row(
        CogViewCaptionPipeline,
        lambda count: ([PICTURE, PICTURE.flip(2), PICTURE.flip(1)][:count],),
        {"max_length": 3, "end": "length"},
        "token_ids",
        has_steps=False,
        is_cogview=True,
    ),
]
every_pipeline = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind.__name__)
with_steps = pytest.mark.parametrize("row", [row for row in ROWS if row.has_steps], ids=lambda row: row.kind.__name__)


@pytest.fixture
def pipe(request, pipe):
    """Of the family of the row."""
    row = request.node.callspec.params["row"] if hasattr(request.node, "callspec") else None
    return request.getfixturevalue("cogview_pipe") if row is not None and row.is_cogview else pipe


class Bar:
    """A progress bar that can be read afterwards."""

    def __init__(self, total):
        self.n, self.total = 0, total

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count=1):
        self.n += count

    def refresh(self):
        pass


def watch_bar(pipe, monkeypatch):
    bars = []

    def make(iterable=None, total=None):
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", make)
    return bars


def test_every_public_pipeline_has_a_row():
    public = {name for name in cogview_pipelines.__all__ if name.endswith("Pipeline")}
    assert public == {row.kind.__name__ for row in ROWS}


@every_pipeline
def test_saved_and_loaded_it_does_the_same(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    expected = row.of(row.call(pipe))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == row.kind.__name__
    loaded = row.kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert row.of(row.call(loaded)) == expected


@every_pipeline
def test_it_loads_the_folder_of_text_to_image_without_warnings(pipe, row, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        loaded = row.kind.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    loaded.set_progress_bar_config(disable=True)
    assert row.of(row.call(loaded)) == row.of(row.call(row.pipe(pipe)))


@every_pipeline
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_formats_are_kept_and_changed(pipe, row, tmp_path, dtype):
    row.pipe(pipe).save_pretrained(tmp_path)
    loaded = row.kind.from_pretrained(tmp_path, dtype=dtype)
    assert {part.dtype for part in loaded._models} == {dtype}
    assert {part.dtype for part in row.kind.from_pretrained(tmp_path)._models} == {torch.float32}


@every_pipeline
def test_float64_is_refused_with_a_sentence(request, row):
    pipe = row.new(request).to(torch.float64)
    with pytest.raises(ValueError, match=r"must be float32, bfloat16 or float16, but is float64"):
        row.call(pipe)


@every_pipeline
def test_offloaded_it_does_the_same(request, row):
    pipe = row.new(request)
    expected = row.of(row.call(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    assert row.of(row.call(pipe)) == expected


@every_pipeline
def test_a_picture_does_not_depend_on_its_batch(pipe, row):
    pipe = row.pipe(pipe)
    together = row.of(row.call(pipe, 3))
    assert together == row.of(row.call(pipe, 3, max_batch_size=1))
    assert together[:1] == row.of(row.call(pipe, 1))
    assert together != row.of(row.call(pipe, 3, seeds=(7, 8, 9)))


@every_pipeline
def test_a_tuple_holds_what_the_output_holds(pipe, row):
    pipe = row.pipe(pipe)
    output, values = row.call(pipe), row.call(pipe, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == len(output)
    assert plain(values[list(output).index(row.result)]) == row.of(output)


@every_pipeline
def test_all_but_the_inputs_are_named(row):
    parameters = list(inspect.signature(row.kind.__call__).parameters.values())[1:]
    num_positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    assert num_positional == len(row.positional(1))
    assert all(parameter.default is not parameter.empty for parameter in parameters[num_positional:])


@every_pipeline
def test_the_default_device_does_not_matter(pipe, row):
    pipe = row.pipe(pipe)
    expected = row.of(row.call(pipe))
    torch.set_default_device("meta")
    try:
        arguments = row.positional(1)
        generator = [torch.Generator("cpu").manual_seed(0)]
        assert row.of(pipe(*arguments, generator=generator, **row.named)) == expected
    finally:
        torch.set_default_device(None)


@every_pipeline
def test_numbers_of_numpy_are_numbers(pipe, row):
    pipe = row.pipe(pipe)
    assert row.of(row.call(pipe, 2, max_batch_size=np.int64(1))) == row.of(row.call(pipe, 2))


@every_pipeline
def test_the_progress_bar_ends_at_its_total_although_a_batch_failed(pipe, row, monkeypatch):
    pipe = row.pipe(pipe)
    pipe.set_decoding(fused=False)  # each step is a call of the model, whether the kernels are built or not
    bars = watch_bar(pipe, monkeypatch)
    expected = row.of(row.call(pipe, 3))
    assert bars[-1].n == bars[-1].total > 0
    calls = []

    def fail_once(forward):
        def run(*arguments, **named):
            calls.append(None)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(*arguments, **named)

        return run

    for model in (CogLMModel, CogLMCanvasModel, CogViewModel):
        monkeypatch.setattr(model, "forward", fail_once(model.forward))
    if row.kind is CogView2InpaintPipeline:  # each picture is a batch of its own: nothing smaller is left
        with pytest.raises(torch.OutOfMemoryError):
            row.call(pipe, 3)
        return
    assert row.of(row.call(pipe, 3)) == expected
    assert bars[-1].n == bars[-1].total > 0
    assert len(calls) > 2


@with_steps
def test_an_interrupted_call_stops_and_its_bar_stands_where_its_batch_began(pipe, row, monkeypatch):
    pipe = row.pipe(pipe)
    bars, steps = watch_bar(pipe, monkeypatch), []

    def stop(pipe, step, timestep, kwargs):
        steps.append(step)
        pipe.interrupt = True

    with pytest.raises(GenerationInterrupted):
        row.call(pipe, callback_on_step_end=stop)
    assert (steps, bars[-1].n) == ([0], 0)
    row.call(pipe)
    assert not pipe.interrupt


@with_steps
def test_a_callback_gets_what_it_asked_for(pipe, row):
    pipe, seen = row.pipe(pipe), []

    def watch(pipe, step, timestep, kwargs):
        seen.append(set(kwargs))

    row.call(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=())
    row.call(pipe, callback_on_step_end=watch)
    num_steps = len(seen) // 2
    assert seen == [{"stage", "image_indices"}] * num_steps + [{"stage", "image_indices", "tokens"}] * num_steps
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` may name"):
        row.call(pipe, callback_on_step_end_tensor_inputs=("latents",))


@with_steps
def test_tokens_that_a_callback_returns_go_on(pipe, row):
    pipe = row.pipe(pipe)

    def same(pipe, step, timestep, kwargs):
        return kwargs

    def zeros(pipe, step, timestep, kwargs):
        return {"tokens": torch.where(kwargs["tokens"] >= 0, 0, kwargs["tokens"])}

    expected = row.of(row.call(pipe))
    assert row.of(row.call(pipe, callback_on_step_end=same)) == expected
    changed = row.call(pipe, callback_on_step_end=zeros)
    assert row.of(changed) != expected
    if "tokens" in changed:
        assert not torch.as_tensor(changed.tokens[0]).any()


@with_steps
@pytest.mark.parametrize("returned", [5, {"tokens": 5}, {"tokens": torch.zeros(1)}, {"tokens": "too large"}])
def test_tokens_that_a_callback_cannot_mean_are_refused(pipe, row, returned):
    pipe = row.pipe(pipe)

    def change(pipe, step, timestep, kwargs):
        if returned == {"tokens": "too large"}:
            return {"tokens": torch.full_like(kwargs["tokens"], 10**6)}
        return returned

    with pytest.raises(ValueError, match="`callback_on_step_end` must return"):
        row.call(pipe, callback_on_step_end=change)


def test_captions_of_tokens_need_no_picture(pipe):
    caption = CogView2CaptionPipeline.from_pipe(pipe)
    caption.set_progress_bar_config(disable=True)
    assert len(caption(tokens=make_image_tokens(2).unflatten(1, (4, 4)), max_length=2).captions) == 2
