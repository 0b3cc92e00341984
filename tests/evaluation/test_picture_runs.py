"""Evaluations that stop and go on, in shards, with pictures that cannot be read."""

import json
import os

import pytest
import torch
from PIL import Image, ImageFilter

from cogview_pipelines.evaluation.captioned import Captioned, open_references
from cogview_pipelines.evaluation.picture_runs import PictureRun
from cogview_pipelines.evaluation.preparation import Preparation

NUM = 150  # in three blocks


def network(pixels):
    """Six features, so that a distance can be told from few pictures: means and deviations of the channels."""
    values = pixels.float() / 255
    return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1), values.mean((2, 3)) * 5


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (8, 8), bytes(noise.flatten().tolist()))


class Maker:
    """Makes pictures from seeds; is killed when its pictures are used up."""

    def __init__(self, most: int = 10**9):
        self.left, self.made = most, []

    def __call__(self, rows, seeds):
        if self.left < len(rows):
            raise KeyboardInterrupt
        self.left -= len(rows)
        self.made += [row.id for row in rows]
        return [picture(seed) for seed in seeds]


@pytest.fixture(scope="module")
def true_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("true")
    for number in range(NUM):
        picture(10_000 + number).save(folder / f"id{number}.png")
    return folder


def run_of(folder, true_pictures, make=None, num=NUM, **changes):
    arguments = {
        "rows": [Captioned(f"id{number}", f"caption {number}") for number in range(num)],
        "settings": {"model": "m"},
        "make": make,
        "references": open_references(true_pictures),
        "network": network,
        "preparation": Preparation(size=16, radii=(0, 2)),
        "scores": {"length": lambda images, rows: [len(row.caption) for row in rows]},
        "seed": 3,
    }
    return PictureRun(folder, **{**arguments, **changes})


def finished(run):
    run.begin()
    run.run()
    return run.results()


def same(results, others) -> bool:
    """Equal up to the order of sums."""
    figures = {name: pytest.approx(figure, rel=1e-6) for name, figure in others["figures"].items()}
    return results == {**others, "figures": figures}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, true_pictures):
    return finished(run_of(tmp_path_factory.mktemp("whole") / "run", true_pictures, Maker()))


def test_the_figures_are_those_of_all_pictures_at_once(whole):
    from cogview_pipelines.evaluation.distances import frechet_distance, inception_score

    prepare = Preparation(size=16, radii=(0, 2))
    sides = [
        [[network(pixels[None])[0] for pixels in prepare(picture(start + number), is_true)] for number in range(NUM)]
        for start, is_true in ((10_000, True), (3, False))
    ]
    for place, radius in enumerate((0, 2)):
        true, made = (torch.cat([one[place] for one in side]) for side in sides)
        assert whole["figures"][f"fid_{radius}"]["value"] == pytest.approx(frechet_distance([true], [made]), rel=1e-4)
        assert whole["figures"][f"fid_{radius}"]["standard_error"] > 0
    logits = torch.cat([one[0][:, :3] * 5 for one in sides[1]])
    assert whole["figures"]["inception_score"]["value"] == pytest.approx(inception_score([logits], NUM)[0], rel=1e-4)
    lengths = [len(f"caption {number}") for number in range(NUM)]
    assert whole["figures"]["length"]["value"] == pytest.approx(sum(lengths) / NUM)
    assert whole["pictures"] == NUM and whole["excluded"] == 0


def test_killed_twice_it_goes_on_to_the_picture_and_gives_the_same(tmp_path, true_pictures, whole):
    makers = [Maker(75), Maker(40), Maker()]
    for maker in makers[:2]:
        run = run_of(tmp_path, true_pictures, maker)
        run.begin()
        with pytest.raises(KeyboardInterrupt):
            run.run()
        assert run.results() is None
    assert same(finished(run_of(tmp_path, true_pictures, makers[2])), whole)
    made = [id for maker in makers for id in maker.made]
    assert len(made) == len(set(made)) == NUM
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.lock"))


def test_shards_in_one_folder_need_no_merging(tmp_path, true_pictures, whole):
    for index in (1, 0):
        maker = Maker()
        run = run_of(tmp_path, true_pictures, maker)
        run.begin()
        run.run((index, 2))
        assert len(maker.made) == (64 if index else 86)
    assert same(run_of(tmp_path, true_pictures, Maker(0)).results(), whole)


def test_a_damaged_picture_or_block_is_made_again(tmp_path, true_pictures, whole):
    run = run_of(tmp_path, true_pictures, Maker())
    finished(run)
    path = tmp_path / "pictures" / "00001" / "000070.png"
    path.write_bytes(path.read_bytes()[:-20])
    block = tmp_path / "blocks" / "00001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    assert run.results() is None
    again = Maker()
    assert same(finished(run_of(tmp_path, true_pictures, again)), whole)
    assert again.made == ["id70"]


def test_two_processes_do_not_work_on_one_block(tmp_path, true_pictures):
    run = run_of(tmp_path, true_pictures, Maker())
    run.begin()
    with run._only_worker(0), pytest.raises(ValueError, match="another process works on block 0"):
        run_of(tmp_path, true_pictures, Maker()).run()


