import random
import zlib
from collections import Counter
from itertools import islice

import pytest

from cogview_pipelines.demo import (
    BACKGROUNDS,
    LAYOUTS,
    SPLITS,
    STYLES,
    Scene,
    Scope,
    is_usable,
    iterate_scenes,
    load_concepts,
    sample_scene,
    sample_scenes,
    split,
)

# Computed with the script that defined this data set, from the same versions of the packages; numbers and checksums of
# splits with that script when it had been told to look for unseen drawings first.
KNOWN_SPLITS = [
    ("train", "twemoji", "blue", ("1f457",), None),
    ("train", "noto", "black", ("1f335", "1f98a"), "below"),
    ("train", "flat", "green", ("1f7e0", "1f3ee"), "left of"),
    ("test_background", "twemoji", "white", ("1f434",), None),
    ("test_background", "twemoji", "green", ("2614", "26c4"), "right of"),
    ("test_background", "flat", "red", ("1f996", "1f333"), "below"),
    ("test_colour_shape", "twemoji", "black", ("1f7e6",), None),
    ("test_colour_shape", "noto", "pink", ("1f682", "2b1b"), "left of"),
    ("test_style", "noto", "blue", ("1f353",), None),
    ("test_style", "fluent", "red", ("1f9f8", "1f451"), "above"),
    ("test_pair", "noto", "purple", ("1f697", "1f388"), "below"),
    ("test_pair", "flat", "gray", ("1f34f", "1f966"), "above"),
    ("test_order", "noto", "blue", ("1f682", "1fa91"), "below"),
    ("test_order", "fluent", "purple", ("1f344", "26a1"), "right of"),
]
TIGER = "1f42f"
SMALL_SCOPE_CHECKSUM = 3233751692


@pytest.mark.parametrize("expected, style, background, objects, relation", KNOWN_SPLITS)
def test_split_is_the_known_one_in_both_readings(expected, style, background, objects, relation):
    scene = Scene(style, background, objects, relation)
    assert is_usable(scene)
    assert split(scene) == expected
    assert split(scene.other_reading()) == expected


def test_both_readings_of_a_pair_are_kept_for_the_validation_or_neither():
    found = set()
    for scene in islice(iterate_scenes(Scope.small(), "pair"), 0, None, 7):
        if split(scene) != "train":
            continue
        found.add(split(scene, validation=True))
        assert split(scene.other_reading(), validation=True) == split(scene, validation=True)
    assert found == {"train", "validation"}


def test_only_splits_of_unseen_drawings_ask_for_drawings_that_training_never_shows():
    scope = Scope.small()
    trained = {(scene.style, *scene.objects) for scene in iterate_scenes(scope, "single", "train")}
    for scene in islice(iterate_scenes(scope, "pair"), 0, None, 7):
        unseen = any((scene.style, hexcode) not in trained for hexcode in scene.objects)
        assert unseen == (split(scene) == "test_style")


def test_concept_table_is_complete_and_in_order():
    concepts = load_concepts()
    assert len(concepts) == 174
    assert list(concepts) == sorted(concepts)
    assert all(concept.noun and concept.noun_zh and concept.measure for concept in concepts.values())
    assert sum(concept.shape != "" for concept in concepts.values()) == 27
    assert concepts[TIGER].noun == "tiger" and concepts[TIGER].noun_zh == "老虎" and concepts[TIGER].emoji == "🐯"


def test_single_scenes_are_the_known_number_in_each_split():
    singles = list(iterate_scenes(Scope.full(), "single"))
    assert len(singles) == len(set(singles)) == 7222
    expected = {"train": 5761, "test_background": 710, "test_colour_shape": 359, "test_style": 392}
    assert Counter(map(split, singles)) == expected


def test_small_scope_splits_every_picture_as_the_known_checksum_says():
    scenes = list(iterate_scenes(Scope.small()))
    counts = Counter((scene.layout, split(scene)) for scene in scenes)
    assert counts == {
        ("single", "train"): 383,
        ("single", "test_background"): 63,
        ("single", "test_style"): 54,
        ("pair", "train"): 10020,
        ("pair", "test_background"): 4612,
        ("pair", "test_style"): 4496,
        ("pair", "test_pair"): 1524,
        ("pair", "test_order"): 1192,
    }
    one_by_one = sorted(
        f"{scene.style} {scene.background} {' '.join(scene.objects)} {scene.relation} {split(scene)}"
        for scene in scenes
    )
    assert zlib.crc32("\n".join(one_by_one).encode()) == SMALL_SCOPE_CHECKSUM


def test_validation_takes_some_of_train_and_nothing_else():
    pairs = list(iterate_scenes(Scope.small(), "pair"))
    with_validation = [split(scene, validation=True) for scene in pairs]
    assert {split(scene) for scene, name in zip(pairs, with_validation) if name == "validation"} == {"train"}
    share = with_validation.count("validation") / [split(scene) for scene in pairs].count("train")
    assert 0.015 < share < 0.025
    assert all(split(scene.other_reading(), validation=True) == name for scene, name in zip(pairs, with_validation))


def test_each_pair_picture_is_listed_once():
    pairs = list(islice(iterate_scenes(Scope.full(), "pair"), 2000))
    assert all(scene == scene.canonical() and scene == scene.other_reading().canonical() for scene in pairs)
    assert len(set(pairs)) == len(pairs)


