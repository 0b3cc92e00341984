"""The launch files: a run of two processes from a shell, and what a job scheduler is told."""

import os
import shutil
import subprocess

import pytest
import torch

from .conftest import COGLM, SCRIPTS, as_arguments

pytestmark = [
    pytest.mark.skipif(
        not shutil.which("bash") or not torch.distributed.is_gloo_available(), reason="needs bash, gloo"
    ),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("path", sorted((SCRIPTS / "launch").iterdir()), ids=lambda path: path.name)
def test_launch_files_are_shell_scripts_that_want_a_folder(path):
    subprocess.run(["bash", "-n", path], check=True)
    result = subprocess.run(["bash", path, "train_coglm", "--max_steps", "3"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "--output_dir is missing\n"


@pytest.fixture
def launch(token_folder, tokenizer_folder, tmp_path):
    """One machine's launch file with two processes, whose training goes on until it is told to stop."""
    options = as_arguments(
        {
            "output_dir": tmp_path / "run",
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "model": COGLM,
            "batch_size": 1,
            "patch_size": 2,
            "data_workers": 0,
            "log_every_steps": 1,
            "sample_every_steps": 0,
        }
    )

    def call(*more):
        return subprocess.run(
            ["bash", SCRIPTS / "launch" / "one_machine.sh", "train_coglm", *options, *more],
            env={**os.environ, "PROCESSES": "2", "RESTARTS": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return call


@pytest.mark.skipif(not shutil.which("torchrun"), reason="torchrun is not on the path")
def test_one_machine_trains_stops_with_75_and_goes_on_to_the_end(launch, tmp_path):
    stopped = launch("--max_steps", "100000", "--max_minutes", "0.001")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert "go on with --resume_from_checkpoint latest" in stopped.stderr
    finished = launch("--max_steps", "3")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "run/final/model.safetensors").is_file()
