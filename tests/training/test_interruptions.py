"""Training that is killed at every change of a file, and resumed: the same run as without the kill, no more files."""

import json
import os
import shutil

import pytest
import torch

from .. import child_processes as children
from .test_loop import Runner

OPTIONS = {"checkpoint_every_steps": 1, "keep_checkpoints": 1, "resume_from_checkpoint": "latest"}


def contents(folder):
    """What a run leaves: metrics without speeds, tensors of its final models by folder, names of all files."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [(row["step"], row["loss"], row["learning_rate"]) for row in rows]
    models = {
        path.parent.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("final*/weights.pt"))
    }
    return metrics, models, sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("beside, every", [(False, 1), (True, 4)], ids=["saves in turn", "saves beside the training"])
def test_an_extended_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, monkeypatch, beside, every):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # processes are killed here, not machines
    runner, folder, before = Runner(tmp_path), tmp_path / "run", tmp_path / "before"

    def call():
        runner("run", max_steps=2, async_checkpoints=beside, **OPTIONS)
        return True

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    children.run(lambda: bool(runner("run", max_steps=1, **OPTIONS)))
    shutil.copytree(folder, before)
    number = children.count_changes(call, folder, writes=(".json", ".jsonl"))
    whole = contents(folder)
    assert number > 20 and set(whole[1]) == {"final", "final-1"}
    for at in range(0, number, every):
        prepare()
        assert children.kill_before_change(call, folder, at, writes=(".json", ".jsonl"))
        children.run(call)
        metrics, models, names = contents(folder)
        assert metrics == whole[0] and names == whole[2], f"killed at change {at}"
        for name, tensors in whole[1].items():
            assert all(torch.equal(value, models[name][key]) for key, value in tensors.items()), f"{name}, {at}"
