"""What the evaluation of the page in the browser rests on; the page itself is in `tests/docs/test_browser.py`."""

import urllib.request
from collections import Counter

import pytest
from PIL import Image

from benchmarks import evaluate_browser
from cogview_pipelines.demo import Scope, render
from cogview_pipelines.environment import SHIPPED_MODEL

SCOPE = Scope.load(SHIPPED_MODEL)


@pytest.mark.parametrize("num", [1, 5, 20])
def test_prompts_are_in_both_languages_of_all_splits_and_the_same_for_a_seed(num):
    chosen = evaluate_browser.choose_prompts(SCOPE, num, seed=3)
    assert len(chosen) == num
    assert chosen == evaluate_browser.choose_prompts(SCOPE, num, seed=3)
    assert chosen != evaluate_browser.choose_prompts(SCOPE, num, seed=4)
    chinese = sum(not case.caption.isascii() for _, case in chosen)
    assert chinese == num // 2
    assert len({case.scene for _, case in chosen}) == num
    counts = Counter(split for split, _ in chosen)
    if num >= 2 * len(evaluate_browser.SPLITS):
        assert set(counts) == set(evaluate_browser.SPLITS)
        assert max(counts.values()) - min(counts.values()) <= 2


class Draws:
    """A page that draws the scene of each prompt, or that of the first."""

    def __init__(self, cases, only_first=False, says="Done in 1.0 s."):
        self.scenes = {case.caption: cases[0][1].scene if only_first else case.scene for _, case in cases}
        self.says, self.drawn = says, []

    def draw(self, page, prompt, seed=0, greedy=False):
        self.drawn.append((prompt, seed, greedy))
        return self.says

    def picture_of(self, page) -> Image.Image:
        return render(self.scenes[self.drawn[-1][0]], 240)


@pytest.fixture
def evaluate(monkeypatch):
    def call(draws, cases, **settings):
        monkeypatch.setattr(evaluate_browser, "draw", draws.draw)
        monkeypatch.setattr(evaluate_browser, "picture_of", draws.picture_of)
        return evaluate_browser.evaluate(None, cases, **settings)

    return call


def test_pictures_are_scored_against_their_own_prompts_and_those_that_miss_are_named(evaluate):
    cases = evaluate_browser.choose_prompts(SCOPE, 4, seed=0)
    draws = Draws(cases)
    result = evaluate(draws, cases, greedy=True)
    assert draws.drawn == [(case.caption, case.seed, True) for _, case in cases]
    assert result["all"] == 1 and result["missed"] == [] and len(result["seconds"]) == 4
    result = evaluate(Draws(cases, only_first=True), cases)
    assert result["all"] == 0.25
    assert [one["prompt"] for one in result["missed"]] == [case.caption for _, case in cases[1:]]


def test_a_page_that_does_not_draw_ends_the_evaluation_with_what_it_said(evaluate):
    cases = evaluate_browser.choose_prompts(SCOPE, 1, seed=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Draws(cases, says="The picture could not be drawn (out of memory)."), cases)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_folder_is_served_with_a_count_of_its_bytes(tmp_path, isolated):
    (tmp_path / "a.mjs").write_bytes(b"x" * 70_000)
    (tmp_path / "b.js").write_bytes(b"")
    with evaluate_browser.serving(tmp_path, isolated) as (address, sizes):
        for name in ("a.mjs", "b.js"):
            with urllib.request.urlopen(f"{address}/{name}") as answer:
                assert answer.headers.get_content_type() == "text/javascript"
                assert (answer.headers["Cross-Origin-Opener-Policy"] == "same-origin") is isolated
                assert answer.read() == (tmp_path / name).read_bytes()
    assert sizes == [70_000, 0]
