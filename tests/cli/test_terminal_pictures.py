"""Pictures in terminals: decoded again by the rules of each protocol, they are what they were."""

import base64
import io
import os
import pty
import re
import threading

import numpy as np
import pytest
from PIL import Image

from cogview_pipelines.cli import terminal_pictures
from cogview_pipelines.cli.terminal_pictures import Show, find_way, iterm2, kitty, sixel


def picture(width=50, height=41):
    """Noise of a few colours, with runs; the height is no multiple of six."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8)
    chosen = np.random.default_rng(0).integers(4, size=(height, width // 5)).repeat(5, axis=1)
    return Image.fromarray(colours[chosen])


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("size", [(5, 6), (50, 41), (200, 200)])
def test_kitty_gets_the_picture_in_pieces(size):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8))
    parts = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", kitty(image))
    controls = [dict(entry.split("=") for entry in control.split(",")) for control, _ in parts]
    assert {"a": "T", "f": "100"}.items() <= controls[0].items()
    assert [control["m"] for control in controls] == ["1"] * (len(parts) - 1) + ["0"]
    assert all(len(piece) <= 4096 and len(piece) % 4 == 0 for _, piece in parts[:-1])
    data = base64.b64decode("".join(piece for _, piece in parts))
    assert np.array_equal(opened(data), np.asarray(image))


def test_iterm2_gets_the_picture_and_its_size():
    match = re.fullmatch(r"\033\]1337;File=inline=1;size=(\d+):([\w+/=]+)\a", iterm2(picture()))
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1])
    assert np.array_equal(opened(data), np.asarray(picture()))


def draw(text):
    """What a terminal makes of sixels."""
    match = re.fullmatch(r'\033Pq"1;1;(\d+);(\d+)(.*)\033\\', text, re.DOTALL)
    width, height, body = int(match[1]), int(match[2]), match[3]
    canvas, palette = np.zeros((height + 5, width, 3), np.uint8), {}
    row = column = colour = 0
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~]|\$|-", body):
        if token.startswith("#"):
            numbers = [int(number) for number in re.findall(r"\d+", token)]
            colour = numbers[0]
            if len(numbers) > 1:
                palette[colour] = [round(value * 255 / 100) for value in numbers[2:]]
        elif token == "$":
            column = 0
        elif token == "-":
            row, column = row + 6, 0
        else:
            count = int(token[1:-1]) if token.startswith("!") else 1
            bits = ord(token[-1]) - 63
            for bit in range(6):
                if bits >> bit & 1:
                    canvas[row + bit, column : column + count] = palette[colour]
            column += count
    assert not canvas[height:].any()
    return canvas[:height]


def test_sixels_are_the_picture():
    assert np.array_equal(draw(sixel(picture())), np.asarray(picture()))


def test_sixels_of_many_colours_are_near_the_picture():
    across, down = np.meshgrid(np.linspace(0, 255, 90), np.linspace(0, 255, 60))
    image = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    drawn = draw(sixel(image))
    assert np.abs(drawn.astype(int) - np.asarray(image)).mean() < 8


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.fixture
def terminal(monkeypatch):
    """Makes the output a terminal, or not, of which the environment tells."""

    def make(is_terminal=True, **environment):
        for name in ("TERM", "TERM_PROGRAM", "TMUX", "KITTY_WINDOW_ID", "LC_TERMINAL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdout", Stream(is_terminal))
        monkeypatch.setattr(terminal_pictures, "_answers_sixel", lambda: False)

    return make


@pytest.mark.parametrize(
    "environment, way",
    [
        ({"TERM": "xterm-kitty"}, Show.kitty),
        ({"KITTY_WINDOW_ID": "1"}, Show.kitty),
        ({"TERM_PROGRAM": "iTerm.app"}, Show.iterm2),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, Show.iterm2),
        ({"TERM": "xterm-256color"}, Show.no),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, Show.no),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, Show.no),
    ],
)
def test_the_terminal_is_known_by_what_it_says(terminal, environment, way):
    terminal(**environment)
    assert find_way(Show.auto) is way
    assert find_way(Show.no) is Show.no
    terminal(is_terminal=False, **environment)
    assert find_way(Show.auto) is Show.no


def test_asked_for_by_name_it_needs_a_terminal(terminal, capsys):
    terminal()
    assert find_way(Show.sixel) is Show.sixel
    terminal(is_terminal=False)
    with pytest.raises(Exception) as error:
        find_way(Show.sixel)
    assert error.value.exit_code == 2
    assert "`--show` sixel needs a terminal" in capsys.readouterr().err


@pytest.mark.parametrize("answer, expected", [(b"\033[?62;4;22c", True), (b"\033[?1;2c", False), (b"", False)])
def test_a_terminal_is_asked_for_sixels(monkeypatch, answer, expected):
    ours, theirs = pty.openpty()

    def reply():
        if answer and b"\033[c" in os.read(ours, 100):
            os.write(ours, answer)

    with os.fdopen(theirs, "r+b", buffering=0) as raw:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(raw))
        monkeypatch.setattr("sys.stdout", os.fdopen(os.dup(theirs), "w"))
        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        assert terminal_pictures._answers_sixel() is expected
        thread.join(timeout=5)
    os.close(ours)


def test_what_is_no_terminal_is_not_asked(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not terminal_pictures._answers_sixel()


@pytest.mark.parametrize("options, count", [((), 2), (("--grid",), 1)])
def test_generate_shows_what_it_made(cogview2, tmp_path, monkeypatch, options, count):
    from cogview_pipelines.cli import generate

    shown = []
    monkeypatch.setattr(generate, "find_way", lambda wanted: Show.kitty)
    monkeypatch.setattr(generate, "show_picture", lambda image, way: shown.append((image.size, way)))
    result = cogview2("generate", "a cat", "--num-images", 2, "--seed", 1, "--output", tmp_path, *options)
    assert result.exit_code == 0
    assert len(shown) == count
    assert {way for _, way in shown} == {Show.kitty}


def test_where_output_is_no_terminal_nothing_but_paths_is_printed(cogview2, tmp_path):
    result = cogview2("generate", "a cat", "--seed", 1, "--output", tmp_path)
    assert result.stdout.strip().endswith(".png")
    assert "\033" not in result.stdout
