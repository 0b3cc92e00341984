"""What a folder may say of a pipeline: its own classes, whose weights are all there. Nothing of a folder is run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview_pipelines import CogView2CaptionPipeline, CogView2Pipeline
from cogview_pipelines.pipelines.common import hub


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A saved pipeline that may be spoiled."""
    shutil.copytree(saved, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_code(folder, trace):
    """A module that leaves a trace if it is run, wherever a loader may look for one."""
    code = f"open({str(trace)!r}, 'w').close()\nclass EvilClass:\n    pass\n"
    for place in (
        "evilmod.py",
        "transformer/evilmod.py",
        "transformer/__init__.py",
        "pipeline.py",
        "tokenizer/evilmod.py",
    ):
        (folder / place).write_text(code)


FOREIGN = {
    "module in the folder": {"transformer": ["evilmod", "EvilClass"]},
    "module by its file": {"transformer": ["transformer.evilmod", "EvilClass"]},
    "pipeline in the folder": {"_class_name": ["pipeline", "EvilClass"]},
    "component that nobody knows": {"another": ["evilmod", "EvilClass"]},
    "module of Python": {"tokenizer": ["subprocess", "Popen"]},
    "remote code": {"transformer": ["diffusers_modules.local.evilmod", "EvilClass"]},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("pipeline_class", [CogView2Pipeline, CogView2CaptionPipeline])
def test_code_that_a_folder_names_is_refused_and_not_run(folder, tmp_path, monkeypatch, kind, pipeline_class):
    trace = tmp_path / "trace"
    put_code(folder, trace)
    change_index(folder, **FOREIGN[kind])
    monkeypatch.syspath_prepend(folder)  # as where somebody works in the folder
    with pytest.raises(ValueError, match=r"model_index\.json.* is not run"):
        pipeline_class.from_pretrained(folder, trust_remote_code=True)
    assert not trace.exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "{", ""])
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / "model_index.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"model_index\.json|JSON"):
        CogView2Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "component, key", [("transformer", "layers.0.mlp.dense_h_to_4h.bias"), ("vqvae", "cluster_labels")]
)
def test_a_pipeline_with_a_weight_missing_is_refused(folder, component, key):
    path = folder / component / "model.safetensors"
    tensors = load_file(path)
    tensors["surplus"] = tensors.pop(key)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 missing: {key}; 1 unknown: surplus"):
        CogView2Pipeline.from_pretrained(folder)


def test_a_shared_backbone_is_not_missing(shared_pipe, tmp_path):
    shared_pipe.save_pretrained(tmp_path)
    pipe = CogView2Pipeline.from_pretrained(tmp_path)
    ours, theirs = pipe.direct_sr_transformer.word_embeddings.weight, pipe.transformer.word_embeddings.weight
    assert ours.data_ptr() == theirs.data_ptr()
    assert torch.equal(ours, shared_pipe.transformer.word_embeddings.weight)


def test_a_model_of_the_hub_is_not_loaded_without_its_adapters(folder, monkeypatch):
    """A connection that breaks when all weights are there: the model without its adapters would be another one."""

    def break_off(*args, **kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(CogView2Pipeline, "download", lambda *args, **kwargs: folder)
    monkeypatch.setattr(hub, "snapshot_download", break_off)
    with pytest.raises(OSError, match="Adapters and card of 'me/model' could not be fetched"):
        CogView2Pipeline.from_pretrained("me/model")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: folder)
    assert CogView2Pipeline.from_pretrained("me/model").get_list_adapters() == {}
