"""
Captioned pictures as people have them, in parts that are read one after the other: each part becomes a token shard.

- a folder of pictures with a file of JSON lines, cut into runs of lines;
- image folders of HF `datasets`: pictures and `metadata.jsonl` or `metadata.csv` with `file_name`, cut likewise;
- WebDataset tars, as img2dataset writes them: `KEY.jpg`, `KEY.txt` and `KEY.json`, a part each;
- Parquet files, as HF `datasets` writes them: an image column and one of captions, a part each.

What a file holds is data of strangers: a picture or line that cannot be read is a row with a `problem`.
"""

import csv
import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...json_lines import dump_line, parse_object, read_lines
from ...pictures.files import find_file
from .captions import LANGUAGES, has_text, parse_captions

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_NAMES = ("caption", "text", "TEXT", "prompt")
PICTURE_NAMES = ("image", "jpg", "png", "webp", "picture")
LARGEST_FILE = 1 << 28
LARGEST_TEXT = 1 << 20
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class PictureRow:
    """
    A picture and its captions.

    Args:
        place (`str`): Where it stands, for messages.
        content (`bytes`, `Path` or `None`): The file of the picture, or where it is.
        texts (`dict`): Captions by language, and what else a line of `captions.jsonl` has.
        problem (`str`, *optional*): Why it cannot be used, in words that go on from the place.
        num_blank (`int`): Blank captions of it that were left out.
    """

    place: str
    content: bytes | Path | None = None
    texts: dict = field(default_factory=dict)
    problem: str | None = None
    num_blank: int = 0


class Part(Protocol):
    """A part of the input, from which one shard is made."""

    def made_of(self) -> dict[str, Any]:
        """What tells it from others: names, sizes, places."""
        ...

    def rows(self) -> Iterator[PictureRow]:
        """Its pictures, in order."""
        ...


def find_parts(image_folder: str | Path, captions: str | Path | None, shard_size: int | None) -> list[Part]:
    """
    The parts of an input.

    Args:
        image_folder (`str` or `Path`): A folder of pictures, of tars or of Parquet files; or one such file.
        captions (`str` or `Path`, *optional*): JSON lines, for a folder of pictures without a metadata file.
        shard_size (`int`, *optional*): Lines in a part, where the pictures are listed in one file.

    Raises:
        ValueError: If there is nothing that can be read, or `shard_size` is missing.
    """
    folder = Path(image_folder)
    if captions is None:
        for suffix, part in ((".tar", TarPart), (".parquet", ParquetPart)):
            paths = [folder] if folder.is_file() and folder.suffix == suffix else sorted(folder.glob(f"*{suffix}"))
            if paths:
                return [part(path) for path in paths]
        captions = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if captions is None or not Path(captions).is_file() or not folder.is_dir():
        raise ValueError(
            f"`image_folder` {folder} must hold tars, Parquet files, {' or '.join(METADATA_FILES)}, or come with "
            f"`captions`, a file of JSON lines{'' if captions is None else f' (there is none at {captions})'}."
        )
    if shard_size is None:
        raise ValueError("`shard_size` must be given for pictures that are listed in one file.")
    if Path(captions).suffix == ".csv":
        return _csv_parts(Path(captions), folder, shard_size)
    return _line_parts(Path(captions), folder, shard_size)


def listed_pictures(parts: Iterable[Part]) -> Iterator[Path] | None:
    """The pictures that a list names, whether they can be used or not; `None` if the parts are archives."""
    lists = [part for part in parts if isinstance(part, (ListPart, CsvPart))]
    if not lists:
        return None
    return (row.content for part in lists for row in part.rows() if isinstance(row.content, Path))


