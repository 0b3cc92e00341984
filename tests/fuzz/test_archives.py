"""
Released files, folders and saved models with mutations: tensors, or a sentence; never another error, nothing that is
run, nor more memory than the files have.
"""

import io
import json
import pickletools
import random
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from cogview_pipelines import CogLMModel
from cogview_pipelines.conversion import ConversionError, convert_to_pipeline, verify
from cogview_pipelines.conversion.cogview2.to_pipeline import _read_integers
from cogview_pipelines.conversion.reader import read_module
from cogview_pipelines.conversion.released_models import open_released_model
from cogview_pipelines.conversion.writer import load_tensors

from .. import child_processes as children
from ..conversion.conftest import FIXTURES, NUM_IMAGE_TOKENS, write_checkpoint
from ..utils import make_coglm
from .utils import cases, mutated

MEMORY = 400 * 2**20
MOST_BYTES = 2**22  # that a mutation of these small files may claim and be read
OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in ("PROTO", "STOP")]


def small_module() -> dict:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 4, generator=generator)
    module = {
        "a": weights,
        "b": weights.t(),
        "c": torch.arange(5),
        "d": torch.ones(2).bfloat16(),
        "e": torch.zeros(0, 4),
    }
    return {
        "module": module,
        "iteration": 7,
        "lr": [1e-3, {"step": (1, None, True)}],
        "name": "cogview",
        "raw": b"\0\1",
    }


