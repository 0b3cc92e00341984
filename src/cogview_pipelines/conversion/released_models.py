"""
The checkpoints of the releases as people have them: an unpacked folder, a zip, a tar, or the `.pt` file itself.

A checkpoint is a small file that names an iteration, a folder of that name with one `.pt` file for each model-parallel
rank, and in CogView2 a configuration. Entries that only stand in a zip or tar are read in place.
"""

import contextlib
import io
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from ..foreign_files import describe_foreign, describe_foreign_file
from .reader import CHUNK_BYTES, ZIP_ERRORS, ConversionError, ReadableTensor, read_module, zip_entries

WEIGHTS_FILE = "mp_rank_00_model_states.pt"
CONFIG_FILE = "model_config.json"
# What names the iteration: CogView2, and CogView.
LATEST_FILES = ("latest", "latest_checkpointed_iteration.txt")
ITERATION = r"[1-9][0-9]{0,17}|release"  # what may stand there; it is the name of a folder


@dataclass
class ReleasedModel:
    """
    The checkpoint of a transformer, opened.

    Args:
        path (`Path`): What the user named.
        iteration (`str`): From the file `latest`.
        config (`dict`): `model_config.json`; empty if there is none.
        ranks (`list[dict]`): The state dict of each model-parallel rank, still on disk.
        others (`list[str]`): What was left out.
        fingerprint: Tells these files from others.
        size (`int`): Bytes of the weights.
    """

    path: Path
    iteration: str
    config: dict
    ranks: list[dict[str, ReadableTensor]]
    others: list[str]
    fingerprint: object
    size: int

    @property
    def tensors(self) -> dict[str, ReadableTensor]:
        """The state dict of a checkpoint in one piece."""
        (tensors,) = self.ranks
        return tensors


