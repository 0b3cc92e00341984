"""Files of results: whatever is not one stays as it is, and only one command writes into a place."""

import json
import multiprocessing
import os

import pytest
import typer

from cogview_pipelines.cli.results import LineFailures, only_writer, read_rows, replace_rows

ROWS = [{"id": "a", "text": "one\u2028two\x85three"}, {"id": "b", "text": "虎"}]
RAW = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def test_rows_are_not_cut_at_separators_inside_of_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RAW, encoding="utf-8")  # as another program writes them
    assert read_rows(path) == ROWS
    replace_rows(path, ROWS)
    assert read_rows(path) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("cut", [1, 7, 8, 20])
def test_a_last_line_that_a_stop_cut_off_is_left_out(tmp_path, cut):
    (tmp_path / "a.jsonl").write_bytes(RAW.encode() + RAW.encode()[:cut])
    assert read_rows(tmp_path / "a.jsonl") == ROWS


@pytest.mark.parametrize(
    "content, line",
    [
        (b"my notes\n", 1),
        (b"my notes", 1),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 1),
        (b'{"name": 1}\n{"name": 2}\n', 1),
        (RAW.encode() + b'{"name": 1}\n', 3),
        (RAW.encode() + b'{"id": "c", "te\n' + RAW.encode(), 3),
        (RAW.encode("utf-16"), 1),
        (b"[1]\n", 1),
    ],
)
def test_a_file_that_holds_anything_else_ends_the_command(tmp_path, capsys, content, line):
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(typer.Exit):
        read_rows(path)
    assert f"{path} is no file of results: line {line} is no JSON object" in capsys.readouterr().err
    assert path.read_bytes() == content


def hold(path, held, done):
    with only_writer(path):
        held.set()
        done.wait(60)


@pytest.mark.parametrize("name", ["", "out.jsonl", "虎" * 80 + ".jsonl"])
def test_a_second_writer_is_turned_away_until_the_first_is_done(tmp_path, capsys, name):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / name, held, done))
    other.start()
    assert held.wait(60)
    with pytest.raises(typer.Exit), only_writer(tmp_path / name):
        pass
    assert "Another command writes into" in capsys.readouterr().err
    done.set()
    other.join(60)
    with only_writer(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []  # nor does it leave anything


def test_an_error_of_one_name_stops_nothing_else_but_a_full_disk_does(tmp_path, capsys):
    failed = LineFailures(2)
    with failed.of_writing("line 1"):
        (tmp_path / ("x" * 300)).write_bytes(b"")
    assert "Error: line 1: could not write: " in capsys.readouterr().err
    with pytest.raises(OSError, match="No space"), failed.of_writing("line 2"):
        raise OSError(28, "No space left on device")
    with pytest.raises(typer.Exit):
        failed.finish()
    assert "1 of 2 lines failed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
