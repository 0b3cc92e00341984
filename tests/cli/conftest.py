"""A tiny random pipeline in a folder, the scope it could have been trained for, and a way to call commands."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app, finetune, loading
from cogview_pipelines.demo import Scope
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from cogview_pipelines.schedulers.scheduling_lopar import LoPARScheduler

from ..utils import make_coglm, make_vq_model, token_config

LOW_SIZE, FULL_SIZE = 40, 120  # pixels: 5 x 5 and 15 x 15 tokens of 8 pixels
SCOPE = Scope(("1f436", "1f431", "1f42f", "1f34e"), ("noto", "twemoji"), ("white", "red", "blue"), ("single", "pair"))


@pytest.fixture(scope="session")
def pipeline(tokenizer):
    """All three stages, with two style presets and room for the captions of the demo data."""
    config = {
        **token_config(tokenizer),
        "image_grid": (5, 5),
        "fine_grid": (15, 15),
        "image_position": 64,
        "max_position_embeddings": 96,
        "max_text_tokens": 64,
    }
    return CogView2Pipeline(
        tokenizer,
        make_coglm(**config),
        make_vq_model(),
        make_coglm("direct", **{**config, "num_text_slots": 64}),
        make_coglm("iterative", **config),
        LoPARScheduler([[1]], top_k=[4], cluster_temperature=0.9),
        LoPARScheduler.diagonal(3, top_k=20),
        styles={"plain": {}, "cool": {"suffix": {"en": " blue", "zh": "蓝色"}, "temperature": 0.8}},
    )


@pytest.fixture(scope="session")
def model_folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    SCOPE.save(folder)
    return folder


@pytest.fixture
def cogview2(model_folder):
    """Call a command with the tiny model, unless the arguments name another one."""

    def call(*arguments):
        arguments = [str(argument) for argument in arguments]
        if "--model" not in arguments and arguments[0] != "doctor":
            arguments += ["--model", str(model_folder)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return call


@pytest.fixture
def write_list(tmp_path):
    """Write a JSONL file; what is not a dictionary already is a line as it is."""

    def write(*lines):
        path = tmp_path / "list.jsonl"
        text = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line for line in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a model is loaded: what can be found out without one must be."""

    def load_pipeline(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)


@pytest.fixture
def captioned_pictures(tmp_path):
    """Twelve pictures to finetune on, one of them no square, with captions; one caption is far too long."""
    folder, lines = tmp_path / "pictures", []
    folder.mkdir()
    colours = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}
    for index in range(12):
        name = [*colours][index % 3]
        Image.new("RGB", (96, 96 + 10 * (index == 0)), colours[name]).save(folder / f"{index}.png")
        lines.append({"file": f"{index}.png", "en": f"a {name} car" if index else " ".join(["a red car"] * 20)})
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def finetuning(captioned_pictures, tmp_path, monkeypatch):
    """
    Of a model, what runs `cogview2 finetune` on it; scripts run in this process, and what they were started with is in
    the `calls` of what it gives.
    """
    from ..training_scripts.conftest import load_script  # it imports much that other commands do without

    def of(model):
        def start(*arguments, folder=None, **options_of_test):
            options = ["--model", str(model), "--output", str(tmp_path / "mine"), "--steps", "3", "--batch-size", "2"]
            command = ["finetune", str(folder or captioned_pictures), *options, *arguments]
            return CliRunner().invoke(app, command, **options_of_test)

        def run_script(self, launcher, script, options):
            start.calls.append((script, launcher, options))
            arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
            if load_script(script.removesuffix(".py")).main(arguments) is None and "max_steps" in options:
                self._stop()

        start.calls = []
        monkeypatch.setattr(finetune.Job, "_run", run_script)
        return start

    return of


def assert_bad_input(result, *parts):
    """Exit code 2, and one line on stderr that holds these parts."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert len(lines) == 1 or lines[0].startswith("Usage: "), result.stderr
    for part in parts:
        assert str(part) in lines[-1]
