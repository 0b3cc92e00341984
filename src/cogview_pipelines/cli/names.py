"""Names of files made from ids and prompts, in every language, on every file system."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

LONGEST_ID = 100  # characters
_LONGEST_SLUG = 60  # characters of a prompt in the name of a file
_LONGEST_SLUG_BYTES = 150
_JOINERS = "\u200c\u200d"  # without width, but parts of words in Persian and the languages of India
_LONGEST_NAME = 255  # bytes, on the file systems in use
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether a text that names no file can be an id on the Hub (owner/name)."""
    return _HUB_ID.fullmatch(text) is not None and text[0] not in "./~"


def is_letter(character: str) -> bool:
    """Whether words are written with it: letters, digits, and the marks that belong to letters."""
    return character.isalnum() or is_mark(character)


def is_mark(character: str) -> bool:
    """Whether it belongs to the letter before it: accents, vowel signs, tones."""
    return unicodedata.category(character).startswith("M") or character in _JOINERS


def check_id(value) -> str:
    """
    The id of a request, which names files.

    Raises:
        ValueError: If it is none.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not (
        isinstance(text, str)
        and 0 < len(text) <= LONGEST_ID
        and (text[0].isalnum() or text[0] == "_")
        and all(is_letter(character) or character in "_.-" for character in text)
    ):
        shown = value if not isinstance(value, str) or len(value) <= LONGEST_ID else f"{value[:LONGEST_ID]}..."
        raise ValueError(
            f"`id` must be up to {LONGEST_ID} letters, digits, `_`, `-` and `.`, and begin with a letter, digit or `_`"
            f" (it names the file), but is {shown!r}."
        )
    return text


def slug(prompt: str) -> str:
    """The beginning of a prompt as the name of a file: whole letters with their marks, of every language."""
    words, word = [], ""
    for character in prompt:
        if is_letter(character) and (word or not is_mark(character)):
            word += character
        elif word:
            words.append(word)
            word = ""
    text = "-".join([*words, word] if word else words)
    end = min(len(text), _LONGEST_SLUG)
    while end and (len(os.fsencode(text[:end])) > _LONGEST_SLUG_BYTES or is_mark(text[end : end + 1] or "-")):
        end -= 1  # not between a letter and its marks
    return text[:end].strip("-") or "picture"


def same_file_key(name: str) -> str:
    """What names have in common that are one file where upper and lower case, or accents, are the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def clashes(names: Iterable[tuple[str, str, list[str]]], are_files: bool) -> list[str]:
    """
    Requests that would write the same file; also where the file system does not tell upper from lower case.

    Args:
        names: `(where, id, names)` of each request.
        are_files (`bool`): Whether names are files, or lines that are told apart exactly.
    """
    errors: list[str] = []
    first: dict[str, str] = {}
    for where, id, own in names:
        for name in own:
            other = first.setdefault(same_file_key(name) if are_files else name, where)
            if other is not where:
                errors.append(f"{where}: `id` {id!r} would write {name} again, after {other}.")
                break
    return errors


def problem_of_name(path: Path) -> str | None:
    """Why no file can have this name, as far as that can be told without writing one."""
    length, most = len(os.fsencode(path.name)), _longest_name(path.parent)
    if length > most:
        return f"the name {path.name[:40]}... has {length} bytes, but may have {most}. Shorten it."
    if os.path.isdir(path):
        return f"{path} is a folder. Choose another name."
    return None


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return _LONGEST_NAME
