"""Time and disk, from one batch."""

import json
import time

from cogview_pipelines.evaluation.captioned import open_references
from cogview_pipelines.evaluation.estimates import estimate, estimate_candidates, tell

from .test_candidates import NUM as NUM_OF_POOL
from .test_candidates import Drawer, pool_of
from .test_picture_runs import NUM, Maker, finished, run_of, true_pictures, whole  # noqa: F401 - fixtures


def test_a_batch_is_made_and_kept_and_the_rest_is_told_from_it(tmp_path, true_pictures):  # noqa: F811
    maker = Maker()

    def slowly(rows, seeds):
        time.sleep(0.05 * len(rows))
        return maker(rows, seeds)

    run = run_of(tmp_path / "run", true_pictures, slowly, batch_size=4)
    run.begin()
    found = estimate(run)
    assert maker.made == ["id0", "id1", "id2", "id3"]
    assert (found["pictures_to_make"], found["pictures_to_compare"]) == (NUM - 4, NUM)
    assert found["seconds"] > 0.05 * (NUM - 4)
    size = (tmp_path / "run" / "pictures" / "00000" / "000000.png").stat().st_size
    features = 2 * (6 + 6) * 4 + 3 * 4 + 8  # of two radii and two sides, logits, a figure
    assert 0.5 < found["bytes"] / ((NUM - 4) * size + NUM * features) < 2
    run.run()
    assert sorted(maker.made) == sorted(f"id{number}" for number in range(NUM))  # none of them twice
    assert estimate(run) is None


def test_of_a_shard_only_its_own_is_told(tmp_path, true_pictures):  # noqa: F811
    run = run_of(tmp_path / "run", true_pictures, Maker())
    run.begin()
    assert estimate(run, (2, 3))["pictures_to_compare"] == NUM - 128


def test_pictures_that_exist_are_compared_only(tmp_path, true_pictures):  # noqa: F811
    run = run_of(tmp_path / "run", true_pictures, made=open_references(true_pictures))
    run.begin()
    found = estimate(run)
    assert (found["pictures_to_make"], found["pictures_to_compare"]) == (0, NUM)
    assert found["bytes"] > 0


def test_of_candidates_the_first_caption_is_drawn_kept_and_told_from(tmp_path, true_pictures):  # noqa: F811
    drawer = Drawer()

    def slowly(row, seeds):
        time.sleep(0.2)
        return drawer(row, seeds)

    pool = pool_of(tmp_path, slowly)
    run = run_of(tmp_path, true_pictures, Maker(), num=NUM_OF_POOL)
    found = estimate_candidates(run, pool, 100)
    assert [id for id, _ in drawer.drawn] == ["id0"]
    assert (found["pictures_to_make"], found["pictures_to_compare"]) == (4 * (NUM_OF_POOL - 1), 100)
    assert found["seconds"] > 0.2 * (NUM_OF_POOL - 1)
    size = sum(path.stat().st_size for path in (tmp_path / "candidates" / "000000").iterdir())
    features = 2 * (6 + 6) * 4 + 3 * 4  # of two radii and two sides, and logits
    assert found["bytes"] == (NUM_OF_POOL - 1) * size + 100 * features
    part = estimate_candidates(run, pool, 100, (1, 3))  # which compares nothing
    assert (part["pictures_to_make"], part["pictures_to_compare"]) == (4 * (NUM_OF_POOL // 3 - 1), 0)
    pool.fill()
    assert len(drawer.drawn) == NUM_OF_POOL  # none of them twice
    assert estimate_candidates(run, pool, 100) is None


def test_the_first_estimate_stays_in_the_results_which_are_the_same(tmp_path, true_pictures, whole):  # noqa: F811
    run = run_of(tmp_path / "run", true_pictures, Maker())
    run.begin()
    run.keep(estimate={"seconds": 1})
    run.keep(estimate={"seconds": 2})
    results = finished(run)
    assert results.pop("estimate") == {"seconds": 1}
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["estimate"] == {"seconds": 1}
    assert results["figures"]["fid_0"]["value"] == whole["figures"]["fid_0"]["value"]


def test_a_disk_that_is_too_small_is_told():
    found = {"seconds": 7200.0, "bytes": 3_000_000_000, "free_bytes": 1_000_000_000}
    assert tell(found) == "About 2.0 h and 3.00 GB are needed, but only 1.00 GB are free, by the first batch."
    assert "free" not in tell({**found, "free_bytes": 10**12})
    assert tell(found, "caption").endswith("by the first caption.")
