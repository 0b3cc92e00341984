"""What is shown, to whom, in what order."""

import pytest
from PIL import Image

from cogview_pipelines.evaluation.captioned import Captioned
from cogview_pipelines.serving.judging.study import make_study

from .conftest import MODELS, NUM, colour


def test_every_judge_has_an_order_of_captions_and_every_caption_one_of_models(study):
    tokens = [f"token {number}" for number in range(20)]
    orders = [study.order_of_captions(token) for token in tokens]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert len(set(map(tuple, orders))) > 5
    assert orders == [study.order_of_captions(token) for token in tokens]  # the same after a restart
    places = [study.order_of_models(token, 1) for token in tokens for _ in range(10)]
    assert {tuple(order) for order in places} > {(0, 1, 2), (2, 1, 0)}
    assert len({tuple(study.order_of_models("token", caption)) for caption in range(20)}) > 3


def test_no_model_stands_at_a_place_more_often_than_by_chance(study):
    firsts = [study.order_of_models(f"token {number}", 0)[0] for number in range(600)]
    assert all(150 < firsts.count(model) < 250 for model in range(3))


def test_pictures_are_those_of_model_and_caption(study):
    for model in range(3):
        assert study.picture(2, model).getpixel((5, 5)) == colour(model, 2)
        assert study.names[model] == MODELS[model]


def test_pictures_can_be_made_of_one_size(rows, folders):
    study, _ = make_study(rows, folders, size=50)
    assert {study.picture(0, model).size for model in range(3)} == {(50, 50)}


def test_captions_without_a_picture_of_every_model_are_left_out_and_named(rows, folders):
    (folders[1] / "id2.png").unlink()
    (folders[2] / "id0.png").write_bytes(b"no picture")
    study, excluded = make_study(rows, folders)
    assert [row.id for row in study.rows] == ["id1", "id3"]
    assert set(excluded) == {"id0", "id2"} and "id2" in excluded["id2"]


def test_so_many_captions_are_chosen_by_chance(rows, folders):
    chosen = [tuple(row.id for row in make_study(rows, folders, 2, seed)[0].rows) for seed in range(20)]
    assert len(set(chosen)) > 3 and all(len(set(ids)) == 2 for ids in chosen)
    assert chosen[4] == tuple(row.id for row in make_study(rows, folders, 2, 4)[0].rows)
    with pytest.raises(ValueError, match="for 4 of 4 captions, but 5 are asked for"):
        make_study(rows, folders, 5)


def test_captions_reach_nothing_outside_of_the_folders(folders, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    names = ("../outside.png", str(tmp_path / "outside.png"), "..", "x/../../outside.png")
    rows = [Captioned(str(number), "caption", name) for number, name in enumerate(names)]
    with pytest.raises(ValueError, match="for 0 of 4 captions"):
        make_study(rows, folders)


@pytest.mark.parametrize(
    ("chosen", "is_pair", "message"),
    [
        ([0], False, "must be two or more, but are 1"),
        ([0, 1, 2], True, "must be two, but are 3"),
        ([0, 0], False, "must be different"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(rows, folders, chosen, is_pair, message):
    with pytest.raises(ValueError, match=message):
        make_study(rows, [folders[number] for number in chosen], is_pair=is_pair)
