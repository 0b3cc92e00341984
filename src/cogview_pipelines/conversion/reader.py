"""
Tensors out of the files of the releases: streamed, and without running anything that a file says.

A `.pt` file is a zip archive with one pickle (`data.pkl`) that describes the tensors, and one stored record of bytes
for each storage; before torch 1.6 it was a row of pickles with the bytes behind them. The pickle is read by
[`checkpoint_pickle`], for which names mean tensors and plain containers only. Files written during training also hold
optimizer and scheduler objects; their classes are never imported: a placeholder stands in for each. Anything of
Python's own library that is no container (`os.system`, `builtins.eval`, ...) has no place in a checkpoint, so such a
file is refused. Nothing takes memory because a file says so: what a file claims is compared with what it holds.
"""

import hashlib
import io
import lzma
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch

from ..foreign_files import describe_foreign
from .checkpoint_pickle import MAX_ARGUMENTS, MAX_PICKLE_BYTES, PLACEHOLDER, Constructor, load, make_mapping
from .errors import ConversionError

CHUNK_BYTES = 2**24
MAX_TENSORS = 2**16
MAX_ZIP_ENTRIES = 2**16
# A tensor whose elements do not lie in a row is read at once; none in the releases is larger, and none is repeated.
MAX_STRIDED_BYTES = 2**28
MAX_REPEATED_BYTES = 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch wrote first before version 1.6
LEGACY_PROTOCOL = 1001


