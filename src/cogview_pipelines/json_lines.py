"""
Files of one JSON object a line: lists, manifests, captions, metrics. All of them are read and written here.

Only a line feed ends a line: JSON strings may hold U+2028, U+2029 and U+0085, at which `str.splitlines` would cut.
"""

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

_UTF_16_OR_32 = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # that of UTF-32-LE begins like the 1st
_ENDS_OF_LINES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\u2028\u2029\x85"})


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """
    The lines that hold something, with their numbers from 1 on. A byte order mark is passed over.

    Raises:
        ValueError: If the file cannot be read, or is not UTF-8 text. The message names file and line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _refuse_utf_16(line, path)
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    raise ValueError(
                        f"cannot read {path}: line {number} is not UTF-8 text. Save the file as UTF-8."
                    ) from None
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error


def parse_object(line: str, allow_nan: bool = False) -> dict:
    """
    The JSON object of a line.

    Args:
        line (`str`): The line.
        allow_nan (`bool`, defaults to `False`): Take NaN and Infinity, which are no numbers of JSON, as other programs
            write them.

    Raises:
        ValueError: If it is none. The message goes on from the name of the line, as in "line 7 is not JSON (...)".
    """
    try:
        value = (_LENIENT if allow_nan else _STRICT).decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno}): {_quoted(line)}.") from None
    except RecursionError:
        raise ValueError(f"is nested too deeply: {_quoted(line)}.") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): {_quoted(line)}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, but is {_quoted(line)}.")
    return value


def read_whole_rows(path: str | Path, allow_nan: bool = False) -> Iterator[dict]:
    """The objects of a file that a stop may have cut or damaged: what is none is passed over."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield parse_object(line.decode("utf-8"), allow_nan)


def dump_line(row: dict) -> str:
    """A line that [`parse_object`] reads, with its line feed; letters stay letters."""
    return _storable(json.dumps(row, ensure_ascii=False).translate(_ENDS_OF_LINES)) + "\n"


def dump_file(content: dict) -> str:
    """The text of a file that holds one JSON object, for people to read; letters stay letters."""
    return _storable(json.dumps(content, ensure_ascii=False, indent=2)) + "\n"


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: an escape of JSON may stand for half of a surrogate pair, which is no letter."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _storable(text: str) -> str:
    """JSON that UTF-8 can hold: names of files may hold halves of letters (surrogates), which are escapes there."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_lines(file: IO[str], rows: Iterable[dict]) -> None:
    """Add lines to an open text file."""
    for row in rows:
        file.write(dump_line(row))


def _refuse_utf_16(line: bytes, path: str | Path) -> None:
    # without a mark, every second byte of ASCII text is zero
    if line.startswith(_UTF_16_OR_32) or b"\0" in line[:4]:
        raise ValueError(f"cannot read {path}: it is UTF-16 or UTF-32 text. Save the file as UTF-8.")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


# made once: `json.loads` with an option makes one for each line
_STRICT, _LENIENT = json.JSONDecoder(parse_constant=_refuse_constant), json.JSONDecoder(parse_constant=float)


def _quoted(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 80 else f"{line[:80]}...")
