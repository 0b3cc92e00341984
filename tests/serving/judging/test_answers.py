"""The file of answers."""

import sqlite3
import threading

import pytest

from cogview_pipelines.serving.judging.answers import Answer, Answers
from cogview_pipelines.serving.judging.study import make_study

from .conftest import grades


def test_an_answer_is_there_for_the_next_who_opens_the_file(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    (token,) = answers.add_judges(1).values()
    answer = Answer(1, [grades(4), grades(9), grades(1, others=5)])
    answers.put(token, 2, answer)
    assert Answers(tmp_path / "a.sqlite").of(token) == {2: answer}  # while the other is open
    answers.put(token, 2, Answer(0, [grades(10), grades(2), grades(3)]))  # judges may change their minds
    answers.close()
    assert Answers(tmp_path / "a.sqlite", study).of(token)[2].best == 0


def test_judges_keep_their_tokens_when_there_are_more(tmp_path, study):
    first = Answers(tmp_path / "a.sqlite", study).add_judges(2)
    more = Answers(tmp_path / "a.sqlite", study).add_judges(4)
    assert list(more) == ["1", "2", "3", "4"] and first.items() < more.items()
    assert len(set(more.values())) == 4 and all(len(token) >= 20 for token in more.values())
    assert Answers(tmp_path / "a.sqlite", study).add_judges(1) == more


def test_answers_that_cannot_be_written_whole_leave_nothing(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    (token,) = answers.add_judges(1).values()
    answers.put(token, 0, Answer(0, [grades(1), grades(2), grades(3)]))
    before = answers.of(token)
    with pytest.raises(KeyError):
        answers.put(token, 0, Answer(2, [grades(5), {"clarity": 1}]))
    with pytest.raises(sqlite3.IntegrityError):
        answers.put("nobody", 1, Answer(0))
    assert answers.of(token) == before


def test_many_at_once_are_all_kept(tmp_path, study):
    answers = Answers(tmp_path / "a.sqlite", study)
    tokens = list(answers.add_judges(8).values())

    def judge(token):
        for caption in range(4):
            answers.put(token, caption, Answer(caption % 3, [grades(1), grades(2), grades(3)]))

    threads = [threading.Thread(target=judge, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(answers.of(token)) == 4 for token in tokens)


def test_files_of_another_study_or_of_something_else_are_refused(tmp_path, study, rows, folders):
    Answers(tmp_path / "a.sqlite", study).close()
    other, _ = make_study(rows[:2], folders[:2])
    with pytest.raises(ValueError, match=r"of another study \(models, captions\)"):
        Answers(tmp_path / "a.sqlite", other)
    (tmp_path / "text").write_text("words " * 1000)
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE things (name TEXT)")
    for name in ("text", "other.sqlite"):
        for opened in (study, None):
            with pytest.raises(ValueError, match="is no file of answers"):
                Answers(tmp_path / name, opened)
    with pytest.raises(ValueError, match="there is no file"):
        Answers(tmp_path / "none")
    with pytest.raises(OSError, match="unable to open"):
        Answers(tmp_path / "none" / "a.sqlite", study)
