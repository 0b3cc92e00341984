"""`cogview2 finetune` of the first CogView: what is trained of which model, what stays, adapters, samples."""

import json
import shutil

import pytest
import torch
from PIL import Image

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline, CogViewTokenizer, CogViewUpscalePipeline
from cogview_pipelines.cli import finetune

from ..pipelines.conftest import build_cogview
from ..utils_cogview import make_cogview_tokenizer

STAGES = ("transformer", "super_resolution_transformer", "caption_transformer")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """All three models, and settings that are not the defaults."""
    made = build_cogview(make_cogview_tokenizer(tmp_path_factory.mktemp("pieces")))
    made.register_to_config(settings={"CogViewPipeline": {"temperature": 0.7}})
    return made


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune_cogview") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, finetuning):
    return finetuning(model)


@pytest.fixture
def save_with(pipe, tmp_path):
    """Saves a pipeline of these models alone, and gives its folder."""

    def save(kind, *names, tokenizer=None):
        own = {name: getattr(pipe, name) for name in names}
        kind(tokenizer or pipe.tokenizer, pipe.vqvae, **own).save_pretrained(tmp_path / "part")
        return str(tmp_path / "part")

    return save


def load(kind, folder, adapter=None):
    made = kind.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    if adapter is not None:
        made.load_lora_weights(adapter)
    return made


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def scripts(run):
    return [call[0] for call in run.calls]


def of_training(run, stage):
    """What a stage was trained with."""
    return next(options for script, _, options in run.calls if options["output_dir"].name == stage)


def test_all_stages_are_trained_and_everything_else_is_as_in_the_model(run, model, tmp_path, caplog):
    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    assert scripts(run) == ["prepare_tokens.py", *["train_cogview.py"] * 3, "assemble_cogview_pipeline.py"]
    before, after = (CogViewPipeline.from_pretrained(folder) for folder in (model, tmp_path / "mine"))
    assert dict(before.config.settings) == dict(after.config.settings) != {}
    for stage in STAGES:
        old, new = getattr(before, stage).state_dict(), getattr(after, stage).state_dict()
        assert old.keys() == new.keys()
        distance = max(float((old[name] - new[name]).abs().max()) for name in old)
        assert 0 < distance < 0.05, stage  # went on from it, and did not begin anew
    report = json.loads((tmp_path / "mine/finetuning.json").read_text())
    assert report["stages"] == [*report["held_out_losses"]] == ["base", "super-resolution", "caption"]
    assert all(None not in losses for losses in report["held_out_losses"].values())
    assert Image.open(tmp_path / "mine/samples.png").size == (64, 64)  # enlarged, of one picture that is held out
    assert len(lines(tmp_path / "mine/samples.txt")) == len(lines(tmp_path / "mine/captions.txt")) == 1
    assert len(lines(tmp_path / "mine.work/data/held_out/captions.jsonl")) == 1
    assert "of 12 (8.3%)" in caplog.text and "Captions with more than" in caplog.text


