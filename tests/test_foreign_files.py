"""What lies in the place of a file, told by its beginning."""

import pytest

from cogview_pipelines.foreign_files import describe_foreign, describe_foreign_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    "start, kind",
    [
        (POINTER, "Git LFS pointer"),
        (b"<!doctype html>", "web page"),
        (b"\xef\xbb\xbf\r\n  <HTML lang='en'>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "web page"),
        (b"", "empty"),
    ],
)
def test_pointers_pages_and_nothing_are_told_apart(tmp_path, start, kind):
    assert kind in describe_foreign(start)
    (tmp_path / "file").write_bytes(start)
    assert describe_foreign_file(tmp_path / "file") == describe_foreign(start)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"{}", b"\x0a\x05", b"<", b"\0" * 256, b" "])
def test_other_files_are_none_of_these(start):
    assert describe_foreign(start) is None


def test_a_file_that_cannot_be_opened_is_left_to_whoever_reads_it(tmp_path):
    assert describe_foreign_file(tmp_path / "nothing") is None
    assert describe_foreign_file(tmp_path) is None
