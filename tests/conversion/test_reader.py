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

from cogview_pipelines.conversion import ConversionError
from cogview_pipelines.conversion.reader import read_module
from cogview_pipelines.conversion.released_models import open_released_model

from .conftest import make_state_dict, weights_of, write_checkpoint


def saved(content, **kwargs) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
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


def test_state_cannot_be_set_on_what_stands_in_for_classes(tmp_path):
    """A pickle that tries to give our placeholder class a `__setstate__` of its own changes nothing."""
    payload = b"\x80\x02csome_trainer\nScaler\n}X\x06\x00\x00\x00appendcsome_trainer\nOther\nsb."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", payload)
    file.seek(0)
    from cogview_pipelines.conversion import reader

    before = dict(vars(reader._Ignored))
    with pytest.raises(ConversionError, match="module"):
        read_module(file, "x.pt")
    assert dict(vars(reader._Ignored)) == before


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
