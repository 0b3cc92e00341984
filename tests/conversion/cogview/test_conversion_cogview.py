"""CogView's released files to a pipeline folder and back: every layout, several ranks, every key, restart, errors."""

import json
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines import CogViewModel, CogViewPipeline, CogViewUpscalePipeline
from cogview_pipelines.conversion import (
    ConversionError,
    convert_cogview_to_pipeline,
    convert_cogview_to_release,
    verify,
    writer,
)
from cogview_pipelines.conversion.cogview import to_release
from cogview_pipelines.conversion.cogview.layout import released_transformer_key, transformer_key

from ...parity import checkpoints

FIXTURES = Path(__file__).parents[2] / "parity" / "cogview" / "fixtures"
TINY = FIXTURES / "checkpoints" / "cogview-tiny"
VQ, TEXT = FIXTURES / "checkpoints" / "vqvae_tiny.pt", FIXTURES / "text_model" / "tiny.model"
SCRIPTS = Path(__file__).parents[3] / "conversion_scripts"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The weights of the tiny checkpoint in two model-parallel ranks."""
    return checkpoints.two_ranks(FIXTURES, tmp_path_factory.mktemp("ranks"))


def convert(output, **files):
    lines = []
    files = {"text_tokenizer": TEXT, "num_attention_heads": 2, **files}
    record = convert_cogview_to_pipeline(output, **files, say=lines.append)
    return record, lines


def released_module(folder):
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    return torch.load(path, weights_only=True)["module"]


def packed(path, kind, source=TINY, prefix="some/folder/cogview-base/"):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in source.rglob("*"):
                archive.write(file, prefix + file.relative_to(source).as_posix())
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(source, prefix.rstrip("/"))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip", "pt"])
def test_every_layout_gives_the_same_tensors(tmp_path, kind):
    if kind == "folder":
        path = TINY
    elif kind == "pt":
        (path,) = TINY.glob("*/mp_rank_00_model_states.pt")
    else:
        path = packed(tmp_path / f"base.{kind}", kind)
    record, _ = convert(tmp_path / "out", base=path)
    tensors = load_file(tmp_path / "out" / "transformer" / "model.safetensors")
    expected = released_module(TINY)
    assert {released_transformer_key(key) for key in tensors} == set(expected)
    assert all(torch.equal(value, expected[released_transformer_key(key)]) for key, value in tensors.items())
    assert record["components"]["transformer"]["iteration"] == "30000"
    assert not list((tmp_path / "out").glob(".unpacked*"))


def test_two_ranks_are_merged_into_the_tensors_of_one(two_ranks, tmp_path):
    record, _ = convert(tmp_path / "two", base=two_ranks)
    convert(tmp_path / "one", base=TINY)
    two, one = (load_file(tmp_path / name / "transformer" / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[key], one[key]) for key in one)
    assert record["components"]["transformer"]["num_ranks"] == 2


def write_ranks(two_ranks, folder, change):
    """The two ranks with something changed in the second."""
    for rank in range(2):
        (source,) = two_ranks.glob(f"*/mp_rank_{rank:02d}_model_states.pt")
        content = torch.load(source, weights_only=True)
        if rank:
            change(content["module"])
        target = folder / "30000" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, target)
    (folder / "latest_checkpointed_iteration.txt").write_text("30000")
    return folder


def test_ranks_that_disagree_are_reported_or_refused(two_ranks, tmp_path):
    key = "transformer.final_layernorm.bias"
    folder = write_ranks(two_ranks, tmp_path / "ranks", lambda module: module[key].add_(1))
    _, lines = convert(tmp_path / "out", base=folder)
    assert any("final_layernorm.bias` of later ranks, which differs" in line for line in lines)
    with pytest.raises(ConversionError, match=r"its ranks disagree about final_layernorm\.bias"):
        convert(tmp_path / "strict", base=folder, strict=True)
    folder = write_ranks(two_ranks, tmp_path / "missing", lambda module: module.pop(key))
    with pytest.raises(ConversionError, match=r"2 ranks do not hold the same tensors: final_layernorm\.bias"):
        convert(tmp_path / "out2", base=folder)
    (folder / "30000" / "mp_rank_01_model_states.pt").rename(folder / "30000" / "mp_rank_02_model_states.pt")
    with pytest.raises(ConversionError, match=r"mp_rank_01_model_states\.pt is missing"):
        convert(tmp_path / "out3", base=folder)


def test_all_parts_make_a_pipeline_that_loads(two_ranks, tmp_path):
    parts = {"base": TINY, "caption": TINY, "super_resolution": two_ranks, "image_tokenizer": VQ}
    _, lines = convert(tmp_path / "out", **parts)
    assert lines[-1] == f"{tmp_path / 'out'} is a CogViewPipeline."
    pipe = CogViewPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.command_token_id == pipe.tokenizer.command_token_id
    assert pipe.super_resolution_transformer is not None and pipe.caption_transformer is not None
    assert verify(tmp_path / "out", say=lambda line: None) == []
    _, lines = convert(tmp_path / "out", **parts)
    assert sum("already converted" in line for line in lines) == 5


def test_super_resolution_alone_makes_a_pipeline_for_it(tmp_path):
    _, lines = convert(tmp_path / "out", super_resolution=TINY, image_tokenizer=VQ)
    assert lines[-1].endswith("is a CogViewUpscalePipeline.")
    assert CogViewUpscalePipeline.from_pretrained(tmp_path / "out").super_resolution_transformer is not None
    _, lines = convert(tmp_path / "part", base=TINY)
    assert lines[-1] == "The folder is no pipeline yet: vqvae must be converted too."


def test_there_and_back_is_the_same_bit_by_bit(tmp_path):
    convert(tmp_path / "out", base=TINY, super_resolution=TINY, image_tokenizer=VQ)
    written = convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    assert {path.name for path in written} == {"cogview-base", "cogview-sr", "vqvae.pt", "cog-pretrain.model"}
    assert (tmp_path / "back" / "cogview-base" / "latest_checkpointed_iteration.txt").read_text() == "30000"
    for ours, theirs in (
        (released_module(tmp_path / "back" / "cogview-base"), released_module(TINY)),
        (torch.load(tmp_path / "back" / "vqvae.pt", weights_only=True), torch.load(VQ, weights_only=True)),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert (tmp_path / "back" / "cog-pretrain.model").read_bytes() == TEXT.read_bytes()
    with pytest.raises(ConversionError, match="exists already"):
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lambda line: None)


def test_an_interrupted_conversion_goes_on_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    original, calls = writer.write_shard, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(writer, "write_shard", fails)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", base=TINY, max_shard_size=2**15)
    assert not (tmp_path / "out" / "transformer").exists()
    _, lines = convert(tmp_path / "out", base=TINY, max_shard_size=2**15)
    assert any("2 shards of an interrupted run were verified and kept" in line for line in lines)
    loaded = CogViewModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    expected = released_module(TINY)
    assert all(torch.equal(loaded[transformer_key(key)].to(value.dtype), value) for key, value in expected.items())


def test_an_interrupted_way_back_goes_on(tmp_path, monkeypatch):
    convert(tmp_path / "out", base=TINY, image_tokenizer=VQ)
    original = to_release._write_image_tokenizer

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(to_release, "_write_image_tokenizer", fails)
    with pytest.raises(KeyboardInterrupt):
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    monkeypatch.setattr(to_release, "_write_image_tokenizer", original)
    lines = []
    with pytest.raises(ConversionError, match="cogview-base exists already"):  # it is another conversion
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", dtype=torch.bfloat16, say=lines.append)
    written = convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lines.append)
    assert {path.name for path in written} == {"cogview-base", "vqvae.pt", "cog-pretrain.model"}
    assert lines[-1].endswith("cogview-base: already written by a run that was interrupted")
    assert all(path.exists() for path in written)


def test_what_stands_for_a_file_or_is_damaged_is_told(tmp_path):
    (tmp_path / "file").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for part in ("text_tokenizer", "image_tokenizer"):
        with pytest.raises(ConversionError, match=f"`{part}` .* Git LFS pointer"):
            convert(tmp_path / "none", **{part: tmp_path / "file"})
    convert(tmp_path / "out", base=TINY)
    with pytest.raises(ConversionError, match="`iteration` must be a number above 0, but is 0"):
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", iteration=0, say=lambda line: None)
    (tmp_path / "out" / "transformer" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="transformer cannot be read"):
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lambda line: None)
    (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConversionError, match=r"tokenizer cannot be read .* Delete it, and convert it again"):
        convert_cogview_to_pipeline(tmp_path / "out", image_tokenizer=VQ, say=lambda line: None)


def rewritten(path, change):
    """The checkpoint with something changed."""
    module = released_module(TINY)
    change(module)
    (path / "1").mkdir(parents=True)
    torch.save({"module": module}, path / "1" / "mp_rank_00_model_states.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("1")
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda module: module.pop("transformer.layers.1.mlp.dense_h_to_4h.bias"), "1 missing"),
        (lambda module: module.update({"transformer.final_layernorm.bias": torch.zeros(3)}), "1 misshapen"),
        (lambda module: module.pop("word_embeddings.weight"), "so it is no CogView transformer"),
        (lambda module: [module.pop(k) for k in [*module] if ".layers.0." in k], r"gaps in its layers: \[0\]"),
        (lambda module: module.update({"word_embeddings.weight": torch.zeros(8600, 32)}), "only 8600 rows"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "out", base=rewritten(tmp_path / "changed", change))


def test_unknown_tensors_are_left_out_or_refused(tmp_path):
    folder = rewritten(tmp_path / "more", lambda module: module.update(extra=torch.zeros(2)))
    record, _ = convert(tmp_path / "out", base=folder)
    assert record["components"]["transformer"]["left_out"] == ["transformer.extra"]
    with pytest.raises(ConversionError, match="tensors that the model does not know: extra"):
        convert(tmp_path / "strict", base=folder, strict=True)


def test_heads_that_the_tensors_do_not_tell_must_be_given(tmp_path):
    with pytest.raises(ConversionError, match="`num_attention_heads` must be a divisor of the width 32, but is 0"):
        convert(tmp_path / "out", base=TINY, num_attention_heads=None)
    with pytest.raises(ConversionError, match="Nothing to convert"):
        convert_cogview_to_pipeline(tmp_path / "out")


def test_models_that_the_original_cannot_run_are_not_written(tmp_path):
    convert(tmp_path / "out", base=TINY)
    config = tmp_path / "out" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_norm_order": "pre", "norm_scale": None}))
    with pytest.raises(ConversionError, match="`layer_norm_order` is pre, not sandwich; `norm_scale` is None"):
        convert_cogview_to_release(tmp_path / "out", tmp_path / "back", say=lambda line: None)


def test_scripts_convert_there_verify_and_back(tmp_path, capsys):
    there = runpy.run_path(str(SCRIPTS / "convert_cogview.py"))["main"]
    back = runpy.run_path(str(SCRIPTS / "convert_cogview_to_release.py"))["main"]
    out = tmp_path / "out"
    files = ["--base", str(TINY), "--image_tokenizer", str(VQ), "--text_tokenizer", str(TEXT)]
    assert there(["--output", str(out), *files, "--num_attention_heads", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output"] == str(out)
    assert there(["--verify", str(out)]) == 0
    assert back(["--pipeline", str(out), "--output", str(tmp_path / "back")]) == 0
    assert there(["--output", str(out), "--base", str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        there(["--output", str(out), "--base", str(TINY), "--max_shard_size", "-1"])
    assert "must be a number of GiB above 0" in capsys.readouterr().err
