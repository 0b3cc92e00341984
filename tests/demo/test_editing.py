"""What inpainting, captioning and upscaling are measured by: the cases, and that each number counts its own thing."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines import CogView2CaptionPipeline, CogView2InpaintPipeline, CogView2UpscalePipeline
from cogview_pipelines.demo import Scene, Scope, captions, render
from cogview_pipelines.demo.editing import choose_edits, measure_captions, measure_inpainting, measure_upscaling
from cogview_pipelines.demo.evaluation import choose_cases
from cogview_pipelines.demo.scenes import is_usable, split

from ..cli.conftest import FULL_SIZE, LOW_SIZE, SCOPE, model_folder, pipeline  # noqa: F401

CAT, DOG = "1f431", "1f436"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_edits_ask_for_held_out_scenes_and_change_one_object(language):
    scope = Scope.small()
    edits = choose_edits(scope, language, 40, seed=2)
    assert len(edits) == 40
    assert len({edit.seed for edit in edits}) == 40
    assert len({edit.cell for edit in edits}) == 4
    for edit in edits:
        assert f"{split(edit.after)} {edit.after.layout}" == edit.cell
        assert edit.prompt in captions(edit.after, language)
        assert is_usable(edit.before) and edit.before in scope
        changed = [old != new for old, new in zip(edit.before.objects, edit.after.objects)]
        assert [index for index, is_new in enumerate(changed) if is_new] == [edit.index]
        assert (edit.before.style, edit.before.background, edit.before.relation) == (
            edit.after.style,
            edit.after.background,
            edit.after.relation,
        )
    assert edits == choose_edits(scope, language, 40, seed=2)
    assert edits != choose_edits(scope, language, 40, seed=3)


def test_the_mask_holds_all_that_changes_and_no_more_than_its_place():
    for edit in choose_edits(Scope.small(), "en", 20):
        before, after = (np.asarray(render(scene, 240)) for scene in (edit.before, edit.after))
        mask = np.asarray(edit.mask(240)) > 0
        assert not (before != after).any(-1)[~mask].any()
        assert mask.mean() == pytest.approx({"single": 0.36, "pair": 0.16}[edit.after.layout])


def paint_as(monkeypatch, answer):
    """Make inpainting return the picture that a function of the edit's mask and picture gives."""

    class Output:
        def __init__(self, image):
            self.images = [image]

    monkeypatch.setattr(
        CogView2InpaintPipeline,
        "__call__",
        lambda self, prompt, image, mask, **call: Output(answer(prompt, image, mask)),
    )


def test_each_share_of_inpainting_falls_when_its_own_thing_is_wrong(pipeline, monkeypatch):  # noqa: F811
    edits = choose_edits(SCOPE, "en", 6)
    true = {edit.prompt: render(edit.after, FULL_SIZE) for edit in edits}
    names = ("object", "style", "rest", "all", "untouched")

    def shares(answer):
        paint_as(monkeypatch, answer)
        result = measure_inpainting(pipeline, edits)
        return {name for name in names if result[name] < 1}, result

    wrong, result = shares(lambda prompt, image, mask: true[prompt])
    assert wrong == set()
    assert set(result["all_by_cell"].values()) == {1.0}
    wrong, result = shares(lambda prompt, image, mask: image)
    assert wrong == {"object", "all"}
    assert result["object"] == 0

    def touched(prompt, image, mask):
        pixels = np.array(true[prompt])
        pixels[0, 0] ^= 1
        return Image.fromarray(pixels)

    assert shares(touched)[0] == {"untouched"}
    after = {edit.prompt: edit.after for edit in edits}

    def recoloured(prompt, image, mask):
        scene = after[prompt]
        other = next(name for name in SCOPE.backgrounds if name != scene.background)
        return render(dataclasses.replace(scene, background=other), FULL_SIZE)

    assert shares(recoloured)[0] == {"rest", "all", "untouched"}


