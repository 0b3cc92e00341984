"""`cogview2 attend`: files with the maps of a picture."""

import importlib.util
import json

import pytest
import torch
from PIL import Image

from .conftest import LOW_SIZE, assert_bad_input

pytest.importorskip("matplotlib", reason="needs the extra `plots`")
from cogview_pipelines.plots.drawing import draw_marks, draw_table

FIXED = {"picture.png", "heads.png", "scales.png", "segments.png", "attention.json"}
PROMPT = "a tiger on a blue background"


def test_a_picture_a_map_for_each_word_and_numbers(cogview2, pipeline, tmp_path):
    result = cogview2("attend", PROMPT, "--seed", 3, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    numbers = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert numbers["prompt"] == PROMPT and numbers["seed"] == 3
    maps = pipeline.attention_maps(PROMPT, generator=torch.Generator().manual_seed(3))
    assert [row["word"] for row in numbers["words"]] == maps.words
    torch.testing.assert_close(torch.tensor(numbers["score_scales"]), maps.score_scales)
    expected = pipeline(PROMPT, height=LOW_SIZE, width=LOW_SIZE, generator=torch.Generator().manual_seed(3)).images[0]
    picture = Image.open(tmp_path / "out" / "picture.png")
    assert picture.tobytes() == expected.resize(picture.size).tobytes()
    assert numbers["segments"] == maps.segments().tolist()
    files = {row["file"] for row in numbers["words"]} | FIXED
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert sorted(result.stdout.split()) == sorted(str(tmp_path / "out" / name) for name in files)


def test_scales_and_segments_are_drawn(cogview2, tmp_path):
    assert cogview2("attend", PROMPT, "--seed", 3, "-o", tmp_path / "out").exit_code == 0
    numbers = json.loads((tmp_path / "out" / "attention.json").read_text())
    scales = draw_table(numbers["score_scales"], "t", "layer", "head")
    (axes, _) = scales.axes
    assert axes.images[0].get_array().tolist() == numbers["score_scales"]
    assert [text.get_text() for text in axes.texts] == [f"{x:.2g}" for row in numbers["score_scales"] for x in row]
    words = [row["word"] for row in numbers["words"]]
    (axes,) = draw_marks(Image.new("RGB", (8, 8)), numbers["segments"], words).axes
    shown = {}
    for dots in axes.collections:
        for x, y in dots.get_offsets().tolist():
            shown[int(y), int(x)] = dots.get_label()
    cells = {(y, x): word for y, row in enumerate(numbers["segments"]) for x, word in enumerate(row)}
    assert shown == {place: words[word] for place, word in cells.items() if word >= 0} and len(shown) == 6  # of 25
    for name in ("scales.png", "segments.png"):
        picture = Image.open(tmp_path / "out" / name).convert("RGB")
        assert len(picture.getcolors(10**6)) > 10


def test_without_matplotlib_the_rest_is_written(cogview2, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(name))
    result = cogview2("attend", PROMPT, "--seed", 3, "-o", tmp_path / "out")
    assert result.exit_code == 0 and 'pip install "cogview_pipelines[plots]"' in result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert FIXED - names == {"scales.png", "segments.png"}


def test_one_head_may_be_shown_alone(cogview2, tmp_path):
    shown = []
    for head in ("0,0", "1,1"):
        assert cogview2("attend", PROMPT, "--seed", 3, "--head", head, "-o", tmp_path / head).exit_code == 0
        shown.append(sorted((tmp_path / head).glob("word-01*.png"))[0].read_bytes())
    assert shown[0] != shown[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "3"], "`--head` must be LAYER,HEAD"),
        (["--head", "99,0"], "`--head` must be below"),
        (["--head", "9" * 5000 + ",0"], "`--head` must be LAYER,HEAD"),
        (["-o", "~nouser-of-this-name/x"], "cannot be found"),
        (["-o", "x" * 300], "File name too long"),
        (["--style", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_told_in_a_line(cogview2, tmp_path, arguments, message):
    assert_bad_input(cogview2("attend", PROMPT, *([] if "-o" in arguments else ["-o", tmp_path]), *arguments), message)


def test_a_second_call_replaces_the_files_of_the_first_and_no_others(cogview2, tmp_path):
    (tmp_path / "notes.txt").write_text("dear to me")
    assert cogview2("attend", PROMPT, "--seed", 3, "-o", tmp_path).exit_code == 0
    first = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "heads.png").unlink()  # as if a stop had come before
    assert cogview2("attend", "a cat", "--seed", 3, "-o", tmp_path).exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    words = {row["file"] for row in json.loads((tmp_path / "attention.json").read_text())["words"]}
    assert names == words | FIXED | {"notes.txt"} and names != first


@pytest.mark.parametrize("name", ["picture.png", "word-01-dog.png", "scales.png", "attention.json"])
def test_files_of_others_are_not_replaced(cogview2, no_model, tmp_path, name):
    (tmp_path / name).write_bytes(b"[]")
    assert_bad_input(cogview2("attend", PROMPT, "-o", tmp_path), name, "Name another folder")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"[]"
