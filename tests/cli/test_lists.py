"""`inpaint`, `upscale`, `caption` and `score` with lists of requests: results, failures, and going on after a stop."""

import inspect
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewUpscalePipeline,
)
from cogview_pipelines.cli import console, loading
from cogview_pipelines.cli.requests import CAPTION, INPAINT, UPSCALE
from cogview_pipelines.cli.results import MANIFEST
from cogview_pipelines.pictures.png import read_metadata

from .conftest import assert_bad_input

PROMPT = "a cat on a blue background."
EDIT = {"prompt": PROMPT, "image": "image.png", "mask": "mask.png", "seed": 3}
COMMANDS = {
    "inpaint": EDIT,
    "upscale": {"image": "image.png", "seed": 3},
    "caption": {"image": "image.png", "max_length": 4},
    "score": {"image": "image.png", "prompts": ["a cat", "一只老虎"]},
}


@pytest.fixture
def folder(tmp_path):
    """Pictures of 48 x 48 pixels, a mask, and a file that is no picture: beside the list."""
    for index, name in enumerate(("image.png", "other.png")):
        pixels = np.random.RandomState(index).randint(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    mask = Image.new("L", (48, 48))
    mask.paste(255, (10, 10, 30, 25))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


@pytest.fixture(autouse=True)
def loads(monkeypatch, pipeline):
    """How often a model was loaded; it is in memory already, which `test_inpaint_and_upscale.py` does without."""
    calls = []

    def load_pipeline(*arguments, **options):
        calls.append(arguments)
        return pipeline

    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)
    return calls


def output_of(command, folder):
    return folder / ("out" if command in ("inpaint", "upscale") else "out.jsonl")


