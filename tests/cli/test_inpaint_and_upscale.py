"""`cogview2 inpaint`, `upscale`, `caption` and `score` on files."""

import json

import numpy as np
import pytest
from PIL import Image

from cogview_pipelines.cli import inpaint_and_upscale as pictures
from cogview_pipelines.cli import inputs
from cogview_pipelines.pictures.png import read_metadata

from .conftest import assert_bad_input

PROMPT = "a cat on a blue background."


@pytest.fixture
def files(tmp_path):
    """A picture and a mask of 70 x 50 pixels."""
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = np.zeros((50, 70), np.uint8)
    mask[15:35, 20:40] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def paint(cogview2, files, *arguments):
    return cogview2("inpaint", PROMPT, "--image", files / "image.png", *arguments)


def test_inpaint_changes_the_masked_part_and_keeps_its_recipe(cogview2, files):
    arguments = ("--mask", files / "mask.png", "--seed", 3, "-n", 2, "--output", files / "out.png")
    result = paint(cogview2, files, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(files / "out-1.png"), str(files / "out-2.png")]
    before, mask = pixels(files / "image.png"), pixels(files / "mask.png") > 0
    for index in (1, 2):
        after = pixels(files / f"out-{index}.png")
        assert np.array_equal(after[~mask], before[~mask])
        assert not np.array_equal(after[mask], before[mask])
        metadata = read_metadata(files / f"out-{index}.png")
        assert (metadata["command"], metadata["prompt"], metadata["seed"]) == ("inpaint", PROMPT, 2 + index)
    paint(cogview2, files, "--mask", files / "mask.png", "--seed", 4, "--output", files / "again.png")
    assert np.array_equal(pixels(files / "again.png"), pixels(files / "out-2.png"))


def test_inpaint_takes_transparency_for_a_mask_and_margins_instead_of_one(cogview2, files):
    mask = pixels(files / "mask.png")
    Image.fromarray(np.dstack([np.zeros((50, 70, 3), np.uint8), 255 - mask])).save(files / "hole.png")
    for name in ("mask", "hole"):
        paint(cogview2, files, "--mask", files / f"{name}.png", "--seed", 1, "--output", files / f"{name}-out.png")
    assert np.array_equal(pixels(files / "mask-out.png"), pixels(files / "hole-out.png"))
    result = paint(cogview2, files, "--right", 20, "--top", 5, "--output", files / "wide.png")
    assert result.exit_code == 0, result.output
    assert pixels(files / "wide.png").shape == (55, 90, 3)
    assert np.array_equal(pixels(files / "wide.png")[5:, :70], pixels(files / "image.png"))


def test_what_the_model_cannot_read_of_a_text_is_told(cogview2, files):
    arguments = ("--seed", 1, "--output", files / "out.png")
    masked = ("--image", files / "image.png", "--mask", files / "mask.png")
    for command in (
        ("inpaint", "a cat ☃", *masked, *arguments),
        ("upscale", files / "image.png", "--prompt", "a cat ☃", *arguments),
        ("score", files / "image.png", "a cat ☃"),
    ):
        result = cogview2(*command)
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
        effect = "so its share in the score says little" if command[0] == "score" else "and goes by the rest"
        assert line == f"Warning: the model does not know this part of the prompt, {effect}: ☃"
        assert "Warning" not in cogview2(*("a cat" if part == "a cat ☃" else part for part in command)).stderr
    result = cogview2("score", files / "image.png", "a cat", "☃ and a cat", "a ☃ ♜")
    assert "does not know this part of the prompts, so its share in the score says little: ☃, ♜" in result.stderr
    assert result.stderr.count("Warning: ") == 1


