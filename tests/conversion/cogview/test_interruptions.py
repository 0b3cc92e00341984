"""CogView's converters, killed at any change of a file and called again: the same files as without the kill."""

import shutil
from pathlib import Path

import pytest

from cogview_pipelines.conversion import (
    ConversionError,
    convert_cogview_to_pipeline,
    convert_cogview_to_release,
    verify,
)
from cogview_pipelines.conversion.output_folder import locked

from ...child_processes import count_changes, kill_before_change
from ..interruptions import check_every_kill, contents, quiet

FIXTURES = Path(__file__).parents[2] / "parity" / "cogview" / "fixtures"
PARTS = {
    "base": FIXTURES / "checkpoints" / "cogview-tiny",
    "image_tokenizer": FIXTURES / "checkpoints" / "vqvae_tiny.pt",
    "text_tokenizer": FIXTURES / "text_model" / "tiny.model",
    "num_attention_heads": 2,
    "say": quiet,
}


@pytest.fixture
def pipeline(tmp_path):
    """A converted pipeline that may be spoiled."""
    convert_cogview_to_pipeline(tmp_path / "pipeline", **PARTS)
    return tmp_path / "pipeline"


def test_a_converter_that_is_killed_anywhere_goes_on_to_a_whole_pipeline(tmp_path):
    output = tmp_path / "out"
    check_every_kill(lambda: bool(convert_cogview_to_pipeline(output, **PARTS, max_shard_size=2**17)), output)
    assert verify(output, say=quiet) == []


def test_the_way_back_goes_on_wherever_it_is_killed(pipeline, tmp_path):
    output = tmp_path / "release"
    check_every_kill(lambda: bool(convert_cogview_to_release(pipeline, output, say=quiet)), output)


def test_what_an_interrupted_run_wrote_is_not_taken_for_another_conversion(pipeline, tmp_path):
    """Killed, and called again with another `iteration`: nothing is mixed."""
    output = tmp_path / "release"

    def convert():
        return bool(convert_cogview_to_release(pipeline, output, say=quiet))

    number = count_changes(convert, output)
    shutil.rmtree(output)
    assert kill_before_change(convert, output, number - 1)
    with pytest.raises(ConversionError, match="exists already"):
        convert_cogview_to_release(pipeline, output, iteration=5, say=quiet)


def test_two_converters_do_not_write_into_one_folder(pipeline, tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(ConversionError, match=r"Another conversion is writing into .*out"):
            convert_cogview_to_pipeline(tmp_path / "out", **PARTS)
        with pytest.raises(ConversionError, match=r"Another conversion is writing into .*out"):
            convert_cogview_to_release(pipeline, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("iteration", [0, -1, "../x"])
def test_the_iteration_is_no_path(pipeline, tmp_path, iteration):
    with pytest.raises(ConversionError, match="`iteration` must be a number above 0"):
        convert_cogview_to_release(pipeline, tmp_path / "out", iteration=iteration, say=quiet)


@pytest.mark.parametrize("component", ["transformer", "vqvae"])
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"num_hidden_layers": 1000000000}'])
def test_a_component_that_was_damaged_is_named(pipeline, tmp_path, component, content):
    (pipeline / component / "config.json").write_text(content)
    with pytest.raises(ConversionError):
        convert_cogview_to_release(pipeline, tmp_path / "out", say=quiet)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_tokenizer_that_was_damaged_is_named_on_the_way_there(pipeline):
    (pipeline / "tokenizer" / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConversionError, match=r"tokenizer cannot be read .* convert it again"):
        convert_cogview_to_pipeline(pipeline, **{**PARTS, "text_tokenizer": None})


def test_a_pointer_instead_of_a_tokenizer_is_called_that(tmp_path):
    (tmp_path / "file").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for part in ("text_tokenizer", "image_tokenizer"):
        with pytest.raises(ConversionError, match="Git LFS pointer"):
            convert_cogview_to_pipeline(tmp_path / "out", **{part: tmp_path / "file"}, say=quiet)
