"""What callers know from pipelines of diffusers: done as there, or refused in a sentence; for all of `ROWS`."""

# ruff: noqa: F811 - tests take the fixture that is imported

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from .test_all_pipelines import every_pipeline, pipe  # noqa: F401


@every_pipeline
def test_variants_of_one_folder_are_told_apart(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    expected = row.of(row.call(pipe))
    pipe.save_pretrained(tmp_path)
    half = row.kind.from_pretrained(tmp_path, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    models = {path.parent.name for path in tmp_path.glob("*/model.safetensors")}
    assert models == {path.parent.name for path in tmp_path.glob("*/model.fp16.safetensors")} != set()
    loaded = row.kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert row.of(row.call(loaded)) == expected
    for dtype in ("auto", torch.float16):
        loaded = row.kind.from_pretrained(tmp_path, variant="fp16", dtype=dtype)
        assert {part.dtype for part in loaded._models} == {torch.float16}
    with pytest.raises((ValueError, OSError), match="bf16"):
        row.kind.from_pretrained(tmp_path, variant="bf16")


@every_pipeline
def test_weights_in_several_files_are_put_together(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="40KB")
    assert list(tmp_path.glob("*/*-00002-of-*.safetensors"))
    loaded = row.kind.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert row.of(row.call(loaded)) == row.of(row.call(pipe))


@every_pipeline
def test_diffusers_loads_it_without_being_told_the_class(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is row.kind
    assert {part.dtype for part in loaded._models} == {torch.float32}
    loaded.set_progress_bar_config(disable=True)
    assert row.of(row.call(loaded)) == row.of(row.call(pipe))


@every_pipeline
def test_what_lies_beside_the_components_goes_along(pipe, row, tmp_path):
    row.pipe(pipe).save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "README.md").write_text("# Tiny\n")
    (tmp_path / "first" / "scope.json").write_text("{}")
    loaded = row.kind.from_pretrained(tmp_path / "first")
    row.kind.from_pipe(loaded).save_pretrained(tmp_path / "second")
    names = {path.name for path in (tmp_path / "second").iterdir() if path.is_file()}
    assert names == {"model_index.json", "README.md", "scope.json"}


@every_pipeline
def test_parts_can_be_given_when_loading(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = row.kind.from_pretrained(tmp_path, vqvae=pipe.vqvae)
    assert loaded.vqvae is pipe.vqvae
    assert json.loads((tmp_path / "model_index.json").read_text())["vqvae"][0] == "cogview_pipelines"


@every_pipeline
def test_what_cannot_be_saved_or_loaded_is_refused(pipe, row, tmp_path):
    pipe = row.pipe(pipe)
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="`repo_id` without `push_to_hub=True`"):
        pipe.save_pretrained(tmp_path, repo_id="someone/model")


@every_pipeline
@pytest.mark.parametrize("name", ["num_inference_steps", "seed", "latents", "num_images"])
def test_names_of_other_pipelines_are_answered(pipe, row, name):
    with pytest.raises(TypeError, match=rf"`{name}` is not an argument of this pipeline; ."):
        row.call(row.pipe(pipe), **{name: 3})


@every_pipeline
def test_layers_that_come_and_go_do_the_same(request, row):
    pipe = row.new(request)
    expected = row.of(row.call(pipe))
    pipe.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    assert row.of(row.call(pipe)) == expected