def test_upscale_enlarges(cogview2, files):
    arguments = ("upscale", files / "image.png", "--prompt", PROMPT, "--seed", 1, "--output")
    for name in ("a.png", "b.png"):
        result = cogview2(*arguments, files / name)
        assert result.exit_code == 0, result.output
    assert pixels(files / "a.png").shape == (150, 210, 3)
    assert np.array_equal(pixels(files / "a.png"), pixels(files / "b.png"))
    assert read_metadata(files / "a.png")["command"] == "upscale"


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam", "best-of"])
def test_captions_come_one_a_line(cogview2, files, strategy):
    image = files / "image.png"
    arguments = ("caption", image, image, "--strategy", strategy, "--candidates", 2, "--seed", 1, "--max-length", 5)
    result = cogview2(*arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [name for name, _ in lines] == [str(image)] * 2
    rows = [json.loads(line) for line in cogview2(*arguments, "--json", "--language", "zh").stdout.splitlines()]
    assert [row["language"] for row in rows] == ["zh", "zh"]
    alone = cogview2("caption", image, "--max-length", 5).stdout
    assert "\t" not in alone
    assert len(alone.splitlines()) == 1


def test_scores_come_best_first(cogview2, files):
    texts = ["a cat", "a red car", "一只老虎"]
    result = cogview2("score", files / "image.png", *texts)
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert sorted(text for _, text in lines) == sorted(texts)
    losses = [float(loss) for loss, _ in lines]
    assert losses == sorted(losses)
    rows = [json.loads(line) for line in cogview2("score", files / "image.png", *texts, "--json").stdout.splitlines()]
    assert [row["caption_loss"] for row in rows] == losses


def test_files_that_cannot_be_read_are_bad_input(cogview2, files, monkeypatch):
    whole = (files / "image.png").read_bytes()
    (files / "text.png").write_text("no picture")
    (files / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(files / "moving.gif", save_all=True, append_images=frames[1:])
    for name, part in (
        ("none.png", "there is no file"),
        ("text.png", "no picture that can be read"),
        ("cut.png", "damaged"),
        ("moving.gif", "animation"),
    ):
        assert_bad_input(cogview2("caption", files / name), part, name)
        assert_bad_input(cogview2("score", files / name, "a cat"), part, name)
        assert_bad_input(cogview2("upscale", files / name, "--output", files / "x.png"), part, name)
        arguments = ("--image", files / name, "--mask", files / "mask.png", "--output", files / "x.png")
        assert_bad_input(cogview2("inpaint", PROMPT, *arguments), part, name, "--image")
        arguments = ("--mask", files / name, "--output", files / "x.png")
        assert_bad_input(paint(cogview2, files, *arguments), part, name, "--mask")
    monkeypatch.setattr(inputs, "MOST_PIXELS", 1000)
    assert_bad_input(cogview2("upscale", files / "image.png", "--output", files / "x.png"), "70 x 50")
    monkeypatch.setattr(inputs, "MOST_PIXELS", 4000)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 4000)
    assert_bad_input(cogview2("upscale", files / "image.png", "--output", files / "x.png"), "million pixels")
    assert not (files / "x.png").exists()


@pytest.mark.parametrize(
    "arguments, part",
    [
        ((), "either --mask"),
        (("--requests", "list.jsonl", "--mask", "mask.png"), "leave out PROMPT, --image, --mask"),
        (("--mask", "mask.png", "--left", 3), "either --mask"),
        (("--mask", "image.png", "--output", "out.jpg"), "must be a .png file"),
        (("--mask", "empty.png"), "marks nothing to paint"),
        (("--mask", "full.png"), "marks the whole picture"),
        (("--mask", "small.png"), "must be as large as its picture"),
        (("--mask", "mask.png", "--style", "oil"), "`style` must be one of"),
    ],
)
def test_what_cannot_be_painted_is_bad_input(cogview2, files, arguments, part):
    for name, colour, size in (("empty", 0, (70, 50)), ("full", 255, (70, 50)), ("small", 255, (50, 70))):
        Image.new("L", size, colour).save(files / f"{name}.png")
    arguments = [files / value if str(value).endswith((".png", ".jpg", ".jsonl")) else value for value in arguments]
    if "--output" not in arguments:
        arguments += ["--output", files / "out.png"]
    assert_bad_input(paint(cogview2, files, *arguments), part)
    assert not (files / "out.png").exists()


def test_a_prompt_over_the_limit_is_bad_input(cogview2, files):
    arguments = ("--mask", files / "mask.png", "--output", files / "x.png")
    prompt = "a cat " * 90
    result = cogview2("inpaint", prompt, "--image", files / "image.png", *arguments)
    assert_bad_input(result, "`prompt` may have", "Shorten it")
    assert len(result.stderr) < 300
    result = cogview2("upscale", files / "image.png", "--prompt", prompt, "--output", files / "x.png")
    assert_bad_input(result, "`prompt` may have", "Shorten it")
    assert not (files / "x.png").exists()


def test_captions_and_scores_name_what_does_not_fit(cogview2, files):
    assert_bad_input(cogview2("caption", files / "image.png", "-n", 3), "may be 1 with")
    assert_bad_input(cogview2("caption", files / "image.png", "--max-length", 500), "`max_length` may be")
    assert_bad_input(cogview2("score", files / "image.png", " "), "must not be empty")
    assert_bad_input(cogview2("score", files / "image.png", "a cat " * 90), "must have 1 to")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("inpaint", "--output", "x.png"), "PROMPT and --image"),
        (("inpaint", "a cat", "--image", "image.png", "--left", 3), "`--output` must say where"),
        (("upscale", "--output", "x.png"), "FILE, or --requests"),
        (("upscale", "image.png", "--requests", "x.jsonl"), "leave out FILE"),
        (("caption",), "FILE, or --requests"),
        (("caption", "image.png", "--output", "x.jsonl"), "--output is for --requests"),
        (("caption", "image.png", "--requests", "x.jsonl"), "leave out FILE"),
        (("score",), "FILE and PROMPT"),
        (("score", "image.png"), "FILE and PROMPT"),
        (("score", "image.png", "--requests", "x.jsonl"), "leave out FILE"),
    ],
)
def test_what_is_missing_or_said_twice_is_named(cogview2, files, no_model, arguments, part):
    arguments = [files / value if str(value).endswith((".png", ".jsonl")) else value for value in arguments]
    assert_bad_input(cogview2(*arguments), part)
