"""What torchrun does: starts a run again whose process died, and runs on several machines as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogview_pipelines.training.run_folder import read_run

from .conftest import COGLM, as_arguments
from .launching import free_port, launch, run_script

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def options(token_folder, tokenizer_folder, tmp_path):
    """Options of a run of five steps, in a folder by name."""

    def make(name, **more):
        return as_arguments(
            {
                "output_dir": tmp_path / name,
                "data": token_folder,
                "tokenizer": tokenizer_folder,
                "model": {**COGLM, "hidden_dropout": 0.0, "attention_dropout": 0.0},
                "patch_size": 2,
                "max_steps": 5,
                "data_workers": 0,
                "log_every_steps": 1,
                "sample_every_steps": 0,
                "checkpoint_every_steps": 2,
                "resume_from_checkpoint": "latest",
                **more,
            }
        )

    return make


def torchrun(launcher, step, arguments) -> subprocess.Popen:
    """Start a launcher of processes, the last of which is killed once in a step, -1 for none."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "tests.training_scripts.dying_worker"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*command, "train_coglm", str(step), *arguments],
        cwd=ROOT,
        env={**environment, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_whose_process_is_killed_starts_again_from_its_checkpoint_and_ends_with_the_same_losses(
    options, tmp_path
):
    more = {"batch_size": 1, "sharding": "full", "optimizer": "adamw", "ema_decay": 0.5}
    launcher = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    process = torchrun(launcher, 3, options("killed", **more))  # a step after the checkpoint
    try:
        _, said = process.communicate(timeout=500)
    finally:
        process.terminate()  # its processes end with it
        process.wait(60)
    assert process.returncode == 0, said[-3000:]
    assert "SIGKILL" in said or "-9" in said, said[-3000:]
    assert "Resuming" not in said and read_run(tmp_path / "killed")["state"] == "finished"
    assert all(launch(2, run_script, "train_coglm", options("let be", **more)))
    assert losses(tmp_path / "killed") == losses(tmp_path / "let be")
    one, other = ((tmp_path / name / "final/model.safetensors").read_bytes() for name in ("killed", "let be"))
    assert one == other


def test_launchers_of_two_machines_train_together_as_one_process_does(options, tmp_path):
    """Shared out within each, with copies between them: the groups are those of the launchers."""
    launcher = ["--nnodes", "2", "--nproc_per_node", "2", "--max_restarts", "0", "--rdzv_id", "run"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"]
    arguments = options("two", batch_size=1, sharding="hybrid")
    machines = [torchrun(launcher, -1, arguments) for _ in range(2)]
    try:
        for machine in machines:
            _, said = machine.communicate(timeout=500)
            assert machine.returncode == 0, said[-3000:]
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait(60)
    assert all(launch(1, run_script, "train_coglm", options("one", batch_size=4)))
    for (step, loss), expected in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert (step, loss) == (expected[0], pytest.approx(expected[1], rel=1e-4))
    assert (tmp_path / "two/final/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["one_machine.sh", "slurm.sbatch"])
def test_launch_files_set_what_a_second_start_needs(name):
    text = (ROOT / "training_scripts/launch" / name).read_text()
    for variable, value in ENVIRONMENT.items():
        assert text.index(f"\nexport {variable}={value}\n") < text.index("torchrun --")
