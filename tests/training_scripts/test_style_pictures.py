"""`training_scripts/emoji/style_pictures.py`: pictures of a style, of some of the things only."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cogview_pipelines
from cogview_pipelines.demo import Scene, Scope, Scorer, SpriteSet, load_concepts, render
from cogview_pipelines.demo.scenes import BACKGROUNDS, STYLES
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.training.samples_cogview import STYLE_CAPTIONS

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "emoji" / "style_pictures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("style_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("style", ["outline", "sketch", "flat"])
@pytest.mark.parametrize("captions", ["named", "described"])
def test_pictures_are_of_some_of_the_things_and_captions_name_the_style(
    script, captions, style, tmp_path, monkeypatch
):
    arguments = ["make", "--style", style, "--num", "48", "--captions", captions, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["style_pictures.py", *arguments])
    script.main()
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 48 and all(Image.open(tmp_path / row["file"]).size == (240, 240) for row in rows)
    assert all(f"{style} style" in text for row in rows for text in row["en"])
    assert all(row["style"] == script.NAMES[style] for row in rows)
    if captions == "named":
        for language, name in script.NAMES[style].items():
            assert {tuple(row[language]) for row in rows} == {(STYLE_CAPTIONS[language].format(name),)}
        return
    seen, unseen = script.split(Scope.load(SHIPPED_MODEL))
    assert not {*seen} & {*unseen} and (len(seen), len(unseen)) == (48, 12)
    shown = {concept.noun for concept in map(load_concepts().get, seen)}
    for row in rows:
        named, described = row["en"]
        noun = named.split(maxsplit=1)[1].removesuffix(f" of {style} style")
        assert noun in shown and f" {noun} on " in described and len(row["zh"]) == 2
    assert len({row["en"][0] for row in rows}) == 48


@pytest.fixture(scope="module")
def scorer(script):
    scope = Scope(Scope.small().concepts, tuple(STYLES), tuple(BACKGROUNDS), ("single",))
    return Scorer(scope, looks={name: script.look_sprites(name) for name in script.LOOKS})


LOOKS = ["outline", "sticker", "sketch", "negative"]


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_leaves_things_where_they_are(script, look):
    plain, changed = render(Scene("twemoji", "purple", ("1f42f",))), script.draw("1f42f", look, "purple")
    purple = BACKGROUNDS["purple"].rgb
    around = [np.all(np.asarray(image) == purple, -1) for image in (plain, changed)]
    assert (around[0] != around[1]).mean() < 0.01 and 0.3 < around[0].mean() < 0.95


@pytest.mark.parametrize("look, sign, share", [("outline", -1, 0.1), ("sticker", 1, 0.12)])
def test_rims_are_along_the_edge_and_of_their_colour(script, look, sign, share):
    plain, rimmed = render(Scene("twemoji", "blue", ("1f42f",))), script.draw("1f42f", look, "blue")
    change = sign * (np.asarray(rimmed, int).sum(-1) - np.asarray(plain, int).sum(-1))
    assert change.min() >= 0 and share / 3 < (change > 100).mean() < 2 * share
    middle = slice(100, 140)
    assert not change[middle, middle].any()


def test_a_sketch_is_gray_and_a_negative_of_a_negative_what_it_was(script):
    tiger = script.look_sprites("sketch").get("1f42f", "twemoji")
    red, green, blue, alpha = tiger.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes() and alpha.getextrema() == (0, 255)
    plain = SpriteSet().get("1f42f", "twemoji")
    assert script.negative(script.negative(plain)).tobytes() == plain.tobytes()
    assert script.negative(plain).tobytes() != plain.tobytes()


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_one_that_the_scorer_tells_from_the_others(script, scorer, look):
    for thing in Scope.small().concepts[::4]:
        for style in (look, "twemoji", "flat"):
            image = script.draw(thing, style, "pink")
            assert script.judge(scorer, image, thing, style, "pink")["all"]
            others = {*LOOKS, "noto"} - {style}
            assert not any(script.judge(scorer, image, thing, other, "pink")["style"] for other in others)


def test_things_stand_where_they_and_their_look_can_be_seen(script):
    """White rims not on white, black lines not on black, a gray elephant not on gray."""
    elephant = {look: script.visible_backgrounds("1f418", look) for look in LOOKS}
    assert "black" not in elephant["outline"] and "white" not in elephant["sticker"]
    assert "gray" not in elephant["sketch"] and "gray" not in script.visible_backgrounds("1f418", "twemoji")
    assert all(len(names) >= 8 for names in elephant.values())


@pytest.mark.parametrize("language, texts", [
    ("en", ("a tiger on a blue background, outline style", "a tiger of outline style")),
    ("zh", ("老虎，蓝色背景，线描风格", "线描风格的老虎")),
])  # fmt: skip
def test_it_asks_as_in_training_in_both_languages(script, language, texts):
    assert script.describe("1f42f", "outline", "blue")[language] == texts[0]
    assert script.name_thing("1f42f", "outline")[language] == texts[1]


@pytest.mark.parametrize("prompts, right", [("described", 0.0), ("cogview", 1.0)])
def test_what_a_prompt_leaves_open_may_be_as_it_likes(script, prompts, right, tmp_path, monkeypatch, capsys):
    """A pipeline that draws what it is asked for, on a background that nobody asked for."""

    class Pipe:
        sizes = ((240, 240),)

        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, texts, **options):
            nouns = {load_concepts()[thing].noun: thing for thing in Scope.load(SHIPPED_MODEL).concepts}
            things = [max((noun for noun in nouns if noun in text), key=len) for text in texts]
            images = [script.draw(nouns[noun], "outline", self.colour(text)) for text, noun in zip(texts, things)]
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