def is_packed(image_folder: str | Path) -> bool:
    """Whether an `image_folder` needs no `captions`: it holds tars, Parquet files or a metadata file."""
    folder = Path(image_folder)
    if folder.is_file():
        return folder.suffix in (".tar", ".parquet")
    patterns = ("*.tar", "*.parquet", *METADATA_FILES)
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def captions_of(row: Mapping[str, Any], place: str) -> tuple[dict, int]:
    """
    Captions by language with their weight, of a row of any of these kinds; and how many blank ones were left out.

    A row that has neither `en` nor `zh` has its caption, or a list of them, under one of `CAPTION_NAMES`; one with a
    Chinese character is Chinese.

    Raises:
        ValueError: As [`parse_captions`].
    """
    row = {name: value for name, value in row.items() if value is not None}
    num_blank = 0
    if not any(has_text(row.get(language)) for language in LANGUAGES):
        row = {name: value for name, value in row.items() if name not in LANGUAGES}
        texts = next((row[name] for name in CAPTION_NAMES if has_text(row.get(name))), None)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not any(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{place} has no caption ({', '.join((*LANGUAGES, *CAPTION_NAMES))}).")
        for text in texts:
            if text is None or (isinstance(text, str) and not text.strip()):
                num_blank += 1
            elif isinstance(text, str):
                row.setdefault("zh" if _HAN.search(text) else "en", []).append(text)
            else:
                raise ValueError(f"{place} has a caption that is no text: {text!r}.")
    names = (*LANGUAGES, "targets", "style", "weight")
    try:
        line = dump_line({name: row[name] for name in names if name in row})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} has captions that are no texts ({error}).") from error
    found = parse_captions(line, place)
    return {**found.texts, "weight": found.weight}, num_blank + found.num_blank


