"""`cogview2 export`."""

import importlib.util

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cogview_pipelines.cli import app, export

from .conftest import assert_bad_input

pytest.importorskip("onnx", reason="needs the extra `onnx`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


def test_a_folder_is_exported_and_draws_as_the_pipeline_does(cogview2, pipeline, tmp_path):
    from cogview_pipelines.export.onnx_pictures import OnnxPictures

    output = tmp_path / "exported"
    result = cogview2("export", "--format", "onnx", "--output", output, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert {line.split()[-1] for line in result.stdout.splitlines()} == {str(path) for path in output.iterdir()}
    (ids,) = pipeline._encode_prompts(["a tiger"], "plain", True)
    found = OnnxPictures(output).draw(ids, style="plain", seed=4)
    expected = pipeline("a tiger", style="plain", generator=torch.Generator().manual_seed(4)).tokens[0]
    np.testing.assert_array_equal(found.tokens["iterative_sr_transformer"], expected.numpy())


def test_bad_options_are_told_before_a_model_is_loaded(cogview2, no_model, tmp_path, monkeypatch):
    output = tmp_path / "exported"
    assert_bad_input(cogview2("export", "--format", "gguf", "-o", output), "`--format` must be one of onnx", "gguf")
    assert_bad_input(cogview2("export", "-o", output, "--dtype", "int8"), "`--dtype` must be one of", "int8")
    assert_bad_input(cogview2("export", "-o", tmp_path), "`--output`", "exists already")
    assert_bad_input(cogview2("export", "-o", output, "--model", tmp_path / "none"), "`--model`")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_bad_input(cogview2("export", "-o", output), "pip install 'cogview_pipelines[onnx]'")
    assert not output.exists()


def test_a_model_of_the_first_cogview_is_refused(no_model, tmp_path):
    folder = tmp_path / "cogview"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "CogViewPipeline"}')
    result = CliRunner().invoke(app, ["export", "--model", str(folder), "-o", str(tmp_path / "exported")])
    assert_bad_input(result, "takes models of cogview2 only")
    assert export.FORMATS == ("onnx",)
