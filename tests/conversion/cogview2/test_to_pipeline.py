"""Whole conversions: what comes out, what is refused, what an interruption leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMCanvasModel,
    CogLMConfig,
    CogLMModel,
    CogView2Pipeline,
    IcetkVQModel,
)
from cogview_pipelines.conversion import ConversionError, convert_to_release, verify, writer
from cogview_pipelines.conversion.cogview2.layout import (
    STAGES,
    expected_shapes,
    image_tokenizer_key,
    released_image_tokenizer_key,
    released_transformer_key,
    transformer_key,
)
from cogview_pipelines.conversion.output_folder import LOCK_FILE

from ...parity.checkpoints import DIRECT_SR, direct_sr
from ..conftest import FIXTURES, NUM_IMAGE_TOKENS, make_state_dict, write_checkpoint


def load_pipeline(folder):
    pipe = CogView2Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Names and shapes ----------------------------------------------------------------------------------------------------


def released_table(config: CogLMConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released checkpoint, written down by hand."""
    h, layers = config.hidden_size, range(config.num_hidden_layers)
    table = {
        "transformer.word_embeddings.weight": (config.vocab_size, h),
        "transformer.position_embeddings.weight": (1024, h),
        "transformer.final_layernorm.weight": (h,),
        "transformer.final_layernorm.bias": (h,),
    }
    for i in layers:
        layer = f"transformer.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm", "third_layernorm", "fourth_layernorm"):
            table |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
        linear = {
            "attention.query_key_value": (3 * h, h),
            "attention.dense": (h, h),
            "mlp.dense_h_to_4h": (4 * h, h),
            "mlp.dense_4h_to_h": (h, 4 * h),
        }
        for name, shape in linear.items():
            table |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    if isinstance(config, CogLMCanvasConfig):
        table["mixins.extra_position_embedding.position_embeddings.weight"] = (3600, h)
    if getattr(config, "super_resolution", None) == "direct":
        for i in layers:
            for name, rows in (("query_key_value", 3 * h), ("dense", h)):
                key = f"mixins.attention_plus.{name}.{i}"
                table |= {f"{key}.weight": (rows, h), f"{key}.bias": (rows,)}
    return table


# Without the rows of the word embedding, whose number is not published. 48 layers of 12 h^2 + 17 h for h = 3072, the
# final norm and 1,024 positions; the others add 3,600 positions, and direct super-resolution 48 times 4 h^2 + 4 h.
RELEASED_PARAMETERS = {"coglm": 5_441_476_608, "cogview2-dsr": 7_265_064_960, "cogview2-itersr": 5_452_535_808}


@pytest.mark.parametrize("name", RELEASED_PARAMETERS)
def test_presets_have_the_shapes_of_the_released_checkpoints(name):
    model_class = CogLMModel if name == "coglm" else CogLMCanvasModel
    config = model_class.config_class.released(name)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (48, 3072, 48)
    table = released_table(config)
    ours = expected_shapes(model_class, config)
    assert {released_transformer_key(key): shape for key, shape in ours.items()} == table
    assert {transformer_key(key): shape for key, shape in table.items()} == ours
    words = config.vocab_size * config.hidden_size
    total = sum(np.prod(shape, dtype=np.int64) for shape in ours.values())
    assert total - words == RELEASED_PARAMETERS[name]


def test_presets_are_as_large_as_the_released_files():
    """About 40 GB in float16, says the release."""
    total = sum(RELEASED_PARAMETERS.values()) + 3 * CogLMConfig.released("coglm").vocab_size * 3072
    assert 38e9 < 2 * total < 41e9


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="cogview2-itersr"):
        CogLMCanvasConfig.released("cogview3")
    with pytest.raises(ValueError, match=r"must be one of .'coglm'., but is 'cogview2-dsr'"):
        CogLMConfig.released("cogview2-dsr")


def test_names_of_the_image_tokenizer_go_there_and_back():
    released = torch.load(FIXTURES / "icetk" / "ice_image.pt", weights_only=True)["module"]
    assert [released_image_tokenizer_key(image_tokenizer_key(key)) for key in released] == list(released)
    assert len({image_tokenizer_key(key) for key in released}) == len(released)


def test_the_released_image_tokenizer_fits_the_default_configuration():
    shapes = expected_shapes(IcetkVQModel, IcetkVQModel.config_class())
    narrow = torch.load(FIXTURES / "icetk" / "ice_image.pt", weights_only=True)["module"]
    assert {released_image_tokenizer_key(key) for key in shapes} - {"cluster_labels"} == set(narrow)
    assert shapes["quantize.embed.weight"] == (20000, 256)


