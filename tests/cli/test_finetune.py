"""`cogview2 finetune`: the steps over the training scripts, what is carried over, going on after a stop, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines import CogView2Pipeline, IcetkTokenizer, IcetkVQModel
from cogview_pipelines.cli import app, finetune
from cogview_pipelines.cli.finetune_families import read_family
from cogview_pipelines.environment import SHIPPED_MODEL, SHIPPED_MODELS
from cogview_pipelines.models.adapters import add_adapter
from cogview_pipelines.training.data.tokens import TokenData

from ..pipelines.conftest import build


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A tiny model with all stages, a style and schedulers that are not the defaults."""
    folder = tmp_path_factory.mktemp("finetune") / "model"
    build(tokenizer, shares_backbone=True, whole_pictures=True).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(captioned_pictures):
    return captioned_pictures


@pytest.fixture
def run(model, finetuning):
    return finetuning(model)


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red car", generator=torch.Generator().manual_seed(1), output_type="latent").tokens


def test_all_stages_are_trained_and_everything_else_is_as_in_the_model(run, model, tmp_path, caplog):
    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    scripts = ["prepare_tokens.py", "train_coglm.py", "train_direct_sr.py", "train_iterative_sr.py"]
    assert [call[0] for call in run.calls] == [*scripts, "assemble_pipeline.py"]
    before, after = (CogView2Pipeline.from_pretrained(folder) for folder in (model, tmp_path / "mine"))
    assert dict(before.config.styles) == dict(after.config.styles)
    assert after.config.whole_pictures and after.config.default_style == "none"
    assert dict(before.iterative_sr_scheduler.config) == dict(after.iterative_sr_scheduler.config)
    assert after.direct_sr_transformer.config.shares_backbone
    for stage in ("transformer", "direct_sr_transformer", "iterative_sr_transformer"):
        old, new = getattr(before, stage).state_dict(), getattr(after, stage).state_dict()
        assert old.keys() == new.keys()
        distance = max(float((old[name] - new[name]).abs().max()) for name in old)
        assert 0 < distance < 0.05, stage  # went on from it, and did not begin anew
    report = json.loads((tmp_path / "mine/finetuning.json").read_text())
    assert set(report["held_out_losses"]) == {"coglm", "direct-sr", "iterative-sr"}
    assert all(None not in losses for losses in report["held_out_losses"].values())
    assert Image.open(tmp_path / "mine/samples.png").size[0] >= 96
    assert len((tmp_path / "mine.work/data/held_out/captions.jsonl").read_text().splitlines()) == 1
    assert "30 tokens (the longest has" in caplog.text


def test_an_adapter_is_one_file_for_all_stages_and_leaves_the_model_alone(run, model, tmp_path):
    plain = draw(CogView2Pipeline.from_pretrained(model))
    result = run("--lora-rank", "2", "--stage", "coglm", "--stage", "iterative-sr", "--learning-rate", "0.1")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "mine/pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "mine/model_index.json").exists()
    pipe = CogView2Pipeline.from_pretrained(model)
    assert torch.equal(draw(pipe), plain)
    pipe.load_lora_weights(tmp_path / "mine")
    assert [*pipe.get_list_adapters()] == ["transformer", "iterative_sr_transformer"]
    assert not torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("stage, is_learned", [("coglm", True), ("iterative-sr", False)])
def test_words_of_the_captions_are_known_where_coglm_was_trained(
    kind, stage, is_learned, run, model, tokenizer, tmp_path
):
    pipe = CogView2Pipeline.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "words")
    pipe.tokenizer = IcetkTokenizer.from_pretrained(tmp_path / "words", known_words=["a", "red", "car"])
    pipe.save_pretrained(tmp_path / "model")
    rank = ["--lora-rank", "2"] if kind == "adapter" else []
    result = run("--stage", stage, "--model", str(tmp_path / "model"), "--steps", "1", *rank)
    assert result.exit_code == 0, (result.output, result.exception)
    made = CogView2Pipeline.from_pretrained(tmp_path / ("model" if rank else "mine"))
    if rank:
        assert made.tokenizer.unknown_parts("a green car") == ["green"]
        made.load_lora_weights(tmp_path / "mine")
    assert made.tokenizer.unknown_parts("a green car") == ([] if is_learned else ["green"])


