"""The detector of the demo drawings, and what scenes ask of it."""

import pytest

from cogview_pipelines.demo import Scene, Scope, load_concepts, render, sample_scenes
from cogview_pipelines.demo.detector import demo_detector, find_objects, requirements_of
from cogview_pipelines.evaluation.requirements import Requirements, check


@pytest.mark.parametrize("layout", ["single", "pair"])
@pytest.mark.parametrize("size", [80, 240])
def test_every_drawn_scene_shows_what_it_asks_for(layout, size):
    for scene in sample_scenes(Scope.small(), 12, 3, layout):
        (found,) = demo_detector()([render(scene, size)])
        result = check(Requirements.from_row(requirements_of(scene)), found)
        assert all(result.values()), (scene, found)
        assert ("geneval_positions" in result) == (layout == "pair")


def test_pictures_of_other_scenes_do_not():
    one, two, other = list(load_concepts())[10:13]
    scene = Scene("noto", "white", (one, two), "left of")
    wanted = Requirements.from_row(requirements_of(scene))
    mirrored = check(wanted, find_objects(render(Scene("noto", "white", (two, one), "left of"), 120)))
    assert mirrored["geneval_objects"] and not mirrored["geneval_positions"]
    assert not check(wanted, find_objects(render(Scene("noto", "white", (one, other), "left of"), 120)))[
        "geneval_objects"
    ]
    assert not check(wanted, find_objects(render(Scene("noto", "white", (one,)), 120)))["geneval_counts"]


def test_both_readings_of_a_picture_ask_for_the_same():
    one, two = list(load_concepts())[10:12]
    scene = Scene("noto", "blue", (one, two), "above")
    found = find_objects(render(scene, 120))
    for reading in (scene, scene.other_reading()):
        assert all(check(Requirements.from_row(requirements_of(reading)), found).values())
