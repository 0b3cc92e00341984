"""`cogview2 evaluate --captions`, from demo scenes written as a list."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines import CogView2CaptionPipeline
from cogview_pipelines.evaluation.embedding_scores import EmbeddingScorer
from cogview_pipelines.json_lines import parse_object, read_lines
from cogview_pipelines.pictures.png import read_metadata

from .conftest import FULL_SIZE, assert_bad_input

NETWORK = "cogview_pipelines.evaluation.networks:efficientnet_lite0"


@pytest.fixture
def listed(cogview2, tmp_path):
    """A list of captions with their true pictures."""
    folder = tmp_path / "listed"
    result = cogview2("evaluate", "--num", 10, "--height", FULL_SIZE, "--export", folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(folder / "captions.jsonl")
    return folder


def evaluated(cogview2, listed, output, *more):
    arguments = (
        "--captions",
        listed / "captions.jsonl",
        "--references",
        listed,
        "--radii",
        "0,2",
        "--network",
        NETWORK,
    )
    result = cogview2("evaluate", *arguments, "--batch-size", 4, "--json", "-o", output, *more)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout) if result.stdout else None
    if report is not None:  # time and disk are told before the work, and are not the same twice
        expected = report.pop("estimate")
        assert expected["seconds"] > 0 and expected["bytes"] > 0 and expected["free_bytes"] > 0
    return report


def test_exported_scenes_are_captions_with_true_pictures(listed):
    rows = [parse_object(line) for _, line in read_lines(listed / "captions.jsonl")]
    assert len(rows) == 10 and all(row["caption"] for row in rows)
    for row in rows:
        assert Image.open(listed / f"{row['id']}.png").size == (FULL_SIZE, FULL_SIZE)


def test_all_measures_from_one_command(cogview2, listed, tmp_path, model_folder, pipeline):
    report = evaluated(cogview2, listed, tmp_path / "out", "--seed", 5)
    assert set(report["figures"]) == {"fid_0", "fid_2", "inception_score", "caption_loss"}
    assert report["pictures"] == 10 and report["settings"]["seed"] == 5 and "torch" in report["versions"]
    assert "10 pictures are fewer than the network's 1280 features" in report["notes"][0]
    # the pictures are those of their seeds, and the loss is that of `score`
    made = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    rows = [parse_object(line) for _, line in read_lines(listed / "captions.jsonl")]
    expected = pipeline(rows[3]["caption"], generator=torch.Generator().manual_seed(8)).images[0]
    assert Image.open(made[3]).tobytes() == expected.tobytes()
    scorer = CogView2CaptionPipeline.from_pipe(pipeline)
    losses = scorer.score([Image.open(path) for path in made], [row["caption"] for row in rows])
    assert report["figures"]["caption_loss"]["value"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_shards_then_all_are_as_at_once_and_pictures_may_come_from_elsewhere(cogview2, listed, tmp_path):
    whole = evaluated(cogview2, listed, tmp_path / "whole")
    assert evaluated(cogview2, listed, tmp_path / "parts", "--shard", "2/2") is None  # one block only, not its
    assert evaluated(cogview2, listed, tmp_path / "parts", "--shard", "1/2") == whole
    assert evaluated(cogview2, listed, tmp_path / "parts") == whole
    # the same pictures, named like the captions
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, path in enumerate(sorted((tmp_path / "whole" / "pictures").rglob("*.png"))):
        path.rename(elsewhere / f"{number:05d}.png")
    given = evaluated(cogview2, listed, tmp_path / "given", "--pictures", elsewhere)
    for name, figure in whole["figures"].items():
        assert given["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-5)


def test_true_pictures_have_no_distance_from_themselves(cogview2, listed, tmp_path):
    report = evaluated(cogview2, listed, tmp_path / "out", "--pictures", listed)
    assert abs(report["figures"]["fid_0"]["value"]) < 1e-3


def test_a_detector_checks_what_the_captions_ask_for(cogview2, listed, tmp_path):
    detector = ("--detector", "cogview_pipelines.demo.detector:demo_detector")
    report = evaluated(cogview2, listed, tmp_path / "true", "--pictures", listed, *detector)
    assert report["figures"]["geneval"] == {"value": 1.0, "standard_error": 0.0}  # the true pictures
    tasks = {name for name in report["figures"] if name.startswith("geneval/")}
    assert tasks <= {"geneval/single_object", "geneval/position"} and tasks
    assert sum(report["figures"][task]["pictures"] for task in tasks) == 10
    assert report["settings"]["detector"] == detector[1]
    made = evaluated(
        cogview2, listed, tmp_path / "made", *detector, "--height", FULL_SIZE
    )  # of a model that has learnt nothing
    assert made["figures"]["geneval"]["value"] < 1


def test_candidates_are_drawn_and_the_best_is_kept(cogview2, listed, tmp_path, pipeline):
    report = evaluated(cogview2, listed, tmp_path / "out", "--candidates", 2, "--num", 3, "--seed", 5)
    assert report["pictures"] == 3 and report["settings"]["call"]["num_candidates"] == 2
    first = sorted((tmp_path / "out" / "pictures").rglob("*.png"))[0]
    drawn = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    best = pipeline(read_metadata(first)["prompt"], generator=drawn, num_candidates=2, num_images_per_prompt=1).images[
        0
    ]
    assert Image.open(first).tobytes() == best.tobytes()


SETTINGS = {"temperature": 0.7, "top_k_clusters": 3, "guidance_scale": 1.5, "negative_prompt": "a cat"}
SETTINGS |= {"iterative_sr_top_k": [9, 5, 3], "num_lopar_steps": 3, "width": FULL_SIZE, "style": "cool"}


def test_settings_are_those_of_generate_and_another_value_is_another_run(cogview2, listed, tmp_path, pipeline):
    given = [str(part) for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    given[given.index("[9, 5, 3]")] = "9,5,3"
    report = evaluated(cogview2, listed, tmp_path / "out", "--num", 2, "--seed", 5, *given)
    assert report["settings"]["call"] == SETTINGS
    used = {**SETTINGS, "height": FULL_SIZE, "text_attention_bias": 1.4, "cluster_temperature": 1.0}
    assert report["sampling"] == used  # with what the model adds
    for path in sorted((tmp_path / "out" / "pictures").rglob("*.png")):
        metadata = read_metadata(path)
        expected = pipeline(
            metadata["prompt"], generator=torch.Generator().manual_seed(metadata["seed"]), **SETTINGS
        ).images[0]
        assert Image.open(path).tobytes() == expected.tobytes()
    arguments = ("--captions", listed / "captions.jsonl", "--references", listed, "--radii", "0,2", "--num", 2)
    arguments += ("--seed", 5, "--network", NETWORK, "-o", tmp_path / "out")
    other = cogview2("evaluate", *arguments, *given, "--temperature", 0.8)
    assert other.exit_code == 2  # the network says a line of its own, too
    assert "holds an evaluation with other settings (call {" in other.stderr and "'temperature': 0.8" in other.stderr


def by_brightness(device):
    """A scorer: dark pictures are better."""
    return lambda images, prompts: [-float(np.asarray(image).mean()) for image in images]


@pytest.mark.parametrize("select", ["clip", f"{__name__}:by_brightness"])
def test_another_scorer_may_decide_on_the_best_candidate(cogview2, listed, tmp_path, clip, pipeline, select):
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    more = ("--candidates", 3, "--num", 3, "--seed", 5, "--clip", tmp_path / "clip")
    report = evaluated(cogview2, listed, tmp_path / "out", *more, "--select", select)
    assert report["settings"]["select"] == select and report["pictures"] == 3
    scorer = EmbeddingScorer(*clip) if select == "clip" else by_brightness("cpu")
    chosen = []
    for path in sorted((tmp_path / "out" / "pictures").rglob("*.png")):
        metadata = read_metadata(path)
        drawn = [torch.Generator().manual_seed(metadata["seed"] + number) for number in range(3)]
        call = {"generator": drawn, "num_candidates": 3}
        best = pipeline(metadata["prompt"], scorer=scorer, **call)
        assert Image.open(path).tobytes() == best.images[0].tobytes()
        chosen.append(best.seeds == pipeline(metadata["prompt"], **call).seeds)
    assert not all(chosen)  # by the caption loss, it would be others
    same = evaluated(cogview2, listed, tmp_path / "loss", *more, "--select", "caption-loss")
    assert "select" not in same["settings"]  # what is meant where nothing is said


def test_a_protocol_sets_what_the_paper_did_and_options_override(cogview2, listed, tmp_path):
    arguments = ("--protocol", "cogview", "--num", 2, "--candidates", 2)
    report = evaluated(cogview2, listed, tmp_path / "out", *arguments)
    assert report["settings"]["contrast"] == 1.5 and report["settings"]["protocol"] == "cogview"
    assert report["settings"]["num"] == 2 and report["settings"]["call"]["num_candidates"] == 2
    result = cogview2(
        "evaluate", "--captions", listed / "captions.jsonl", "--protocol", "cogview2", "-o", tmp_path / "x"
    )
    assert_bad_input(result, "captions of 10 different pictures, but 30000 are asked for")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--references", "."], "--references is for --captions"),
        (["--captions", "LIST"], "`--output` must name a folder"),
        (["--captions", "LIST", "-o", "out", "--split", "train"], "--split is for the demo data"),
        (["--captions", "LIST", "-o", "out", "--radii", "0,x"], "`--radii` must be"),
        (["--captions", "LIST", "-o", "out", "--radii", "1,1"], "`--radii` must be"),
        (["--captions", "LIST", "-o", "out", "--candidate-counts", "1,x"], "`--candidate-counts` must be"),
        (["--captions", "LIST", "-o", "out", "--candidate-counts", "4"], "`--candidate-counts` must be"),
        (["--captions", "LIST", "-o", "out", "--candidate-counts", "1,2", "--candidates", "2"], "leave --candidates"),
        (["--captions", "LIST", "-o", "out", "--candidate-counts", "1,2"], "need a network that compares"),
        (["--captions", "LIST", "-o", "out", "--shard", "3/2"], "`--shard` must be like 1/4"),
        (["--captions", "LIST", "-o", "out", "--references", "REFERENCES"], "need a network that compares"),
        (["--captions", "LIST", "-o", "out", "--inception", "none.pth"], "there is no file none.pth of Inception's"),
        (["--captions", "LIST", "-o", "out", "--inception", "none.pth", "--network", "a:b"], "not both"),
        (["--captions", "LIST", "-o", "out", "--network", "nothing"], "must be `module:function`"),
        (["--captions", "LIST", "-o", "out", "--network", "json:nothing"], "must be `module:function`"),
        (["--captions", "LIST", "-o", "out", "--detector", "nothing"], "the detector must be `module:function`"),
        (["--captions", "PLAIN", "-o", "out", "--detector", "a:b"], "captions that say what is to be seen"),
        (["--captions", "LIST", "-o", "out", "--precision"], "--precision needs --references"),
        (["--detector", "a:b"], "--detector is for --captions"),
        (["--select", "clip"], "--select is for --captions"),
        (["--captions", "LIST", "-o", "out", "--select", "clip"], "--select needs candidates to choose from"),
        (
            ["--captions", "LIST", "-o", "out", "--select", "clip", "--candidates", "2"],
            "--select clip needs the model",
        ),
        (["--captions", "LIST", "-o", "out", "--select", "no", "--candidates", "2"], "the scorer of --select must be"),
        (["--captions", "LIST", "-o", "out", "--select", "clip", "--candidate-counts", "1,2"], "compare the scorers"),
        (["--captions", "LIST", "-o", "out", "--pictures", "REFERENCES", "--top-p", "0.5"], "leave it out with --pic"),
        (["--captions", "LIST", "-o", "out", "--pictures", "REFERENCES", "--candidates", "2"], "--candidates is for"),
        (["--captions", "LIST", "-o", "out", "--top-p", "0.5"], "`top_p` has no meaning for this model"),
        (["--captions", "LIST", "-o", "out", "--temperature", "0"], "`temperature` must be a number from"),
        (["--captions", "LIST", "-o", "out", "--iterative-sr-top-k", "9,x"], "`iterative_sr_top_k` must be"),
        (
            ["--captions", "LIST", "-o", "out", "--iterative-sr-top-k", "9,8"],
            "one number or one per step (5), but has 2",
        ),
        (["--captions", "LIST", "-o", "out", "--clip", "no-such-folder"], "no model of pictures and texts"),
        (["--captions", "missing.jsonl", "-o", "out"], "missing.jsonl"),
        (["--captions", "x" * 300 + ".tsv", "-o", "out"], "File name too long"),
        (["--captions", "~nouser-of-this-name/x.jsonl", "-o", "out"], "cannot be found"),
        (["--captions", "LIST", "-o", "~nouser-of-this-name/x"], "cannot be found"),
        (["--captions", "LIST", "-o", "x" * 300], "File name too long"),
        (["--captions", "LIST", "-o", "out", "--references", "missing.tsv"], "cannot read missing.tsv"),
        (["--captions", "LIST", "-o", "out", "--references", "x" * 300], "must be in a folder"),
        (["--captions", "LIST", "-o", "out", "--references", "~nouser-of-this-name/x"], "cannot be found"),
        (["--captions", "LIST", "-o", "out", "--pictures", "~nouser-of-this-name/x"], "cannot be found"),
        (["--captions", "LIST", "-o", "out", "--pictures", "missing"], "must be in a folder"),
        (["--captions", "LIST", "-o", "out", "--inception", "x" * 300], "of Inception's weights"),
        (["--captions", "LIST", "-o", "out", "--clip", "~nouser-of-this-name/x"], "cannot be found"),
        (["--captions", "LIST", "-o", "out", "--network", "..:f"], "must be `module:function`"),
        (["--captions", "LIST", "-o", "out", "--network", ":f"], "must be `module:function`"),
        (["--captions", "LIST", "-o", "out", "--contrast", "nan"], "Invalid value for '--contrast'"),
        (["--captions", "LIST", "-o", "out", "--radii", "nan"], "`--radii` must be"),
        (["--captions", "LIST", "-o", "out", "--radii", "1,1.0000001"], "`--radii` must be"),
        (["--captions", "LIST", "-o", "out", "--shard", "1/" + "9" * 5000], "`--shard` must be like 1/4"),
    ],
)
def test_bad_input_is_told_in_a_line_before_any_picture(cogview2, listed, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.tsv").write_text("1\ta tiger\n")
    names = {"LIST": listed / "captions.jsonl", "REFERENCES": listed, "PLAIN": tmp_path / "plain.tsv"}
    assert_bad_input(cogview2("evaluate", *(names.get(argument, argument) for argument in arguments)), message)
    assert not list(tmp_path.glob("out/**/*.png"))


def test_captions_that_do_not_fit_are_all_named_before_any_picture(cogview2, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"id": n, "caption": "a tiger " * 80}) + "\n" for n in range(2)))
    result = cogview2("evaluate", "--captions", path, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "caption 0: " in result.stderr and "caption 1: " in result.stderr
    assert not list(tmp_path.glob("out/**/*.png"))


def test_captions_of_pictures_that_are_there_are_checked_before_the_first(cogview2, listed, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"id": f"{n:05d}", "caption": "a tiger " * 80}) + "\n" for n in range(2)))
    result = cogview2("evaluate", "--captions", path, "--pictures", listed, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "caption 00000: " in result.stderr and "caption 00001: " in result.stderr
    assert not (tmp_path / "out/evaluation.json").exists()


def test_exporting_replaces_no_file_but_the_same(cogview2, listed, tmp_path):
    export = ("evaluate", "--num", 2, "--height", FULL_SIZE, "--export")
    before = {path.name: path.read_bytes() for path in listed.iterdir()}
    result = cogview2(*export, listed)  # fewer, so that the list is another
    assert_bad_input(result, "captions.jsonl is there already")
    assert {path.name: path.read_bytes() for path in listed.iterdir()} == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "00001.png").write_bytes(b"my picture")
    assert_bad_input(cogview2(*export, mine), "00001.png is there already")
    assert (mine / "00001.png").read_bytes() == b"my picture" and not (mine / "captions.jsonl").exists()
    (mine / "00001.png").unlink()  # what a stop left is gone on with
    for _ in range(2):
        assert cogview2(*export, mine).exit_code == 0
    assert sorted(path.name for path in mine.iterdir()) == ["00000.png", "00001.png", "captions.jsonl"]


def test_a_scorer_without_all_of_its_weights_is_refused(cogview2, listed, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 16}, vision_config={**small, "image_size": 8, "patch_size": 4})
    ).save_pretrained(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, tmp_path / "clip/model.safetensors", {"format": "pt"})
    arguments = ("--captions", listed / "captions.jsonl", "-o", tmp_path / "out", "--clip", tmp_path / "clip")
    assert_bad_input(cogview2("evaluate", *arguments), "it lacks weights: visual_projection.weight")
    (tmp_path / "clip/model.safetensors").write_bytes(b"\xff" * 100)
    assert_bad_input(cogview2("evaluate", *arguments), "is no model of pictures and texts")


def test_figures_by_the_number_of_candidates_are_a_table_and_a_plot(cogview2, listed, tmp_path, clip, pipeline):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    arguments = ("--captions", listed / "captions.jsonl", "--references", listed, "--num", 3, "--radii", "0")
    arguments += ("--network", NETWORK, "--clip", tmp_path / "clip", "--candidate-counts", "1,2", "--seed", 5)
    result = cogview2("evaluate", *arguments, "--json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    curves, expected = content["curves"], content["estimate"]
    assert (expected["pictures_to_make"], expected["pictures_to_compare"]) == (2 * 2, 3 * 3)  # after the first caption
    assert expected["seconds"] > 0 and expected["bytes"] > 0
    assert " are needed, by the first caption." in result.stderr
    assert {scorer: list(own) for scorer, own in curves.items()} == {
        name: ["1", "2"] for name in ("caption_loss", "clip")
    }
    assert set(curves["clip"]["2"]) == {"fid_0", "inception_score"}
    for name in ("candidates.csv", "candidates.json", "candidates.png", "candidates.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    # the candidates are those of their seeds, and self-reranking keeps what the pipeline keeps
    folder = tmp_path / "out" / "candidates" / "000000"
    drawn = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    best = pipeline(read_metadata(folder / "000.png")["prompt"], generator=drawn, num_candidates=2).images[0]
    scores = json.loads((folder / "scores.json").read_text())["scores"]["caption_loss"]
    chosen = folder / f"{scores.index(max(scores)):03d}.png"
    assert Image.open(chosen).tobytes() == best.tobytes()