def test_other_reading_is_an_involution_that_keeps_every_object_in_its_slot():
    scene = Scene("noto", "blue", (TIGER, "1f431"), "right of")
    other = scene.other_reading()
    assert other.relation == "left of" and other.other_reading() == scene
    assert dict(zip(scene.objects, scene.slots)) == dict(zip(other.objects, other.slots))


def test_a_sprite_hidden_by_the_background_or_named_by_its_colour_is_not_usable():
    by_noun = {concept.noun: hexcode for hexcode, concept in load_concepts().items()}
    assert not is_usable(Scene("twemoji", "red", (by_noun["red apple"],)))
    hidden = {(style, b) for style, names in load_concepts()[by_noun["white heart"]].hidden.items() for b in names}
    assert ("noto", "white") in hidden
    assert all(not is_usable(Scene(style, b, (by_noun["white heart"],))) for style, b in hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split_name", ["train", "validation", "test_background", "test_style"])
def test_sampled_scenes_are_different_pictures_of_the_asked_part(layout, split_name):
    scope = Scope.small()
    scenes = sample_scenes(scope, 6, seed=3, layout=layout, split_name=split_name)
    assert len({scene.canonical() for scene in scenes}) == 6
    for scene in scenes:
        assert scene in scope and is_usable(scene)
        assert scene.layout == layout and split(scene, validation=True) == split_name
    assert scenes == sample_scenes(scope, 6, seed=3, layout=layout, split_name=split_name)
    assert scenes != sample_scenes(scope, 6, seed=4, layout=layout, split_name=split_name)


def test_sampling_the_full_scope_gives_all_layouts_relations_and_splits():
    scenes = sample_scenes(Scope.full(), 2000, seed=0)
    assert {scene.layout for scene in scenes} == set(LAYOUTS)
    assert {scene.relation for scene in scenes} == {None, "left of", "right of", "above", "below"}
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {split(scene, validation=True) for scene in scenes} == set(SPLITS)


def test_pair_probability_decides_the_share_of_pairs():
    rng = random.Random(0)
    scenes = [sample_scene(Scope.small(), rng, pair_probability=0.2) for _ in range(1000)]
    assert 0.15 < sum(scene.layout == "pair" for scene in scenes) / 1000 < 0.25


def test_asking_for_more_pictures_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"`num_scenes` is 55, but there are only 54 different single"):
        sample_scenes(Scope.small(), 55, seed=0, layout="single", split_name="test_style")
    two = Scope((TIGER, "1f431"), ("noto",), ("blue",), ("single",))
    assert len(sample_scenes(two, 2, seed=0)) == 2
    with pytest.raises(ValueError, match=r"`num_scenes` is 3, but only 2"):
        sample_scenes(two, 3, seed=0)
    with pytest.raises(ValueError, match="no single scene in the split 'test_colour_shape'"):
        sample_scene(two, random.Random(0), split_name="test_colour_shape")


def test_scope_survives_saving_beside_other_keys(tmp_path):
    scope = Scope((TIGER,), ("noto", "flat"), ("blue",), ("single",))
    scope.save(tmp_path)
    assert Scope.load(tmp_path) == Scope.load(tmp_path / "scope.json") == scope
    (tmp_path / "more.json").write_text((tmp_path / "scope.json").read_text().replace("{", '{"note": 1,', 1))
    assert Scope.load(tmp_path / "more.json") == scope
    (tmp_path / "less.json").write_text('{"concepts": ["1f42f"]}')
    with pytest.raises(ValueError, match=r"lacks \['styles', 'backgrounds', 'layouts'\]"):
        Scope.load(tmp_path / "less.json")


def test_small_scope_is_part_of_the_full_one():
    small, full = Scope.small(), Scope.full()
    assert len(small.concepts) == 24 and small.styles == ("noto", "twemoji")
    assert set(small.concepts) <= set(full.concepts)
    assert Scene("noto", "blue", (TIGER,)) in small
    assert Scene("fluent", "blue", (TIGER,)) not in small


def test_scene_survives_a_round_trip_through_plain_values():
    scene = Scene("noto", "blue", (TIGER, "1f431"), "above")
    assert Scene(**scene.to_dict()) == scene


@pytest.mark.parametrize(
    "values, message",
    [
        (("oil", "blue", (TIGER,)), "`style` has 'oil'"),
        (("noto", "teal", (TIGER,)), "`background` has 'teal'"),
        (("noto", "blue", ("1f42F",)), "`objects` has '1f42F'"),
        (("noto", "blue", ()), "one concept or two different"),
        (("noto", "blue", (TIGER, TIGER), "above"), "one concept or two different"),
        (("noto", "blue", (TIGER,), "above"), "`relation` must be left out"),
        (("noto", "blue", (TIGER, "1f431")), "`relation` has None"),
    ],
)
def test_impossible_scene_is_an_error_that_names_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        Scene(*values)


def test_impossible_scope_or_choice_is_an_error():
    with pytest.raises(ValueError, match="`layouts` must be a list of different names"):
        Scope((TIGER,), ("noto",), ("blue",), ())
    with pytest.raises(ValueError, match="`layout` has 'pair'"):
        next(iterate_scenes(Scope((TIGER,), ("noto",), ("blue",), ("single",)), "pair"))
    with pytest.raises(ValueError, match="`split_name` has 'test'"):
        next(iterate_scenes(Scope.small(), split_name="test"))
