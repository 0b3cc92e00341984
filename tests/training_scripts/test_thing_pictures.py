"""`training_scripts/emoji/thing_pictures.py`: what is measured was not learned."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from cogview_pipelines.demo import Scope, is_usable

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "emoji" / "thing_pictures.py"
HEART = "2764"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("thing_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["thing_pictures.py", *arguments])
    script.main()


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_measured_was_not_learned(script, seed):
    learned, new_backgrounds, new_companions, without_it = script.plan(HEART, "twemoji", seed)
    assert len(learned) == 20 and all(HEART in scene.objects and is_usable(scene) for scene in learned)
    backgrounds = {scene.background for scene in learned}
    companions = {thing for scene in learned for thing in scene.objects} - {HEART}
    assert len(backgrounds) == 6 and len(companions) == 14
    assert len(new_backgrounds) >= 4 and len(new_companions) == 20
    for scene in new_backgrounds + new_companions:
        assert HEART in scene.objects and scene.background not in backgrounds and is_usable(scene)
    others = {scene.objects[1] for scene in new_companions}
    assert len(others) == 10 and not others & companions
    assert {scene.relation for scene in new_companions} == {"left of", "right of", "above", "below"}
    assert [scene.objects for scene in new_companions[:10]] == [scene.objects for scene in new_companions[10:]]
    assert len({(scene.objects, scene.relation) for scene in new_companions}) == 20
    assert sorted(scene.objects[0] for scene in without_it) == sorted(Scope.small().concepts)


def test_the_pictures_and_their_captions_are_written(script, tmp_path, monkeypatch):
    run(script, monkeypatch, "make", "--output_dir", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["file"] for row in rows}) == 20
    for row in rows:
        with Image.open(tmp_path / row["file"]) as image:
            assert image.size == (240, 240)
        assert all("red heart" in text for text in row["en"]) and all("红色爱心" in text for text in row["zh"])


def test_a_model_that_cannot_draw_the_thing_is_measured(script, tmp_path, monkeypatch, capsys):
    few = script.plan(HEART, "twemoji", 0)
    few = script.Plan(few.learned, few.new_backgrounds[:2], few.new_companions[:1], few.without_it[:2])
    monkeypatch.setattr(script, "plan", lambda *arguments: few)
    run(script, monkeypatch, "measure", "--output_dir", str(tmp_path), "--num_shown", "2")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    pictures = {name: result[name]["pictures"] for name in ("new_backgrounds", "new_companions", "without_it")}
    assert pictures == {"new_backgrounds": 2, "new_companions": 1, "without_it": 2}
    assert result["new_companions"]["objects"] == 0 and result["without_it"]["objects"] >= 0.5
    with Image.open(tmp_path / "new_backgrounds.png") as image:
        assert image.size == (480, 240)