def test_a_folder_of_other_settings_is_refused_and_stays(tmp_path, true_pictures):
    finished(run_of(tmp_path, true_pictures, Maker()))
    before = (tmp_path / "evaluation.json").read_bytes()
    other = run_of(tmp_path, true_pictures, Maker(), settings={"model": "n", "size": 5})
    with pytest.raises(ValueError, match=r"other settings \(model 'm', now 'n'; size None, now 5\)"):
        other.begin()
    with pytest.raises(ValueError, match=r"other settings \(captions\)"):
        run_of(tmp_path, true_pictures, Maker(), num=9).begin()
    assert (tmp_path / "evaluation.json").read_bytes() == before
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged or no file of an evaluation"):
        other.begin()


def test_what_cannot_be_read_is_left_out_on_both_sides_counted_and_named(tmp_path, true_pictures):
    import shutil

    true, made = tmp_path / "true", tmp_path / "made"
    shutil.copytree(true_pictures, true)
    (true / "id3.png").write_bytes(b"broken")
    (true / "id70.png").unlink()
    made.mkdir()
    for number in range(NUM):
        picture(number + 3).save(made / f"id{number}.png")
    (made / "id4.png").unlink()
    results = finished(run_of(tmp_path / "run", true, made=open_references(made)))
    assert results["pictures"] == NUM - 3 and results["excluded"] == 3
    assert set(results["excluded_pictures"]) == {"id3", "id4", "id70"}
    assert "no picture" in results["excluded_pictures"]["id70"]
    without = [Captioned(f"id{n}", f"caption {n}") for n in range(NUM) if n not in (3, 4, 70)]
    clean = finished(run_of(tmp_path / "clean", true, made=open_references(made), rows=without))
    for name, figure in clean["figures"].items():
        assert results["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6)


def test_features_that_are_no_numbers_stop_the_run_before_they_are_kept(tmp_path, true_pictures):
    def broken(pixels):
        features, logits = network(pixels)
        return features * float("nan"), logits

    run = run_of(tmp_path, true_pictures, Maker(), network=broken)
    run.begin()
    with pytest.raises(ValueError, match="features that are not finite"):
        run.run()
    assert not list((tmp_path).glob("blocks/*.safetensors"))
    with pytest.raises(ValueError, match=r"features of shape \(8, any\), but gave \(6,\)"):
        run_of(tmp_path, true_pictures, Maker(), network=lambda pixels: torch.zeros(6)).run()


def test_figures_that_are_no_numbers_stop_the_run_before_they_are_kept(tmp_path, true_pictures):
    scores = {"caption_loss": lambda images, rows: [float("nan") if row.id == "id3" else 1.0 for row in rows]}
    run = run_of(tmp_path, true_pictures, make=Maker(), num=10, scores=scores)
    run.begin()
    with pytest.raises(ValueError, match="'caption_loss' of id3 is no finite number"):
        run.run()
    assert not list(tmp_path.glob("blocks/*"))


def test_what_killed_runs_left_goes_and_all_may_read_what_is_kept(tmp_path, true_pictures):
    run = run_of(tmp_path, true_pictures, make=Maker(), num=10)
    run.begin()
    for folder, name in (("blocks", "00000.safetensors"), ("pictures/00000", "000003.png")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f".{name}.0123abcd.part").write_bytes(b"half")
    run.run()
    assert not list(tmp_path.rglob("*.part"))
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".png", ".json")}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_names_that_are_no_text_stand_in_the_results(tmp_path, true_pictures):
    name = os.fsdecode(b"pictures\xff")
    run = run_of(tmp_path, true_pictures, make=Maker(), num=10, settings={"pictures": name})
    run.begin()
    run.run()
    assert run.results()["pictures"] == 10
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["settings"]["pictures"] == name
    run.begin()  # the same again


def test_too_few_pictures_for_the_features_are_told(tmp_path, true_pictures):
    wide = finished(
        run_of(tmp_path / "a", true_pictures, Maker(), num=20, network=lambda p: p.float().flatten(1)[:, :30])
    )
    assert "20 pictures are fewer than the network's 30 features" in wide["notes"][0]
    narrow = finished(run_of(tmp_path / "b", true_pictures, Maker(), num=20))
    assert narrow["notes"] == []


def test_both_sides_are_blurred_and_the_made_one_alone_gets_contrast():
    image, prepare = picture(0), Preparation(size=8, radii=(0, 1, 4), contrast=1.5)
    for is_true in (True, False):
        pixels = list(prepare(image, is_true))
        base = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
        for radius, values in zip((1, 4), pixels[1:], strict=True):
            expected = Image.fromarray(values.permute(1, 2, 0).numpy())
            assert base.filter(ImageFilter.GaussianBlur(radius)).tobytes() == expected.tobytes()
        assert (base.tobytes() == image.tobytes()) == is_true
    true, made = (next(prepare(image, is_true)).float() for is_true in (True, False))
    assert made.std() > 1.2 * true.std()


def test_each_picture_has_its_candidates_seeds(tmp_path, true_pictures):
    seeds = []

    def make(rows, given):
        seeds.extend(given)
        return [picture(seed) for seed in given]

    finished(run_of(tmp_path, true_pictures, make, num=70, seeds_of_each=4, seed=100))
    assert seeds == [100 + 4 * number for number in range(70)]


def test_one_source_of_pictures_is_needed(tmp_path, true_pictures):
    with pytest.raises(ValueError, match="`make` or `made` must be given, and not both"):
        run_of(tmp_path, true_pictures)


def test_results_hold_all_that_makes_them_comparable(tmp_path, true_pictures):
    results = finished(run_of(tmp_path, true_pictures, Maker(), num=5, stamp={"versions": {"torch": "1"}}))
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved == results and saved["versions"] == {"torch": "1"} and saved["settings"] == {"model": "m"}
