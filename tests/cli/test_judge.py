"""`cogview2 judge` before its server starts, and what it tells of answers."""

import json
import socket

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app
from cogview_pipelines.cli import judge as command

from .conftest import assert_bad_input

pytest.importorskip("fastapi", reason="needs the extra `serve`")


def run(*arguments):
    return CliRunner().invoke(app, ["judge", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def listed(tmp_path):
    """Two folders of pictures and their captions."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    lines = [json.dumps({"id": str(number), "caption": f"caption {number}"}) + "\n" for number in range(3)]
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def served(monkeypatch):
    """The server that would run."""
    from cogview_pipelines.serving import server

    class Server:
        def run(self, sockets):
            self.port = sockets[0].getsockname()[1]

    made = Server()
    monkeypatch.setattr(server, "make_server", lambda app, settings: made)
    monkeypatch.setattr(server, "set_up_log", lambda: None)
    return made


def arguments_of(listed, *more):
    folders = (listed / "first", listed / "second")
    return (
        *folders,
        "--captions",
        listed / "captions.jsonl",
        "--answers",
        listed / "answers.sqlite",
        "--port",
        0,
        *more,
    )


def test_every_judge_gets_a_link_and_keeps_it(listed, served):
    result = run(*arguments_of(listed, "--judges", 2))
    assert result.exit_code == 0, result.output
    links = result.stdout.splitlines()
    assert len(links) == 2 and all(f"http://127.0.0.1:{served.port}/judge/" in line for line in links)
    tokens = [line.rsplit("/", 1)[1] for line in links]
    again = run(*arguments_of(listed, "--judges", 3)).stdout.splitlines()
    assert [line.rsplit("/", 1)[1] for line in again][:2] == tokens


def test_captions_without_all_pictures_are_told(listed, served):
    (listed / "second" / "1.png").unlink()
    result = run(*arguments_of(listed))
    assert result.exit_code == 0, result.output
    assert "1 captions are left out" in result.stderr and "2 captions, pictures of 2 models" in result.stderr


def test_results_are_told_in_words_and_as_json(listed, served):
    from cogview_pipelines.serving.judging.answers import Answer, Answers

    assert run(*arguments_of(listed, "--ab", "--judges", 2)).exit_code == 0
    answers = Answers(listed / "answers.sqlite")
    for token in answers.judges().values():
        for caption in range(3):
            answers.put(token, caption, Answer(caption % 2))
    answers.close()
    result = run("--results", listed / "answers.sqlite")
    assert result.exit_code == 0, result.output
    assert "first over second: 66.7% [30.0%, 90.3%] of 6" in result.stdout
    found = json.loads(run("--results", listed / "answers.sqlite", "--json").stdout)
    assert found["mode"] == "ab" and found["answers"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a folder for each model"),
        (["first"], "Name a folder for each model"),
        (["first", "--captions", "captions.jsonl"], "must be two or more, but are 1"),
        (["first", "none", "--captions", "captions.jsonl"], "none"),
        (["first", "second", "--captions", "none.jsonl"], "none.jsonl"),
        (["first", "second", "--captions", "captions.jsonl", "--num", "9"], "9 are asked for"),
        (["--results", "captions.jsonl"], "is no file of answers"),
        (["--results", "none.sqlite"], "there is no file none.sqlite"),
        (["first", "--results", "a.sqlite"], "leave folders and --captions out"),
    ],
)
def test_bad_input_is_told_in_a_line(listed, monkeypatch, arguments, message):
    monkeypatch.chdir(listed)
    assert_bad_input(run(*arguments), message)


def test_a_port_in_use_is_told(listed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(*arguments_of(listed, "--port", taken.getsockname()[1]))
    assert result.exit_code == 1 and "Choose another --port" in result.stderr


def test_without_the_extra_it_is_named(listed, monkeypatch):
    monkeypatch.setattr(command, "NEEDED", ("no_such_package",))
    result = run(*arguments_of(listed))
    assert result.exit_code == 1 and "cogview_pipelines[serve]" in result.stderr
