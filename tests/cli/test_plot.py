"""`cogview2 plot`: files that can be looked at."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app, plot

from .conftest import assert_bad_input

pytest.importorskip("matplotlib", reason="needs the extra `plots`")


def run(*arguments):
    return CliRunner().invoke(app, ["plot", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def runs(tmp_path):
    """Two runs; the names hold what matplotlib could take for something else."""
    folders = []
    for factor, name in enumerate(("_first $x_", "第二次"), 1):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [{"step": step, "loss": factor / step, "learning_rate": 1e-3} for step in range(1, 40)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "lo')
        folders.append(folder)
    return folders


def test_both_formats_are_written_and_runs_have_different_colours(runs, tmp_path):
    result = run(*runs, "--key", "loss", "--smooth", 5, "--log", "-o", tmp_path / "out" / "curves")
    assert result.exit_code == 0, result.output
    files = [tmp_path / "out" / "curves.png", tmp_path / "out" / "curves.svg"]
    assert result.stdout.split() == [str(file) for file in files]
    assert sorted((tmp_path / "out").iterdir()) == files
    colours = {colour for _, colour in Image.open(files[0]).convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours
    assert ElementTree.parse(files[1]).getroot().tag.endswith("svg")


def test_the_same_numbers_are_the_same_file(runs, tmp_path):
    for name in ("a.svg", "b.svg"):
        assert run(*runs, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_values_are_bars(tmp_path):
    figures = {"caption_loss": {"value": 2.0, "standard_error": 0.1}, "fid_0": {"value": 9.0, "standard_error": None}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"figures": figures}))
    result = run(tmp_path, "-o", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def test_one_point_can_be_seen(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    assert run(tmp_path, "-o", tmp_path / "plot.png").exit_code == 0
    colours = {colour for _, colour in Image.open(tmp_path / "plot.png").convert("RGB").getcolors(1 << 20)}
    assert (31, 119, 180) in colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--key", "lost"], "nothing is called 'lost' in what was given. There are loss, learning_rate"),
        (["RUN", "-o", "plot.pdf"], "written as .png or .svg, not as .pdf"),
        (["none"], "there is no file or folder none"),
    ],
)
def test_bad_input_is_told_in_a_line(runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(run(*(runs[0] if part == "RUN" else part for part in arguments)), message)


def test_too_many_numbers_are_to_be_chosen_from(tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({f"n{number}": number for number in range(40)}))
    assert_bad_input(run(tmp_path / "bench.jsonl"), "There are 40 numbers", "--key")


def test_without_matplotlib_the_extra_is_named(runs, monkeypatch):
    monkeypatch.setattr(plot, "NEEDED", "no_such_package")
    assert importlib.util.find_spec("no_such_package") is None
    result = run(runs[0])
    assert result.exit_code == 1 and "cogview_pipelines[plots]" in result.stderr