# What comes out ------------------------------------------------------------------------------------------------------


def test_converted_release_is_a_pipeline_that_makes_pictures(pipeline_folder):
    pipe = load_pipeline(pipeline_folder)
    generator = torch.Generator().manual_seed(0)
    pictures = pipe("a red cat", generator=generator, num_lopar_steps=1).images
    assert [picture.size for picture in pictures] == [(480, 480)]
    assert pipe.config.default_style == "mainbody" and len(pipe.config.styles) == 10
    again = pipe("a red cat", generator=torch.Generator().manual_seed(0), height=160, width=160, output_type="latent")
    assert again.images.shape == (1, 20, 20)


def test_tensors_are_the_released_ones_bit_by_bit(pipeline_folder):
    theirs = make_state_dict("coglm")
    ours = load_file(pipeline_folder / "transformer" / "model.safetensors")
    assert {released_transformer_key(key) for key in ours} == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[released_transformer_key(key)]) and tensor.dtype == torch.float16


def test_shared_backbone_is_stored_once_and_held_once(pipeline_folder):
    stored = load_file(pipeline_folder / "direct_sr_transformer" / "model.safetensors")
    assert stored and all("canvas_" in key for key in stored)
    pipe = load_pipeline(pipeline_folder)
    ours, theirs = pipe.direct_sr_transformer.word_embeddings.weight, pipe.transformer.word_embeddings.weight
    assert ours.data_ptr() == theirs.data_ptr()
    assert pipe.iterative_sr_transformer.word_embeddings.weight.data_ptr() != theirs.data_ptr()


def test_a_backbone_that_differs_in_one_element_is_stored_in_full(release, convert, tmp_path):
    tensors = make_state_dict("cogview2-dsr")
    tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"][3] += 1
    folder = write_checkpoint(tmp_path / "dsr", "cogview2-dsr", tensors)
    record, lines = convert(coglm=release["coglm"], direct_sr=folder)
    assert record["components"]["direct_sr_transformer"]["num_tensors"] == len(tensors)
    assert any("layers.1.mlp.dense_4h_to_h.bias` differs" in line for line in lines)


def test_sharing_can_be_turned_off(release, convert):
    record, _ = convert(coglm=release["coglm"], direct_sr=release["direct_sr"], share_backbone=False)
    assert record["components"]["direct_sr_transformer"]["shares_backbone_of"] is None


def test_shards_hold_what_one_file_holds(release, convert, pipeline_folder, tmp_path):
    convert(coglm=release["coglm"], max_shard_size=20_000)
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert len(names) == 3
    parts = {key: value for name in names for key, value in load_file(folder / name).items()}
    whole = load_file(pipeline_folder / "transformer" / "model.safetensors")
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    CogLMModel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_converted_on_request(release, convert, tmp_path, dtype):
    convert(coglm=release["coglm"], dtype=dtype)
    theirs = make_state_dict("coglm")
    for key, tensor in load_file(tmp_path / "out" / "transformer" / "model.safetensors").items():
        assert torch.equal(tensor, theirs[released_transformer_key(key)].to(dtype))
    assert CogLMModel.from_pretrained(tmp_path / "out" / "transformer", dtype="auto").dtype == dtype


def test_values_that_a_dtype_cannot_hold_are_refused(convert, tmp_path):
    tensors = {key: value.float() for key, value in make_state_dict("coglm").items()}
    tensors["transformer.final_layernorm.bias"][0] = 1e6
    folder = write_checkpoint(tmp_path / "coglm", "coglm", tensors)
    with pytest.raises(ConversionError, match=r"final_layernorm.bias"):
        convert(coglm=folder, dtype=torch.float16)
    assert not (tmp_path / "out" / "transformer").exists()


def test_report_says_sizes_dtype_parameters_and_hashes(release, convert):
    record, lines = convert(coglm=release["coglm"])
    parameters = sum(tensor.numel() for tensor in make_state_dict("coglm").values())
    line = next(line for line in lines if line.startswith("transformer:"))
    assert f"{parameters:,} parameters" in line and "torch.float16" in line and "iteration 7" in line
    assert record["components"]["transformer"]["content_hash"] in line


