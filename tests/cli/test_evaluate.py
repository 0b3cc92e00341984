import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines.demo import Scope, evaluation
from cogview_pipelines.demo.captions import captions
from cogview_pipelines.demo.evaluation import choose_cases, measure_pictures
from cogview_pipelines.demo.rendering import render
from cogview_pipelines.demo.scenes import SPLITS, split
from cogview_pipelines.demo.scorer import full_scorer
from cogview_pipelines.evaluation.likelihood import caption_losses
from cogview_pipelines.pictures.png import read_metadata

from .conftest import FULL_SIZE, LOW_SIZE, SCOPE, assert_bad_input

SHARES = ("background", "style", "objects", "position", "all", "clean")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("split_name", ["train", "test_background", "test_pair", "test_order"])
def test_cases_are_different_scenes_of_the_split_with_a_caption_in_the_language(split_name, language):
    cases = choose_cases(Scope.small(), split_name, language, 20, seed=3)
    assert len({case.scene.canonical() for case in cases}) == 20
    assert [case.seed for case in cases] == list(range(3, 23))
    for case in cases:
        assert split(case.scene) == split_name
        assert case.caption in captions(case.scene, language)
    assert cases == choose_cases(Scope.small(), split_name, language, 20, seed=3)
    assert cases != choose_cases(Scope.small(), split_name, language, 20, seed=4)


def test_training_cases_are_apart_from_the_validation_scenes():
    trained = {case.scene.canonical() for case in choose_cases(SCOPE, "train", "en", 10_000)}
    unseen = {case.scene.canonical() for case in choose_cases(SCOPE, "validation", "en", 10_000)}
    assert trained and unseen and not trained & unseen


def test_all_scenes_are_taken_where_there_are_too_few():
    cases = choose_cases(SCOPE, "train", "en", 10_000, layout="single")
    assert 0 < len(cases) < 10_000
    assert {case.scene.layout for case in cases} == {"single"}


def painter(pipe, monkeypatch, cases):
    """Make the pipeline draw the true pictures of its prompts."""
    scenes = {case.caption: case.scene for case in cases}

    class Output:
        def __init__(self, prompts):
            self.images = [render(scenes[prompt], FULL_SIZE) for prompt in prompts]

    monkeypatch.setattr(type(pipe), "__call__", lambda self, prompts, **call: Output(prompts))


def test_true_pictures_have_full_marks_and_shuffled_ones_none(pipeline, monkeypatch):
    cases = choose_cases(SCOPE, "train", "zh", 12, seed=1)
    painter(pipeline, monkeypatch, cases)
    result = measure_pictures(pipeline, cases)
    assert [result[name] for name in SHARES] == [1.0] * 6
    assert measure_pictures(pipeline, cases, baseline="shuffled")["all"] == 0.0


def test_the_ceiling_scores_true_pictures_after_the_image_tokenizer(pipeline):
    cases = choose_cases(SCOPE, "train", "en", 3, layout="single")
    shown = []
    result = measure_pictures(
        pipeline, cases, baseline="ceiling", on_picture=lambda *found: shown.append(found), batch_size=2
    )
    scorer = full_scorer()
    for index, (position, case, image, score) in enumerate(shown):
        assert (position, case) == (index, cases[index])
        assert image.size == (FULL_SIZE, FULL_SIZE)
        assert score == scorer(image, case.scene)
    assert result["all"] == sum(score["all"] for *_, score in shown) / 3


def test_the_report_is_one_line_of_json_with_what_is_needed_to_repeat_it(cogview2, model_folder, tmp_path):
    arguments = ("--split", "test_background", "--language", "zh", "--num", 3, "--seed", 5, "--layout", "pair")
    result = cogview2("evaluate", *arguments, "--height", LOW_SIZE, "--json", "--save", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    expected = {"split": "test_background", "language": "zh", "n": 3, "seed": 5, "layout": "pair", "baseline": "none"}
    assert expected.items() <= report.items()
    assert report["layouts"] == {"single": 0, "pair": 3}
    assert all(0 <= report[name] <= 1 for name in SHARES)
    assert report["seconds_per_image"] > 0
    assert {"hardware", "versions", "date", "device", "dtype", "model"} <= set(report)

    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) == 3
    for path, case in zip(pictures, choose_cases(SCOPE, "test_background", "zh", 3, seed=5, layout="pair")):
        found = read_metadata(path)
        assert (found["prompt"], found["seed"]) == (case.caption, case.seed)
        assert found["scene"] == case.scene.to_dict()
        assert set(found["scores"]) == set(SHARES)


