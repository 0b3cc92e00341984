"""Sentences written as people type: what they ask for, and how their pictures are counted."""

import importlib.util
import json
from pathlib import Path

import pytest

from cogview_pipelines.demo import Scope
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import parse_object, read_lines

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evaluate_typed_sentences.py"
RELATIONS = [(), ("left of",), ("right of",), ("above",), ("below",), ("left of", "right of")]
ANYWHERE = ("left of", "right of", "above", "below")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_typed_sentences", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, count", [("typed_sentences", 120), ("typed_sentences_new", 100)])
def test_the_sentences_ask_for_what_the_shipped_model_was_trained_on(script, name, count):
    scope = Scope.load(SCRIPT.parents[1] / "training_scripts/emoji/scope_sixty.json")
    cases = script.read_cases(SCRIPT.with_name(f"{name}.jsonl"), scope, 0)
    assert len({case.caption for _, case in cases}) == len(cases) == 2 * count
    assert [language for language, _ in cases] == ["en"] * count + ["zh"] * count
    for _, case in cases:
        request = case.request
        assert set(request.objects) <= set(scope.concepts) and request.style in (None, *scope.styles)
        assert request.relations in ([()] if len(request.objects) == 1 else [*RELATIONS[1:], ANYWHERE])
        assert request.is_met_by(case.scene)
    assert [case.seed for _, case in cases] == list(range(2 * count))


def test_cells_part_the_sentences_by_language_layout_and_scope(script):
    cases = script.read_cases(script.SENTENCES, Scope.small(), 0)
    found, known = list(script.cells(cases, Scope.small())), set(Scope.small().concepts)
    assert [cell["n"] for cell, _ in found] == [40, 40, 40, 40, 20, 20, 20, 20]
    assert len({case.seed for _, own in found for case in own}) == 240
    assert all((set(case.scene.objects) <= known) is cell["in_scope"] for cell, own in found for case in own)


def test_pictures_are_right_or_wrong_with_or_without_a_warning_and_long_sentences_are_refused(
    script, tmp_path, capsys
):
    lines = [
        {"text": "a tiger on a blue background", "background": "blue"},
        {"text": "a tiger on a blue background", "background": "green"},  # asks for blue, so that the picture is wrong
        {"text": "a tiger on a blue background, zyzzyva", "background": "green"},
        {"text": "tiger " * 70, "background": "blue"},
    ]
    asks = {"language": "en", "objects": ["1f42f"], "relations": [], "style": None}
    sentences = tmp_path / "sentences.jsonl"
    sentences.write_text("".join(json.dumps({**asks, **line}) + "\n" for line in lines), encoding="utf-8")
    script.main(str(SHIPPED_MODEL), sentences, tmp_path / "results.jsonl", tmp_path / "wrong", 7, 20)
    ((_, text),) = read_lines(tmp_path / "results.jsonl")
    result = parse_object(text)
    assert text == capsys.readouterr().out.rstrip("\n")
    names = ("right", "wrong_with_warning", "wrong_without_warning", "right_with_warning", "refused", "n")
    assert [result[name] for name in names] == [0.25, 0.25, 0.25, 0, 0.25, 4]
    assert result["wrong"] == [line["text"] for line in lines[1:3]]
    assert sorted(path.name for path in (tmp_path / "wrong").iterdir()) == ["8.png", "9.png"]