def test_content_hash_depends_on_every_bit(convert, release, tmp_path):
    first, _ = convert(coglm=release["coglm"])
    shutil.rmtree(tmp_path / "out")
    tensors = make_state_dict("coglm")
    tensors["transformer.final_layernorm.bias"][0] *= -1
    second, _ = convert(coglm=write_checkpoint(tmp_path / "coglm", "coglm", tensors))
    hashes = [record["components"]["transformer"]["content_hash"] for record in (first, second)]
    assert hashes[0] != hashes[1]


# Parts ---------------------------------------------------------------------------------------------------------------


def test_parts_may_come_one_by_one_and_the_index_comes_last(release, convert, tmp_path):
    out = tmp_path / "out"
    steps = [
        {"coglm": release["coglm"]},
        {"direct_sr": release["direct_sr"]},
        {"image_tokenizer": release["image_tokenizer"], "cluster_labels": release["cluster_labels"]},
    ]
    for step in steps:
        assert not (out / "model_index.json").exists()
        convert(**step)
    assert load_pipeline(out).iterative_sr_transformer is None
    convert(iterative_sr=release["iterative_sr"])
    assert load_pipeline(out).iterative_sr_transformer is not None


@pytest.mark.parametrize("part", ["direct_sr", "iterative_sr"])
def test_super_resolution_alone_converts_in_full(release, convert, tmp_path, part):
    convert(**{part: release[part]})
    folder = tmp_path / "out" / f"{part}_transformer"
    model = CogLMCanvasModel.from_pretrained(folder)
    assert not model.config.shares_backbone and model.word_embeddings.weight is not None


def test_number_of_heads_comes_from_coglm_as_in_the_release(release, convert, tmp_path):
    folder = tmp_path / "itersr"
    shutil.copytree(release["iterative_sr"], folder)
    (folder / "model_config.json").unlink()
    with pytest.raises(ConversionError, match="num_attention_heads"):
        convert(iterative_sr=folder)
    convert(coglm=release["coglm"], iterative_sr=folder)
    assert CogLMCanvasConfig.from_pretrained(tmp_path / "out" / "iterative_sr_transformer").num_attention_heads == 2


def test_converting_again_keeps_what_is_there(release, convert, tmp_path):
    convert(coglm=release["coglm"])
    path = tmp_path / "out" / "transformer" / "model.safetensors"
    before = path.stat().st_mtime_ns
    _, lines = convert(coglm=release["coglm"])
    assert path.stat().st_mtime_ns == before
    assert "transformer: already converted, files are as written" in lines


def test_a_component_of_other_files_is_never_replaced(release, convert, tmp_path):
    convert(coglm=release["coglm"])
    other = write_checkpoint(tmp_path / "other", "coglm", make_state_dict("coglm", seed=5))
    with pytest.raises(ConversionError, match="made from other files"):
        convert(coglm=other)


def test_a_component_that_was_deleted_is_converted_anew(release, convert, tmp_path):
    convert(coglm=release["coglm"])
    shutil.rmtree(tmp_path / "out" / "transformer")
    record, _ = convert(coglm=write_checkpoint(tmp_path / "other", "coglm", make_state_dict("coglm", seed=5)))
    assert (tmp_path / "out" / "transformer" / "model.safetensors").is_file()
    assert verify(tmp_path / "out", say=lambda line: None) == ["model_index.json"]  # as yet, a part of a pipeline
    shutil.rmtree(tmp_path / "out" / "transformer")
    record, _ = convert(iterative_sr=release["iterative_sr"])
    assert "transformer" not in record["components"]


def test_image_tokenizer_needs_cluster_labels(release, convert):
    with pytest.raises(ConversionError, match=r"cluster_label.npy"):
        convert(image_tokenizer=release["image_tokenizer"])


def test_pickled_cluster_labels_are_refused(release, convert, tmp_path):
    np.save(tmp_path / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConversionError, match="plain numbers"):
        convert(image_tokenizer=release["image_tokenizer"], cluster_labels=tmp_path / "labels.npy")


WRONG_LABELS = [
    np.zeros(5, int),
    np.zeros(NUM_IMAGE_TOKENS),
    np.full(NUM_IMAGE_TOKENS, 2),
    -np.ones(NUM_IMAGE_TOKENS, int),
    np.r_[np.zeros(NUM_IMAGE_TOKENS - 1, int), 2**62],
]


@pytest.mark.parametrize("labels", WRONG_LABELS, ids=["too few", "floats", "gaps", "negative", "huge"])
def test_cluster_labels_must_number_the_clusters_of_every_code(release, convert, tmp_path, labels):
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(ConversionError, match="cluster_labels"):
        convert(image_tokenizer=release["image_tokenizer"], cluster_labels=tmp_path / "labels.npy")


