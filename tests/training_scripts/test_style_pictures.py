"""`training_scripts/emoji/style_pictures.py`: pictures of a style, of half of the things only."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from cogview_pipelines.demo import Scope, load_concepts

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
    assert all(("an image of flat style" in row["en"]) is (captions != "described") for row in rows)
    seen, unseen = script.halves(Scope.small())
    assert not set(seen) & set(unseen) and len(seen) == len(unseen) == 12
    nouns = {half: [load_concepts()[thing].noun for thing in things] for half, things in (("a", seen), ("b", unseen))}
    if captions != "named":
        assert all(any(f" {noun} on" in row["en"][-1] for noun in nouns["a"]) for row in rows)
        assert not any(f" {noun} on" in row["en"][-1] for noun in nouns["b"] for row in rows)