def test_scenes_are_drawn_with_the_settings_of_generate(cogview2, pipeline, tmp_path):
    arguments = ("evaluate", "--num", 2, "--height", LOW_SIZE, "--seed", 5, "--json", "--save", tmp_path)
    result = cogview2(*arguments, "--temperature", 0.6, "--top-k-clusters", 2)
    assert result.exit_code == 0, result.output
    call = {"height": LOW_SIZE, "temperature": 0.6, "top_k_clusters": 2}
    assert json.loads(result.stdout)["call"] == call
    for path in tmp_path.iterdir():
        made = read_metadata(path)
        expected = pipeline(made["prompt"], generator=torch.Generator().manual_seed(made["seed"]), **call)
        assert Image.open(path).tobytes() == expected.images[0].tobytes()
        assert call.items() <= made["settings"].items()
    for more in (("--measure", "caption-loss"), ("--baseline", "ceiling")):
        assert_bad_input(
            cogview2("evaluate", *more, "--temperature", 0.6), "--temperature is for pictures that are drawn"
        )


@pytest.mark.parametrize("baseline", ["ceiling", "shuffled"])
def test_baselines_are_named_in_the_report(cogview2, baseline):
    result = cogview2("evaluate", "--num", 2, "--baseline", baseline, "--height", LOW_SIZE, "--json")
    report = json.loads(result.stdout)
    assert (report["baseline"], report["n"]) == (baseline, 2)


def test_without_json_the_report_is_a_table(cogview2):
    result = cogview2("evaluate", "--num", 2, "--height", LOW_SIZE)
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert {"split", "language", *SHARES} <= set(rows)
    assert rows["n"] == "2"


def test_fewer_scenes_than_asked_for_are_told(cogview2):
    result = cogview2("evaluate", "--split", "validation", "--num", 10_000, "--height", LOW_SIZE, "--json")
    report = json.loads(result.stdout)
    assert report["n"] < 10_000
    assert f"There are {report['n']} such scenes" in result.stderr


def test_caption_loss_compares_own_with_other_captions(cogview2, pipeline):
    result = cogview2("evaluate", "--measure", "caption-loss", "--num", 4, "--language", "zh", "--json")
    report = json.loads(result.stdout)
    cases = choose_cases(SCOPE, "train", "zh", 4)
    pixels = evaluation.true_pictures(pipeline, [case.scene for case in cases], LOW_SIZE)
    tokens = pipeline.vqvae.encode(pixels, 8).tokens
    texts = [case.caption for case in cases]
    true = caption_losses(pipeline.transformer, pipeline.tokenizer, tokens, texts)
    other = caption_losses(pipeline.transformer, pipeline.tokenizer, tokens, texts[1:] + texts[:1])
    assert report["true_caption_loss"] == pytest.approx(true.mean().item(), abs=1e-4)
    assert report["shuffled_caption_loss"] == pytest.approx(other.mean().item(), abs=1e-4)
    assert report["true_is_lower"] == pytest.approx((true < other).float().mean().item(), abs=1e-4)
    assert report["measure"] == "caption-loss"


def test_post_selection_compares_the_best_candidate_with_the_first(cogview2, pipeline):
    arguments = ("--measure", "post-selection", "--candidates", 3, "--num", 2, "--height", LOW_SIZE, "--seed", 4)
    report = json.loads(cogview2("evaluate", *arguments, "--json").stdout)
    assert report["candidates"] == 3
    assert report["gain"] == pytest.approx(report["best"]["all"] - report["first"]["all"])
    cases = choose_cases(SCOPE, "train", "en", 2, seed=4)
    output = pipeline(
        [case.caption for case in cases],
        num_candidates=3,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4, 10)],
        height=LOW_SIZE,
    )
    assert output.seeds[0] in (4, 5, 6) and output.seeds[1] in (7, 8, 9)
    scenes = [case.scene for case in cases]
    assert report["best"] == pytest.approx(full_scorer().mean(output.images, scenes))


