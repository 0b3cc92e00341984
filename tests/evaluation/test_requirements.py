"""What pictures show beside what their captions ask for, by the rules of GenEval."""

import json

import pytest
from PIL import Image

from cogview_pipelines.evaluation.captioned import read_captions
from cogview_pipelines.evaluation.requirements import Requirements, check, detect, relations

from .test_picture_runs import Maker, finished, run_of, true_pictures  # noqa: F401 - a fixture


def wanted(**row) -> Requirements:
    return Requirements.from_row({"tag": "task", **row})


def seen(label, left=0.0, top=0.0, size=10.0, **more):
    return {"label": label, "box": (left, top, left + size, top + size), **more}


RED_DOG_RIGHT_OF_BENCH = wanted(
    tag="position",
    include=[{"class": "bench", "count": 1}, {"class": "dog", "color": "red", "position": ["right of", 0]}],
)


def test_all_that_is_asked_for_must_be_there():
    found = [seen("bench"), seen("dog", 40, color="red"), seen("cat", 80)]
    right = dict.fromkeys(
        ("geneval/position", "geneval_objects", "geneval_counts", "geneval_colors", "geneval_positions"), True
    )
    assert check(RED_DOG_RIGHT_OF_BENCH, found) == right
    blue = check(RED_DOG_RIGHT_OF_BENCH, [seen("bench"), seen("dog", 40, color="blue")])
    assert blue == {**right, "geneval_colors": False, "geneval/position": False}
    left = check(RED_DOG_RIGHT_OF_BENCH, [seen("bench", 40), seen("dog", color="red")])
    assert left == {**right, "geneval_positions": False, "geneval/position": False}
    assert not any(check(RED_DOG_RIGHT_OF_BENCH, []).values())


def test_numbers_are_at_least_what_is_included_and_less_than_what_is_excluded():
    two = wanted(tag="counting", include=[{"class": "dog", "count": 2}], exclude=[{"class": "dog", "count": 3}])
    for number, is_right in ((0, False), (1, False), (2, True), (3, False)):
        found = [seen("dog", 20 * place) for place in range(number)]
        assert check(two, found)["geneval/counting"] == check(two, found)["geneval_counts"] == is_right
    assert check(two, [seen("dog")])["geneval_objects"]  # the kind is there
    assert set(check(two, [])) == {"geneval/counting", "geneval_objects", "geneval_counts"}  # no more is asked for


def test_detections_count_if_they_are_sure_and_surer_where_numbers_are_asked_for():
    one, counted = wanted(include=[{"class": "dog"}]), wanted(tag="counting", include=[{"class": "dog"}])
    for score, (is_one, is_counted) in {0.2: (False, False), 0.5: (True, False), 0.95: (True, True)}.items():
        found = [seen("dog", score=score)]
        assert check(one, found)["geneval/task"] == is_one
        assert check(counted, found)["geneval/counting"] == is_counted