def test_a_random_model_paints_inside_of_the_mask_only(pipeline):  # noqa: F811
    edits = choose_edits(SCOPE, "zh", 2)
    seen = []
    result = measure_inpainting(
        pipeline, edits, pictures="decoded", num_lopar_steps=0, on_picture=lambda *what: seen.append(what)
    )
    assert result["untouched"] == 1.0
    assert [number for number, *_ in seen] == [0, 1]
    with pytest.raises(ValueError, match="`pictures` must be one of"):
        measure_inpainting(pipeline, edits, pictures="drawn")
    with pytest.raises(ValueError, match="`edits` must be at least one"):
        measure_inpainting(pipeline, [])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_right_as_far_as_they_say_what_is_there(pipeline, monkeypatch, language):  # noqa: F811
    cases = choose_cases(SCOPE, "train", language, 8)
    scenes = [case.scene for case in cases]

    class Output:
        def __init__(self, texts):
            self.captions = texts

    def measure(change):
        texts = [captions(change(scene), language)[0] for scene in scenes]
        monkeypatch.setattr(CogView2CaptionPipeline, "__call__", lambda self, images, **call: Output(texts))
        return measure_captions(pipeline, cases, language)

    right = measure(lambda scene: scene)
    assert right.pop("named_by_layout") == {"single": 1.0, "pair": 1.0}
    assert set(right.values()) == {1.0}
    style = {"noto": "twemoji", "twemoji": "noto"}
    other = measure(lambda scene: Scene(style[scene.style], scene.background, scene.objects, scene.relation))
    assert other.pop("named_by_layout") == {"single": 0.0, "pair": 0.0}
    assert {name for name, share in other.items() if share < 1} == {"style", "named", "all"}
    mirrored = measure(
        lambda scene: (
            scene
            if scene.relation is None
            else Scene(scene.style, scene.background, scene.objects[::-1], scene.relation)
        )
    )
    assert mirrored.pop("named_by_layout") == {"single": 1.0, "pair": 1.0}
    assert {name for name, share in mirrored.items() if share < 1} == {"relation", "all"}
    assert mirrored["relation"] == 0
    wrong_pairs = measure(lambda scene: scene if scene.relation is None else scenes[0])
    assert wrong_pairs["named_by_layout"]["single"] == 1.0
    assert wrong_pairs["named_by_layout"]["pair"] < 1.0


def test_upscaling_is_measured_beside_its_ceiling(pipeline, monkeypatch):  # noqa: F811
    cases = choose_cases(SCOPE, "train", "en", 3)
    result = measure_upscaling(pipeline, cases, num_lopar_steps=0, with_prompt=False)
    assert result["difference"] == pytest.approx(result["psnr"] - result["ceiling_psnr"], abs=0.011)
    true = [render(case.scene, FULL_SIZE) for case in cases]

    class Output:
        images = true

    def call(self, images, prompts, **arguments):
        assert [image.size for image in images] == [(LOW_SIZE, LOW_SIZE)] * 3
        assert prompts == [case.caption for case in cases]
        return Output()

    monkeypatch.setattr(CogView2UpscalePipeline, "__call__", call)
    assert measure_upscaling(pipeline, cases)["psnr"] > 90
    assert result["bicubic_psnr"] == measure_upscaling(pipeline, cases)["bicubic_psnr"]


def test_the_benchmark_records_how_candidates_were_drawn(model_folder, tmp_path):  # noqa: F811
    script = Path(__file__).parents[2] / "benchmarks" / "evaluate_editing.py"
    benchmark = typer.Typer()
    benchmark.command()(runpy.run_path(str(script))["main"])

    def run(*arguments):
        return CliRunner().invoke(benchmark, ["--model", str(model_folder), "--num", "2", *map(str, arguments)])

    refused = run("--measures", "captions", "--temperature", 2)
    assert refused.exit_code == 2 and "post_selection" in refused.stderr
    output = tmp_path / "lines.jsonl"
    made = run("--measures", "post_selection", "--temperature", 2, "--top-k-clusters", 9, "--output", output)
    assert made.exit_code == 0, made.output
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line["sampling"] == {"temperature": 2.0, "top_k_clusters": 9}
        assert {"first", "best", "preset_first", "gain", "gain_over_preset", "token_difference"} <= set(line)
        assert line["cpu_seconds"] >= 0
