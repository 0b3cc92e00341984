"""The small CogView that comes with the package: it draws, draws finer, describes and ranks what its scope says."""

import json

import pytest
import torch
from typer.testing import CliRunner

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline
from cogview_pipelines.cli import app
from cogview_pipelines.demo import Scope
from cogview_pipelines.demo.editing import measure_captions
from cogview_pipelines.demo.evaluation import choose_cases, generators, measure_pictures
from cogview_pipelines.environment import SHIPPED_MODELS
from cogview_pipelines.pictures.png import read_metadata

FOLDER = SHIPPED_MODELS["cogview-emoji"]
CAT, STAR = "cartoon style cat, blue background", "cartoon style star, blue background"


@pytest.fixture(scope="module")
def pipe():
    pipe = CogViewPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scope():
    return Scope.load(FOLDER)


@pytest.mark.parametrize("finer", [False, True], ids=["96px", "192px"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_pictures_show_what_was_asked_for(pipe, scope, language, finer):
    cases = choose_cases(scope, "train", language, 16, seed=1)
    assert measure_pictures(pipe, cases, batch_size=16, finer=finer)["all"] >= 0.8  # 0.85 are the goal, over many


def test_captions_say_what_is_there(pipe, scope):
    cases = choose_cases(scope, "train", "en", 8, seed=1)
    assert measure_captions(pipe, cases, None, generator=generators(cases))["named"] >= 0.75


def test_the_text_that_fits_is_likelier(pipe):
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    tokens = pipe([CAT, STAR], generator=generator, output_type="latent").tokens
    losses = CogViewCaptionPipeline.from_pipe(pipe).caption_loss
    own, other = (losses(None, texts, tokens=tokens) for texts in ([CAT, STAR], [STAR, CAT]))
    assert (own < other).all()


def test_words_of_other_things_are_warned_about(pipe):
    assert pipe.tokenizer.unknown_words([CAT, "一只猫，蓝色背景"]) == []
    assert pipe.tokenizer.unknown_words(["a tiger", "一只老虎"]) == ["tiger", "老虎"]


def test_the_command_line_finds_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", "cogview-emoji"]
    result = CliRunner().invoke(app, ["generate", CAT, "--seed", "1", *options, "-o", "cat.png"])
    assert result.exit_code == 0, result.output
    assert read_metadata(tmp_path / "cat.png")["model"] == "cogview-emoji"
    result = CliRunner().invoke(app, ["score", "cat.png", CAT, STAR, "--json", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[0])["prompt"] == CAT
    (tmp_path / "cogview-emoji").mkdir()  # a folder of that name comes first, and this one is no model
    result = CliRunner().invoke(app, ["generate", CAT, *options])
    assert result.exit_code == 2 and "is not a saved pipeline" in result.output