def results_of(command, folder):
    """By id, what is in the output: bytes of pictures, or rows."""
    output = output_of(command, folder)
    if output.is_dir():
        return {path.stem: path.read_bytes() for path in sorted(output.glob("*.png"))}
    return {row["id"]: row for row in read_jsonl(output)}


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(cogview2, command, path, *arguments):
    return cogview2(command, "--requests", path, "--output", output_of(command, path.parent), *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_line_gives_a_result_and_a_rerun_makes_only_what_is_missing(cogview2, write_list, folder, loads, command):
    line = COMMANDS[command]
    path = write_list({**line, "id": "a"}, "", {**line, "id": "b", "image": "other.png"} | mask_of(command))
    result = run(cogview2, command, path)
    assert result.exit_code == 0, result.output
    first = results_of(command, folder)
    assert list(first) == ["a", "b"]
    assert first["a"] != first["b"]

    assert run(cogview2, command, path).exit_code == 0
    assert len(loads) == 1  # nothing was left to do
    assert results_of(command, folder) == first

    path = write_list({**line, "id": "a"}, {**line, "id": "c"}, {**line, "id": "b", "image": "other.png"})
    result = run(cogview2, command, path)
    assert result.exit_code == 0, result.output
    assert "2 of 3" in result.stderr
    again = results_of(command, folder)
    assert {id: again[id] for id in first} == first
    assert sorted(again) == ["a", "b", "c"]


def mask_of(command):
    return {"mask": "mask.png"} if command == "inpaint" else {}


@pytest.mark.parametrize("command", COMMANDS)
def test_lines_that_fail_stop_no_other_and_are_tried_again(cogview2, write_list, folder, command):
    line = COMMANDS[command]
    path = write_list(
        {**line, "id": "gone", "image": "gone.png"},
        {**line, "id": "text", "image": "text.png"},
        {**line, "id": "good"},
    )
    result = run(cogview2, command, path)
    assert result.exit_code == 1
    errors = result.stderr.strip().splitlines()
    assert errors[0].startswith(f"Error: {path}, line 1: ") and "gone.png" in errors[0]
    assert errors[1].startswith(f"Error: {path}, line 2: ") and "text.png" in errors[1]
    assert "2 of 3 lines failed" in errors[-1]
    assert list(results_of(command, folder)) == ["good"]
    for name in ("gone.png", "text.png"):
        (folder / name).write_bytes((folder / "other.png").read_bytes())
    assert run(cogview2, command, path).exit_code == 0
    assert sorted(results_of(command, folder)) == ["gone", "good", "text"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_of_another_request_or_of_a_changed_picture_is_replaced_only_if_asked(
    cogview2, write_list, folder, command
):
    line = {**COMMANDS[command], "id": "a"}
    assert run(cogview2, command, write_list(line)).exit_code == 0
    first = results_of(command, folder)
    (folder / "image.png").write_bytes((folder / "other.png").read_bytes())
    result = run(cogview2, command, write_list(line))
    assert_bad_input(result, "--overwrite")
    assert results_of(command, folder) == first
    assert run(cogview2, command, write_list(line), "--overwrite").exit_code == 0
    assert results_of(command, folder) != first
    assert list(results_of(command, folder)) == ["a"]


@pytest.mark.parametrize("command", ["inpaint", "score"])
@pytest.mark.parametrize(
    "change, part",
    [
        ({"colour": 1}, "has unknown fields: colour"),
        ({"image": 7}, "`image` must be the path of a file"),
        ({"id": "../a"}, "`id` must be"),
        ({"id": "good"}, "again, after"),
        ({"image": None}, "lacks `image`"),
        ({"max_batch_size": 0}, "`max_batch_size` must be a whole number of at least 1"),
    ],
)
def test_a_line_that_says_something_else_is_found_before_anything_is_done(
    cogview2, write_list, no_model, folder, command, change, part
):
    line = {**COMMANDS[command], "id": "bad", **change}
    line = {name: value for name, value in line.items() if value is not None}
    path = write_list({**COMMANDS[command], "id": "good"}, line)
    assert_bad_input(run(cogview2, command, path), f"{path}, line 2: ", part)
    assert not output_of(command, folder).exists()


@pytest.mark.parametrize(
    "command, change, part",
    [
        ("inpaint", {"prompt": ""}, "`prompt` must not be empty"),
        ("inpaint", {"mask": None}, "must say where to paint"),
        ("inpaint", {"left": 3}, "must say where to paint"),
        ("inpaint", {"mask_share": 2}, "`mask_share` must be a number from 0 to 1"),
        ("inpaint", {"super_resolve": "yes"}, "`super_resolve` must be true or false"),
        ("inpaint", {"num_candidates": 3}, "unknown fields: num_candidates"),
        ("inpaint", {"seed": -1}, "`seed` must be"),
        ("upscale", {"prompt": 7}, "`prompt` must be a text"),
        ("upscale", {"num_levels": 1.5}, "`num_levels` must be a whole number"),
        ("caption", {"language": "de"}, "`language` must be one of en, zh"),
        ("caption", {"strategy": "best"}, "`strategy` must be one of"),
        ("score", {"prompts": []}, "`prompts` must be a list of texts"),
        ("score", {"prompts": "a cat"}, "`prompts` must be a list of texts"),
        ("score", {"prompts": ["a cat", " "]}, "`prompts` must not be empty"),
        ("score", {"prompts": None}, "lacks `prompts`"),
        ("score", {"seed": 3}, "unknown fields: seed"),
    ],
)
def test_fields_are_checked(cogview2, write_list, no_model, folder, command, change, part):
    line = {**COMMANDS[command], "id": "a", **change}
    path = write_list({name: value for name, value in line.items() if value is not None})
    assert_bad_input(run(cogview2, command, path), f"{path}, line 1: ", part)


def test_pictures_of_a_list_are_those_of_single_calls_and_keep_their_recipe(cogview2, write_list, folder):
    path = write_list(
        {**EDIT, "id": "two", "num_images_per_prompt": 2, "temperature": 0.8},
        {"id": "wide", "prompt": PROMPT, "image": "image.png", "left": 10, "seed": 1},
    )
    assert run(cogview2, "inpaint", path, "--num-lopar-steps", 2).exit_code == 0
    out = folder / "out"
    assert Image.open(out / "wide.png").size == (58, 48)
    files = ("--image", folder / "image.png", "--mask", folder / "mask.png")
    settings = ("--seed", 3, "-n", 2, "--temperature", 0.8, "--num-lopar-steps", 2)
    cogview2("inpaint", PROMPT, *files, *settings, "--output", folder / "one.png")
    for index in (1, 2):
        own, single = (read_metadata(path) for path in (out / f"two-{index}.png", folder / f"one-{index}.png"))
        assert own == single
        assert own["seed"] == 2 + index
        assert own["settings"] == {"temperature": 0.8, "num_lopar_steps": 2}
        assert own["inputs"]["mask"]["file"] == "mask.png"
        assert Image.open(out / f"two-{index}.png").tobytes() == Image.open(folder / f"one-{index}.png").tobytes()
    rows = read_jsonl(out / MANIFEST)
    assert [(row["id"], row["file"]) for row in rows] == [
        ("two", "two-1.png"),
        ("two", "two-2.png"),
        ("wide", "wide.png"),
    ]
    assert rows[2]["settings"] == {"num_lopar_steps": 2, "left": 10}


def test_captions_of_a_list_are_those_of_single_calls_whatever_their_batch(cogview2, write_list, folder):
    drawn = {"strategy": "best-of", "num_candidates": 3, "num_captions_per_image": 2, "max_length": 5, "seed": 4}
    lines = [
        {**drawn, "id": "a", "image": "image.png"},
        {**drawn, "id": "b", "image": "other.png"},
        {"id": "c", "image": "other.png", "language": "zh", "max_length": 5},
        {**drawn, "id": "d", "image": "image.png", "seed": 5},
    ]
    assert run(cogview2, "caption", write_list(*lines)).exit_code == 0
    rows = results_of("caption", folder)
    assert sorted(rows) == ["a", "b", "c", "d"]
    arguments = ("--strategy", "best-of", "--candidates", 3, "-n", 2, "--max-length", 5, "--seed", 4, "--json")
    for id, name in (("a", "image.png"), ("b", "other.png")):
        single = [json.loads(line) for line in cogview2("caption", folder / name, *arguments).stdout.splitlines()]
        assert [row["caption"] for row in single] == [entry["caption"] for entry in rows[id]["captions"]]
        assert rows[id]["seed"] == 4
    assert rows["c"]["language"] == "zh" and "seed" not in rows["c"]
    assert rows["a"]["settings"]["strategy"] == "best_of"


def test_scores_of_a_list_come_best_first_and_without_an_output_they_are_printed(cogview2, write_list, folder):
    line = {**COMMANDS["score"], "id": "a"}
    result = cogview2("score", "--requests", write_list(line))
    assert result.exit_code == 0, result.output
    (row,) = [json.loads(text) for text in result.stdout.splitlines()]
    losses = [entry["caption_loss"] for entry in row["scores"]]
    assert losses == sorted(losses)
    single = cogview2("score", folder / "image.png", *line["prompts"], "--json").stdout.splitlines()
    assert [json.loads(text) for text in single] == row["scores"]


@pytest.mark.parametrize("command", ["inpaint", "upscale", "score"])
def test_what_the_model_cannot_read_of_a_line_is_told_with_its_place(cogview2, write_list, folder, command):
    texts = {"prompts": ["a cat", "a cat ☃"]} if command == "score" else {"prompt": "a cat ☃"}
    if command == "inpaint":
        texts |= {"negative_prompt": "a dog ♜", "guidance_scale": 2}
    path = write_list({**COMMANDS[command], "id": "a"}, {**COMMANDS[command], "id": "b", **texts})
    result = run(cogview2, command, path)
    assert result.exit_code == 0, result.output
    line, *others = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    name = "the prompts" if command == "score" else "the prompt"
    effect = "so its share in the score says little" if command == "score" else "and goes by the rest"
    assert f"this part of {name} of {path}, line 2, {effect}: ☃" in line
    assert [other.partition("this part of ")[2] for other in others] == (
        [f"the negative prompt of {path}, line 2, and goes by the rest: ♜"] if command == "inpaint" else []
    )


def test_a_line_cut_off_by_a_stop_is_made_again_and_other_lines_stay(cogview2, write_list, folder):
    line = COMMANDS["caption"]
    output = output_of("caption", folder)
    run(cogview2, "caption", write_list({**line, "id": "a"}, {**line, "id": "b"}))
    whole = results_of("caption", folder)
    text = output.read_text(encoding="utf-8")
    output.write_text('{"id": "mine"}\n' + text[:-20], encoding="utf-8")
    result = run(cogview2, "caption", write_list({**line, "id": "a"}, {**line, "id": "b"}))
    assert result.exit_code == 0, result.output
    assert "1 of 2" in result.stderr
    assert results_of("caption", folder) == {"mine": {"id": "mine"}, **whole}


def test_a_request_that_the_model_cannot_do_fails_alone(cogview2, write_list, folder):
    path = write_list(
        {"id": "long", "image": "image.png", "max_length": 5000},
        {"id": "good", "image": "image.png", "max_length": 3},
        {"id": "greedy", "image": "image.png", "num_captions_per_image": 2},
    )
    result = run(cogview2, "caption", path)
    assert result.exit_code == 1
    assert "line 1: `max_length` may be" in result.stderr
    assert "line 3: `num_captions_per_image` may be 1" in result.stderr
    assert list(results_of("caption", folder)) == ["good"]
    path = write_list({**EDIT, "id": "good"}, {**EDIT, "id": "oil", "style": "oil"})
    result = run(cogview2, "inpaint", path)
    assert result.exit_code == 1
    assert "line 2: `style` must be one of" in result.stderr
    assert list(results_of("inpaint", folder)) == ["good"]


@pytest.mark.parametrize("command", ["caption", "score"])
@pytest.mark.parametrize("name", ["notes.txt", "image.png", "rows.jsonl", "list.jsonl"])
def test_no_file_but_one_of_results_is_written_anew(cogview2, write_list, no_model, folder, command, name):
    path = write_list({**COMMANDS[command], "id": "a"})
    (folder / "notes.txt").write_text("my notes\n")
    (folder / "rows.jsonl").write_text("".join(f'{{"name": {number}}}\n' for number in range(5)))
    before = (folder / name).read_bytes()
    result = cogview2(command, "--requests", path, "--output", folder / name, "--overwrite")
    assert_bad_input(result, "`--output`", folder / name)
    assert (folder / name).read_bytes() == before


def test_rows_of_others_stay_even_if_their_ids_are_no_texts_or_not_unique(cogview2, write_list, folder):
    rows = [{"id": 1}, {"id": "x", "n": 1}, {"id": "x", "n": 2}, {"id": ["a"]}]
    output = output_of("caption", folder)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(cogview2, "caption", write_list({**COMMANDS["caption"], "id": "a"}))
    assert result.exit_code == 0, result.output
    assert read_jsonl(output)[:4] == rows and read_jsonl(output)[4]["id"] == "a"


def test_captions_for_nobody_are_not_computed(cogview2, write_list, folder, monkeypatch):
    monkeypatch.setattr(console.Reports, "is_closed", True, raising=False)
    monkeypatch.setattr(console.Reports, "__init__", lambda self, stream: setattr(self, "_stream", stream))
    calls = []
    call = CogView2CaptionPipeline.__call__
    monkeypatch.setattr(CogView2CaptionPipeline, "__call__", lambda *a, **kw: (calls.append(a), call(*a, **kw))[1])
    line = {**COMMANDS["caption"], "max_batch_size": 1}
    result = cogview2("caption", "--requests", write_list({**line, "id": "a"}, {**line, "id": "b"}))
    assert (result.exit_code, len(calls)) == (1, 1)


def test_files_are_found_however_their_accents_are_written(cogview2, write_list, folder):
    (folder / "image.png").rename(folder / unicodedata.normalize("NFD", "é.png"))
    path = write_list({**COMMANDS["score"], "id": "a", "image": unicodedata.normalize("NFC", "é.png")})
    assert run(cogview2, "score", path).exit_code == 0


@pytest.mark.parametrize(
    "kind, pipelines, objects",
    [
        (INPAINT, [CogView2InpaintPipeline], {"mask_image"}),
        (UPSCALE, [CogView2UpscalePipeline, CogViewUpscalePipeline], {"tokens"}),
        (CAPTION, [CogView2CaptionPipeline, CogViewCaptionPipeline], {"tokens"}),
    ],
)
def test_lines_may_have_every_argument_of_the_call_that_json_can_hold(kind, pipelines, objects):
    objects = {"self", "generator", "output_type", "return_dict", "prompt_translator", *objects}
    parameters = {
        name
        for pipeline in pipelines
        for name in inspect.signature(pipeline.__call__).parameters
        if name not in objects and not name.startswith(("callback", "return_"))
    }
    margins = {"top", "bottom", "left", "right"} if kind is INPAINT else set()
    assert parameters | margins == (set(kind.fields) - {"id", "seed", "mask"})