def test_adapters_that_were_saved_with_the_model_are_named_before_anything_is_done(run, model, tmp_path, monkeypatch):
    pipe = CogView2Pipeline.from_pretrained(model)
    add_adapter(pipe.transformer, "style", 2)
    pipe.save_pretrained(tmp_path / "with_lora")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.Job, "_run", stop)
    said = " ".join(run("--model", str(tmp_path / "with_lora")).output.split())
    assert "the adapters ['style'] of `--model` are left out" in said and "fuse_lora" in said
    assert "Warning" not in run("--output", str(tmp_path / "other")).output


def test_a_broken_picture_is_left_out_by_the_option_that_the_script_names(run, pictures, tmp_path, caplog):
    (pictures / "2.png").write_bytes(b"no picture")
    options = ("--stage", "coglm", "--steps", "1")
    with pytest.raises(ValueError, match=r"2\.png .*leave them out with `--skip_unreadable`"):
        run(*options, catch_exceptions=False)
    run.calls.clear()
    result = run(*options, "--skip_unreadable", "--gradient-checkpointing")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "2.png" in caplog.text
    (_, _, preparing), (_, _, training), _ = run.calls
    assert preparing["skip_unreadable"] and training["gradient_checkpointing"]
    lines = [path.read_text().splitlines() for path in (tmp_path / "mine.work/data").glob("**/captions.jsonl")]
    assert sum(map(len, lines)) == 11
    for option in ("--skip-unreadable", "--gradient-checkpointing"):
        assert option in CliRunner().invoke(app, ["finetune", "--help"]).output


def test_the_same_command_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    result = run("--stage", "coglm", "--max-minutes", "0")
    assert result.exit_code == 75 and "The same command goes on" in result.output
    assert [call[0] for call in run.calls] == ["prepare_tokens.py"]
    result = run("--stage", "coglm")
    assert result.exit_code == 0, (result.output, result.exception)
    assert [call[0] for call in run.calls[1:]] == ["train_coglm.py", "assemble_pipeline.py"]
    assert run("--stage", "coglm").exit_code == 0  # nothing is trained again
    assert not run.calls[3:]
    result = run("--stage", "coglm", "--steps", "5")
    assert result.exit_code == 2 and "is of another finetuning (steps was 3)" in result.output


def test_pictures_that_were_becoming_tokens_go_on(run, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenData, "save", stop)
        assert run().exit_code == 75
    assert not (tmp_path / "mine.work/data.done").exists()
    monkeypatch.setattr(IcetkVQModel, "encode", lambda *_: pytest.fail("made tokens again"))
    result = run("--max-minutes", "0")
    assert result.exit_code == 75 and (tmp_path / "mine.work/data.done").exists(), (result.output, result.exception)


def test_captions_and_pictures_that_have_changed_since_are_told(run, pictures, tmp_path):
    captions, picture = pictures / "captions.jsonl", pictures / "3.png"
    lines, content = captions.read_text(), picture.read_bytes()

    def said(*arguments):
        return " ".join(run("--stage", "coglm", *arguments).output.split())

    captions.write_text(lines.replace("3.png", "none.png"))
    with pytest.raises(ValueError, match=r"1 of 12 lines"):
        run("--stage", "coglm", catch_exceptions=False)
    captions.write_text(lines)
    assert "The same command goes on" in said("--max-minutes", "0")  # mended, and prepared
    captions.write_text(lines.replace("a green car", "a green bus"))
    assert f"mine.work is of another finetuning ({captions} has changed since). Name" in said()
    captions.write_text(lines)
    Image.new("RGB", (99, 99), (1, 2, 3)).save(picture)
    assert "(some of its pictures have changed since)" in said()
    picture.unlink()
    assert "(its pictures were 12 and are 11)" in said()
    picture.write_bytes(content)
    assert run("--stage", "coglm").exit_code == 0
    assert "It is done already" in said()
    captions.write_text(lines + "\n")
    assert f"or remove {tmp_path / 'mine'}, too" in said()
    shutil.rmtree(tmp_path / "mine.work")
    assert f"mine is of another finetuning ({captions} has changed since). Name" in said()


def test_direct_super_resolution_that_is_not_trained_keeps_the_weights_it_was_trained_with(run, model, tmp_path):
    assert run("--stage", "coglm", "--learning-rate", "0.05").exit_code == 0
    before, after = (CogView2Pipeline.from_pretrained(folder) for folder in (model, tmp_path / "mine"))
    assert not after.direct_sr_transformer.config.shares_backbone
    for name, value in before.direct_sr_transformer.state_dict().items():
        assert torch.allclose(value, after.direct_sr_transformer.state_dict()[name], atol=1e-3), name
    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    assert max(float((old[name] - new[name]).abs().max()) for name in old) > 0.02


