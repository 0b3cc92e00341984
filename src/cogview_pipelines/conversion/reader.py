"""
Tensors out of the files of the releases: streamed, and without running anything that a file says.

A `.pt` file is a zip archive with one pickle (`data.pkl`) that describes the tensors and one stored record of bytes
for each storage. The pickle is read by an unpickler that knows tensors and plain containers only. Files written during
training also hold optimizer and scheduler objects; their classes are never imported: an inert placeholder stands in
for each. Anything of Python's own library that is no container (`os.system`, `builtins.eval`, ...) has no place in a
checkpoint, so such a file is refused.
"""

import hashlib
import io
import math
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch

CHUNK_BYTES = 2**24
MAX_PICKLE_BYTES = 2**28


class ConversionError(ValueError):
    """A file that cannot be converted; the message says which, why, and what to do."""


# Tensors on disk ----------------------------------------------------------------------------------------------------


@dataclass
class StoredTensor:
    """
    A tensor that is still on disk.

    Args:
        archive (`TorchArchive`): Where it is.
        record (`str`): Name of its storage in the archive.
        dtype (`torch.dtype`): Of the elements.
        shape, stride (`tuple[int, ...]`): As in torch, in elements.
        offset (`int`): First element in the storage.
    """

    archive: "TorchArchive"
    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def __setstate__(self, state):  # whatever a pickle sets on a tensor is ignored
        pass

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The elements in row-major order, some bytes at a time; every chunk holds whole elements."""
        if not self.is_contiguous:
            span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride)) if self.nbytes else 0
            flat = torch.frombuffer(
                bytearray(b"".join(self.archive.read(self.record, self._start, span * self.dtype.itemsize))),
                dtype=self.dtype,
            )
            dense = flat.as_strided(self.shape, self.stride).contiguous()
            yield dense.view(-1).view(torch.uint8).numpy().tobytes()
        else:
            yield from self.archive.read(self.record, self._start, self.nbytes, chunk_bytes)

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(b"".join(self.chunks())), dtype=self.dtype).view(self.shape)

    @property
    def _start(self) -> int:
        return self.offset * self.dtype.itemsize

    def _check(self, storage: "_Storage") -> None:
        if len(self.shape) != len(self.stride) or any(n < 0 for n in (*self.shape, *self.stride, self.offset)):
            raise ConversionError(
                f"{self.archive.name}: a tensor has an impossible shape ({self.shape}, {self.stride})."
            )
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        held = self.archive.record_size(self.record) // self.dtype.itemsize
        if math.prod(self.shape) and last >= min(held, storage.num_elements):
            raise ConversionError(
                f"{self.archive.name}: a tensor of shape {self.shape} reaches beyond its data ({held} elements). "
                "The file is damaged."
            )


@dataclass
class LoadedTensor:
    """A tensor that had to be loaded with its whole file, behind the interface of [`StoredTensor`]."""

    tensor: torch.Tensor

    def __post_init__(self):
        self.dtype, self.shape = self.tensor.dtype, tuple(self.tensor.shape)
        self.nbytes = self.tensor.numel() * self.dtype.itemsize

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        flat = self.tensor.contiguous().view(-1)
        for part in flat.split(chunk_bytes // self.dtype.itemsize):
            yield part.view(torch.uint8).numpy().tobytes()

    def read(self) -> torch.Tensor:
        return self.tensor


# The pickle in a checkpoint -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    num_elements: int

    def __setstate__(self, state):
        pass


class _Inert:
    """
    Base of all that a pickle gets for a global name: a static `__setstate__`, so that no state can be set on class or
    instance.
    """

    __slots__ = ()
    __setstate__ = staticmethod(lambda *args: None)


class _Ignored(_Inert):
    """
    Stands for any object that is no tensor and no container: takes whatever an unpickler does to an object, and keeps
    nothing.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __call__(self, *args, **kwargs):
        return self

    def _nothing(self, *args):
        pass

    append = extend = add = update = __setitem__ = _nothing


class _Mapping(dict):
    """`OrderedDict`, without what may be attached to it."""

    __setstate__ = staticmethod(lambda *args: None)


class _Size(_Inert):
    def __new__(cls, sizes=()):
        return tuple(sizes)


class _Parameter(_Inert):
    def __new__(cls, data, *args):
        return data


class _StorageType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, dtype):
        self.dtype = dtype


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What pickles of harmless objects name of Python's own library. Nothing of it is imported or called either.
_PLAIN_LIBRARY = {
    "_codecs.encode",
    "argparse.Namespace",
    "collections.defaultdict",
    "collections.deque",
    "collections.Counter",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "types.SimpleNamespace",
    *(f"builtins.{name}" for name in ("object", "set", "frozenset", "list", "dict", "tuple", "bytearray", "complex")),
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "bytes", "slice", "range")),
}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _CheckpointUnpickler(pickle.Unpickler):
    """Tensors, containers and plain values; no global name of the pickle is ever looked up."""

    def __init__(self, file: BinaryIO, archive: "TorchArchive"):
        super().__init__(file)
        self.archive = archive
        self.ignored: set[str] = set()

    def find_class(self, module: str, name: str):
        module = _OLD_MODULES.get(module, module)
        path = f"{module}.{name}"
        if path == "collections.OrderedDict":
            return _Mapping
        if path == "torch._utils._rebuild_tensor_v2":
            return self._rebuild_type()
        if path == "torch._utils._rebuild_parameter":
            return _Parameter
        if path == "torch.Size":
            return _Size
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module.split(".")[0] in sys.stdlib_module_names and path not in _PLAIN_LIBRARY:
            raise ConversionError(
                f"{self.archive.name} asks for `{path}`, which could run commands and which no checkpoint needs. "
                "Nothing was run. Do not open this file with other programs; fetch the original again."
            )
        self.ignored.add(path)
        return _Ignored

    def persistent_load(self, saved_id):
        try:
            kind, storage_type, record, _, num_elements = saved_id
            if kind == "storage" and isinstance(storage_type, _StorageType):
                return _Storage(str(record), storage_type.dtype, int(num_elements))
        except (TypeError, ValueError):
            pass
        return _Ignored()

    def _rebuild_type(self):
        archive = self.archive

        class Rebuild(_Inert):
            def __new__(cls, storage, offset, shape, stride, *args):
                if not isinstance(storage, _Storage):
                    return _Ignored()
                shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
                tensor = StoredTensor(archive, storage.record, storage.dtype, shape, stride, int(offset))
                tensor._check(storage)
                return tensor

        return Rebuild


