"""Figures against the number of candidates."""

import json

import pytest

from cogview_pipelines.evaluation.candidates import CandidatePool, candidate_curves
from cogview_pipelines.evaluation.captioned import Captioned

from .test_picture_runs import picture, run_of, true_pictures  # noqa: F401 - a fixture

NUM = 30


class Drawer:
    """Candidates by seed; one scorer likes late seeds, the other early ones."""

    def __init__(self, most=10**9):
        self.left, self.drawn = most, []

    def __call__(self, row, seeds):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.drawn.append((row.id, list(seeds)))
        return [picture(seed) for seed in seeds], {"late": list(seeds), "early": [-seed for seed in seeds]}


def pool_of(folder, draw, key="k"):
    rows = [Captioned(f"id{number}", f"caption {number}") for number in range(NUM)]
    return CandidatePool(folder / "candidates", rows, draw, count=4, key=key, seed=7)


def test_every_candidate_has_a_seed_of_its_own_and_is_drawn_once(tmp_path):
    draw = Drawer()
    pool = pool_of(tmp_path, draw)
    for shard in ((1, 2), (0, 2), (0, 1)):
        assert not pool.is_full or shard == (0, 1)
        pool.fill(shard)
    assert pool.is_full
    seeds = [seed for _, own in sorted(draw.drawn, key=lambda one: one[1]) for seed in own]
    assert seeds == list(range(7, 7 + 4 * NUM))


def test_a_stop_loses_a_caption_at_most_and_other_settings_begin_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pool_of(tmp_path, Drawer(most=11)).fill()
    (tmp_path / "candidates" / "000003" / "scores.json").write_text('{"key": "k", "sco')
    again = Drawer()
    pool_of(tmp_path, again).fill()
    assert [id for id, _ in again.drawn] == ["id3", *(f"id{number}" for number in range(11, NUM))]
    other = Drawer()
    pool_of(tmp_path, other, key="other").fill()
    assert len(other.drawn) == NUM


def test_the_best_of_the_first_so_many_is_chosen_by_each_scorer(tmp_path):
    pool = pool_of(tmp_path, Drawer())
    pool.fill()
    assert [pool.chosen(5, number, "late").name for number in (1, 2, 4)] == ["000.png", "001.png", "003.png"]
    assert [pool.chosen(5, number, "early").name for number in (1, 2, 4)] == ["000.png"] * 3


def test_figures_are_those_of_evaluations_of_the_chosen_pictures(tmp_path, true_pictures):  # noqa: F811
    pool = pool_of(tmp_path, Drawer())
    pool.fill()
    unused = run_of(tmp_path, true_pictures, lambda rows, seeds: pytest.fail("made"), num=NUM)
    content = candidate_curves(unused, pool, [4, 1, 2], ["late", "early"])
    assert list(content["curves"]["late"]) == ["1", "2", "4"]
    made = run_of(
        tmp_path / "expected", true_pictures, lambda rows, seeds: [picture(seed + 3) for seed in seeds], num=NUM
    )
    made.seed, made.seeds_of_each = 7, 4
    made.begin()
    made.run()
    expected = made.results()["figures"]
    assert content["curves"]["late"]["4"]["fid_0"]["value"] == pytest.approx(expected["fid_0"]["value"], rel=1e-5)
    early = content["curves"]["early"]
    assert early["1"] == content["curves"]["late"]["1"]
    assert early["4"]["fid_2"]["value"] == pytest.approx(early["1"]["fid_2"]["value"], rel=1e-6)  # the same pictures
    assert content["curves"]["late"]["2"]["fid_0"]["value"] != early["2"]["fid_0"]["value"]
    assert json.loads((tmp_path / "candidates.json").read_text())["curves"] == content["curves"]
    lines = (tmp_path / "candidates.csv").read_text().splitlines()
    assert lines[0] == "chosen_by,candidates,figure,value,spread" and len(lines) == 1 + 2 * 3 * 3