def test_stages_that_are_trained_one_after_the_other_are_as_if_trained_at_once(run, model, tmp_path):
    """Direct super-resolution borrows again from the CogLM that went on without it."""
    first = model
    for stage in ("coglm", "direct-sr"):
        output = tmp_path / stage
        result = run("--stage", stage, "--model", str(model), "--learning-rate", "0.01", "--output", str(output))
        assert result.exit_code == 0, (result.output, result.exception)
        model = output
    both = ("--stage", "coglm", "--stage", "direct-sr")
    assert run(*both, "--learning-rate", "0.01", "--output", str(tmp_path / "at_once")).exit_code == 0
    before, parts, whole = map(CogView2Pipeline.from_pretrained, (first, model, tmp_path / "at_once"))
    assert parts.direct_sr_transformer.config.shares_backbone
    for name, value in whole.transformer.state_dict().items():
        assert torch.equal(value, parts.transformer.state_dict()[name]), name
    old, own, wanted = (pipe.direct_sr_transformer.state_dict() for pipe in (before, parts, whole))
    canvas = [name for name in old if "canvas_" in name]
    change = sum(float((wanted[name] - old[name]).abs().sum()) for name in canvas)
    error = sum(float((wanted[name] - own[name]).abs().sum()) for name in canvas)
    assert error < change / 10  # weights are rounded where they are stored between
    for folder, stage, keeps in (
        (first, "coglm", True),
        (first, "iterative-sr", False),
        (tmp_path / "coglm", "iterative-sr", True),
        (tmp_path / "coglm", "direct-sr", False),
    ):
        notes = read_family(str(folder)).notes({"lora_rank": None, "stages": [stage]})
        assert notes == {"direct_sr_keeps_backbone": keeps}, (folder, stage)


def test_a_backbone_that_adapters_were_fused_into_is_kept(run, model, tmp_path):
    pipe = CogView2Pipeline.from_pretrained(model)
    add_adapter(pipe.direct_sr_transformer, "style", 2)
    for name, value in pipe.direct_sr_transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(value, 0.1)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    stages = ("--stage", "coglm", "--stage", "direct-sr", "--learning-rate", "0.01")
    result = run("--model", str(tmp_path / "fused"), *stages)
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = (CogView2Pipeline.from_pretrained(tmp_path / name) for name in ("fused", "mine"))
    old, new = before.direct_sr_transformer.state_dict(), after.direct_sr_transformer.state_dict()
    changed = [name for name in old if not torch.allclose(old[name], new[name], atol=1e-3)]
    assert changed and all("canvas_" in name for name in changed)


@pytest.mark.parametrize("kind", ["with a copy of the weights that it borrowed", "that borrows"])
def test_adapters_of_direct_super_resolution_are_for_the_stage_of_the_model(kind, run, model, tmp_path):
    folder = model
    if kind != "that borrows":
        folder = tmp_path / "first"
        assert run("--stage", "coglm", "--output", str(folder)).exit_code == 0
    arguments = ("--stage", "direct-sr", "--lora-rank", "2", "--learning-rate", "0.1")
    result = run("--model", str(folder), *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    pipe = CogView2Pipeline.from_pretrained(folder)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path / "mine")
    assert not torch.equal(draw(pipe), plain)