def saved(**kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(small_module(), file, **kwargs)
    return file.getvalue()


def with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A `.pt` file with another pickle, whose checksum is right."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return packed.getvalue()


def random_pickle(source: random.Random) -> bytes:
    """Opcodes in any order, with arguments of their kind."""
    content = bytearray(b"\x80\x04")
    for _ in range(source.randint(1, 60)):
        opcode = source.choice(OPCODES)
        content += opcode.code.encode("latin-1")
        if opcode.arg is None:
            continue
        length = opcode.arg.n
        if length == pickletools.UP_TO_NEWLINE:
            content += source.choice([b"1", b"os", b"'a'", b"collections", b"torch", b"-9", b"\xff"]) + b"\n"
            if opcode.name in ("GLOBAL", "INST"):
                content += source.choice([b"system", b"OrderedDict", b"FloatStorage", b"Size"]) + b"\n"
        elif length > 0:
            content += source.choice([bytes(length), b"\xff" * length, source.randbytes(length)])
        else:
            size = source.randint(0, 3)
            width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(length, 4)
            content += size.to_bytes(width, "little") + b"abc"[:size]
    return bytes(content) + b"."


def read_file(content: bytes) -> None:
    module, _, _ = read_module(io.BytesIO(content), "x.pt")
    read_tensors(module)


def read_tensors(tensors) -> None:
    for tensor in tensors.values():
        assert sum(map(len, tensor.chunks())) == tensor.nbytes
        if tensor.nbytes < MOST_BYTES:
            assert tuple(tensor.read().shape) == tensor.shape


def read_checkpoint(path) -> None:
    with open_released_model(path, path.parent, several_ranks=True) as model:
        for rank in model.ranks:
            read_tensors(rank)


def try_all(function: Callable[[random.Random], None], count: int, expected: tuple = (ConversionError,)) -> dict:
    """How many cases were read and refused; and those that failed in another way, with their seeds."""

    def run():
        read, refused, failed = 0, 0, []
        for seed, source in cases(count):
            try:
                function(source)
                read += 1
            except expected as error:
                refused += 1
                if len(str(error)) > 4000 or "weights_only" in str(error) or "allow_pickle" in str(error):
                    failed.append(f"{seed}: told {str(error)[:200]}")
            except Exception as error:
                failed.append(f"{seed}: {type(error).__name__}: {str(error)[:200]}")
        return {"read": read, "refused": refused, "failed": failed[:10]}

    return children.run(run, memory=MEMORY, runs_code=False)


FILES = {
    "zip": (400, lambda source, content: mutated(content["zip"], source)),
    "directory of the zip": (400, lambda source, content: mutate_end(content["zip"], source)),
    "pickle": (800, lambda source, content: with_pickle(content["zip"], lambda data: mutated(data, source))),
    "random pickle": (400, lambda source, content: with_pickle(content["zip"], lambda data: random_pickle(source))),
    "old format": (600, lambda source, content: mutated(content["old"], source)),
}


def mutate_end(content: bytes, source: random.Random) -> bytes:
    return content[:-600] + mutated(content[-600:], source)


@pytest.mark.parametrize("kind", FILES)
def test_torch_files_are_read_or_refused(kind):
    count, change = FILES[kind]
    content = {"zip": saved(), "old": saved(_use_new_zipfile_serialization=False)}
    read_file(content["zip"])
    read_file(content["old"])
    found = try_all(lambda source: read_file(change(source, content)), count)
    assert found["failed"] == [] and found["refused"] > count // 10


def pack(folder, path, kind: str) -> None:
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "coglm")
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "coglm")
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if kind == "zip" else zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, f"coglm/{file.relative_to(folder).as_posix()}")


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint in the layout of the release."""
    return write_checkpoint(tmp_path / "coglm", "coglm", content=small_module())


@pytest.mark.parametrize("kind", ["zip", "compressed zip", "tar", "tar.gz"])
def test_packed_checkpoints_are_read_or_refused(checkpoint, tmp_path, kind):
    path = tmp_path / "packed"
    pack(checkpoint, path, kind)
    read_checkpoint(path)
    content = path.read_bytes()

    def check(source):
        path.write_bytes(mutate_end(content, source) if source.random() < 0.5 else mutated(content, source))
        read_checkpoint(path)

    found = try_all(check, 150)
    assert found["failed"] == [] and found["refused"] > 10
    assert {left.name for left in tmp_path.iterdir()} == {"coglm", "packed"}


def mutated_json(value, source: random.Random):
    """A JSON value with something in it replaced."""
    strange = [None, True, -1, 0, 10**9, 2**70, 1e300, float("nan"), "", "../x", "x" * 300, [], {}, [[[]]], {"a": [1]}]
    if not isinstance(value, dict | list) or not value or source.random() < 0.15:
        return source.choice(strange)
    key = source.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if isinstance(value, dict) and source.random() < 0.2:
        del changed[key]
    else:
        changed[key] = mutated_json(value[key], source)
    return changed


def test_folders_are_read_or_refused(checkpoint):
    files = [checkpoint / name for name in ("latest", "model_config.json", "7/mp_rank_00_model_states.pt")]
    whole = {file: file.read_bytes() for file in files}
    read_checkpoint(checkpoint)

    def check(source):
        file = source.choice(files)
        try:
            file.write_bytes(mutated(whole[file], source))
            read_checkpoint(checkpoint)
        finally:
            file.write_bytes(whole[file])

    found = try_all(check, 200)
    assert found["failed"] == [] and found["refused"] > 10


def test_cluster_labels_are_read_or_refused(tmp_path):
    path = tmp_path / "labels.npy"
    np.save(path, np.arange(20) % 4)
    whole = path.read_bytes()

    def check(source):
        path.write_bytes(mutated(whole, source, last=140))
        _read_integers(path, 20)

    found = try_all(check, 300)
    assert found["failed"] == [] and found["refused"] > 50


def test_settings_of_a_checkpoint_are_obeyed_or_refused(tmp_path):
    """The converter, with something replaced in `model_config.json`, or in the record of an earlier conversion."""
    folder = write_checkpoint(tmp_path / "coglm", "coglm")
    config = folder / "model_config.json"
    output = tmp_path / "out"

    def convert(**parts):
        convert_to_pipeline(output, num_image_tokens=NUM_IMAGE_TOKENS, say=lambda line: None, **parts)

    convert(text_tokenizer=FIXTURES / "icetk" / "ice_text.model", coglm=folder)
    record = output / "conversion.json"
    whole = {file: json.loads(file.read_text()) for file in (config, record)}

    def check(source):
        file = source.choice([config, record])
        try:
            file.write_text(json.dumps(mutated_json(whole[file], source)))
            if source.random() < 0.5:
                verify(output, say=lambda line: None)
            convert(coglm=folder)
        finally:
            file.write_text(json.dumps(whole[file]))

    found = try_all(check, 60)
    assert found["failed"] == [] and found["refused"] > 10


# Saved models --------------------------------------------------------------------------------------------------------


def mutated_header(content: bytes, source: random.Random) -> bytes:
    """A safetensors file with something in its header replaced, whose length is right more often than not."""
    length = int.from_bytes(content[:8], "little")
    if source.random() < 0.3:
        return mutated(content, source, last=8 + length)
    header = json.dumps(mutated_json(json.loads(content[8 : 8 + length]), source)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.fixture
def model(tmp_path):
    make_coglm().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_headers_of_safetensors_are_read_or_refused(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()

    def check(source):
        path.write_bytes(mutated_header(whole, source))
        load_tensors(model)

    found = try_all(check, 300)
    assert found["failed"] == [] and found["refused"] > 100


def test_saved_models_are_loaded_or_refused(model):
    """By transformers, whose errors are told by the command line; here, that they are of kinds that it expects."""
    path, config = model / "model.safetensors", model / "config.json"
    whole, settings = path.read_bytes(), json.loads(config.read_text())
    fields = {key: value for key, value in settings.items() if key not in ("architectures", "transformers_version")}

    def check(source):
        try:
            if source.random() < 0.5:
                path.write_bytes(mutated_header(whole, source))
            else:
                changed = mutated_json(fields, source)
                config.write_text(json.dumps(settings | changed if isinstance(changed, dict) else changed))
            CogLMModel.from_pretrained(model)
        finally:
            path.write_bytes(whole)
            config.write_text(json.dumps(settings))

    CogLMModel.from_pretrained(model)
    expected = (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError)
    found = try_all(check, 40, expected)
    assert found["failed"] == [] and found["refused"] > 5
