"""What often lies where a file of weights or settings should be, told by its first bytes."""

from pathlib import Path

_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--")


def describe_foreign(start: bytes) -> str | None:
    """
    What a file is whose beginning shows that it is none of a model's: a sentence without its subject, or `None`.

    Args:
        start (`bytes`): The first bytes of the file, some hundred of them.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if not start:
        return "is empty. It was not copied, or not whole; fetch it again."
    if text.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer: a note of where the file is, not the file itself. Fetch it with `git lfs pull`, or "
            "from the model's page."
        )
    if text.startswith(_PAGE_STARTS):
        return (
            "is a web page, not the file itself: the server has answered with a page, for instance one that asks "
            "for a login. Open the address in a browser, and fetch the file again."
        )
    return None


def describe_foreign_file(path: str | Path) -> str | None:
    """The same for a file on disk; `None` also for what cannot be opened."""
    try:
        with open(path, "rb") as file:
            return describe_foreign(file.read(256))
    except OSError:
        return None