def test_what_is_put_together_when_a_stop_comes_is_not_there_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    arguments = ("--stage", "coglm")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save_grid", stop)
        result = run(*arguments)
        assert result.exit_code == 75 and "Stopped. The same command goes on." in result.output
    assert not (tmp_path / "mine").exists()
    assert (tmp_path / ".mine.part").is_dir()
    calls = len(run.calls)
    (tmp_path / "mine").mkdir()  # an empty folder is no obstacle
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert not any("train" in call[0] for call in run.calls[calls:])
    assert not (tmp_path / ".mine.part").exists()
    assert {"finetuning.json", "samples.png", "samples.txt"} <= {path.name for path in (tmp_path / "mine").iterdir()}
    CogView2Pipeline.from_pretrained(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine.work")
    assert run(*arguments).exit_code == 0  # it is done, whatever became of the work folder
    assert len(run.calls) <= calls + 1
    result = run(*arguments, "--seed", "5", "--work", str(tmp_path / "other"))
    assert result.exit_code == 2 and "is of another finetuning" in result.output


def test_captions_in_odd_letters_and_cut_metrics_end_nothing(run, pictures, tmp_path):
    lines = (pictures / "captions.jsonl").read_text().splitlines()
    (pictures / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines).replace("a red", "a\\u2028red\\n"))
    work = tmp_path / "बाघ"
    folder = work / "coglm"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "validation_loss_before": 3.5}\n{"step": 2, "valid')
    assert finetune._losses(folder) == (3.5, None)
    shutil.rmtree(work)
    result = run("--stage", "coglm", "--work", os.fspath(work))
    assert result.exit_code == 0, (result.output, result.exception)
    samples = (tmp_path / "mine/samples.txt").read_text(encoding="utf-8").split("\n")
    assert samples[-1] == "" and all(" car" in line for line in samples[:-1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_in_the_last_step_is_told_and_changes_nothing_once_all_is_done(run, tmp_path, monkeypatch, when):
    replace, output = os.replace, tmp_path / "mine"

    def replace_and_stop(source, target):
        if when == "after":
            replace(source, target)
        if target == output:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # which the signal ends
        if when == "before":
            replace(source, target)

    monkeypatch.setattr(os, "replace", replace_and_stop)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it does not end the tests
    try:
        result = run("--stage", "coglm", "--steps", "1")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    is_done = when == "after"
    assert result.exit_code == (0 if is_done else 75) and output.exists() is is_done
    assert ("Stopped. The same command goes on." in result.output) is not is_done
    assert not is_done or result.stdout.splitlines()[-1] == str(output)


OWN_END = "signal.signal(signal.SIGTERM, lambda *a: (open({!r}, 'w').close(), sys.exit(75)))\n"


@pytest.mark.parametrize("code", [75, 0])
def test_a_stop_is_one_also_where_the_script_has_nothing_left_to_do(tmp_path, code):
    """What it has done is done."""
    ready = tmp_path / "ready"
    (tmp_path / "prepare_tokens.py").write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *a: sys.exit({code}))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    program = (
        "import sys; from pathlib import Path; from cogview_pipelines.cli import finetune\n"
        "job = finetune.Job.__new__(finetune.Job)\n"
        f"job.scripts = job.work = Path({str(tmp_path)!r}); job.model = ''\n"
        "asked = dict.fromkeys(('pictures', 'captions', 'held_out', 'fit', 'seed'))\n"
        "try:\n    job.prepare(asked, False)\n"
        "except BaseException as error:\n    sys.exit(error.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Stopped. The same command goes on." in said
    assert (tmp_path / "data.done").exists() is (code == 0)


@pytest.mark.parametrize("kind", ["SIGTERM, which the script takes", "SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_script_which_ends_in_its_own_way_or_by_it(tmp_path, kind):
    ready, noted = tmp_path / "ready", tmp_path / "noted"
    is_taken, is_terminal = kind.endswith("takes"), kind == "SIGINT"  # Ctrl-C reaches all programs of a terminal
    (tmp_path / "script.py").write_text(
        "import signal, sys, time\n"
        f"{OWN_END.format(str(noted)) if is_taken else ''}"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    program = (
        "import signal, sys; from pathlib import Path; from cogview_pipelines.cli import finetune\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell runs in the background
        "job = finetune.Job.__new__(finetune.Job)\n"
        f"job.scripts = Path({str(tmp_path)!r})\n"
        "try:\n    job._run([sys.executable], 'script.py', {})\n"
        "except BaseException as error:\n    sys.exit(error.exit_code)\n"
    )
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", program], **options)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT) if is_terminal else process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and noted.exists() == is_taken
    assert "Stopped. The same command goes on." in said


def test_how_a_script_ended_is_known_where_ctrl_c_comes_at_that_moment(tmp_path):
    (tmp_path / "script.py").write_text("import sys; sys.exit(3)")
    program = (
        "import os, signal, subprocess; from pathlib import Path; from cogview_pipelines.cli import finetune\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try_wait = subprocess.Popen._try_wait\n"
        "def wait(process, flags):\n"
        "    ended = try_wait(process, flags)\n"
        "    os.kill(os.getpid(), signal.SIGINT)  # the system has told, and nobody noted it yet\n"
        "    return ended\n"
        "subprocess.Popen._try_wait = wait\n"
        "job = finetune.Job.__new__(finetune.Job)\n"
        f"job.scripts = Path({str(tmp_path)!r})\n"
        "try:\n    job._run([os.sys.executable], 'script.py', {})\n"
        "except finetune.typer.Exit as error:\n    os.sys.exit(error.exit_code)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 75 and "Stopped. The same command goes on." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "~nouser-of-this-name/x"], "cannot be found"),
        (["--output", "x" * 300], "`--output`: "),
        (["--work", "x" * 300], "`--work`: "),
        (["--output", "/"], "`--output` must be a folder of its own"),
        (["--output", "notes.txt"], "`--output`: notes.txt cannot be made: Not a directory"),
        (["--output", "."], "is there already"),
        (["--captions", "x" * 300], "there is no file"),
        (["--captions", "~nouser-of-this-name/x"], "cannot be found"),
        (["--launcher", "'"], "`--launcher` must be a command"),
        (["--launcher", ""], "`--launcher` must begin with a program"),
        (["--launcher", "no-such-program --flag"], "`--launcher` must begin with a program"),
        (["--learning-rate", "nan"], "Invalid value for '--learning-rate'"),
        (["--held-out", "nan"], "Invalid value for '--held-out'"),
        (["--max-minutes", "inf"], "no number that can be counted with"),
        (["--mixed-precision", "fp8"], "`--mixed-precision` must be no, bf16, fp16"),
        (["--work", "damaged"], "is damaged"),
        (["--work", os.fsdecode(b"\xff")], "`--work` must be a name in UTF-8"),
        (["--output", os.fsdecode(b"\xff")], "`--output` must be a name in UTF-8"),
    ],
)
def test_values_that_cannot_be_are_told_in_a_line(run, pictures, tmp_path, monkeypatch, arguments, message):
    here = tmp_path / "here"
    (here / "damaged").mkdir(parents=True)
    (here / "notes.txt").write_text("dear to me")
    (here / "damaged/asked.json").write_text("[]")
    monkeypatch.chdir(here)
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.output.split()), result.output
    assert not run.calls and (here / "notes.txt").read_text() == "dear to me"
    assert sorted(path.name for path in here.iterdir()) == ["damaged", "notes.txt"]


def test_a_folder_of_pictures_whose_name_is_too_long_is_none(run):
    assert "There is no folder of pictures" in run(folder="x" * 300).output


def test_mistakes_are_named_before_anything_is_trained(run, pictures, tmp_path):
    for arguments, message in (
        (["--fit", "stretch"], "must be crop or pad, but is stretch"),
        (["--stage", "base"], "`--stage`: the model, a CogView2, has no base; it has coglm, direct-sr, iterative-sr."),
        (["--style-probability", "1"], "`--style-probability` is for the base of a CogView"),
        (["--noise", "0.2", "--stage", "direct-sr"], "`--noise` is for coglm or base, which is not trained here"),
        (["--captions", str(tmp_path / "none.jsonl")], "there is no file"),
        (["--model", str(tmp_path)], "not a saved pipeline"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert "There is no folder of pictures" in run(folder=tmp_path / "nowhere").output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    result = run()
    assert result.exit_code == 2 and "is there already" in result.output
    assert not run.calls


@pytest.mark.parametrize("option, share", [([], 0.5), (["--noise", "0.2"], 0.2), (["--noise", "0"], 0.0)])
def test_what_draws_is_trained_with_noise_and_super_resolution_is_not(option, share, run):
    result = run("--steps", "1", *option)
    assert result.exit_code == 0, (result.output, result.exception)
    coglm, *others = [options for script, _, options in run.calls if script.startswith("train_")]
    assert coglm["noise_probability"] == share and len(others) == 2
    assert not any("noise_probability" in options for options in others)


def test_the_learning_rate_and_the_noise_fit_the_size_of_the_model(tmp_path):
    for model in SHIPPED_MODELS.values():
        job = finetune.Job(finetune.find_scripts(), [], read_family(str(model)), tmp_path, tmp_path, None)
        assert job.learning_rate(adapters=False) == 5e-4 and job.learning_rate(adapters=True) == 5e-3
        assert job.noise() == (0.5 if model == SHIPPED_MODEL else 0)
        job.family.width = lambda: 2048
        assert (
            job.learning_rate(adapters=False) == 1e-5 and job.learning_rate(adapters=True) == 1e-4 and job.noise() == 0
        )