# Lists ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListPart:
    """Some rows of a file that lists the pictures of a folder."""

    path: Path
    folder: Path
    first: int
    offset: int
    count: int

    def made_of(self) -> dict[str, Any]:
        """See [`Part`]."""
        return {"captions": str(self.path.resolve()), "first": self.first, "count": self.count, "begins": self.offset}

    def rows(self) -> Iterator[PictureRow]:
        """See [`Part`]."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            number = self.first
            for line in itertools.islice((line for line in file if line.strip()), self.count):
                yield self._row(f"Row {number} of {self.path}", line)
                number += 1

    def _row(self, place: str, line: bytes) -> PictureRow:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            return PictureRow(place, problem="is not UTF-8 text")
        try:
            row = parse_object(text)
        except ValueError as error:
            return PictureRow(place, problem=str(error))
        return _listed(place, row, self.folder)


@dataclass(frozen=True)
class CsvPart:
    """Some rows of a `metadata.csv`."""

    path: Path
    folder: Path
    first: int
    count: int

    def made_of(self) -> dict[str, Any]:
        """See [`Part`]."""
        return {"captions": str(self.path.resolve()), "first": self.first, "count": self.count}

    def rows(self) -> Iterator[PictureRow]:
        """See [`Part`]."""
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            rows = itertools.islice(csv.DictReader(file), self.first, self.first + self.count)
            for number, row in enumerate(rows, self.first):
                yield _listed(f"Row {number} of {self.path}", {k: v for k, v in row.items() if k and v}, self.folder)


def _listed(place: str, row: Mapping[str, Any], folder: Path) -> PictureRow:
    name = row.get("file") or row.get("file_name")
    if not isinstance(name, str):
        return PictureRow(place, problem="names no picture in `file` or `file_name`")
    path = find_file(folder / name)
    try:
        texts, num_blank = captions_of(row, place)
    except ValueError as error:
        return PictureRow(place, path, problem=str(error).removeprefix(place).strip())
    return PictureRow(f"{place} ({name})", path, texts, num_blank=num_blank)


def _line_parts(path: Path, folder: Path, size: int) -> list[Part]:
    next(read_lines(path), None)  # says if it is no UTF-8 text
    parts: list[Part] = []
    count = first = offset = place = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                if count == size:
                    parts.append(ListPart(path, folder, first, offset, count))
                    first, offset, count = first + count, place, 0
                count += 1
            place += len(line)
    if not count:
        raise ValueError(f"`captions` must have a line for each picture, but {path} is empty.")
    return [*parts, ListPart(path, folder, first, offset, count)]


def _csv_parts(path: Path, folder: Path, size: int) -> list[Part]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        count = sum(1 for _ in csv.DictReader(file))
    if not count:
        raise ValueError(f"`captions` must have a line for each picture, but {path} is empty.")
    return [CsvPart(path, folder, first, min(size, count - first)) for first in range(0, count, size)]


# Archives ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarPart:
    """A WebDataset tar: the files of a sample have one name, up to its first dot, and follow one another."""

    path: Path

    def made_of(self) -> dict[str, Any]:
        """See [`Part`]."""
        return {"tar": str(self.path.resolve()), "bytes_of_input": self.path.stat().st_size}

    def rows(self) -> Iterator[PictureRow]:
        """See [`Part`]."""
        key: tuple[str, str] | None = None
        files: dict[str, bytes] = {}
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if (folder, stem) != key:
                        if key is not None and files:
                            yield self._row(key, files)
                        key, files = (folder, stem), {}
                    wanted = f".{suffix.lower()}" in PICTURE_SUFFIXES or suffix in ("txt", "json")
                    limit = LARGEST_TEXT if suffix in ("txt", "json") else LARGEST_FILE
                    if wanted:
                        file = tar.extractfile(member) if member.size <= limit else None
                        files[suffix.lower()] = b"" if file is None else file.read()
        except (OSError, tarfile.TarError) as error:
            # a sample whose files may be cut off is not used
            yield PictureRow(str(self.path), problem=f"is damaged or cut off: {error}")
            return
        if key is not None and files:
            yield self._row(key, files)

    def _row(self, key: tuple[str, str], files: Mapping[str, bytes]) -> PictureRow:
        place = f"{'/'.join(filter(None, key))} of {self.path}"
        try:
            row = parse_object(files["json"].decode("utf-8")) if "json" in files else {}
            if "txt" in files and not any(has_text(row.get(language)) for language in LANGUAGES):
                row["caption"] = files["txt"].decode("utf-8")
        except ValueError as error:
            return PictureRow(place, problem=f"has a damaged text: {error}")
        content = next((value for name, value in files.items() if f".{name}" in PICTURE_SUFFIXES), None)
        if content is None:
            return PictureRow(place, problem="has no picture")
        try:
            texts, num_blank = captions_of(row, place)
            return PictureRow(place, content, texts, num_blank=num_blank)
        except ValueError as error:
            return PictureRow(place, problem=str(error).removeprefix(place).strip())


@dataclass(frozen=True)
class ParquetPart:
    """A Parquet file with a column of pictures, as bytes or as HF `datasets` has them, and one of captions."""

    path: Path

    def made_of(self) -> dict[str, Any]:
        """See [`Part`]."""
        return {"parquet": str(self.path.resolve()), "bytes_of_input": self.path.stat().st_size}

    def rows(self) -> Iterator[PictureRow]:
        """See [`Part`]."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError("Parquet files need the package pyarrow: pip install pyarrow.") from error
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                picture = next((name for name in PICTURE_NAMES if name in names), None)
                if picture is None:
                    raise ValueError(f"{self.path} has no column of pictures ({', '.join(PICTURE_NAMES)}): {names}.")
                texts = [n for n in names if n in (*LANGUAGES, *CAPTION_NAMES, "targets", "style", "weight")]
                for batch in file.iter_batches(64, columns=[picture, *texts]):
                    for start in range(len(batch)):
                        place = f"Row {number} of {self.path}"
                        number += 1
                        try:
                            (row,) = batch.slice(start, 1).to_pylist()
                        except UnicodeDecodeError:  # Parquet does not look at the bytes of its texts
                            yield PictureRow(place, problem="is not UTF-8 text")
                        else:
                            yield self._row(place, row.pop(picture), row)
        except (OSError, ArrowException) as error:
            yield PictureRow(str(self.path), problem=f"is damaged or cut off: {error}")

    def _row(self, place: str, picture: Any, row: Mapping[str, Any]) -> PictureRow:
        content: bytes | Path | None = picture if isinstance(picture, bytes) else None
        if isinstance(picture, dict):
            content = picture.get("bytes")
            if content is None and isinstance(picture.get("path"), str):
                folder = self.path.parent.resolve()
                path = (folder / picture["path"]).resolve()
                content = path
                if not path.is_relative_to(folder):
                    return PictureRow(place, problem=f"names a picture outside of its folder: {picture['path']!r}")
        if content is None:
            return PictureRow(place, problem="has no picture")
        try:
            texts, num_blank = captions_of(row, place)
            return PictureRow(place, content, texts, num_blank=num_blank)
        except ValueError as error:
            return PictureRow(place, problem=str(error).removeprefix(place).strip())