def test_each_stage_learns_what_it_does(run, model, pipe, save_with, tmp_path):
    result = run("--steps", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    base, finer, caption = (of_training(run, stage) for stage in ("base", "super-resolution", "caption"))
    assert "caption_probability" not in base and caption["caption_probability"] == 1
    assert finer["super_resolution_probability"] == 1 and finer["restart_on_roi2"] is False
    run.calls.clear()
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine.work")
    # a base model that also describes, as the shipped one
    result = run("--steps", "1", "--model", save_with(CogViewPipeline, *STAGES[:2]))
    assert result.exit_code == 0, (result.output, result.exception)
    assert of_training(run, "base")["caption_probability"] == 0.25
    assert len(run.calls) == 4 and (tmp_path / "mine/captions.txt").is_file()


def test_stages_that_are_named_are_trained_and_the_others_stay(run, model, tmp_path):
    result = run("--stage", "super-resolution", "--learning-rate", "0.01")
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = (CogViewPipeline.from_pretrained(folder) for folder in (model, tmp_path / "mine"))
    for stage in STAGES:
        old, new = getattr(before, stage).state_dict(), getattr(after, stage).state_dict()
        change = max(float((old[name] - new[name]).abs().max()) for name in old)
        assert (change > 5e-3) is (stage == "super_resolution_transformer"), stage
    assert (tmp_path / "mine/samples.png").is_file() and not (tmp_path / "mine/captions.txt").exists()


@pytest.mark.parametrize(
    "kind, name, samples",
    [
        (CogViewUpscalePipeline, "super_resolution_transformer", {"samples.png", "samples.txt"}),
        (CogViewCaptionPipeline, "caption_transformer", {"samples.txt", "captions.txt"}),
    ],
)
def test_models_that_only_enlarge_or_describe_are_trained(run, save_with, tmp_path, kind, name, samples):
    folder = save_with(kind, name)
    result = run("--model", folder, "--learning-rate", "0.01")
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(run.calls) == 3
    before, after = (getattr(kind.from_pretrained(each), name).state_dict() for each in (folder, tmp_path / "mine"))
    assert max(float((before[key] - after[key]).abs().max()) for key in before) > 5e-3
    assert {path.name for path in (tmp_path / "mine").glob("*s.*")} == samples


def test_an_adapter_is_one_file_for_all_stages_and_leaves_the_model_alone(run, model, pipe, tmp_path):
    result = run("--lora-rank", "2", "--learning-rate", "0.1")
    assert result.exit_code == 0, (result.output, result.exception)
    assert not (tmp_path / "mine/model_index.json").exists()
    assert {"finetuning.json", "samples.png", "samples.txt", "captions.txt"} < {
        path.name for path in (tmp_path / "mine").iterdir()
    }
    tokens = torch.randint(48, (1, 4, 4), generator=torch.Generator().manual_seed(0))
    calls = {
        CogViewPipeline: lambda made, generator: made("a red car", generator=generator).tokens,
        CogViewUpscalePipeline: lambda made, generator: made(tokens=tokens, generator=generator).tokens,
        CogViewCaptionPipeline: lambda made, _: made.score(None, "a red car", tokens=tokens),
    }
    for kind, call in calls.items():
        plain = call(kind.from_pipe(pipe), torch.Generator().manual_seed(1))
        for adapter, is_plain in ((None, True), (tmp_path / "mine", False)):
            made = load(kind, model, adapter)
            assert torch.allclose(call(made, torch.Generator().manual_seed(1)), plain) is is_plain, kind
    assert [*made.get_list_adapters()] == [*STAGES]


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("stage, is_learned", [("base", True), ("super-resolution", False), ("caption", False)])
def test_words_of_the_captions_are_known_where_what_draws_them_was_trained(
    kind, stage, is_learned, run, pipe, save_with, tmp_path
):
    pipe.tokenizer.save_pretrained(tmp_path / "words")
    tokenizer = CogViewTokenizer.from_pretrained(tmp_path / "words", known_words=["a", "red", "car"])
    folder = save_with(CogViewPipeline, *STAGES, tokenizer=tokenizer)
    rank = ["--lora-rank", "2"] if kind == "adapter" else []
    result = run("--stage", stage, "--model", folder, "--steps", "1", *rank)
    assert result.exit_code == 0, (result.output, result.exception)
    made = load(CogViewPipeline, folder if rank else tmp_path / "mine", tmp_path / "mine" if rank else None)
    assert made.tokenizer.unknown_parts("a green car") == ([] if is_learned else ["green"])


def test_the_same_command_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    stages = ("--stage", "base", "--stage", "caption")
    result = run(*stages, "--max-minutes", "0")
    assert result.exit_code == 75 and "The same command goes on" in result.output

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save_grid", stop)
        result = run(*stages)
        assert result.exit_code == 75 and not (tmp_path / "mine").exists()
    assert scripts(run)[1:] == ["train_cogview.py", "train_cogview.py", "assemble_cogview_pipeline.py"]
    assert run(*stages).exit_code == 0
    assert scripts(run)[4:] == ["assemble_cogview_pipeline.py"]
    assert run(*stages).exit_code == 0  # nothing is made again
    assert len(run.calls) == 5
    result = run(*stages, "--style-probability", "0.5")
    assert result.exit_code == 2 and "is of another finetuning (style_probability was None)" in result.output


def test_style_learning_and_noise_are_the_base_s(run, captioned_pictures, tmp_path):
    rows = [json.loads(line) | {"style": "oil painting"} for line in lines(captioned_pictures / "captions.jsonl")]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (captioned_pictures / "captions.jsonl").write_text(text)
    noise = ["--noise", "0.3"]
    result = run("--style-probability", "1", "--stage", "base", "--stage", "super-resolution", "--steps", "1", *noise)
    assert result.exit_code == 0, (result.output, result.exception)
    assert of_training(run, "base")["style_probability"] == 1
    assert of_training(run, "base")["noise_probability"] == 0.3
    assert "noise_probability" not in of_training(run, "super-resolution")
    assert "style_probability" not in of_training(run, "super-resolution")
    result = run("--style-probability", "1", "--stage", "super-resolution", "--output", str(tmp_path / "other"))
    assert result.exit_code == 2 and "`--style-probability` is for the base of a CogView" in result.output


def test_stages_that_the_model_has_not_are_named_with_those_that_it_has(run, save_with):
    for arguments, message in (
        (("--stage", "coglm"), "the model, a CogView, has no coglm; it has base, super-resolution, caption."),
        (
            ("--stage", "caption", "--model", save_with(CogViewPipeline, *STAGES[:2])),
            "the model, a CogView, has no caption; it has base, super-resolution.",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and f"`--stage`: {message}" in " ".join(result.output.split())
    assert not run.calls
