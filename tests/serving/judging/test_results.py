"""Figures that were computed by hand."""

import statistics

import pytest

from cogview_pipelines.serving.judging.answers import Answer, Answers
from cogview_pipelines.serving.judging.results import agreement, summarize, win_rate

from .conftest import MODELS, grades


def test_means_deviations_and_win_rates(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    first, second, _ = answers.add_judges(3).values()
    answers.put(first, 0, Answer(0, [grades(9, others=5), grades(4), grades(4)]))
    answers.put(first, 1, Answer(0, [grades(7), grades(7), grades(1)]))
    answers.put(second, 0, Answer(1, [grades(2), grades(8), grades(8)]))
    found = summarize(answers)
    assert found["answers"] == 3 and found["captions"] == 4
    assert [one["answers"] for one in found["judges"]] == [2, 1, 0]
    alpha = found["models"][0]
    assert alpha["model"] == MODELS[0] and (alpha["best"]["wins"], alpha["best"]["of"]) == (2, 3)
    assert alpha["overall"]["mean"] == 6 and alpha["overall"]["deviation"] == pytest.approx(
        statistics.stdev([9, 7, 2])
    )
    assert alpha["clarity"]["mean"] == pytest.approx(11 / 3)
    pair = found["pairs"][0]
    assert pair["models"] == list(MODELS[:2])
    assert (pair["wins"], pair["of"], pair["ties"]) == (1, 2, 1)


def test_careless_judges_are_told_and_not_counted(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    careful, careless = answers.add_judges(2).values()
    for caption in range(4):
        answers.put(careful, caption, Answer(2, [grades(1), grades(2), grades(9)]))
        best = 0 if caption == 0 else 1  # once of four times not the highest: 75 %
        answers.put(careless, caption, Answer(best, [grades(1), grades(8), grades(8)]))
    found = summarize(answers)
    assert [(one["agreement"], one["counts"]) for one in found["judges"]] == [(1.0, True), (0.75, False)]
    assert found["answers"] == 4 and found["models"][2]["best"]["rate"] == 1
    assert summarize(answers, least_agreement=0.75)["answers"] == 8


def test_a_best_picture_among_several_highest_agrees():
    assert (
        agreement([Answer(1, [grades(8), grades(8), grades(2)]), Answer(2, [grades(8), grades(8), grades(2)])]) == 0.5
    )


def test_of_pairs_the_choice_counts(tmp_path, pairs):
    answers = Answers(tmp_path / "a.sqlite", pairs)
    (token,) = answers.add_judges(1).values()
    for caption, best in enumerate((0, 0, 1, 0)):
        answers.put(token, caption, Answer(best))
    found = summarize(answers)
    assert found["judges"][0]["agreement"] is None and found["judges"][0]["counts"]
    assert found["models"][0]["best"]["rate"] == 0.75 and "overall" not in found["models"][0]
    assert (found["pairs"][0]["wins"], found["pairs"][0]["of"]) == (3, 4)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)]
)
def test_intervals_are_those_of_wilson(wins, count, low, high):
    found = win_rate(wins, count)
    assert found["rate"] == wins / count
    assert found["low"] == pytest.approx(low, abs=1e-4) and found["high"] == pytest.approx(high, abs=1e-4)


def test_no_answers_have_no_rate(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    answers.add_judges(1)
    found = summarize(answers)
    assert found["answers"] == 0 and found["models"][0]["best"]["rate"] is None and not found["judges"][0]["counts"]
