"""`--lora`: adapters change what commands make as they change what pipelines make, and results name them."""

import json
import shutil

import pytest
import torch
import typer
from PIL import Image

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.cli import app, loading
from cogview_pipelines.loaders.textual_inversion import EMBEDDING_NAME, write_learned_token
from cogview_pipelines.pictures.png import read_metadata

from ..loaders.conftest import STAGES, random_adapter
from .conftest import assert_bad_input

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    pipe = CogView2Pipeline.from_pretrained(model_folder)
    folder = tmp_path_factory.mktemp("adapters") / "flat"
    random_adapter({stage: getattr(pipe, stage) for stage in STAGES}, folder, scale=1.0)
    return folder


def picture_of(pipe, prompt="a cat", seed=3):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]


def same(path, image):
    return Image.open(path).convert("RGB").tobytes() == image.tobytes()


def test_pictures_are_those_of_the_pipeline_with_the_adapter_at_its_weight(cogview2, model_folder, adapter, tmp_path):
    without = picture_of(CogView2Pipeline.from_pretrained(model_folder, dtype=torch.float32))
    expected = {}
    for weight in (1.0, 0.5):
        pipe = CogView2Pipeline.from_pretrained(model_folder, dtype=torch.float32)
        pipe.load_lora_weights(adapter, adapter_name="mine")
        pipe.set_adapters("mine", weight)
        pipe.fuse_lora()
        expected[weight] = picture_of(pipe)
    assert len({image.tobytes() for image in (without, *expected.values())}) == 3
    for weight, value in ((1.0, adapter), (0.5, f"{adapter}=0.5")):
        path = tmp_path / f"{weight}.png"
        result = cogview2("generate", "a cat", "--seed", 3, "--lora", value, "--dtype", "float32", "--output", path)
        assert result.exit_code == 0, result.stderr
        assert same(path, expected[weight])
        (said,) = read_metadata(path)["lora"]
        assert said["name"] == "flat" and said["weight"] == weight and len(said["fingerprint"]) == 16
        assert str(adapter) not in json.dumps(read_metadata(path))


def test_an_adapter_counts_beside_those_that_a_model_was_saved_with(cogview2, model_folder, adapter, tmp_path):
    pipe = CogView2Pipeline.from_pretrained(model_folder, dtype=torch.float32)
    random_adapter({"transformer": pipe.transformer}, tmp_path / "house", seed=5, scale=1.0)
    pipe.load_lora_weights(tmp_path / "house", "lora_0")  # the name that the command would take
    pipe.load_lora_weights(adapter, "off")
    pipe.set_adapters("lora_0", 0.5)
    pipe.save_pretrained(tmp_path / "model")
    only_the_own = picture_of(pipe)
    pipe.set_adapters(["lora_0", "off"], [0.5, 1.0])
    pipe.fuse_lora()
    result = cogview2(
        *("generate", "a cat", "--seed", 3, "--model", tmp_path / "model", "--lora", adapter),
        *("--dtype", "float32", "--output", tmp_path / "made.png"),
    )
    assert result.exit_code == 0, result.stderr
    assert same(tmp_path / "made.png", picture_of(pipe)) and not same(tmp_path / "made.png", only_the_own)


