import inspect
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cogview_pipelines import __version__
from cogview_pipelines.cli import app
from cogview_pipelines.cli.loading import describe_model
from cogview_pipelines.cli.requests import ARGUMENTS
from cogview_pipelines.environment import fingerprint
from cogview_pipelines.pictures.png import read_metadata, save_png
from cogview_pipelines.pipelines.cogview.pipeline_cogview import CogViewPipeline
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline

from .conftest import FULL_SIZE, LOW_SIZE, assert_bad_input

TIGER, TIGER_ZH = "a tiger on a blue background.", "一只老虎,蓝色背景。"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def look_the_same(first, second):
    """Up to the rounding of one colour level: sums are ordered otherwise in a batch of another size."""
    return np.abs(pixels(first) - pixels(second)).max() <= 1


def test_each_picture_is_written_and_named_on_stdout(cogview2, tmp_path):
    result = cogview2("generate", TIGER, TIGER_ZH, "--seed", 7, "--num-images", 2, "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    names = [f"a-tiger-on-a-blue-background-{seed}.png" for seed in (7, 8)]
    names += [f"一只老虎-蓝色背景-{seed}.png" for seed in (7, 8)]
    assert result.stdout.split() == [str(tmp_path / "new" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert pixels(tmp_path / "new" / names[0]).shape == (FULL_SIZE, FULL_SIZE, 3)


def test_picture_i_of_seed_s_is_the_one_of_seed_s_plus_i(cogview2, tmp_path):
    cogview2(
        "generate", TIGER, TIGER_ZH, "--seed", 7, "-n", 3, "--max-batch-size", 4, "--output", tmp_path / "all.png"
    )
    cogview2("generate", TIGER_ZH, "--seed", 9, "--output", tmp_path / "one.png")
    assert look_the_same(tmp_path / "all-6.png", tmp_path / "one.png")
    assert not look_the_same(tmp_path / "all-5.png", tmp_path / "one.png")


def test_pictures_are_those_of_the_pipeline(cogview2, model_folder, tmp_path):
    import torch

    cogview2("generate", TIGER, "--seed", 3, "--temperature", 0.7, "--output", tmp_path / "a.png")
    pipe = CogView2Pipeline.from_pretrained(model_folder)
    image = pipe(TIGER, generator=torch.Generator().manual_seed(3), temperature=0.7).images[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(image))


def test_no_picture_in_a_folder_is_overwritten(cogview2, tmp_path):
    for _ in range(2):
        assert cogview2("generate", "?!", "--seed", 1, "--output", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-1-2.png", "picture-1.png"]


def test_a_grid_shows_all_pictures(cogview2, tmp_path):
    arguments = (TIGER, TIGER_ZH, "--seed", 5, "-n", 2, "--height", LOW_SIZE)
    cogview2("generate", *arguments, "--output", tmp_path / "one.png")  # a batch of four, as in the grid
    assert cogview2("generate", *arguments, "--grid", "--output", tmp_path / "grid.png").exit_code == 0
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * LOW_SIZE, 2 * LOW_SIZE, 3)
    assert np.array_equal(grid[LOW_SIZE:, :LOW_SIZE], pixels(tmp_path / "one-3.png"))
    shown = read_metadata(tmp_path / "grid.png")["pictures"]
    assert [(picture["prompt"], picture["seed"]) for picture in shown] == [
        (TIGER, 5),
        (TIGER, 6),
        (TIGER_ZH, 5),
        (TIGER_ZH, 6),
    ]


def test_the_grid_of_one_prompt_is_nearly_square_and_filled_up_in_white(cogview2, tmp_path):
    result = cogview2("generate", TIGER, "--seed", 5, "-n", 3, "--height", LOW_SIZE, "--grid", "--output", tmp_path)
    grid = pixels(result.stdout.strip())
    assert grid.shape == (2 * LOW_SIZE, 2 * LOW_SIZE, 3)
    assert (grid[LOW_SIZE:, LOW_SIZE:] == 255).all()


def test_metadata_tells_how_to_make_the_picture_again(cogview2, model_folder, tmp_path):
    first = tmp_path / "first.png"
    settings = ("--style", "cool", "--temperature", 0.9, "--iterative-sr-top-k", "9,8,7,6,5", "--height", FULL_SIZE)
    cogview2("generate", TIGER_ZH, "--seed", 11, *settings, "--output", first)
    metadata = read_metadata(first)
    assert metadata["Software"] == f"cogview_pipelines {__version__}"
    assert (metadata["prompt"], metadata["seed"], metadata["model"]) == (TIGER_ZH, 11, model_folder.name)
    assert str(model_folder).encode() not in first.read_bytes()  # where a model stands is nobody's business
    assert metadata["settings"]["style"] == "cool"
    assert metadata["settings"]["iterative_sr_top_k"] == [9, 8, 7, 6, 5]

    options = []
    for name, value in metadata["settings"].items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    again = tmp_path / "again.png"
    cogview2("generate", metadata["prompt"], "--seed", metadata["seed"], *options, "--output", again)
    assert np.array_equal(pixels(first), pixels(again))

    remade = cogview2("generate", "--remake", first, "--output", tmp_path / "remade.png")
    assert remade.exit_code == 0, remade.output
    assert np.array_equal(pixels(first), pixels(tmp_path / "remade.png"))
    cogview2("generate", "--remake", first, "--seed", 12, "--output", tmp_path / "other.png")
    assert not np.array_equal(pixels(first), pixels(tmp_path / "other.png"))
    assert read_metadata(tmp_path / "other.png")["settings"] == metadata["settings"]


@pytest.mark.parametrize("named", ["evil/model", "/somewhere", "shipped"])
def test_the_model_that_a_picture_names_is_not_loaded_for_that(no_model, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    metadata = {"prompt": TIGER, "seed": 1, "settings": {}, "model": named, "model_fingerprint": "0" * 16}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    result = CliRunner().invoke(app, ["generate", "--remake", "a.png"], catch_exceptions=False)
    assert_bad_input(result, f"made by the model '{named}'", "Pass --model")


@pytest.mark.parametrize("command, shown", [("inpaint", "'inpaint'"), ({"a": "x" * 1000}, "xxx")])
def test_a_picture_that_was_made_from_another_one_is_not_remade_from_its_prompt(no_model, tmp_path, command, shown):
    metadata = {"command": command, "prompt": TIGER, "seed": 1, "settings": {}, "model": "owner/name"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    arguments = ["generate", "--remake", str(tmp_path / "a.png"), "--model", "owner/name"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert_bad_input(result, "was not made from its prompt alone", shown)
    assert len(result.stderr) < 1000


def test_a_picture_of_another_model_is_made_by_the_one_that_is_asked_for(cogview2, tmp_path):
    settings = {"height": LOW_SIZE, "width": LOW_SIZE}
    metadata = {"prompt": TIGER, "seed": 1, "settings": settings, "model": "owner/name", "model_fingerprint": "0" * 16}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    result = cogview2("generate", "--remake", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    cogview2("generate", TIGER, "--seed", 1, "--height", LOW_SIZE, "--output", tmp_path / "c.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_the_fingerprint_of_a_model_is_that_of_its_weights(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "copy")
    assert describe_model(str(tmp_path / "copy")) == {
        "model": "copy",
        "model_fingerprint": describe_model(str(model_folder))["model_fingerprint"],
    }
    small, large = "vqvae/config.json", "transformer/model-00002-of-00002.safetensors"
    assert (model_folder / small).stat().st_size < 2**20  # read whole
    told = []
    for name in (None, small, large):  # in a folder of its own each, since fingerprints are cached
        other = shutil.copytree(model_folder, tmp_path / f"other-{len(told)}")
        (other / large).write_bytes(bytes(2**21))  # read in parts
        if name is not None:
            content = bytearray((other / name).read_bytes())
            content[-1] ^= 1
            (other / name).write_bytes(content)
        told.append(fingerprint(other))
    assert len(set(told)) == 3
    assert describe_model("owner/name") == {"model": "owner/name"}


def test_metadata_can_be_left_out(cogview2, tmp_path):
    arguments = ("generate", TIGER, "--seed", 1, "--height", LOW_SIZE, "--no-metadata", "--output")
    assert cogview2(*arguments, tmp_path / "a.png").exit_code == 0
    assert cogview2(*arguments, tmp_path / "b.png", "--grid").exit_code == 0
    for name in ("a.png", "b.png"):
        assert read_metadata(tmp_path / name) == {}


def test_prompts_whose_names_differ_in_case_only_are_two_files(cogview2, tmp_path):
    result = cogview2("generate", "A TIGER", "a tiger", "--seed", 1, "--height", LOW_SIZE, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A-TIGER-1.png", "a-tiger-1-2.png"]


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([TIGER, "-o", "~nouser-of-this-name/x.png"], ["`--output`", "~nouser-of-this-name/x.png"]),
        ([TIGER, "-o", f"{LONG}.png"], ["`--output`", "304 bytes"]),
        ([TIGER, "-o", LONG], ["`--output`", "too long"]),
        ([TIGER, "-o", f"{LONG}/a.png"], ["`--output`", "too long"]),
        ([TIGER, "-o", f"{'虎' * 84}.png"], ["`--output`", "256 bytes"]),
        (["--remake", "~nouser-of-this-name/x.png"], ["`--remake`"]),
        (["--remake", LONG], ["too long"]),
        (["--remake", "deep.png"], ["does not say how one picture was made"]),
        (["--remake", "list.png"], ["`height` must be"]),
        (["--prompts", LONG], ["too long"]),
        (["--prompts", "~nouser-of-this-name/x.jsonl"], ["`--prompts`"]),
    ],
)
def test_paths_and_files_that_make_no_sense_are_told_in_one_line(
    cogview2, no_model, tmp_path, monkeypatch, arguments, parts
):
    monkeypatch.chdir(tmp_path)
    metadata = {"prompt": TIGER, "seed": 1, "model": "shipped", "settings": "[" * 3000}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "deep.png", metadata)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "list.png", {**metadata, "settings": {"height": []}, "dtype": [1]})
    assert_bad_input(cogview2("generate", *arguments), *parts)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "outputs") == ["deep.png", "list.png"]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--model", LONG], ["`--model`", LONG]),
        (["--model", f"{LONG}/{LONG}"], ["`--model`"]),
        (["--model", "~nouser-of-this-name"], ["`--model`", "~nouser-of-this-name"]),
        (["--model", "deep"], ["`--model`", "deep", "damaged"]),
        (["--device", "meta"], ["`--device`", "meta"]),
    ],
)
def test_models_and_devices_that_make_no_sense_are_told_in_one_line(cogview2, tmp_path, monkeypatch, arguments, parts):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model_index.json").write_text("[" * 100_000)
    assert_bad_input(cogview2("generate", TIGER, *arguments, "--output", "a.png"), *parts)


def test_a_name_that_is_no_unicode_is_a_name(cogview2, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.png")
    result = cogview2("generate", TIGER, "--height", LOW_SIZE, "--output", path)
    assert result.exit_code == 0, result.output
    assert read_metadata(path)["prompt"] == TIGER


def test_a_seed_drawn_by_chance_is_kept_and_makes_the_picture_again(cogview2, tmp_path):
    cogview2("generate", TIGER, "--output", tmp_path / "a.png")
    cogview2("generate", TIGER, "--seed", read_metadata(tmp_path / "a.png")["seed"], "--output", tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_the_best_candidates_are_kept_and_each_can_be_made_again_from_its_own_seed(cogview2, pipeline, tmp_path):
    import torch

    arguments = (TIGER, TIGER_ZH, "--seed", 20, "--num-images", 2, "--num-candidates", 4, "--height", LOW_SIZE)
    result = cogview2("generate", *arguments, "--output", tmp_path / "best.png")
    assert result.exit_code == 0, result.output
    expected = pipeline(
        [TIGER, TIGER_ZH],
        num_images_per_prompt=2,
        num_candidates=4,
        height=LOW_SIZE,
        generator=[torch.Generator().manual_seed(20 + index) for _ in range(2) for index in range(4)],
    )
    found = [read_metadata(tmp_path / f"best-{index}.png") for index in range(1, 5)]
    assert [metadata["seed"] for metadata in found] == expected.seeds
    assert [metadata["prompt"] for metadata in found] == [TIGER, TIGER, TIGER_ZH, TIGER_ZH]
    assert found[0]["post_selection"] == {"num_candidates": 4, "seed": 20, "score": pytest.approx(expected.scores[0])}
    cogview2("generate", "--remake", tmp_path / "best-3.png", "--output", tmp_path / "again.png")
    assert look_the_same(tmp_path / "best-3.png", tmp_path / "again.png")


def test_a_negative_prompt_is_led_away_from(cogview2, tmp_path):
    arguments = (TIGER, "--seed", 1, "--height", LOW_SIZE, "--guidance-scale", 4)
    cogview2("generate", *arguments, "--output", tmp_path / "a.png")
    cogview2("generate", *arguments, "--negative-prompt", "a cat", "--output", tmp_path / "b.png")
    assert not look_the_same(tmp_path / "a.png", tmp_path / "b.png")
    assert read_metadata(tmp_path / "b.png")["settings"]["negative_prompt"] == "a cat"


@pytest.mark.parametrize(
    "option, value, setting",
    [
        ("--guidance-scale", "2.5", 2.5),
        ("--text-attention-bias", "-0.5", -0.5),
        ("--temperature", "0.7", 0.7),
        ("--top-k-clusters", "2", 2),
        ("--cluster-temperature", "0.5", 0.5),
        ("--direct-sr-temperature", "0.6", 0.6),
        ("--direct-sr-top-k-clusters", "1", 1),
        ("--direct-sr-cluster-temperature", "0.4", 0.4),
        ("--iterative-sr-temperature", "0.3", 0.3),
        ("--iterative-sr-top-k", "2", 2),
        ("--num-lopar-steps", "2", 2),
        ("--num-lopar-steps", "0", 0),
        ("--style", "cool", "cool"),
        ("--width", str(LOW_SIZE), LOW_SIZE),
    ],
)
def test_every_setting_reaches_the_pipeline(cogview2, tmp_path, monkeypatch, option, value, setting):
    calls = []
    call = CogView2Pipeline.__call__
    monkeypatch.setattr(CogView2Pipeline, "__call__", lambda *a, **kw: (calls.append(kw), call(*a, **kw))[1])
    cogview2("generate", TIGER, "--seed", 1, option, value, "--output", tmp_path / "a.png")
    name = option.removeprefix("--").replace("-", "_")
    assert calls[0][name] == setting
    assert read_metadata(tmp_path / "a.png")["settings"][name] == setting


def test_requests_may_have_every_argument_of_the_call_that_json_can_hold():
    objects = {"self", "prompt", "generator", "output_type", "scorer", "prompt_translator"}
    kinds = (CogView2Pipeline, CogViewPipeline)
    parameters = {name for kind in kinds for name in inspect.signature(kind.__call__).parameters} - objects
    assert {name for name in parameters if not name.startswith(("callback", "return_"))} == set(ARGUMENTS)


def test_characters_outside_the_vocabulary_are_named_and_no_obstacle(cogview2, tmp_path):
    prompt = "a tiger ☃ Ж 龘 \U0001f984"
    result = cogview2("generate", prompt, "--seed", 1, "--output", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "the model does not know this part of the prompt" in result.stderr and result.stderr.count("☃") == 1
    assert read_metadata(tmp_path / "a.png")["prompt"] == prompt
    guided = ("--guidance-scale", 2, "--negative-prompt", "a dog ♜", "--height", LOW_SIZE)
    result = cogview2("generate", "a cat", "--output", tmp_path / "b.png", *guided)
    assert result.exit_code == 0, result.output
    warning = "Warning: the model does not know this part of the negative prompt, and goes by the rest: ♜"
    assert warning in result.stderr.splitlines()


def test_what_the_model_does_not_know_is_told_once_in_a_command(cogview2, tmp_path):
    guided = ("--guidance-scale", 2, "--negative-prompt", "a dog ♜", "--height", LOW_SIZE)
    result = cogview2("generate", "a cat ☃", "a ☃ dog", "Ж", *guided, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("Warning")] == [
        "Warning: the model does not know this part of the prompt, and goes by the rest: ☃",
        "Warning: the model does not know this part of the negative prompt, and goes by the rest: ♜",
        "Warning: the model knows nothing of the prompt: Ж",
    ]
    lines = [{"id": str(index), "prompt": f"a cat {end}"} for index, end in enumerate(("", "☃", "☃ ♜", "☃"))]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = cogview2("generate", "--requests", tmp_path / "list.jsonl", *guided, "--output", tmp_path / "made")
    assert result.exit_code == 0, result.output
    told = "Warning: the model does not know this part of the {} of {}, line {}, and goes by the rest: {}"
    assert [line for line in result.stderr.splitlines() if line.startswith("Warning")] == [
        told.format(name, tmp_path / "list.jsonl", number, part)
        for name, number, part in (("negative prompt", 1, "♜"), ("prompt", 2, "☃"), ("prompt", 3, "♜"))
    ]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["generate", " \n "], ["`prompt`", "empty"]),
        (["generate", TIGER, "--temperature", "0"], ["`temperature`", "1e-06", "0.0"]),
        (["generate", TIGER, "--temperature", "nan"], ["`temperature`", "nan"]),
        (["generate", TIGER, "--text-attention-bias", "inf"], ["`text_attention_bias`", "inf"]),
        (["generate", TIGER, "--iterative-sr-top-k", "9,x"], ["`iterative_sr_top_k`", "'x'"]),
        (["generate", TIGER, "--seed", "seven"], ["--seed"]),
        (["generate", TIGER, "--seed", "-1"], ["--seed", "0"]),
        (["generate", TIGER, "--seed", str(2**63 - 1), "-n", "2"], ["`seed`", str(2**63 - 2)]),
        (["generate", TIGER, "--num-images", "0"], ["--num-images", "1"]),
        (["generate", TIGER, "--top-k-clusters", "few"], ["--top-k-clusters", "integer"]),
        (["generate", TIGER, "--dtype", "int8"], ["--dtype", "int8"]),
        (["generate", TIGER, "--colour", "blue"], ["--colour"]),
        (["generate"], ["PROMPT", "--prompts"]),
        (["generate", TIGER, "--prompts", "list.jsonl"], ["PROMPT and --prompts"]),
        (["generate", "--prompts", "list.jsonl", "--grid"], ["--grid"]),
        (["generate", "--prompts", "list.jsonl"], ["list.jsonl", "No such file"]),
        (["generate", "--remake", "no.png"], ["no.png"]),
        (["generate", TIGER, "--output", "a.jpg"], ["`--output`", "a.jpg", ".png"]),
    ],
)
def test_bad_input_is_reported_before_the_model_is_loaded(cogview2, no_model, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    assert_bad_input(cogview2(*arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["file/new", "file/new/a.png", "file"])
def test_output_that_cannot_be_written_is_reported_before_the_model_is_loaded(cogview2, no_model, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    assert_bad_input(cogview2("generate", TIGER, "--output", tmp_path / output), "`--output`", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["tiger " * 65], ["`prompt`", "64", "Shorten"]),
        ([TIGER, "--style", "baroque"], ["`style`", "'baroque'", "cool", "plain"]),
        ([TIGER, "--height", "100"], ["100", f"{LOW_SIZE} x {LOW_SIZE}", f"{FULL_SIZE} x {FULL_SIZE}"]),
        ([TIGER, "--height", str(LOW_SIZE), "--width", str(FULL_SIZE)], [f"{LOW_SIZE} x {FULL_SIZE}"]),
        ([TIGER, "--num-lopar-steps", "99"], ["99"]),
        ([TIGER, "-n", "3", "--num-candidates", "2"], ["`num_candidates`", "3", "2"]),
        ([TIGER, "--negative-prompt", "a cat"], ["`negative_prompt`", "`guidance_scale`"]),
        ([TIGER, "--iterative-sr-top-k", "9,8"], ["`top_k`", "2"]),
        ([TIGER, "--device", "abacus"], ["`--device`", "abacus"]),
    ],
)
def test_what_the_model_cannot_do_is_reported_before_anything_is_computed(cogview2, tmp_path, arguments, parts):
    assert_bad_input(cogview2("generate", *arguments, "--output", tmp_path / "a.png"), *parts)
    assert list(tmp_path.iterdir()) == []


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_index(folder):
    (folder / "model_index.json").unlink()


def break_index(folder):
    (folder / "model_index.json").write_text("{")


def index_of_other_pipeline(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))


def cut_weights(folder):
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def remove_weights(folder):
    (folder / "vqvae" / "model.safetensors").unlink()


def remove_component(folder):
    shutil.rmtree(folder / "tokenizer")


def break_config(folder):
    (folder / "transformer" / "config.json").write_text("[]")


def rename_weight(folder):
    path = folder / "transformer" / "model.safetensors"
    tensors = load_file(path)
    tensors["surplus"] = tensors.pop("layers.0.mlp.dense_h_to_4h.bias")
    save_file(tensors, path, {"format": "pt"})


def deepen(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))


def leave_a_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "iterative_sr_transformer" / "model.safetensors").write_text(pointer)


def name_code(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformer": ["evilmod", "EvilClass"]}))
    for place in (folder, folder / "transformer"):
        (place / "evilmod.py").write_text(
            f"open({str(folder.parent / 'a.png')!r}, 'w').close()\nclass EvilClass: pass\n"
        )


@pytest.mark.parametrize(
    "damage, part",
    [
        (remove_folder, "there is no folder"),
        (remove_index, "no model_index.json"),
        (break_index, "damaged"),
        (index_of_other_pipeline, "OtherPipeline"),
        (cut_weights, "damaged"),
        (remove_weights, "damaged"),
        (remove_component, "damaged"),
        (break_config, "damaged"),
        (rename_weight, "1 missing: layers.0.mlp.dense_h_to_4h.bias; 1 unknown: surplus"),
        (deepen, "`num_hidden_layers` must be a number from 1 to 1000"),
        (leave_a_pointer, "iterative_sr_transformer/model.safetensors is a Git LFS pointer"),
        (name_code, "['evilmod', 'EvilClass'] for `transformer`"),
    ],
)
def test_a_missing_or_damaged_model_is_reported_in_one_line(cogview2, model_folder, tmp_path, damage, part):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    result = cogview2("generate", TIGER, "--model", folder, "--output", tmp_path / "a.png")
    assert_bad_input(result, "`--model`", folder, part)
    assert not (tmp_path / "a.png").exists()


def test_a_name_that_is_neither_folder_nor_hub_repository_is_reported(cogview2, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = cogview2("generate", TIGER, "--model", "nobody/nothing", "--output", tmp_path / "a.png")
    assert_bad_input(result, "`--model`", "nobody/nothing", "Hub")


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_only_pictures_that_say_how_they_were_made_can_be_remade(cogview2, no_model, tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(content)
    assert_bad_input(cogview2("generate", "--remake", path, "--output", tmp_path / "b.png"), path)


@pytest.mark.parametrize("option", ["--num-images", "--num-candidates"])
def test_the_largest_seed_leaves_room_for_all_that_is_drawn(cogview2, no_model, option):
    result = cogview2("generate", "a cat", "--seed", 2**63 - 2, option, 3)
    assert_bad_input(result, "`seed`", 2**63 - 3, 2**63 - 2)