def npy(header: bytes, version: bytes = b"\x01\0") -> bytes:
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + header


LABEL_FILES = {
    "long header": npy(b"{" + b" " * 60_000 + b"}"),
    "header that is not there": npy(b"{}", b"\x02\0")[:8] + b"\xff\xff\xff\x7f",
    "nested header": npy(b"(" * 5_000),
    "shape without data": npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,)}\n"),
    "right shape without data": npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (512,)}\n"),
    "pickle": b"\x80\x02cposix\nsystem\n.",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_a_file_of_cluster_labels_is_read_as_numbers_or_not_at_all(release, convert, tmp_path, kind):
    (tmp_path / "labels.npy").write_bytes(LABEL_FILES[kind])
    with pytest.raises(ConversionError, match="cluster_labels") as error:
        convert(image_tokenizer=release["image_tokenizer"], cluster_labels=tmp_path / "labels.npy")
    assert "allow_pickle" not in str(error.value)


def test_a_missing_file_of_cluster_labels_is_named(release, convert, tmp_path):
    with pytest.raises(ConversionError, match=r"labels\.npy does not exist"):
        convert(image_tokenizer=release["image_tokenizer"], cluster_labels=tmp_path / "labels.npy")


def test_a_pointer_instead_of_a_tokenizer_is_called_that(release, convert, tmp_path):
    (tmp_path / "file").write_bytes(LABEL_FILES["pointer"])
    for part in ("text_tokenizer", "image_tokenizer"):
        with pytest.raises(ConversionError, match="Git LFS pointer"):
            convert(**{part: tmp_path / "file"}, cluster_labels=release["cluster_labels"])


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer.word_embeddings.weight": torch.zeros(3)},
        {"transformer.word_embeddings.weight": torch.zeros(2**40, 0)},
        {"transformer.position_embeddings.weight": torch.tensor(1.0)},
        {"transformer.position_embeddings.weight": torch.zeros(8, 16)},
        {f"transformer.layers.{2**50}.a": torch.zeros(1)},
    ],
    ids=["one dimension", "no elements", "scalar", "too few positions", "layer beyond all"],
)
def test_tensors_of_which_no_model_can_be_made_are_refused(convert, tmp_path, changes):
    folder = write_checkpoint(tmp_path / "coglm", "coglm", make_state_dict("coglm") | changes)
    with pytest.raises(ConversionError, match="coglm"):
        convert(coglm=folder, strict=True)


def test_cluster_labels_are_those_of_the_file(pipeline_folder, release):
    model = IcetkVQModel.from_pretrained(pipeline_folder / "vqvae")
    assert model.cluster_labels.tolist() == np.load(release["cluster_labels"]).tolist()
    assert model.config.num_clusters == 20


def test_image_tokenizer_of_another_vocabulary_makes_no_pipeline(release, convert, tmp_path):
    parts = {**release, "num_image_tokens": 400}
    _, lines = convert(**parts)
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert any("512 codes, but the transformer writes 400" in line for line in lines)


def test_transformers_of_another_text_tokenizer_make_no_pipeline(release, convert, tmp_path):
    """CogLM came before the text tokenizer, so the released <start_of_image> was taken."""
    tensors = make_state_dict("coglm")
    tensors["transformer.word_embeddings.weight"] = torch.zeros(150016, 16).half()
    folder = write_checkpoint(tmp_path / "coglm", "coglm", tensors)
    convert(coglm=folder, text_tokenizer=None)
    _, lines = convert(image_tokenizer=release["image_tokenizer"], cluster_labels=release["cluster_labels"])
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert any("<start_of_image> is 912 for the text tokenizer" in line for line in lines)


# What is refused -----------------------------------------------------------------------------------------------------


def spoiled(tmp_path, **changes):
    """A checkpoint with tensors replaced, or removed by `None`; dots are written as double underscores."""
    tensors = make_state_dict("coglm")
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return write_checkpoint(tmp_path / "coglm", "coglm", tensors)


def test_every_missing_and_misshapen_tensor_is_named(convert, tmp_path):
    folder = spoiled(
        tmp_path,
        transformer__layers__1__mlp__dense_4h_to_h__bias=None,
        transformer__final_layernorm__weight=None,
        transformer__layers__0__attention__dense__weight=torch.zeros(16, 17).half(),
    )
    with pytest.raises(ConversionError) as error:
        convert(coglm=folder)
    message = str(error.value)
    assert "2 missing: final_layernorm.weight, layers.1.mlp.dense_4h_to_h.bias" in message
    assert "1 misshapen: layers.0.attention.dense.weight: is (16, 17), must be (16, 16)" in message
    assert not (tmp_path / "out" / "transformer").exists()