@contextlib.contextmanager
def open_released_model(
    path: str | Path, scratch: str | Path | None = None, several_ranks: bool = False
) -> Iterator[ReleasedModel]:
    """
    Open the checkpoint of a transformer.

    Args:
        path (`str` or `Path`): The zip or tar as released, the unpacked folder (at any depth around the file that
            names the iteration), or the `.pt` file itself, beside which those of other ranks are found.
        scratch (`str` or `Path`, *optional*):
            Where compressed entries are unpacked for as long as they are open. Entries that are only stored are read
            in place.
        several_ranks (`bool`): Also take a checkpoint that is cut into several model-parallel parts.

    Raises:
        ConversionError: If it holds no readable checkpoint.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            model = _open_files(path, _Folder(path, stack))
        elif not path.is_file():
            raise ConversionError(f"{path} does not exist.")
        elif (foreign := describe_foreign_file(path)) is not None:
            raise ConversionError(f"{path} {foreign}")
        elif path.suffix == ".pt":
            model = _open_weights(path, stack)
        elif _is_tar(path):  # first: the weights at the end of a tar are a zip by themselves
            model = _open_files(path, _Tar(path, stack, scratch))
        elif zipfile.is_zipfile(path):
            model = _open_files(path, _Zip(path, stack, scratch))
        else:
            model = _open_weights(path, stack)
        if len(model.files) > 1 and not several_ranks:
            raise ConversionError(
                f"{path} is cut into {len(model.files)} model-parallel parts. Merge them first; only one part is read."
            )
        yield model.read()


@dataclass
class _Found:
    """A checkpoint whose files are open; nothing of the weights is read yet. `files`: file, name and size of each."""

    path: Path
    iteration: str
    config: dict
    files: Sequence[tuple[BinaryIO, str, int]]

    def read(self) -> ReleasedModel:
        ranks: list[dict[str, ReadableTensor]] = []
        others, fingerprints = [], []
        for file, name, _ in self.files:
            tensors, left_out, fingerprint = read_module(file, name)
            ranks.append({**tensors})
            others += [other for other in left_out if other not in others]
            fingerprints.append(fingerprint)
        fingerprint = fingerprints[0] if len(fingerprints) == 1 else fingerprints
        size = sum(size for *_, size in self.files)
        return ReleasedModel(self.path, self.iteration, self.config, ranks, others, fingerprint, size)


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # packed, but damaged
        return False


def _open_weights(path: Path, stack: contextlib.ExitStack) -> _Found:
    config = next((f for f in (path.parent / CONFIG_FILE, path.parent.parent / CONFIG_FILE) if f.is_file()), None)
    if config is not None:
        _check_small(config.stat().st_size, config.name, path.parent)
    iteration = path.parent.name if re.fullmatch(ITERATION, path.parent.name) else "release"
    ranks = [path]
    if path.name == WEIGHTS_FILE:
        ranks = sorted(path.parent.glob("mp_rank_*_model_states.pt"))
    files = [(stack.enter_context(rank.open("rb")), str(rank), rank.stat().st_size) for rank in ranks]
    return _Found(path, iteration, _read_config(config.read_bytes() if config else None, path), files)


def _open_files(path: Path, files: "_Folder | _Zip | _Tar") -> _Found:
    latest, config = _locate(files.names, path)
    iteration = files.read_small(latest).decode(errors="replace").strip()
    ranks = _rank_names(files.names, latest, iteration, path)
    settings = _read_config(files.read_small(config) if config else None, path)
    opened = [files.open(name) for name in ranks]
    names = [str(path)] if len(ranks) == 1 else [f"{path}: {name}" for name in ranks]
    return _Found(path, iteration, settings, [(file, name, size) for (file, size), name in zip(opened, names)])


def _locate(names: list[str], path: Path) -> tuple[str, str | None]:
    """Of the files of a checkpoint: the one that names the iteration, and (if any) the configuration."""
    latest = [name for name in names if PurePosixPath(name).name in LATEST_FILES]
    if len(latest) != 1:
        found = f"{len(latest)} ({', '.join(latest[:4])})" if latest else "none"
        raise ConversionError(
            f"{path} must hold one checkpoint, with one file `{LATEST_FILES[0]}` or `{LATEST_FILES[1]}`, but has "
            f"{found}."
        )
    config = str(PurePosixPath(latest[0]).parent / CONFIG_FILE)
    return latest[0], config if config in names else None


def _rank_names(names: list[str], latest: str, iteration: str, path: Path) -> list[str]:
    """The weights files of all ranks, in order."""
    root, latest = PurePosixPath(latest).parent, PurePosixPath(latest).name
    if not re.fullmatch(ITERATION, iteration):
        raise ConversionError(
            f"{path}: `{latest}` must hold a number or the word release, but holds {iteration[:40]!r}."
        )
    folder = root / iteration
    parts = sorted(
        n for n in names if PurePosixPath(n).parent == folder and PurePosixPath(n).name.startswith("mp_rank_")
    )
    weights = str(folder / WEIGHTS_FILE)
    if weights not in parts:
        raise ConversionError(f"{path}: `{latest}` names iteration {iteration}, but {weights} is missing.")
    wanted = [str(folder / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(len(parts))]
    if parts != wanted:
        missing = sorted(set(wanted) - set(parts))
        raise ConversionError(f"{path} has {len(parts)} model-parallel parts, but {', '.join(missing)} is missing.")
    return parts


def _read_config(content: bytes | None, path: Path) -> dict:
    if content is not None and (foreign := describe_foreign(content)) is not None:
        raise ConversionError(f"{path}: `{CONFIG_FILE}` {foreign}")
    try:
        config = json.loads(content) if content is not None else {}
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: `{CONFIG_FILE}` is no JSON ({str(error)[:200]}).") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: `{CONFIG_FILE}` must hold an object, but holds {type(config).__name__}.")
    return config


# Where the files are -------------------------------------------------------------------------------------------------


class _Folder:
    """An unpacked checkpoint."""

    def __init__(self, path: Path, stack: contextlib.ExitStack):
        self.path, self.stack = path, stack
        self.names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]

    def read_small(self, name: str) -> bytes:
        _check_small((self.path / name).stat().st_size, name, self.path)
        return (self.path / name).read_bytes()

    def open(self, name: str) -> tuple[BinaryIO, int]:
        """The file and its size."""
        file = self.stack.enter_context((self.path / name).open("rb"))
        return file, (self.path / name).stat().st_size


class _Zip:
    """A checkpoint in a zip."""

    def __init__(self, path: Path, stack: contextlib.ExitStack, scratch: str | Path | None):
        self.path, self.stack, self.scratch = path, stack, scratch
        try:
            self.archive = stack.enter_context(zipfile.ZipFile(path))
        except Exception as error:  # zipfile lets several kinds through for damaged directories
            raise ConversionError(f"{path} is no whole zip ({str(error)[:200]}). Fetch it again.") from error
        self.entries = zip_entries(self.archive, str(path))
        self.names = _safe_names(((name, name.endswith("/")) for name in self.entries), path)

    def read_small(self, name: str) -> bytes:
        _check_small(self.entries[name].file_size, name, self.path)
        try:
            return self.archive.read(self.entries[name])
        except ZIP_ERRORS as error:
            raise ConversionError(f"{self.path}: {name} cannot be read ({error}). Fetch the zip again.") from error

    def open(self, name: str) -> tuple[BinaryIO, int]:
        entry = self.entries[name]
        if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:
            file = self.stack.enter_context(self.path.open("rb"))
            file.seek(max(0, entry.header_offset))
            header = file.read(30)  # a local header: 30 bytes, then name and extra field, whose lengths end it
            if not header.startswith(b"PK\x03\x04"):
                raise ConversionError(f"{self.path}: {name} is not where the zip says. Fetch the zip again.")
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = entry.header_offset + 30 + lengths
            return io.BufferedReader(_FileSlice(file, start, entry.file_size), CHUNK_BYTES), entry.file_size
        try:
            with self.archive.open(entry) as source:
                return _unpack(source, entry.file_size, name, self)
        except ConversionError:
            raise
        except ZIP_ERRORS as error:
            raise ConversionError(f"{self.path}: {name} cannot be unpacked ({error}). Fetch the zip again.") from error


class _Tar:
    """A checkpoint in a tar, also a compressed one."""

    def __init__(self, path: Path, stack: contextlib.ExitStack, scratch: str | Path | None):
        self.path, self.stack, self.scratch = path, stack, scratch
        try:
            self.archive = stack.enter_context(tarfile.open(path))  # noqa: SIM115
            members = self.archive.getmembers()
        except Exception as error:  # tarfile lets many kinds through for damaged headers
            raise ConversionError(f"{path} is no whole tar ({error}). Fetch it again.") from error
        self.members = {
            member.name.removeprefix("./").replace("\\", "/"): member for member in members if member.isfile()
        }
        _safe_names(((member.name, member.isdir()) for member in members), path)
        self.names = list(self.members)

    def read_small(self, name: str) -> bytes:
        _check_small(self.members[name].size, name, self.path)
        try:
            return self._read(name).read()
        except Exception as error:  # tarfile lets many kinds through for damaged headers
            raise ConversionError(f"{self.path}: {name} cannot be read ({error}). Fetch the tar again.") from error

    def open(self, name: str) -> tuple[BinaryIO, int]:
        member = self.members[name]
        if type(self.archive.fileobj) is io.BufferedReader and not member.issparse():
            file = self.stack.enter_context(self.path.open("rb"))
            if member.offset_data + member.size > self.path.stat().st_size:
                raise ConversionError(f"{self.path} is cut off inside of {name}. Fetch it again.")
            return io.BufferedReader(_FileSlice(file, member.offset_data, member.size), CHUNK_BYTES), member.size
        try:
            return _unpack(self._read(name), member.size, name, self)
        except ConversionError:
            raise
        except Exception as error:  # tarfile lets many kinds through for damaged headers
            raise ConversionError(f"{self.path}: {name} cannot be unpacked ({error}). Fetch the tar again.") from error

    def _read(self, name: str) -> IO[bytes]:
        file = self.archive.extractfile(self.members[name])
        assert file is not None  # the members are files
        return file


def _unpack(source: IO[bytes], size: int, name: str, archive: "_Zip | _Tar") -> tuple[BinaryIO, int]:
    """A compressed entry as a file in the scratch folder, for as long as the archive is open."""
    folder = Path(archive.stack.enter_context(tempfile.TemporaryDirectory(prefix=".unpacked-", dir=archive.scratch)))
    if shutil.disk_usage(folder).free < size + 2**28:
        raise ConversionError(
            f"{archive.path}: unpacking the weights needs {size / 2**30:.1f} GiB beside the output, which are not "
            "free."
        )
    unpacked = folder / PurePosixPath(name).name
    with unpacked.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK_BYTES)
    return archive.stack.enter_context(unpacked.open("rb")), size


def _safe_names(entries: Iterator[tuple[str, bool]], path: Path) -> list[str]:
    """Names of the files of an archive; none may point out of it."""
    names = []
    for entry, is_folder in entries:
        name = entry.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
            raise ConversionError(f"{path} has an entry that points out of the archive ({entry!r}). Do not unpack it.")
        if not is_folder:
            names.append(name)
    return names


def _check_small(size: int, name: str, path: Path) -> None:
    if size > 2**20:
        raise ConversionError(f"{path}: {name} is {size} bytes long, which cannot be right.")


class _FileSlice(io.RawIOBase):
    """A part of a file as a file: an entry that stands unpacked in an archive is read in place."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self._position

    def seek(self, offset, whence=io.SEEK_SET):
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer):
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