def test_colours_and_places_are_those_of_the_surest():
    red = wanted(include=[{"class": "dog", "color": "red"}])
    dogs = [seen("dog", color="red", score=0.6), seen("dog", 40, color="blue", score=0.9)]
    assert not check(red, dogs)["geneval_colors"]
    assert check(red, [{**dog, "score": 1.5 - dog["score"]} for dog in dogs])["geneval_colors"]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((40, 0, 50, 10), {"right of"}),
        ((-40, 0, -30, 10), {"left of"}),
        ((0, 40, 10, 50), {"below"}),
        ((0, -40, 10, -30), {"above"}),
        ((40, 40, 50, 50), {"right of", "below"}),
        ((1, 1, 11, 11), set()),  # they all but cover each other
        ((0, 0, 10, 10), set()),
        ((40, 4, 50, 14), {"right of"}),  # a little below, but by far more to the right
    ],
)
def test_places_are_told_from_the_middles_beyond_a_tenth_of_the_sizes(box, expected):
    assert relations({"box": box}, {"box": (0, 0, 10, 10)}) == expected
    named = dict(zip(("xmin", "ymin", "xmax", "ymax"), box))
    assert relations({"box": named}, {"box": (0, 0, 10, 10)}) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"include": []}, 'a list of objects as "include"'),
        ({"include": "dog"}, 'a list of objects as "include"'),
        ({"include": [{"count": 1}]}, 'a name as "class"'),
        ({"include": [{"class": "dog", "count": 0}]}, "1 to 16 as \"count\" of 'dog'"),
        ({"include": [{"class": "dog", "count": True}]}, '"count"'),
        ({"include": [{"class": "dog", "color": 3}]}, 'a name as "color"'),
        ({"include": [{"class": "dog", "position": ["near", 0]}]}, "one of left of, right of"),
        ({"include": [{"class": "dog", "position": ["above"]}]}, "one of left of, right of"),
        ({"include": [{"class": "dog", "position": ["above", 1]}]}, "beside object 1, but there are 1"),
        ({"include": [{"class": "dog"}], "exclude": [3]}, 'a list of objects as "exclude"'),
        ({"include": [{"class": "dog"}], "tag": 3}, 'a name as "tag"'),
    ],
)
def test_lists_in_another_form_are_refused_by_line(tmp_path, row, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"prompt": "a dog", "include": [{"class": "dog"}]}) + "\n")
    assert read_captions(path)[0].shows == Requirements.from_row({"include": [{"class": "dog"}]})
    path.write_text(path.read_text() + json.dumps({"prompt": "a dog", **row}) + "\n")
    with pytest.raises(ValueError) as raised:
        read_captions(path)
    assert message in str(raised.value) and "line 2 " in str(raised.value)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "a list for each of 1 pictures, but gave 0"),
        ([[{"box": (0, 0, 1, 1)}]], "KeyError: 'label'"),
        ([[{"label": "dog"}]], "KeyError: 'box'"),
        ([[{"label": "dog", "box": (0, 0, 1)}]], "boxes of four numbers"),
        ([[{"label": "dog", "box": {"xmin": 0}}]], "boxes of four numbers"),
        ([[{"label": "dog", "box": (0, 0, 1, float("nan"))}]], "a box that is no place"),
        ([[{"label": "dog", "box": (0, 0, 1, 1), "score": "sure"}]], "a number as score, but gave 'sure'"),
        ([3], "TypeError"),
    ],
)
def test_detectors_that_give_something_else_are_named(found, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        detect(lambda images: found, [Image.new("RGB", (4, 4))])


def test_figures_of_a_run_are_shares_of_those_pictures_that_are_asked(tmp_path, true_pictures):  # noqa: F811
    import dataclasses

    run = run_of(tmp_path, true_pictures, Maker(), num=80, network=None, references=None, scores={}, batch_size=7)
    rows = list(run.rows)
    dog, two = wanted(tag="one", include=[{"class": "dog"}]), wanted(tag="two", include=[{"class": "dog", "count": 2}])
    for number, shows in enumerate([dog] * 40 + [two] * 10):
        rows[number] = dataclasses.replace(rows[number], shows=shows)
    asked = []

    def detector(images):
        asked.extend(images)
        return [[seen("dog")] for _ in images]

    run = dataclasses.replace(run, rows=rows, detector=detector)
    figures = finished(run)["figures"]
    assert len(asked) == 50
    assert figures["geneval/one"] == {"value": 1.0, "standard_error": 0.0, "pictures": 40}
    assert figures["geneval/two"]["value"] == 0.0 and figures["geneval_counts"]["value"] == pytest.approx(0.8)
    assert figures["geneval_counts"]["standard_error"] == pytest.approx((0.8 * 0.2 / 50) ** 0.5)
    assert figures["geneval"] == {"value": 0.5, "standard_error": 0.0}  # each task counts alike
    # what is asked for decides, too: another list is another evaluation
    assert dataclasses.replace(run, rows=[*run.rows[:49], dataclasses.replace(rows[49], shows=dog)]).key != run.key
