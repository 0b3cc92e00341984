"""Reading released files: every layout, nothing executed, every damage noticed."""

import argparse
import collections
import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from cogview_pipelines.conversion import ConversionError, checkpoint_pickle
from cogview_pipelines.conversion.reader import read_module
from cogview_pipelines.conversion.released_models import open_released_model

from .. import child_processes as children
from .conftest import make_state_dict, weights_of, write_checkpoint


def saved(content, **kwargs) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    file.seek(0)
    return file


def archived(payload, **records) -> io.BytesIO:
    """A `.pt` file with this pickle and these records, compressed as much as they can be."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", payload)
        for name, data in records.items():
            archive.writestr(f"x/data/{name}", data)
    file.seek(0)
    return file


def zip_folder(folder, path, prefix, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{prefix}{file.relative_to(folder).as_posix()}")
    return path


def read_all(path, scratch):
    with open_released_model(path, scratch) as model:
        return {key: tensor.read() for key, tensor in model.tensors.items()}, model.iteration, model.config


@pytest.mark.parametrize(
    "layout", ["folder", "nested folder", "zip", "compressed zip", "nested zip", "compressed nested zip", "weights"]
)
def test_every_layout_of_the_release_is_read(release, tmp_path, layout):
    source = release["coglm"]
    prefix = "sharefs/cogview-new/coglm/" if "nested" in layout else ""
    if "zip" in layout:
        compression = zipfile.ZIP_DEFLATED if "compressed" in layout else zipfile.ZIP_STORED
        path = zip_folder(source, tmp_path / "coglm.zip", prefix, compression)
    elif layout == "nested folder":
        (tmp_path / "unpacked").mkdir()
        with zipfile.ZipFile(zip_folder(source, tmp_path / "x.zip", prefix, zipfile.ZIP_STORED)) as archive:
            archive.extractall(tmp_path / "unpacked")
        path = tmp_path / "unpacked"
    else:
        path = weights_of(source) if layout == "weights" else source
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tensors, iteration, config = read_all(path, scratch)
    expected = make_state_dict("coglm")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert (iteration, config["num_layers"]) == ("7", 2)
    assert not list(scratch.iterdir())


def test_the_word_release_names_the_folder(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    (folder / "7").rename(folder / "release")
    (folder / "latest").write_text("release\n")
    assert read_all(folder, tmp_path)[1] == "release"


@pytest.mark.parametrize("latest", ["../7", "/7", "7/../..", "0", "", "seven"])
def test_latest_may_not_be_a_path(tmp_path, latest):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    (folder / "latest").write_text(latest)
    with pytest.raises(ConversionError, match="latest"):
        read_all(folder, tmp_path)


@pytest.mark.parametrize("member", ["../evil", "/evil", "coglm/../../evil", "C:\\evil", "..\\evil"])
def test_zip_with_a_path_out_of_itself_is_refused(release, tmp_path, member):
    path = zip_folder(release["coglm"], tmp_path / "coglm.zip", "", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "payload")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ConversionError, match="points out of the archive"):
        read_all(path, tmp_path)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_several_checkpoints_in_one_folder_are_refused(tmp_path):
    write_checkpoint(tmp_path / "both" / "a", "coglm")
    write_checkpoint(tmp_path / "both" / "b", "coglm")
    with pytest.raises(ConversionError, match=r"2 \(a/latest, b/latest\)|2 \(b/latest, a/latest\)"):
        read_all(tmp_path / "both", tmp_path)


def test_model_parallel_parts_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    (folder / "7" / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(ConversionError, match="2 model-parallel parts"):
        read_all(folder, tmp_path)


# Nothing is executed -------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside", "inside", "instead"])
@pytest.mark.parametrize(
    "payload",
    [
        lambda path: Call(os.system, f"touch {path}"),
        lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
        lambda path: Call(exec, f"open({str(path)!r}, 'w')"),
        lambda path: Call(open, str(path), "w"),
        lambda path: Call(os.mkdir, str(path)),
        lambda path: Call(__import__, "os"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_run_commands_are_refused_and_not_run(tmp_path, payload, place, zipped):
    trace = tmp_path / "trace"
    bomb = payload(trace)
    content = {
        "beside": {"module": {"a": torch.zeros(2)}, "optimizer": bomb},
        "inside": {"module": {"a": torch.zeros(2), "b": bomb}},
        "instead": bomb,
    }[place]
    file = saved(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError):
        read_module(file, "bomb.pt")
    assert not trace.exists()


def test_the_message_names_what_a_pickle_asked_for():
    with pytest.raises(ConversionError, match=r"asks for `(posix|nt)\.system`"):
        read_module(saved({"module": {"a": Call(os.system, "true")}}), "bomb.pt")


@pytest.fixture
def training_classes(monkeypatch):
    """Classes of a library that is not installed where the file is converted."""
    module = types.ModuleType("some_trainer")

    class LossScaler:
        def __init__(self):
            self.scale, self.history, self.weights = 65536.0, [1, 2], torch.ones(3)

    class Parts(list):
        pass

    class Settings(dict):
        pass

    for one in (LossScaler, Parts, Settings):
        one.__module__, one.__qualname__ = "some_trainer", one.__name__
        setattr(module, one.__name__, one)
    monkeypatch.setitem(sys.modules, "some_trainer", module)
    yield module
    sys.modules.pop("some_trainer", None)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_optimizer_states_and_foreign_objects_are_left_out(training_classes, monkeypatch, protocol):
    parts, settings = training_classes.Parts([1, torch.ones(2)]), training_classes.Settings(a=1)
    content = {
        "module": make_state_dict("coglm"),
        "optimizer": {"state": {0: {"exp_avg": torch.randn(4)}}, "scaler": training_classes.LossScaler()},
        "parts": parts,
        "settings": settings,
        "args": argparse.Namespace(lr=1e-3),
        "random_state": np.random.RandomState(0).get_state(),
        "numbers": {1, 2, 3},
        "sizes": torch.Size([1, 2]),
        "counts": collections.defaultdict(list, a=[1]),
        "half": torch.float16,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "iteration": 7,
    }
    file = saved(content, pickle_protocol=protocol)
    monkeypatch.delitem(sys.modules, "some_trainer")  # as where the file is converted
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    file.seek(0)
    tensors, others, _ = read_module(file, "mp_rank_00_model_states.pt")
    expected = make_state_dict("coglm")
    assert all(torch.equal(tensors[key].read(), expected[key]) for key in expected)
    assert "class `some_trainer.LossScaler`" in others
    assert "entry `optimizer`" in others


def test_state_dicts_with_metadata_and_parameters_are_read():
    module = torch.nn.Linear(3, 2)
    content = {"module": module.state_dict(keep_vars=True)}
    tensors, _, _ = read_module(saved(content), "x.pt")
    assert torch.equal(tensors["weight"].read(), module.weight.detach())


def test_a_module_with_anything_but_tensors_is_refused():
    with pytest.raises(ConversionError, match="'b' is something else"):
        read_module(saved({"module": {"a": torch.zeros(2), "b": 3}}), "x.pt")


@pytest.mark.parametrize("content", [{"model": {}}, {"module": {}}, [1], {"module": torch.zeros(2)}])
def test_a_file_without_a_module_is_refused(content):
    with pytest.raises(ConversionError, match="under the key `module`"):
        read_module(saved(content), "x.pt")


def test_state_cannot_be_set_on_what_stands_in_for_classes():
    """A pickle that tries to give our placeholder class a `__setstate__` of its own changes nothing."""
    payload = b"\x80\x02csome_trainer\nScaler\n}X\x06\x00\x00\x00appendcsome_trainer\nOther\nsb."
    before = dict(vars(checkpoint_pickle.Placeholder))
    with pytest.raises(ConversionError, match="module"):
        read_module(archived(payload), "x.pt")
    assert dict(vars(checkpoint_pickle.Placeholder)) == before


# Every kind of tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_views_empty_and_scalar_tensors_are_read(zipped):
    base = torch.randn(6, 4)
    module = {
        "base": base,
        "transposed": base.t(),
        "slice": base[1:3],
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "long": torch.arange(5),
        "bfloat16": torch.randn(3).bfloat16(),
    }
    tensors, _, _ = read_module(saved({"module": module}, _use_new_zipfile_serialization=zipped), "x.pt")
    for key, expected in module.items():
        ours = tensors[key].read()
        assert ours.dtype == expected.dtype and tensors[key].shape == tuple(expected.shape), key
        assert torch.equal(ours, expected), key
        if expected.numel():
            data = b"".join(tensors[key].chunks(8))
            assert data == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), key


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["weights", "zip", "old format"])
def test_files_that_are_cut_off_are_refused(release, tmp_path, share, kind):
    if kind == "zip":
        path = zip_folder(release["coglm"], tmp_path / "coglm.zip", "", zipfile.ZIP_STORED)
    else:
        path = tmp_path / "mp_rank_00_model_states.pt"
        zipped = kind == "weights"
        path.write_bytes(saved({"module": make_state_dict("coglm")}, _use_new_zipfile_serialization=zipped).getvalue())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ConversionError, match=path.name):
        read_all(path, tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    path = weights_of(folder)
    data = bytearray(path.read_bytes())
    needle = make_state_dict("coglm")["transformer.word_embeddings.weight"].numpy().tobytes()
    data[data.find(needle) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="damaged"):
        read_all(folder, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_any_damaged_byte_is_refused_or_without_effect(zipped):
    module = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    whole = saved({"module": module}).getvalue() if zipped else compressed(saved({"module": module}))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        place = int(torch.randint(len(data), (), generator=generator))
        data[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        try:
            tensors, _, _ = read_module(io.BytesIO(bytes(data)), "x.pt")
            assert all(torch.equal(tensors[key].read(), module[key]) for key in module)
        except ConversionError:
            refused += 1
    assert refused > 50


def compressed(file) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return packed.getvalue()


def test_a_tensor_that_reaches_beyond_its_data_is_refused(tmp_path):
    file = saved({"module": {"a": torch.zeros(8)}})
    broken = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(broken, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, data[:16] if entry.filename.endswith("data/0") else data)
    broken.seek(0)
    with pytest.raises(ConversionError, match="beyond its data"):
        read_module(broken, "x.pt")


def test_a_tensor_that_reaches_beyond_its_declared_storage_is_refused():
    broken = io.BytesIO()
    with zipfile.ZipFile(saved({"module": {"a": torch.zeros(8)}})) as source, zipfile.ZipFile(broken, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"K\x08") == 2  # elements of the storage, then of the tensor
                data = data.replace(b"K\x08", b"K\x04", 1)
            target.writestr(entry.filename, data)
    broken.seek(0)
    with pytest.raises(ConversionError, match="beyond its data"):
        read_module(broken, "x.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConversionError, match="nowhere does not exist"):
        read_all(tmp_path / "nowhere", tmp_path)


# What lies in the place of a file ------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12000000000\n"
PAGES = [
    b"<!DOCTYPE html><html><body>Sign in</body></html>",
    b"\n <HTML>",
    b"\xef\xbb\xbf<?xml version='1.0'?><Error/>",
]
FOREIGN = [(POINTER, "Git LFS pointer"), *((page, "web page") for page in PAGES), (b"", "is empty")]


@pytest.mark.parametrize("content, kind", FOREIGN, ids=["pointer", "page", "page after a line", "XML", "nothing"])
@pytest.mark.parametrize("name", ["weights.pt", "coglm.zip", "in a folder"])
def test_a_pointer_or_a_page_instead_of_a_file_is_called_that(tmp_path, content, kind, name):
    path = tmp_path / name
    if name == "in a folder":
        weights_of(write_checkpoint(path, "coglm")).write_bytes(content)
    else:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=kind) as error:
        read_all(path, tmp_path)
    assert "weights_only" not in str(error.value)


def test_a_pointer_instead_of_the_configuration_is_called_that(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    (folder / "model_config.json").write_bytes(POINTER)
    with pytest.raises(ConversionError, match="Git LFS pointer"):
        read_all(folder, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [{"module": {"a": Call(os.system, "true")}}, [1], {"module": 1}])
def test_nobody_is_told_to_trust_a_file(content, zipped):
    for cut in (None, 100):
        data = saved(content, _use_new_zipfile_serialization=zipped).getvalue()[:cut]
        with pytest.raises(ConversionError) as error:
            read_module(io.BytesIO(data), "x.pt")
        assert "weights_only" not in str(error.value) and "allow_pickle" not in str(error.value)


# Zips of other systems -----------------------------------------------------------------------------------------------


def with_backslashes(folder, path, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = zipfile.ZipInfo("coglm\\" + file.relative_to(folder).as_posix().replace("/", "\\"))
                entry.compress_type = compression
                archive.writestr(entry, file.read_bytes())
    assert b"coglm\\7\\mp_rank" in path.read_bytes()
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_backslashes_is_read(release, tmp_path, compression):
    path = with_backslashes(release["coglm"], tmp_path / "coglm.zip", compression)
    tensors, iteration, config = read_all(path, tmp_path)
    expected = make_state_dict("coglm")
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert (iteration, config["num_layers"]) == ("7", 2)


def test_a_torch_file_with_backslashes_is_read():
    packed = io.BytesIO()
    with zipfile.ZipFile(saved({"module": {"a": torch.ones(2)}})) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            target.writestr(zipfile.ZipInfo(entry.filename.replace("/", "\\")), source.read(entry))
    packed.seek(0)
    assert read_module(packed, "x.pt")[0]["a"].read().tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["coglm/latest", "coglm\\latest"])
def test_a_zip_with_two_entries_of_one_name_is_refused(release, tmp_path, name):
    path = zip_folder(release["coglm"], tmp_path / "coglm.zip", "coglm/", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), "8")
    with pytest.raises(ConversionError, match="two entries of one name"):
        read_all(path, tmp_path)


# Memory --------------------------------------------------------------------------------------------------------------

MEBIBYTE = 2**20


def tuple_bomb() -> bytes:
    """A key whose hash takes 2^200 steps."""
    nested = b"K\x01" + b"q\x01h\x01\x86" * 200
    return b"\x80\x02}" + nested + b"K\x02s."


def mapping_bomb() -> bytes:
    """A list of 20,000 pairs, from which 50,000 mappings are made."""
    pairs = b"](" + b"".join(b"J" + n.to_bytes(4, "little") + b"K\x01\x86" for n in range(20_000)) + b"eq\x00"
    return b"\x80\x02" + pairs + b"ccollections\nOrderedDict\nq\x01](" + b"h\x01h\x00\x85R" * 50_000 + b"e."


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], number: int) -> bytes:
    """A state dict with one tensor of one storage."""

    def integers(values):
        return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little") for value in values) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + integers([number])[1:-1]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\0" + integers(shape) + integers(stride)
    return b"\x80\x02}X\x06\0\0\0module}X\x01\0\0\0a" + tensor + b"\x89}tRss."


def legacy(payload: bytes) -> bytes:
    start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return start + payload + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)


PICKLE_BOMBS = {
    "memo": b"\x80\x02K\x01r" + (2**27).to_bytes(4, "little") + b".",
    "memo by text": b"I1\np2000000000\n.",
    "empty lists": b"\x80\x02(" + b"]" * 20_000_000 + b"t.",
    "two million empty sets": b"\x80\x04(" + b"\x8f" * 2_000_000 + b"t.",
    "bytes that are not there": b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b".",
    "bytearray that is not there": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "text that is not there": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
    "frame that is not there": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
    "nested tuple as key": tuple_bomb(),
    "mappings": mapping_bomb(),
    "stride 0": tensor_pickle((2**30,), (0,), 4),
    "stride 0 in two dimensions": tensor_pickle((2**20, 2**20), (0, 0), 4),
    "more elements than there are": tensor_pickle((2**40,), (1,), 2**40),
    "huge numbers": tensor_pickle((2**63, 2**63), (0, 2**63), 4),
}


@pytest.mark.parametrize("kind", PICKLE_BOMBS)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_small_file_takes_little_memory_whatever_it_says(kind, is_legacy):
    payload = PICKLE_BOMBS[kind]
    file = io.BytesIO(legacy(payload)) if is_legacy else archived(payload, **{"0": bytes(16)})

    def read():
        try:
            module, _, _ = read_module(file, "x.pt")
            for tensor in module.values():
                tensor.read()
        except ConversionError as error:
            return str(error)

    message = children.run(read, memory=400 * MEBIBYTE, runs_code=False)
    assert "x.pt" in message and len(message) < 1000


def test_the_tensor_of_these_tests_is_read():
    for file in (archived(tensor_pickle((2, 3), (1, 0), 4), **{"0": bytes(16)}), None):
        file = file or io.BytesIO(legacy(tensor_pickle((2, 3), (1, 0), 4)))
        assert read_module(file, "x.pt")[0]["a"].read().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_name_of_a_layer_allocates_nothing(tmp_path):
    """Layers are counted; a layer of a number beyond all is a gap, not a list of all that are missing."""
    from cogview_pipelines.conversion.shapes import count_layers

    assert count_layers(["layers.0.a", "layers.1.a", "b"], "x.pt") == 2
    for key in ("layers.999999.a", "layers.1000000000000.a", "layers." + "9" * 5000 + ".a"):
        with pytest.raises(ConversionError, match=r"x\.pt has gaps") as error:
            count_layers([key], "x.pt")
        assert len(str(error.value)) < 200


def test_a_configuration_that_is_nested_without_end_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    for content, reason in (("[" * 100_000, "is no JSON"), ("[" * 900 + "]" * 900, "must hold an object")):
        (folder / "model_config.json").write_text(content)
        with pytest.raises(ConversionError, match=reason):
            read_all(folder, tmp_path)


def test_a_configuration_beside_the_weights_is_small(tmp_path):
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    (folder / "model_config.json").write_bytes(b" " * (2**20 + 1))
    for path in (folder, weights_of(folder)):
        with pytest.raises(ConversionError, match="cannot be right"):
            read_all(path, tmp_path)