def test_two_adapters_count_together(cogview2, adapter, tmp_path):
    """An adapter and its opposite leave the model as it was."""
    for name, options in (("plain", ()), ("both", ("--lora", adapter, "--lora", f"{adapter}=-1"))):
        options = ("--height", 40, "--dtype", "float32", *options)
        result = cogview2("generate", "a cat", "-s", 3, *options, "-o", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.stderr
        assert "peft" not in result.stderr
    pixels = [
        torch.frombuffer(bytearray(Image.open(tmp_path / f"{name}.png").tobytes()), dtype=torch.uint8).int()
        for name in ("plain", "both")
    ]
    assert (pixels[0] - pixels[1]).abs().max() <= 1  # a rounding step


def test_a_picture_is_remade_only_with_the_adapters_that_are_named_again(cogview2, adapter, tmp_path):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert cogview2("generate", "a cat", "--height", 40, "--lora", adapter, "-o", first).exit_code == 0
    result = cogview2("generate", "--remake", first, "-o", again)
    assert result.exit_code == 2 and "Pass --lora for each" in result.stderr and "flat" in result.stderr
    assert not again.exists()
    assert cogview2("generate", "--remake", first, "--lora", adapter, "-o", again).exit_code == 0
    assert same(again, Image.open(first))


@pytest.mark.parametrize("command", ["generate", "upscale", "caption"])
def test_results_of_a_list_with_other_adapters_are_not_taken_for_done(cogview2, adapter, tmp_path, command):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    work = {"generate": {"prompt": "a cat", "height": 40}, "upscale": {"prompt": "", "image": "red.png"}}
    line = {"id": "one", "seed": 1, **work.get(command, {"image": "red.png"})}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / ("captions.jsonl" if command == "caption" else "made")
    call = (command, "--requests", tmp_path / "list.jsonl", "--output", output)
    for first, second in ((call, (*call, "--lora", adapter)), ((*call, "--lora", adapter), call)):
        result = cogview2(*first, "--overwrite")
        assert result.exit_code == 0, result.stderr
        result = cogview2(*second)
        assert result.exit_code == 2 and "--overwrite" in result.stderr
        assert cogview2(*first).exit_code == 0


WORD = "<my-car>"


@pytest.fixture(scope="module")
def word(pipeline, tmp_path_factory):
    """A folder with a learned word alone."""
    width = pipeline.transformer.config.hidden_size
    row = 3 * torch.randn(width, generator=torch.Generator().manual_seed(5))
    return write_learned_token(tmp_path_factory.mktemp("words") / "car", WORD, row, "car").parent


@pytest.mark.parametrize("kind", ["word", "file", "both"])
def test_a_learned_word_is_loaded_alone_and_beside_an_adapter(cogview2, model_folder, adapter, word, tmp_path, kind):
    source, value, prompt = word, None, f"a {WORD}"
    if kind == "file":  # whatever it is called
        source = tmp_path / "car.safetensors"
        shutil.copy(word / EMBEDDING_NAME, source)
    elif kind == "both":
        source, value = tmp_path / "final", f"{tmp_path / 'final'}=0.5"
        shutil.copytree(adapter, source)
        shutil.copy(word / EMBEDDING_NAME, source)
    made = {}
    for name, options in (("with", ("--lora", value or source)), ("without", ("--lora", adapter))):
        path = tmp_path / f"{name}.png"
        made[name] = cogview2("generate", prompt, "-s", 3, "--dtype", "float32", "--height", 40, *options, "-o", path)
        assert made[name].exit_code == 0, made[name].stderr
    pipe = CogView2Pipeline.from_pretrained(model_folder, dtype=torch.float32)
    pipe.load_textual_inversion(word)
    if kind == "both":
        pipe.load_lora_weights(adapter, "mine")
        pipe.set_adapters("mine", 0.5)
        pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt, generator=torch.Generator().manual_seed(3), height=40).images[0]
    assert same(tmp_path / "with.png", image) and not same(tmp_path / "without.png", image)
    (said,) = read_metadata(tmp_path / "with.png")["lora"]
    (other,) = read_metadata(tmp_path / "without.png")["lora"]
    assert said["name"] == source.name and said["fingerprint"] != other["fingerprint"]


def test_a_learned_word_that_the_model_has_already_is_told_in_a_line(cogview2, word, tmp_path):
    result = cogview2("generate", "a cat", "--lora", word, "--lora", word, "-o", tmp_path / "a.png")
    assert_bad_input(result, f"`--lora` {word}: `token` must be a new one")


class Reached(Exception):
    """Adapters were asked for."""


CALLS = [
    ("generate", "a cat"),
    ("inpaint", "a cat", "--image", "red.png", "--left", "8", "-o", "made.png"),
    ("upscale", "red.png", "-o", "made.png"),
    ("caption", "red.png"),
    ("score", "red.png", "a cat"),
    ("attend", "a cat"),
    ("bench",),
    ("serve", "--port", "0"),
    ("evaluate", "--num", "2"),
    ("evaluate", "--captions", "captions.jsonl", "--output", "evaluated"),
    ("export", "--output", "exported"),
]


def test_all_commands_that_load_a_model_are_tried_with_adapters():
    commands = typer.main.get_command(app).commands
    with_a_model = {name for name, one in commands.items() if any("--model" in part.opts for part in one.params)}
    # it trains a model, and makes adapters
    assert with_a_model - {"finetune"} == {command for command, *_ in CALLS}


@pytest.mark.parametrize("arguments", CALLS)
def test_every_command_that_loads_a_model_takes_adapters(cogview2, adapter, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("red.png")
    (tmp_path / "captions.jsonl").write_text('{"id": "a", "caption": "a cat"}\n')

    def add_adapters(pipe, adapters):
        assert [(each.source, each.weight) for each in adapters] == [(str(adapter), 0.5)]
        raise Reached

    monkeypatch.setattr(loading, "add_adapters", add_adapters)
    with pytest.raises(Reached):
        cogview2(*arguments, "--lora", f"{adapter}=0.5")


@pytest.mark.parametrize(
    "value, part",
    [
        ("=0.5", "must be SOURCE or SOURCE=WEIGHT"),
        ("{adapter}=much", "must be SOURCE or SOURCE=WEIGHT with a number as weight"),
        ("{adapter}=nan", "must be SOURCE or SOURCE=WEIGHT with a number as weight"),
        ("absent.safetensors", "there is no file or folder absent.safetensors"),
        ("{folder}", "must hold one .safetensors file"),
    ],
)
def test_what_is_no_adapter_is_told_before_the_model_is_loaded(cogview2, no_model, adapter, tmp_path, value, part):
    value = value.format(adapter=adapter, folder=tmp_path)
    assert_bad_input(cogview2("generate", "a cat", "--lora", value, "-o", tmp_path / "a.png"), part)


def test_a_file_of_another_kind_is_told_in_one_line(cogview2, tmp_path):
    for name, content in (("a.safetensors", b"no header"), ("a.bin", b"pickle")):
        (tmp_path / name).write_bytes(content)
        result = cogview2("generate", "a cat", "--lora", tmp_path / name, "-o", tmp_path / "a.png")
        assert_bad_input(result, f"`--lora` {tmp_path / name}:")
        assert not (tmp_path / "a.png").exists()
