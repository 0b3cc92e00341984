"""`training_scripts/emoji/style_pictures.py`: pictures of a style, of half of the things only."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import cogview_pipelines
from cogview_pipelines.demo import Request, Scene, Scope, load_concepts, render
from cogview_pipelines.training.samples_cogview import STYLE_CAPTIONS

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "emoji" / "style_pictures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("style_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("captions, texts", [("named", 1), ("described", 1), ("both", 2)])
def test_pictures_are_of_half_of_the_things_and_captions_name_the_style(
    script, captions, texts, tmp_path, monkeypatch
):
    arguments = ["make", "--style", "flat", "--num", "24", "--captions", captions, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["style_pictures.py", *arguments])
    script.main()
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24 and all(Image.open(tmp_path / row["file"]).size == (240, 240) for row in rows)
    assert all(len(row["en"]) == len(row["zh"]) == texts for row in rows)
    assert all("flat style" in text for row in rows for text in row["en"])
    assert all(row["style"] == {"en": "flat", "zh": "扁平"} for row in rows)
    named = {language: [text for row in rows for text in row[language][:1]] for language in ("en", "zh")}
    for language, name in rows[0]["style"].items() if captions != "described" else ():
        assert set(named[language]) == {STYLE_CAPTIONS[language].format(name)}
    assert all(("an image of flat style" in row["en"]) is (captions != "described") for row in rows)
    seen, unseen = script.halves(Scope.small())
    assert not set(seen) & set(unseen) and len(seen) == len(unseen) == 12
    nouns = {half: [load_concepts()[thing].noun for thing in things] for half, things in (("a", seen), ("b", unseen))}
    if captions != "named":
        assert all(any(f" {noun} on" in row["en"][-1] for noun in nouns["a"]) for row in rows)
        assert not any(f" {noun} on" in row["en"][-1] for noun in nouns["b"] for row in rows)


def test_it_asks_as_in_training_or_in_the_form_of_cogview(script):
    scene = Scene("flat", "blue", ("1f42f",))
    assert script.ask(scene, "described") == ("a tiger on a blue background, flat style", Request.of(scene))
    assert script.ask(scene, "cogview") == ("a tiger of flat style", Request(scene.objects, style="flat"))


@pytest.mark.parametrize("prompts, right", [("described", 0.0), ("cogview", 1.0)])
def test_what_a_prompt_leaves_open_may_be_as_it_likes(script, prompts, right, tmp_path, monkeypatch, capsys):
    """A pipeline that draws what it is asked for, on a background that nobody asked for."""

    class Pipe:
        sizes = ((240, 240),)

        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, texts, **options):
            nouns = {load_concepts()[thing].noun: thing for thing in Scope.small().concepts}
            things = [max((noun for noun in nouns if noun in text), key=len) for text in texts]
            images = [
                render(Scene("flat", self.colour(text), (nouns[noun],)), 240) for text, noun in zip(texts, things)
            ]
            return SimpleNamespace(images=images)

        def colour(self, text):
            return "purple" if "purple" not in text else "yellow"

    monkeypatch.setattr(cogview_pipelines.CogView2Pipeline, "from_pretrained", lambda *args: Pipe())
    arguments = ["measure", "--prompts", prompts, "--num_each", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["style_pictures.py", *arguments])
    script.main()
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == prompts and result["unseen_things"]["pictures"] == 12
    for half in ("seen_things", "unseen_things"):
        assert result[half]["style"] > 0.8 and result[half]["objects"] > 0.8
        assert result[half].get("background", 1.0) == right
