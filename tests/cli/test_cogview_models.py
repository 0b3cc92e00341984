"""Folders of the first CogView as `--model`: the family is found, and what has no meaning for it is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline, CogViewUpscalePipeline
from cogview_pipelines.loaders.textual_inversion import write_learned_token
from cogview_pipelines.pictures.png import read_metadata

from ..utils_cogview import make_cogview, make_cogview_tokenizer, make_cogview_vq
from .conftest import SCOPE, assert_bad_input

CAT = "a cat"
TEXTS = [CAT, "a tree on a blue", "一只猫"]
NETWORK = "cogview_pipelines.evaluation.networks:efficientnet_lite0"


@pytest.fixture(scope="module")
def cogview(tmp_path_factory):
    """A folder with all three models."""
    folder = tmp_path_factory.mktemp("cogview")
    tokenizer = make_cogview_tokenizer(tmp_path_factory.mktemp("pieces"))
    settings = {"CogViewUpscalePipeline": {"temperature": 0.5}}
    models = [make_cogview(seed) for seed in range(3)]
    CogViewPipeline(tokenizer, make_cogview_vq(), *models, settings=settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upscaler(cogview, tmp_path_factory):
    """A folder with super-resolution alone."""
    pipe = CogViewPipeline.from_pretrained(cogview)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "vqvae", "super_resolution_transformer")}
    folder = tmp_path_factory.mktemp("upscaler")
    CogViewUpscalePipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


def load(kind, folder):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pictures_are_those_of_the_pipeline_and_made_again_from_their_files(cogview2, cogview, tmp_path):
    options = ("--model", cogview, "--top-k", 5, "--top-p", 0.9, "--temperature", 0.7)
    result = cogview2("generate", CAT, "--seed", 3, "--num-candidates", 3, *options, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    made = load(CogViewPipeline, cogview)(
        CAT,
        num_candidates=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)],
        top_k=5,
        top_p=0.9,
        temperature=0.7,
    )
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(made.images[0]))
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata["settings"] == {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert (metadata["seed"], metadata["model"]) == (made.seeds[0], cogview.name)
    result = cogview2("generate", "--remake", tmp_path / "a.png", "--model", cogview, "-o", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_lists_of_prompts_are_made_once(cogview2, cogview, write_list, tmp_path):
    lines = write_list({"id": "one", "prompt": CAT, "seed": 1, "top_k": 3}, {"id": "two", "prompt": "一只猫"})
    arguments = ("generate", "--prompts", lines, "--model", cogview, "-o", tmp_path / "out")
    assert cogview2(*arguments).exit_code == 0
    written = [(tmp_path / f"out/{name}.png").read_bytes() for name in ("one", "two")]
    assert "2 of 2" in cogview2(*arguments).stderr
    assert [(tmp_path / f"out/{name}.png").read_bytes() for name in ("one", "two")] == written


@pytest.mark.parametrize("kind", ["whole", "alone"])
def test_finer_pictures_are_those_of_the_pipeline(cogview2, cogview, upscaler, picture, kind, tmp_path):
    folder = cogview if kind == "whole" else upscaler
    options = ("--prompt", CAT, "--seed", 2, "--size", 16, "--model", folder)
    result = cogview2("upscale", picture, *options, "-o", tmp_path / "fine.png")
    assert result.exit_code == 0, result.output
    made = load(CogViewUpscalePipeline, folder)(
        Image.open(picture), CAT, size=16, generator=torch.Generator().manual_seed(2)
    )
    assert np.array_equal(pixels(tmp_path / "fine.png"), np.asarray(made.images[0]))
    assert made.images[0].size == (32, 32)


def test_captions_are_greedy_unless_they_are_drawn(cogview2, cogview, picture):
    pipe = load(CogViewCaptionPipeline, cogview)
    greedy = cogview2("caption", picture, "--model", cogview, "--max-length", 5)
    assert greedy.stdout.splitlines() == [pipe(Image.open(picture), top_k=1, max_length=5).captions[0]]
    drawn = cogview2("caption", picture, "--strategy", "sample", "-n", 2, "--seed", 7, "--json", "--model", cogview)
    rows = [json.loads(line) for line in drawn.stdout.splitlines()]
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = pipe(Image.open(picture), num_captions_per_image=2, generator=generators)
    assert [row["caption"] for row in rows] == expected.captions and "language" not in rows[0]


def test_captions_of_a_list_go_into_a_file(cogview2, cogview, picture, write_list, tmp_path):
    lines = write_list({"id": "a", "image": picture.name}, {"id": "b", "image": picture.name, "strategy": "sample"})
    result = cogview2("caption", "--requests", lines, "--model", cogview, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"] and "seed" in rows[1] and "seed" not in rows[0]
    assert all(len(row["captions"]) == 1 for row in rows)


def test_scores_are_losses_best_first(cogview2, cogview, picture):
    result = cogview2("score", picture, *TEXTS, "--json", "--model", cogview)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    scores = load(CogViewCaptionPipeline, cogview).score(Image.open(picture), TEXTS).tolist()
    expected = sorted((round(-score, 4), text) for score, text in zip(scores, TEXTS))
    assert [(row["caption_loss"], row["prompt"]) for row in rows] == expected


@pytest.mark.parametrize("candidates", [(), ("--candidates", 2)], ids=["one", "best of two"])
def test_the_caption_loss_of_an_evaluation_is_that_of_score(
    cogview2, cogview, picture, write_list, tmp_path, candidates
):
    for number in range(len(TEXTS)):
        shutil.copy(picture, tmp_path / f"{number}.png")
    lines = write_list(*({"id": f"{number}", "caption": text} for number, text in enumerate(TEXTS)))
    arguments = (
        "--captions",
        lines,
        "--references",
        tmp_path,
        "--radii",
        "0",
        "--model",
        cogview,
        "--network",
        NETWORK,
    )
    result = cogview2("evaluate", *arguments, *candidates, "--json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert set(figures) == {"fid_0", "inception_score", "caption_loss"}
    losses = []
    for path, text in zip(sorted((tmp_path / "out/pictures").rglob("*.png")), TEXTS, strict=True):
        (row,) = cogview2("score", path, text, "--json", "--model", cogview).stdout.splitlines()
        losses.append(json.loads(row)["caption_loss"])
    assert figures["caption_loss"]["value"] == pytest.approx(np.mean(losses), abs=1e-4) and min(losses) > 0


def test_attention_is_that_of_the_picture_that_is_drawn(cogview2, cogview, tmp_path):
    result = cogview2("attend", CAT, "--seed", 3, "--head", "1,2", "--model", cogview, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "attention.json").read_text())
    pipe = load(CogViewPipeline, cogview)
    maps = pipe.attention_maps(CAT, generator=torch.Generator().manual_seed(3))
    assert [row["word"] for row in numbers["words"]] == maps.words and numbers["model"] == cogview.name
    torch.testing.assert_close(torch.tensor(numbers["score_scales"]), maps.score_scales)
    assert maps.score_scales.shape == (2, 4)
    assert numbers["segments"] == maps.segments((1, 2)).tolist()
    drawn = pipe(CAT, generator=torch.Generator().manual_seed(3)).images[0]
    picture = Image.open(tmp_path / "out" / "picture.png")
    assert picture.tobytes() == drawn.resize(picture.size).tobytes()
    files = {row["file"] for row in numbers["words"]} | {"picture.png", "heads.png", "attention.json"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    assert_bad_input(cogview2("attend", CAT, "--style", "cool", "--model", cogview, "-o", tmp_path / "a"), "style")
    assert_bad_input(cogview2("attend", CAT, "--head", "2,0", "--model", cogview, "-o", tmp_path / "b"), "below 2,4")


def test_a_learned_word_is_loaded_by_every_command_that_reads_texts(cogview2, cogview, picture, tmp_path):
    word, row = "<my-car>", torch.randn(32, generator=torch.Generator().manual_seed(5))
    lora = ("--model", cogview, "--lora", write_learned_token(tmp_path / "word", word, 3 * row, "car").parent)
    path, finer = tmp_path / "made.png", tmp_path / "finer.png"
    for command in (
        ("generate", word, "--seed", 3, "--num-candidates", 2, "--output", path),
        ("upscale", picture, "--prompt", word, "--seed", 3, "--output", finer),
        ("score", picture, word),
    ):
        result = cogview2(*command, *lora)
        assert result.exit_code == 0 and "Warning" not in result.stderr, result.stderr
    loss = float(result.stdout.split()[0])
    pipe = load(CogViewPipeline, cogview)
    pipe.load_textual_inversion(tmp_path / "word")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert np.array_equal(pixels(path), np.asarray(pipe(word, num_candidates=2, generator=generators).images[0]))
    upscaler, captioner = (kind.from_pipe(pipe) for kind in (CogViewUpscalePipeline, CogViewCaptionPipeline))
    made = upscaler(Image.open(picture), word, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(pixels(finer), np.asarray(made))
    assert loss == pytest.approx(float(captioner.caption_loss(Image.open(picture), word)), abs=1e-3)


def test_whole_numbers_are_for_cogview2(cogview2, cogview, tmp_path):
    result = cogview2("generate", CAT, "--model", cogview, "--int8", "-o", tmp_path / "a.png")
    assert_bad_input(result, "`--int8` is about the super-resolution of CogView2")


def test_bench_measures_it(cogview2, cogview):
    result = cogview2("bench", "--model", cogview, "-b", 1, "--seconds", 0.1, "--json")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert set(line["stage_seconds"]) == {"transformer", "vqvae"} and line["stage1_fraction_of_floor"] > 0
    assert line["super_resolution_floor_seconds"] is None


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("generate", CAT, "--style", "cool"), "style"),
        (("generate", CAT, "--guidance-scale", 2), "guidance_scale"),
        (("generate", CAT, "--height", 32), "height"),
        (("generate", CAT, "--top-k-clusters", 2), "top_k_clusters"),
        (("upscale", "PICTURE", "--levels", 2), "num_levels"),
        (("upscale", "PICTURE", "--faithful"), "faithful"),
        (("caption", "PICTURE", "--language", "zh"), "language"),
        (("caption", "PICTURE", "--beams", 2), "num_beams"),
    ],
)
def test_settings_of_the_other_family_are_refused(cogview2, cogview, picture, arguments, name, tmp_path):
    arguments = [picture if argument == "PICTURE" else argument for argument in arguments]
    output = () if arguments[0] == "caption" else ("-o", tmp_path / "a.png")
    result = cogview2(*arguments, *output, "--model", cogview)
    assert_bad_input(result, f"`{name}` has no meaning for this model, which is a CogView")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "arguments", [("generate", "a cat", "--top-k", 3), ("generate", "a cat", "--top-p", 0.5)], ids=["top k", "top p"]
)
def test_settings_of_cogview_are_refused_for_cogview2(cogview2, arguments, tmp_path):
    result = cogview2(*arguments, "-o", tmp_path / "a.png")
    assert_bad_input(result, "`top_", "has no meaning for this model, which is a CogView2Pipeline")


def test_what_a_model_cannot_do_is_said_before_it_is_loaded(
    cogview2, cogview, upscaler, picture, monkeypatch, tmp_path
):
    monkeypatch.setattr("cogview_pipelines.pipelines.common.base.PipelineBase.from_pretrained", lambda *_, **__: 1 / 0)
    output = ("-o", tmp_path / "a.png")
    result = cogview2("generate", CAT, "--model", upscaler, *output)
    assert_bad_input(result, "`transformer` must be given for a CogViewPipeline, but is missing", "Upscale")
    result = cogview2("caption", picture, "--model", upscaler)
    assert_bad_input(result, "`caption_transformer` must be given for a CogViewCaptionPipeline")
    result = cogview2("inpaint", CAT, "--image", picture, "--left", 8, "--model", cogview, *output)
    assert_bad_input(result, "a CogViewPipeline cannot inpaint; it can generate, upscale, caption")


def test_strategies_and_sizes_that_there_are_not_are_named(cogview2, cogview, picture, tmp_path):
    result = cogview2("caption", picture, "--strategy", "beam", "--model", cogview)
    assert_bad_input(result, "`strategy` must be greedy or sample with this model, but is beam")
    result = cogview2("caption", picture, "-n", 2, "--model", cogview)
    assert_bad_input(result, "`strategy` must be sample for `num_captions_per_image`")
    result = cogview2("upscale", picture, "--size", 20, "--model", cogview, "-o", tmp_path / "a.png")
    assert_bad_input(result, "`size` must be 16 or 32 with this model, but is 20")
    result = cogview2("generate", "a cat " * 40, "--model", cogview, "-o", tmp_path / "a.png")
    assert_bad_input(result, "`prompt` may have 21 tokens with this model")


def test_evaluate_measures_pictures_captions_and_candidates(cogview2, cogview, tmp_path):
    shutil.copytree(cogview, tmp_path / "model")
    SCOPE.save(tmp_path / "model")
    arguments = ("evaluate", "--num", 2, "--layout", "single", "--json", "--model", tmp_path / "model")
    long = cogview2(*arguments)
    assert_bad_input(long, "`prompt` may have 21 tokens with this model")
    roomy = make_cogview(max_position_embeddings=80)
    pipe = CogViewPipeline.from_pretrained(cogview)
    CogViewPipeline(pipe.tokenizer, pipe.vqvae, roomy).save_pretrained(tmp_path / "roomy")
    SCOPE.save(tmp_path / "roomy")
    arguments = (*arguments[:-1], tmp_path / "roomy")
    for more, keys in (
        (("--baseline", "ceiling"), {"all", "clean"}),
        (("--measure", "caption-loss"), {"true_caption_loss", "shuffled_caption_loss"}),
        (("--measure", "post-selection", "--candidates", 2), {"first", "best", "gain"}),
    ):
        result = cogview2(*arguments, *more)
        assert result.exit_code == 0, result.output
        assert keys <= set(json.loads(result.stdout))
    assert_bad_input(cogview2(*arguments, "--height", 32), "`height` has no meaning for this model")
