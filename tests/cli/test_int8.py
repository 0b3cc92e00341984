"""`--int8`: super-resolution in whole numbers on a CPU, which results tell."""

import json

import numpy as np
import pytest
from PIL import Image

from cogview_pipelines.cli import loading
from cogview_pipelines.ops.int8_linear import is_built
from cogview_pipelines.pictures.png import read_metadata, save_png

from .conftest import assert_bad_input

needs_kernels = pytest.mark.skipif(not is_built(), reason="the kernels are not built")


@needs_kernels
def test_a_picture_says_that_it_was_made_so_and_is_remade_only_so(cogview2, tmp_path):
    plain, first, again = (tmp_path / f"{name}.png" for name in ("plain", "first", "again"))
    for path, options in ((plain, ()), (first, ("--int8",))):
        assert cogview2("generate", "a cat", "--seed", 3, *options, "-o", path).exit_code == 0
    assert "int8" not in read_metadata(plain) and read_metadata(first)["int8"] is True
    assert not np.array_equal(Image.open(plain), Image.open(first))
    assert_bad_input(cogview2("generate", "--remake", first, "-o", again), "was made with --int8", "Pass --int8")
    assert not again.exists()
    assert cogview2("generate", "--remake", first, "--int8", "-o", again).exit_code == 0
    assert np.array_equal(Image.open(again), Image.open(first))


@needs_kernels
@pytest.mark.parametrize("command", ["generate", "upscale"])
def test_results_of_a_list_made_otherwise_are_not_taken_for_done(cogview2, write_list, tmp_path, command):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    work = {"prompt": "a cat"} if command == "generate" else {"prompt": "", "image": "red.png"}
    call = (command, "--requests", write_list({"id": "one", "seed": 1, **work}), "--output", tmp_path / "made")
    for first, second in ((call, (*call, "--int8")), ((*call, "--int8"), call)):
        assert cogview2(*first, "--overwrite").exit_code == 0
        assert_bad_input(cogview2(*second), "--overwrite")
        assert cogview2(*first).exit_code == 0


@pytest.mark.parametrize("command", ["generate", "upscale"])
def test_pictures_that_say_so_are_not_taken_for_others(cogview2, write_list, tmp_path, command):
    """Also where there are no kernels: the pictures may come from another machine."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    work = {"prompt": "a cat", "height": 40} if command == "generate" else {"prompt": "", "image": "red.png"}
    call = (command, "--requests", write_list({"id": "one", "seed": 1, **work}), "--output", tmp_path / "made")
    assert cogview2(*call).exit_code == 0
    made = tmp_path / "made" / "one.png"
    save_png(Image.open(made), made, {**read_metadata(made), "int8": True})
    assert_bad_input(cogview2(*call), "--overwrite")
    if command == "generate":
        result = cogview2("generate", "--remake", made, "-o", tmp_path / "again.png")
        assert_bad_input(result, "was made with --int8", "Pass --int8")


@needs_kernels
def test_bench_and_evaluate_say_what_they_measured(cogview2):
    result = cogview2("bench", "-b", 1, "--seconds", 0.1, "--int8", "--json")
    assert json.loads(result.stdout)["int8"] is True
    lines = [json.loads(cogview2("evaluate", "--num", 2, "--json", *more).stdout) for more in ((), ("--int8",))]
    assert "int8" not in lines[0] and lines[1]["int8"] is True


class Reached(Exception):
    """The pipeline was told to compute so."""


@needs_kernels
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a cat"),
        ("inpaint", "a cat", "--image", "red.png", "--left", "8", "-o", "made.png"),
        ("upscale", "red.png", "-o", "made.png"),
        ("bench",),
        ("serve", "--port", "0"),
        ("evaluate", "--num", "2"),
        ("evaluate", "--captions", "captions.jsonl", "--output", "evaluated"),
    ],
)
def test_every_command_that_enlarges_pictures_takes_it(cogview2, pipeline, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("red.png")
    (tmp_path / "captions.jsonl").write_text('{"id": "a", "caption": "a cat"}\n')

    def set_super_resolution(self, *, int8=False):
        assert int8
        raise Reached

    monkeypatch.setattr(type(pipeline), "set_super_resolution", set_super_resolution)
    with pytest.raises(Reached):
        cogview2(*arguments, "--int8")


def test_where_it_cannot_be_is_said(cogview2, tmp_path, monkeypatch):
    made = ("-o", tmp_path / "a.png", "--int8")
    monkeypatch.setattr("cogview_pipelines.pipelines.cogview2.base.is_built", lambda: False)
    assert_bad_input(cogview2("generate", "a cat", *made), "`--int8`", "needs the kernels")
    monkeypatch.setattr(loading, "choose_device", lambda device: "cuda")
    assert_bad_input(cogview2("generate", "a cat", *made), "`--int8` computes on a CPU, but the device is cuda")
