"""Reports: whatever becomes of them, the work goes on."""

import io
import os
import sys

import pytest
import torch
import typer

from cogview_pipelines.cli import console
from cogview_pipelines.cli.console import FAILURE, expand, failures, say, say_json
from cogview_pipelines.reports import guard_streams


def console_of(encoding, monkeypatch):
    """A console with this encoding on stdout; gives what was written."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding, write_through=True))
    return content


def test_letters_that_a_console_cannot_show_become_escapes(monkeypatch):
    content = console_of("gbk", monkeypatch)
    say("a-1 ñ-2 虎.png")
    say("half \udcff")
    assert content.getvalue().decode("gbk").split("\n") == ["a-1 \\xf1-2 虎.png", "half \\udcff", ""]


def test_json_for_such_a_console_is_still_json(monkeypatch):
    content = console_of("gbk", monkeypatch)
    say_json({"caption": "ñ 虎"})
    say_json({"caption": "虎"})
    lines = content.getvalue().decode("gbk").splitlines()
    assert lines == ['{"caption": "\\u00f1 \\u864e"}', '{"caption": "虎"}']


def test_nothing_that_is_printed_into_a_closed_pipe_stops_the_work(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
    guard_streams()
    say("first")
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    for number in range(3):
        say(number)
        print("a library", file=sys.stdout, flush=True)
    with pytest.raises(typer.Exit):
        console.end_if_nobody_reads()
    sys.stdout.close()


def test_without_a_console_nothing_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("nothing")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
)
def test_what_runs_out_is_told_in_one_line(error, capsys):
    with pytest.raises(typer.Exit) as caught, failures():
        raise error
    assert caught.value.exit_code == FAILURE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake of ours"), failures():
        raise RuntimeError("a mistake of ours")


def test_a_home_that_is_not_there_is_told_in_one_line(capsys):
    from pathlib import Path

    with pytest.raises(typer.Exit):
        expand(Path("~nobody-has-this-name/x.png"), "--output")
    assert capsys.readouterr().err.startswith("Error: `--output`: ~nobody-has-this-name/x.png cannot be found")
