"""A converter that is killed at any change of a file, and called again: the same files as without the kill."""

import json
import shutil

import pytest

from cogview_pipelines.conversion import ConversionError, convert_to_pipeline, convert_to_release, verify
from cogview_pipelines.conversion.output_folder import locked
from cogview_pipelines.conversion.release_folder import choose_iteration

from ...child_processes import count_changes, kill_before_change
from ..conftest import FIXTURES, NUM_IMAGE_TOKENS
from ..interruptions import check_every_kill, contents, quiet


@pytest.fixture
def parts(release):
    """The least that has tokenizers, shards, and a stage with its scheduler."""
    return {**release, "direct_sr": None, "num_image_tokens": NUM_IMAGE_TOKENS, "say": quiet}


def test_a_converter_that_is_killed_anywhere_goes_on_to_a_whole_pipeline(parts, tmp_path):
    output = tmp_path / "out"
    check_every_kill(lambda: bool(convert_to_pipeline(output, **parts, max_shard_size=2**20)), output)
    assert verify(output, say=quiet) == []


def test_the_way_back_goes_on_wherever_it_is_killed(tmp_path):
    convert_to_pipeline(
        tmp_path / "pipeline",
        coglm=FIXTURES / "checkpoints" / "coglm",
        image_tokenizer=FIXTURES / "icetk" / "ice_image.pt",
        text_tokenizer=FIXTURES / "icetk" / "ice_text.model",
        cluster_labels="compute",
        say=quiet,
    )
    output = tmp_path / "sat"
    check_every_kill(lambda: bool(convert_to_release(tmp_path / "pipeline", output, say=quiet)), output)


def test_what_an_interrupted_run_wrote_is_not_taken_for_another_conversion(pipeline_folder, tmp_path):
    """Killed, and called again with another `iteration`: nothing is mixed."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, pipeline)
    for name in ("direct_sr_transformer", "iterative_sr_transformer", "transformer"):
        shutil.rmtree(pipeline / name)
    output = tmp_path / "sat"
    number = count_changes(lambda: bool(convert_to_release(pipeline, output, say=quiet)), output)
    shutil.rmtree(output)
    assert kill_before_change(lambda: bool(convert_to_release(pipeline, output, say=quiet)), output, number - 1)
    with pytest.raises(ConversionError, match="exists already"):
        convert_to_release(pipeline, output, iteration=5, say=quiet)


def test_two_converters_do_not_write_into_one_folder(parts, pipeline_folder, tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(ConversionError, match=r"Another conversion is writing into .*out"):
            convert_to_pipeline(tmp_path / "out", **parts)
        with pytest.raises(ConversionError, match=r"Another conversion is writing into .*out"):
            convert_to_release(pipeline_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_a_folder_that_cannot_be_made_is_told(parts, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / ("x" * 300), tmp_path / "file" / "in"):
        with pytest.raises(ConversionError, match="cannot be written"):
            convert_to_pipeline(output, **parts)


# Verification --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(pipeline_folder, tmp_path):
    """A converted pipeline that may be spoiled."""
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_pipeline_without_its_index_is_not_whole(pipeline):
    (pipeline / "model_index.json").unlink()
    assert verify(pipeline, say=quiet) == ["model_index.json"]


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "{"])
def test_a_pipeline_with_a_damaged_index_is_not_whole(pipeline, content):
    (pipeline / "model_index.json").write_text(content)
    assert verify(pipeline, say=quiet) == ["model_index.json"]


def test_a_stage_without_its_scheduler_is_not_whole(pipeline):
    change_index(pipeline, iterative_sr_scheduler=[None, None])
    assert verify(pipeline, say=quiet) == ["iterative_sr_scheduler"]


def test_a_component_that_only_the_index_names_is_missing(pipeline):
    record = json.loads((pipeline / "conversion.json").read_text())
    del record["components"]["direct_sr_transformer"]
    (pipeline / "conversion.json").write_text(json.dumps(record))
    assert verify(pipeline, say=quiet) == ["direct_sr_transformer"]


def test_a_scheduler_that_is_gone_is_written_again(parts, tmp_path):
    convert_to_pipeline(tmp_path / "out", **parts)
    shutil.rmtree(tmp_path / "out" / "iterative_sr_scheduler")
    convert_to_pipeline(tmp_path / "out", **parts)
    assert verify(tmp_path / "out", say=quiet) == []
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["iterative_sr_scheduler"] == ["cogview_pipelines", "LoPARScheduler"]


WRONG_RECORDS = {
    "nested": "[" * 100_000,
    "list": "[]",
    "other version": '{"version": 0, "components": {}}',
    "no version": '{"components": {}}',
    "no components": '{"version": 1}',
    "component": '{"version": 1, "components": {"transformer": 3}}',
    "files": '{"version": 1, "components": {"transformer": {"source_id": "", "files": ["a"]}}}',
    "path": '{"version": 1, "components": {"transformer": {"source_id": "", "files": {"../x": ""}}}}',
    "tensors": '{"version": 1, "components": {"transformer": {"source_id": "", "files": {}, "tensors": 1}}}',
    "no JSON": "\0\0",
}


@pytest.mark.parametrize("kind", WRONG_RECORDS)
def test_a_record_that_is_none_is_refused(parts, pipeline, kind):
    (pipeline / "conversion.json").write_text(WRONG_RECORDS[kind])
    with pytest.raises(ConversionError, match=r"conversion\.json"):
        verify(pipeline, say=quiet)
    with pytest.raises(ConversionError, match=r"conversion\.json"):
        convert_to_pipeline(pipeline, **parts)


def test_the_iteration_of_a_record_is_no_path(pipeline, tmp_path):
    """It becomes the name of a folder on the way back."""
    record = json.loads((pipeline / "conversion.json").read_text())
    assert choose_iteration(pipeline, "transformer", None) == "7"
    record["components"]["transformer"]["iteration"] = "../../elsewhere"
    (pipeline / "conversion.json").write_text(json.dumps(record))
    assert choose_iteration(pipeline, "transformer", None) == "1"


DAMAGED = [
    *((f"{name}/config.json", text) for name in ("transformer", "vqvae") for text in ("[" * 100_000, "[]", "{")),
    ("tokenizer/tokenizer_config.json", "["),
    ("transformer/config.json", '{"num_hidden_layers": 1000000000}'),
    ("iterative_sr_scheduler/scheduler_config.json", "{"),
]


@pytest.mark.parametrize("file, content", DAMAGED, ids=lambda text: text[:40])
def test_a_component_that_was_damaged_is_named(parts, pipeline, file, content):
    (pipeline / file).write_text(content)
    given = {"text_tokenizer": None, "image_tokenizer": None, "coglm": None}
    with pytest.raises(ConversionError, match=file.split("/")[0]):
        convert_to_pipeline(pipeline, **{**parts, **given})