class TorchArchive:
    """
    A `.pt` file in torch's zip format.

    Args:
        file (binary file): Seekable; stays open as long as its tensors are read.
        name (`str`): For messages.

    Raises:
        ConversionError: If it is no such file, or is cut off.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name = name
        try:
            self.zip = zipfile.ZipFile(file)
        except Exception as error:  # zipfile lets several kinds through for damaged directories
            raise ConversionError(
                f"{name} is no whole torch file: the end of its archive is missing. It was cut off while it was "
                "copied; fetch it again."
            ) from error
        pickles = [n for n in self.zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(f"{name} is a zip archive, but not one of torch: it has {len(pickles)} `data.pkl`.")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = f"{self._prefix}byteorder"
        if order in self.zip.namelist() and (found := b"".join(self._bytes(order, 0, 16))) != b"little":
            raise ConversionError(f"{name} was written on a machine of another byte order ({found!r}).")
        self.fingerprint = sorted((entry.filename, entry.file_size, entry.CRC) for entry in self.zip.infolist())

    def load(self) -> tuple[object, set[str]]:
        """What the pickle describes, with tensors left on disk, and the names of the classes that were left out."""
        try:
            unpickler = _CheckpointUnpickler(io.BytesIO(self._read_pickle()), self)
            return unpickler.load(), unpickler.ignored
        except ConversionError:
            raise
        except Exception as error:  # whatever a damaged pickle makes an unpickler stumble over
            raise ConversionError(f"{self.name} cannot be read: its pickle is damaged ({error}).") from error

    def _read_pickle(self) -> bytes:
        entry = self.zip.getinfo(f"{self._prefix}data.pkl")
        if entry.file_size > MAX_PICKLE_BYTES:
            raise ConversionError(
                f"{self.name}: its pickle has {entry.file_size} bytes, too many for a list of tensors."
            )
        return b"".join(self._bytes(entry.filename, 0, entry.file_size))

    def record_size(self, record: str) -> int:
        """Bytes of a storage."""
        try:
            return self.zip.getinfo(f"{self._prefix}data/{record}").file_size
        except KeyError:
            raise ConversionError(f"{self.name}: the data of a tensor (record {record}) is missing.") from None

    def read(self, record: str, start: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Bytes of a storage in chunks; checksums are compared where the whole storage is read."""
        left = size
        for chunk in self._bytes(f"{self._prefix}data/{record}", start, size, chunk_bytes):
            left -= len(chunk)
            yield chunk
        if left:
            raise ConversionError(f"{self.name}: record {record} ends too early. The file is damaged.")

    def _bytes(self, entry: str, start: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        try:
            with self.zip.open(entry) as file:
                if start:
                    file.seek(start)
                while size > 0 and (chunk := file.read(min(size, chunk_bytes))):
                    size -= len(chunk)
                    yield chunk
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
            raise ConversionError(f"{self.name}: {entry} is damaged ({error}). Fetch the file again.") from error


def read_module(
    file: BinaryIO, name: str, is_bare: bool = False
) -> tuple[dict[str, StoredTensor | LoadedTensor], list[str], object]:
    """
    The state dict under the key `module` of a `.pt` file.

    Args:
        file (binary file): Seekable; stays open as long as its tensors are read.
        name (`str`): For messages.
        is_bare (`bool`): The file is the state dict itself.

    Returns:
        tuple: Tensors by name; what else the file holds (names of entries and of classes that were left out); a
        fingerprint that tells this file from others.

    Raises:
        ConversionError: If there is no `module`, or it holds anything but tensors.
    """
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        archive = TorchArchive(file, name)
        content, ignored = archive.load()
        fingerprint = archive.fingerprint
    else:
        fingerprint = hashlib.sha256(file.read()).hexdigest()
        file.seek(0)
        content, ignored = _load_old_format(file, name), set()
    if is_bare:
        content = {"module": content}
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConversionError(f"{name} must hold a dict of tensors under the key `module`, but holds {keys}.")
    wrong = [key for key, value in module.items() if not isinstance(value, (StoredTensor, torch.Tensor))]
    if wrong:
        raise ConversionError(
            f"{name}: `module` must hold tensors only, but {wrong[0]!r} is something else ({len(wrong)} such)."
        )
    tensors = {
        str(key): LoadedTensor(value) if isinstance(value, torch.Tensor) else value for key, value in module.items()
    }
    others = sorted(f"entry `{key}`" for key in content if key != "module") + sorted(
        f"class `{path}`" for path in ignored
    )
    return tensors, others, fingerprint


def _load_old_format(file: BinaryIO, name: str) -> object:
    """
    Files from before torch 1.6 hold tensors and pickle in one stream: read at once, by torch's own restricted
    unpickler.
    """
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"{name} is no torch file, is cut off, or holds more than tensors ({reason}). Fetch it again, or save "
            "its `module` with a "
            "current torch."
        ) from error