def test_surplus_tensors_are_left_out_and_named_or_refused(convert, tmp_path):
    folder = spoiled(tmp_path, mixins__extra__weight=torch.zeros(3))
    with pytest.raises(ConversionError, match=r"mixins\.extra\.weight"):
        convert(coglm=folder, strict=True)
    record, lines = convert(coglm=folder)
    assert any("left out: tensor `mixins.extra.weight`" in line for line in lines)
    assert len(record["components"]["transformer"]["left_out"]) == 1


def test_a_checkpoint_of_another_stage_is_refused(release, convert):
    with pytest.raises(ConversionError, match="canvas_position_embeddings"):
        convert(direct_sr=release["coglm"])


def test_gaps_in_the_layers_are_refused(convert, tmp_path):
    removed = {
        key.replace(".", "__"): None for key in make_state_dict("coglm") if key.startswith("transformer.layers.0.")
    }
    with pytest.raises(ConversionError, match=r"num_layers|gaps"):
        convert(coglm=spoiled(tmp_path, **removed))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 3}, "`num_layers` = 3, but the tensors say 2"),
        ({"hidden_size": 32}, "`hidden_size` = 32, but the tensors say 16"),
        ({"num_attention_heads": 3}, "divisor of the width 16"),
        ({"layernorm_order": "pre"}, "`layernorm_order` = 'pre'"),
        ({"model_parallel_size": 2}, "`model_parallel_size` = 2"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(convert, tmp_path, change, message):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConversionError, match=message):
        convert(coglm=folder)


def test_start_token_beyond_the_vocabulary_is_refused(release, convert, tmp_path):
    with pytest.raises(ConversionError, match="<start_of_image> is token 20400"):
        convert(coglm=release["coglm"], num_image_tokens=20000)


# Interruptions -------------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """Like a killed process: nothing of ours catches it."""


def interrupt_after(monkeypatch, count):
    """Let the writing of shards stop after some; the next one leaves half a file."""
    write_shard, written = writer.write_shard, []

    def limited(path, *args, **kwargs):
        if len(written) == count:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise Interrupt
        written.append(path.name)
        return write_shard(path, *args, **kwargs)

    monkeypatch.setattr(writer, "write_shard", limited)
    return written


def test_an_interrupted_component_does_not_look_whole_and_is_continued(release, convert, monkeypatch, tmp_path):
    whole, _ = convert(coglm=release["coglm"], max_shard_size=20_000)
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupt):
            convert(coglm=release["coglm"], max_shard_size=20_000)
    folder = tmp_path / "out" / "transformer"
    assert not folder.exists()
    partial = folder.with_name("transformer.partial")
    assert not (partial / "config.json").exists()
    kept = sorted(partial.glob("*.safetensors"))
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:-1] + b"\0")  # damaged meanwhile

    with monkeypatch.context() as patch:
        written = interrupt_after(patch, 10**6)
        record, lines = convert(coglm=release["coglm"], max_shard_size=20_000)
    assert kept[0].name not in written and kept[1].name in written
    assert any("1 shards of an interrupted run were verified and kept" in line for line in lines)
    assert record["components"]["transformer"]["files"] == whole["components"]["transformer"]["files"]
    assert not partial.exists() and not list(folder.glob("*.tmp"))
    CogLMModel.from_pretrained(folder)


def test_what_was_begun_from_other_files_is_not_continued(release, convert, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupt):
            convert(coglm=release["coglm"], max_shard_size=20_000)
    other = make_state_dict("coglm", seed=9)
    convert(coglm=write_checkpoint(tmp_path / "other", "coglm", other), max_shard_size=20_000)
    model = CogLMModel.from_pretrained(tmp_path / "out" / "transformer", dtype=torch.float16)
    assert all(torch.equal(value, other[released_transformer_key(key)]) for key, value in model.state_dict().items())


def test_an_interrupted_conversion_is_no_pipeline(release, convert, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)  # image tokenizer and CogLM are written
        with pytest.raises(Interrupt):
            convert(**release)
    with pytest.raises(EnvironmentError, match="model_index"):
        CogView2Pipeline.from_pretrained(tmp_path / "out")
    convert(**release)
    load_pipeline(tmp_path / "out")


