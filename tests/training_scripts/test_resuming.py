"""The training scripts of the transformers: two steps, a stop, and the rest give what one uninterrupted run gives."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines.training import distribution
from cogview_pipelines.training.checkpoints import list_checkpoints

from .conftest import COGLM, COGVIEW, WINDOWS, as_arguments, load_script, metrics

SCRIPTS_FOLDER = Path(__file__).parents[2] / "training_scripts"
SCRIPTS = ("train_coglm", "train_direct_sr", "train_iterative_sr", "train_cogview")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@pytest.fixture
def run(
    tokenizer_folder,
    vqvae_folder,
    coglm_folder,
    token_folder,
    cogview_tokenizer_folder,
    cogview_vqvae_folder,
    cogview_token_folder,
    tmp_path,
):
    """`run("train_coglm", "name", max_steps=3)`: a tiny run in `tmp_path / "name"`."""

    inputs = {"data": token_folder, "tokenizer": tokenizer_folder, "vqvae": vqvae_folder}
    of_cogview = {
        "data": cogview_token_folder,
        "tokenizer": cogview_tokenizer_folder,
        "vqvae": cogview_vqvae_folder,
    }

    def call(script: str, name: str, **options):
        options = {
            "output_dir": tmp_path / name,
            **(of_cogview if script == "train_cogview" else inputs),
            "batch_size": 3,
            "max_steps": 5,
            "warmup_steps": 1,
            "decay_steps": 2,
            "learning_rate": 1e-2,
            "log_every_steps": 1,
            "sample_every_steps": 1,
            "checkpoint_every_steps": 0,
            **own_options(script, coglm_folder),
            **options,
        }
        return load_script(script).main(as_arguments(options))

    return call


def own_options(script, coglm_folder):
    if script == "train_coglm":
        return {"model": COGLM, "caption_probability": 0.5, "drop_text_probability": 0.2, "patch_size": 2}
    if script == "train_cogview":  # sparse attention draws pivots anew in every step
        sparse = {"sparse_attention": {"window_size": 8, "num_windows": 2, "num_pivots": 40}}
        shares = {"caption_probability": 0.2, "super_resolution_probability": 0.3, "style_probability": 0.5}
        return {"model": {**COGVIEW, **sparse}, "max_text_tokens": 30, "noise_probability": 0.1, **shares}
    slots = {"train_direct_sr": 30, "train_iterative_sr": 4}[script]
    # the released dropouts, so that the random state counts
    options = {"num_text_slots": slots, **WINDOWS, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    return {"transformer": coglm_folder, "model": options}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "ema_decay": 0.5, "data_workers": 0},
        pytest.param({"optimizer": "muon", "gradient_checkpointing": True}, marks=needs_muon),
        {"mixed_precision": "bf16", "ema_decay": 0.9, "data_workers": 3},
    ],
    ids=["plain", "accumulation and average", "muon", "bf16"],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupted_run_continues_exactly(run, script, options, stop_after, tmp_path, monkeypatch):
    # under autocast in any case, also where the processor would rather not
    monkeypatch.setattr(distribution, "multiplies", lambda dtype: True)
    whole = run(script, "whole", **options)
    stop_after(2)
    assert run(script, "parts", **options) is None
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    assert not (tmp_path / "parts/final").exists()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")[:2]
    resumed = run(script, "parts", resume_from_checkpoint="latest", **options)

    assert [line["step"] for line in metrics(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    weights, resumed_weights = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "parts"))
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
    for step in (1, 3, 5):
        names = sorted(path.name for path in (tmp_path / "whole/samples").glob(f"{step:07d}*.png"))
        pictures = [[(tmp_path / run / "samples" / name).read_bytes() for name in names] for run in ("whole", "parts")]
        assert names and pictures[0] == pictures[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_checkpointing_and_sample_pictures_change_no_loss(run, script, tmp_path):
    run(script, "plain", max_steps=2, decay_steps=0, sample_every_steps=0)
    run(script, "other", max_steps=2, decay_steps=0, gradient_checkpointing=True)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_lowers_the_loss(run, script, tmp_path):
    run(script, "run", max_steps=30, decay_steps=0, sample_every_steps=0, learning_rate=2e-3, batch_size=8)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("script", SCRIPTS[:3])  # of CogView: test_train_cogview.py
def test_pictures_of_another_size_than_the_models_are_an_error(run, script, coglm_folder, tmp_path):
    from .conftest import write_token_folder

    low, fine = torch.zeros(20, 2, 2).long(), torch.zeros(20, 8, 8).long()
    folder = write_token_folder(tmp_path / "small", low=low, fine=fine)
    options = {"init_from": coglm_folder, "model": {}} if script == "train_coglm" else {}
    with pytest.raises(ValueError, match=r"2 x 2 tokens, but the model makes 4 x 4"):
        run(script, "run", data=folder, **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_never_begun_in_the_folder_of_another(run, script, tmp_path):
    run(script, "run", max_steps=2, decay_steps=0, checkpoint_every_steps=1)
    before = metrics(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has a run already \(checkpoint-2\).*--resume_from_checkpoint latest"):
        run(script, "run")
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_kept_and_extended(run, script, tmp_path):
    options = {"max_steps": 2, "decay_steps": 0, "sample_every_steps": 0, "ema_decay": 0.5}
    run(script, "run", **options)
    before = (tmp_path / "run/final/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"has a run already"):
        run(script, "run", **{**options, "max_steps": 3})
    extended = run(script, "run", **{**options, "max_steps": 3}, resume_from_checkpoint="latest")
    whole = run(script, "whole", **{**options, "max_steps": 3})
    assert (tmp_path / "run/final-2/model.safetensors").read_bytes() == before
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in extended.state_dict().items())


def test_a_script_stopped_by_a_signal_ends_with_the_status_that_says_resume(
    tokenizer_folder, token_folder, coglm_folder, tmp_path
):
    options = {
        "output_dir": tmp_path / "run",
        "data": token_folder,
        "tokenizer": tokenizer_folder,
        "max_steps": 100000,
        "batch_size": 2,
        **own_options("train_coglm", coglm_folder),
    }
    command = [sys.executable, str(SCRIPTS_FOLDER / "train_coglm.py"), *as_arguments(options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run/metrics.jsonl").is_file() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert "by SIGTERM; go on with --resume_from_checkpoint latest" in said
    assert len(list_checkpoints(tmp_path / "run")) == 1
    wrong = subprocess.run([*command, "--stepps", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "error: `output_dir`" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_line_says_what_is_missing(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).main(["--output_dir", "out"])
    assert "required: --data, --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        "train_vq_model",
        "train_tokenizer",
        "prepare_tokens",
        "assemble_pipeline",
        "assemble_cogview_pipeline",
    ],
)
def test_help_begins_with_commands_and_gives_each_option_a_line_of_help(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).main(["--help"])
    text = capsys.readouterr().out
    for command in text.partition("\noptions:")[0].split(":\n")[1:]:
        first, *rest = (line.strip() for line in command.splitlines()[: command.count("\\\n") + 2] if line.strip())
        for line, following in zip([first, *rest], rest):
            assert line.endswith("\\") or not following.startswith("--"), line  # a command goes on after a backslash
    assert f"python training_scripts/{script}.py" in text.partition("\noptions:")[0]
    assert "(default: " in text and "(default: None)" not in text
