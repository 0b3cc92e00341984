"""What a sentence asks for, and how a picture is judged by that and nothing else."""

import pytest

from cogview_pipelines.demo import RELATIONS, Request, Scene, render
from cogview_pipelines.demo.scorer import full_scorer

DOG, CAT = "1f436", "1f431"
SCENE = Scene("noto", "blue", (DOG, CAT), "left of")
BESIDE = ("left of", "right of")


def test_a_request_for_all_of_a_scene_is_met_by_both_readings_and_by_no_other_scene():
    request = Request.of(SCENE)
    assert request.is_met_by(SCENE) and request.is_met_by(SCENE.other_reading())
    assert request.canonical() == Request.of(SCENE.other_reading()).canonical()
    for other in (
        Scene("twemoji", "blue", (DOG, CAT), "left of"),
        Scene("noto", "red", (DOG, CAT), "left of"),
        Scene("noto", "blue", (CAT, DOG), "left of"),
        Scene("noto", "blue", (DOG,)),
    ):
        assert not request.is_met_by(other)


@pytest.mark.parametrize("relation", RELATIONS)
def test_what_is_left_open_may_be_as_it_likes(relation):
    scene = Scene("twemoji", "pink", (CAT, DOG), relation)
    assert Request((DOG, CAT), tuple(RELATIONS)).is_met_by(scene)
    assert Request((DOG, CAT), BESIDE).is_met_by(scene) == (relation in BESIDE)


def test_pictures_are_judged_by_what_was_asked_for():
    scorer, picture = full_scorer(), render(SCENE)
    judged = scorer.judge(picture, Request((DOG, CAT), tuple(RELATIONS)), SCENE)
    assert judged == {"objects": True, "all": True, "clean": True}
    beside = Request((CAT, DOG), BESIDE, style="noto")
    assert scorer.judge(picture, beside, SCENE) == {
        "objects": True,
        "style": True,
        "position": True,
        "all": True,
        "clean": True,
    }
    for wrong, name in (
        (Request((DOG, CAT), BESIDE, style="twemoji"), "style"),
        (Request((DOG, CAT), BESIDE, background="red"), "background"),
        (Request((DOG, CAT), ("right of",)), "position"),
        (Request((DOG, "1f42f"), BESIDE), "objects"),
    ):
        judged = scorer.judge(picture, wrong, SCENE)
        assert not judged[name] and not judged["all"]


def test_two_things_in_no_told_place_are_found_one_above_the_other():
    scene = Scene("noto", "blue", (DOG, CAT), "below")
    judged = full_scorer().judge(render(scene), Request((DOG, CAT), tuple(RELATIONS), background="blue"), SCENE)
    assert judged["all"] and "position" not in judged