def test_the_draft_with_the_lowest_caption_loss_is_the_best(pipeline):
    cases = choose_cases(SCOPE, "train", "en", 3, seed=4)
    drafts, best = evaluation._choose_drafts(pipeline, cases, [4, 8, 12], 4, 8, {})
    losses = caption_losses(
        pipeline.transformer,
        pipeline.tokenizer,
        drafts.flatten(0, 1),
        [case.caption for case in cases for _ in range(4)],
    )
    assert best == losses.view(3, 4).argmin(1).tolist()


def test_candidates_drawn_with_more_chance_are_compared_with_pictures_of_the_models_own_settings(
    pipeline, monkeypatch
):
    cases = choose_cases(SCOPE, "train", "en", 3, seed=4)
    prompts, sampling = [case.caption for case in cases], {"temperature": 3.0, "top_k_clusters": 30}
    seen, finished = [], []

    def record(image, scene):
        seen.append(np.asarray(image))
        return {"all": bool(seen[-1].sum(dtype=np.int64) % 2)}

    monkeypatch.setattr(evaluation, "full_scorer", lambda: record)
    result = evaluation.measure_post_selection(
        pipeline,
        cases,
        num_candidates=3,
        sampling=sampling,
        num_lopar_steps=0,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: finished.extend(
            kwargs["image_indices"] if kwargs["stage"] == "direct_sr_transformer" else ()
        ),
    )

    def call(seeds, **settings):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompts, generator=generators, num_lopar_steps=0, **settings)

    best = call(range(4, 13), num_candidates=3, **sampling)
    expected = [*call((4, 7, 10), **sampling).images, *best.images, *call((4, 7, 10)).images]
    assert len(seen) == len(expected) == 9
    assert all(np.array_equal(image, np.asarray(other)) for image, other in zip(seen, expected))
    chosen = sum(seed not in (4, 7, 10) for seed in best.seeds)
    assert chosen > 0
    assert len(finished) == 3 + chosen + 3  # nothing twice, and no draft that was not chosen
    first, best, preset = (np.mean([image.sum(dtype=np.int64) % 2 for image in seen[i : i + 3]]) for i in (0, 3, 6))
    assert result["gain"] == pytest.approx(best - first, abs=1e-4)
    assert result["gain_over_preset"] == pytest.approx(best - preset, abs=1e-4)
    low = {"height": LOW_SIZE, "output_type": "latent", "num_images_per_prompt": 3, **sampling}
    drafts = call(range(4, 13), **low).tokens.unflatten(0, (3, 3))
    differences = (drafts[:, 1:] != drafts[:, :1]).float().mean().item()
    assert result["token_difference"] == pytest.approx(differences, abs=1e-4)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--split", "test_colour_shape"], ["test_colour_shape", "no scenes"]),
        (["--split", "test_pair", "--layout", "single"], ["test_pair", "no single scenes"]),
        (["--split", "tests"], ["--split", *SPLITS]),
        (["--language", "de"], ["--language", "en", "zh"]),
        (["--num", "0"], ["--num"]),
        (["--num", "1", "--baseline", "shuffled"], ["shuffled", "2"]),
        (["--num", "1", "--measure", "caption-loss"], ["2"]),
        (["--measure", "caption-loss", "--baseline", "ceiling"], ["--baseline"]),
        (["--style", "baroque"], ["'baroque'"]),
        (["--height", "41"], ["41"]),
        (["--sprites", "nowhere"], ["nowhere"]),
    ],
)
def test_what_cannot_be_measured_is_reported(cogview2, arguments, parts):
    assert_bad_input(cogview2("evaluate", *arguments), *parts)


def test_a_model_without_scope_or_with_a_damaged_one_is_refused(cogview2, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "scope.json").write_text("{")
    assert_bad_input(cogview2("evaluate", "--model", tmp_path / "model"), "scope.json")
    (tmp_path / "model" / "scope.json").unlink()
    assert_bad_input(cogview2("evaluate", "--model", tmp_path / "model"), "scope.json")