class Archive(Protocol):
    """Where the bytes of tensors are."""

    name: str

    def record_size(self, record: str) -> int:
        """Bytes of a storage."""

    def read(self, record: str, start: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Bytes of a storage in chunks."""


# Tensors on disk ----------------------------------------------------------------------------------------------------


class ReadableTensor(Protocol):
    """What [`StoredTensor`] and its like have in common: a tensor that is read when it is needed, or part by part."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As in torch."""

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The elements in row-major order, some bytes at a time; every chunk holds whole elements."""

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""


@dataclass
class StoredTensor:
    """
    A tensor that is still on disk.

    Args:
        archive (`Archive`): Where it is.
        record (`str`): Name of its storage in the archive.
        dtype (`torch.dtype`): Of the elements.
        shape, stride (`tuple[int, ...]`): As in torch, in elements.
        offset (`int`): First element in the storage.
        num_elements (`int`): Of the storage, as the pickle says.
    """

    archive: Archive
    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    num_elements: int

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
        if not self.nbytes:
            return
        if self.is_contiguous:
            yield from self.archive.read(self.record, self._start, self.nbytes, chunk_bytes)
        else:
            data = bytearray(b"".join(self.archive.read(self.record, self._start, self._span)))
            dense = torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()
            yield dense.view(-1).view(torch.uint8).numpy().tobytes()

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(b"".join(self.chunks())), dtype=self.dtype).view(self.shape)

    @property
    def _start(self) -> int:
        return self.offset * self.dtype.itemsize

    @property
    def _span(self) -> int:
        """Bytes from the first element to the last, of a tensor that has some."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        return (1 + last) * self.dtype.itemsize

    def check(self) -> None:
        """
        Raises:
            ConversionError: If the file does not hold what the pickle says of the tensor.
        """
        sizes = (*self.shape, *self.stride, self.offset)
        is_possible = len(self.shape) == len(self.stride) and all(n >= 0 for n in sizes)
        if not is_possible or math.prod(size or 1 for size in self.shape) >= 2**60:
            raise ConversionError(
                f"{self.archive.name}: a tensor has an impossible shape ({self.shape}, {self.stride})."
            )
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        held = self.archive.record_size(self.record) // self.dtype.itemsize
        if math.prod(self.shape) and last >= min(held, self.num_elements):
            raise ConversionError(
                f"{self.archive.name}: a tensor of shape {self.shape} reaches beyond its data ({held} elements). "
                "The file is damaged."
            )
        if not self.is_contiguous:
            repeated = self.nbytes > max(held * self.dtype.itemsize, MAX_REPEATED_BYTES)
            if self.nbytes and (repeated or self._span > MAX_STRIDED_BYTES):
                how = "repeats" if repeated else "is spread over"
                raise ConversionError(
                    f"{self.archive.name}: a tensor of shape {self.shape} {how} its data ({held} elements, strides "
                    f"{self.stride}) and would take {max(self.nbytes, self._span):,} bytes of memory. Save it again "
                    "after `tensor.clone().contiguous()`."
                )


@dataclass
class LoadedTensor:
    """A tensor in memory, behind the interface of [`StoredTensor`]."""

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


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


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


class _CheckpointReader:
    """What names and storages of a checkpoint's pickle stand for; no name is ever looked up."""

    def __init__(self, archive: Archive):
        self.archive = archive
        self.ignored: set[str] = set()
        self.storages: dict[str, _Storage] = {}
        self._num_tensors = 0

    def load(self, file: BinaryIO) -> object:
        """What the pickle describes, with tensors left on disk."""
        return load(file, self.archive.name, self.find_global, self.load_persistent)

    def find_global(self, module: str, name: str):
        """What stands in for a global name."""
        module = _OLD_MODULES.get(module, module)
        path = f"{module}.{name}"
        if path == "collections.OrderedDict":
            return Constructor(make_mapping)
        if path == "torch._utils._rebuild_tensor_v2":
            return Constructor(self._rebuild)
        if path == "torch._utils._rebuild_parameter":
            return Constructor(lambda data, *args: data)
        if path == "torch.Size":
            return Constructor(_sizes)
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module.split(".")[0] in sys.stdlib_module_names and path not in _PLAIN_LIBRARY:
            raise ConversionError(
                f"{self.archive.name} asks for `{path[:100]}`, which no checkpoint needs and which could run "
                "commands. Nothing of it was run. Do not open this file with other programs; fetch the original again."
            )
        self.ignored.add(path[:200])
        return PLACEHOLDER

    def load_persistent(self, saved_id):
        """A storage, by what torch wrote of it."""
        if not isinstance(saved_id, tuple) or len(saved_id) not in (5, 6) or saved_id[0] != "storage":
            return PLACEHOLDER
        _, storage_type, record, _, num_elements, *view = saved_id
        if not isinstance(storage_type, _StorageType) or not isinstance(record, str):
            return PLACEHOLDER
        if view != [None] * len(view):
            raise ConversionError(f"{self.archive.name} is of torch before 0.4. Save it again with a newer one.")
        storage = _Storage(record, storage_type.dtype, _integer(num_elements))
        return self.storages.setdefault(storage.record, storage)

    def _rebuild(self, storage, offset, shape, stride, *args):
        if not isinstance(storage, _Storage):
            return PLACEHOLDER
        self._num_tensors += 1
        if self._num_tensors > MAX_TENSORS:
            raise ConversionError(f"{self.archive.name} has more than {MAX_TENSORS:,} tensors, which no model has.")
        shape, stride, offset = _sizes(shape), _sizes(stride), _integer(offset)
        return StoredTensor(self.archive, storage.record, storage.dtype, shape, stride, offset, storage.num_elements)


def _integer(number) -> int:
    if not isinstance(number, int) or abs(number) >= 2**63:
        raise TypeError("a size must be an integer of 64 bits")
    return number


def _sizes(sizes=()) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > MAX_ARGUMENTS:
        raise TypeError(f"a shape must be a tuple of at most {MAX_ARGUMENTS} sizes")
    return tuple(map(_integer, sizes))


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
        self._entries = zip_entries(self.zip, name)
        pickles = [n for n in self._entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(f"{name} is a zip archive, but not one of torch: it has {len(pickles)} `data.pkl`.")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = f"{self._prefix}byteorder"
        if order in self._entries and (found := b"".join(self._bytes(order, 0, 16))) != b"little":
            raise ConversionError(f"{name} was written on a machine of another byte order ({found!r}).")
        self.fingerprint = sorted((entry.filename, entry.file_size, entry.CRC) for entry in self.zip.infolist())

    def load(self) -> tuple[object, set[str]]:
        """What the pickle describes, with tensors left on disk, and the names of the classes that were left out."""
        reader, entry = _CheckpointReader(self), f"{self._prefix}data.pkl"
        if (size := self._entries[entry].file_size) > MAX_PICKLE_BYTES:
            raise ConversionError(f"{self.name}: its pickle is {size:,} bytes long, which no list of tensors is.")
        return reader.load(io.BytesIO(b"".join(self._bytes(entry, 0, size)))), reader.ignored

    def record_size(self, record: str) -> int:
        """Bytes of a storage."""
        try:
            return self._entries[f"{self._prefix}data/{record}"].file_size
        except KeyError:
            raise ConversionError(f"{self.name}: the data of a tensor (record {record[:40]}) is missing.") from None

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
            with self.zip.open(self._entries[entry]) as file:
                if start:
                    file.seek(start)
                while size > 0 and (chunk := file.read(min(size, chunk_bytes))):
                    size -= len(chunk)
                    yield chunk
        except ZIP_ERRORS as error:
            raise ConversionError(f"{self.name}: {entry} is damaged ({error}). Fetch the file again.") from error


# What zipfile and the decompressors raise for entries that are damaged, encrypted, or packed in ways they do not know.
ZIP_ERRORS = (
    *(zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError),
    *(OverflowError, lzma.LZMAError, struct.error),
)


def zip_entries(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """
    Entries by name, with slashes: some programs of Windows write backslashes, against the standard.

    Raises:
        ConversionError: If there are more than any checkpoint has, or two of one name.
    """
    infos = archive.infolist()
    if len(infos) > MAX_ZIP_ENTRIES:
        raise ConversionError(f"{name} has {len(infos):,} entries, which no checkpoint has.")
    entries = {info.filename.replace("\\", "/"): info for info in infos}
    if len(entries) < len(infos):
        raise ConversionError(f"{name} has two entries of one name, so it is not clear which is meant.")
    return entries


class LegacyFile:
    """
    A `.pt` file from before torch 1.6: pickles of a magic number, a protocol, the machine and the tensors, then
    one of the names of the storages, and their bytes, each after its length.

    Args:
        file (binary file): Seekable; stays open as long as its tensors are read.
        name (`str`): For messages.

    Raises:
        ConversionError: If it is no such file, or is cut off.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name, self._file = name, file
        self._records: dict[str, tuple[int, int]] = {}

    def load(self) -> tuple[object, set[str]]:
        """What the pickle describes, with tensors left on disk, and the names of the classes that were left out."""
        file, reader = self._file, _CheckpointReader(self)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            magic = reader.load(file)
        except ConversionError:
            magic = None
        if magic != LEGACY_MAGIC:
            raise ConversionError(
                f"{self.name} is no torch file, or is damaged at its beginning. Fetch it again, or save its `module` "
                "with a current torch."
            )
        protocol, machine = reader.load(file), reader.load(file)
        if protocol != LEGACY_PROTOCOL or not isinstance(machine, dict) or not machine.get("little_endian"):
            raise ConversionError(f"{self.name} was written by a torch, or on a machine, that is not supported.")
        content, records = reader.load(file), reader.load(file)
        if not isinstance(records, list) or not all(isinstance(record, str) for record in records):
            raise ConversionError(f"{self.name} does not say where its tensors are. The file is damaged.")
        for record in records:
            if record not in reader.storages:
                raise ConversionError(f"{self.name} holds data that no tensor has. The file is damaged.")
            count = int.from_bytes(file.read(8), "little")
            start, nbytes = file.tell(), count * reader.storages[record].dtype.itemsize
            if start + nbytes > size:
                raise ConversionError(f"{self.name} is cut off. Fetch it again.")
            self._records[record] = (start, nbytes)
            file.seek(start + nbytes)
        return content, reader.ignored

    def record_size(self, record: str) -> int:
        """Bytes of a storage."""
        if record not in self._records:
            raise ConversionError(f"{self.name}: the data of a tensor (record {record[:40]}) is missing.")
        return self._records[record][1]

    def read(self, record: str, start: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Bytes of a storage in chunks."""
        position = self._records[record][0] + start
        while size > 0:
            self._file.seek(position)
            chunk = self._file.read(min(size, chunk_bytes))
            if not chunk:
                raise ConversionError(f"{self.name}: record {record} ends too early. The file is damaged.")
            position, size = position + len(chunk), size - len(chunk)
            yield chunk


def read_module(file: BinaryIO, name: str, is_bare: bool = False) -> tuple[dict[str, StoredTensor], list[str], object]:
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
    start = file.read(256)
    content: Any
    fingerprint: Any
    file.seek(0)
    if (foreign := describe_foreign(start)) is not None:
        raise ConversionError(f"{name} {foreign}")
    if start.startswith(b"PK\x03\x04"):
        archive = TorchArchive(file, name)
        content, ignored = archive.load()
        fingerprint = archive.fingerprint
    else:
        content, ignored = LegacyFile(file, name).load()
        fingerprint = _hash(file)
    if is_bare:
        content = {"module": content}
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        found = f"the keys {_shortened(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ConversionError(f"{name} must hold a dict of tensors under the key `module`, but holds {found}.")
    wrong = [key for key, value in module.items() if not isinstance(key, str) or not isinstance(value, StoredTensor)]
    if wrong:
        raise ConversionError(
            f"{name}: `module` must hold tensors only, but {_shortened(wrong[:1])} is something else "
            f"({len(wrong)} such)."
        )
    for tensor in module.values():
        tensor.check()
    others = sorted(f"entry `{str(key)[:100]}`" for key in content if key != "module")
    return module, others + sorted(f"class `{path}`" for path in ignored), fingerprint


def _shortened(keys) -> str:
    """Some of the keys, for a message."""
    some = [repr(key)[:60] for key in list(keys)[:8]]
    return ", ".join(some) + (", ..." if len(keys) > len(some) else "") if some else "(none)"


def _hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