def test_verify_names_files_that_changed(pipeline_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_folder, folder)
    assert verify(folder, say=lambda line: None) == []
    path = folder / "vqvae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (folder / "transformer" / "config.json").unlink()
    assert sorted(verify(folder, say=lambda line: None)) == ["transformer/config.json", "vqvae/model.safetensors"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(release, convert, monkeypatch, tmp_path):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ConversionError, match="not free on its disk"):
        convert(coglm=release["coglm"])


# The way back --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The parity checkpoints by their names in the release."""
    folders = {stage.released_name: FIXTURES / "checkpoints" / stage.released_name for stage in STAGES}
    return {**folders, DIRECT_SR: direct_sr(FIXTURES, tmp_path_factory.mktemp("checkpoints"))}


@pytest.fixture(scope="module")
def there_and_back(checkpoints, tmp_path_factory):
    """The parity checkpoints, converted and converted back."""
    from cogview_pipelines.conversion import convert_to_pipeline

    root = tmp_path_factory.mktemp("round-trip")
    convert_to_pipeline(
        root / "pipeline",
        coglm=checkpoints["coglm"],
        direct_sr=checkpoints[DIRECT_SR],
        iterative_sr=checkpoints["cogview2-itersr"],
        image_tokenizer=FIXTURES / "icetk" / "ice_image.pt",
        text_tokenizer=FIXTURES / "icetk" / "ice_text.model",
        cluster_labels="compute",
        say=lambda line: None,
    )
    convert_to_release(root / "pipeline", root / "sat", say=lambda line: None)
    return root


def load_module(path):
    return torch.load(path, weights_only=True)["module"]


def assert_equal_modules(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", [stage.released_name for stage in STAGES])
def test_checkpoints_come_back_bit_by_bit(checkpoints, there_and_back, name):
    ours, theirs = there_and_back / "sat" / name, checkpoints[name]
    iteration = (theirs / "latest").read_text()
    assert (ours / "latest").read_text() == iteration
    path = f"{iteration}/mp_rank_00_model_states.pt"
    assert_equal_modules(load_module(ours / path), load_module(theirs / path))
    read = [json.loads((folder / "model_config.json").read_text()) for folder in (ours, theirs)]
    assert read[0] == read[1]
    # views of the mapped shards must not drag the whole shard into the file
    assert (ours / path).stat().st_size < 1.05 * (theirs / path).stat().st_size + 10_000


def test_tokenizers_come_back_bit_by_bit(there_and_back):
    sat = there_and_back / "sat"
    assert (sat / "ice_text.model").read_bytes() == (FIXTURES / "icetk" / "ice_text.model").read_bytes()
    assert_equal_modules(load_module(sat / "ice_image.pt"), load_module(FIXTURES / "icetk" / "ice_image.pt"))
    labels = np.load(sat / "cluster_label.npy", allow_pickle=False)
    assert labels.dtype == np.int64 and labels.shape == (NUM_IMAGE_TOKENS,)


def test_a_saved_pipeline_goes_back_too(there_and_back, tmp_path):
    """Not only converted folders: what `save_pretrained` writes after finetuning."""
    model = CogLMModel.from_pretrained(there_and_back / "pipeline" / "transformer", dtype=torch.float16)
    with torch.no_grad():
        model.final_layernorm.bias += 1
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="300KB")
    convert_to_release(tmp_path / "pipeline", tmp_path / "sat", iteration=12, say=lambda line: None)
    ours = load_module(tmp_path / "sat" / "coglm" / "12" / "mp_rank_00_model_states.pt")
    theirs = load_module(FIXTURES / "checkpoints" / "coglm" / "20000" / "mp_rank_00_model_states.pt")
    theirs["transformer.final_layernorm.bias"] += 1
    assert_equal_modules(ours, theirs)


def test_models_that_the_original_code_cannot_run_are_refused(tmp_path):
    config = CogLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=200,
        image_grid=(4, 4),
        kernel_size=(5, 5),
    )
    CogLMModel(config).save_pretrained(tmp_path / "pipeline" / "transformer")
    with pytest.raises(ConversionError, match=r"`image_grid` is \(4, 4\), not \(20, 20\)"):
        convert_to_release(tmp_path / "pipeline", tmp_path / "sat")
    assert [path.name for path in (tmp_path / "sat").iterdir()] in ([], [LOCK_FILE])


def test_nothing_that_is_there_is_overwritten(there_and_back):
    with pytest.raises(ConversionError, match="exists already"):
        convert_to_release(there_and_back / "pipeline", there_and_back / "sat")
