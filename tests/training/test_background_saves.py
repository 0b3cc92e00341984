"""Checkpoints that are written beside the training: whole, of their step, one at a time, never lost in silence."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
from torch.distributed import checkpoint as dcp

from cogview_pipelines.training import loop
from cogview_pipelines.training.background_saves import BackgroundSaves
from cogview_pipelines.training.checkpoints import read_state
from cogview_pipelines.training.run_folder import read_run

from .test_loop import Runner, fresh_accelerate_state, same  # noqa: F401


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


@pytest.fixture
def writing(monkeypatch):
    """`writing(function)`: call it in the thread that writes, before each checkpoint is written."""
    write = dcp.FileSystemWriter.write_data

    def arm(function):
        def patched(writer, *rest):
            function(writer)
            return write(writer, *rest)

        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", patched)

    return arm


def stored(folder) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    read_state(folder)
    reader = dcp.FileSystemReader(folder)
    found = {name: torch.empty(value.size) for name, value in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "gradient_accumulation_steps": 2}])
def test_a_checkpoint_is_of_its_step_however_long_its_writing_takes(runner, writing, options):
    options |= {"checkpoint_every_steps": 3, "keep_checkpoints": 0}
    runner("before", **options)
    two_steps_on, waited = threading.Event(), []
    runner.at_step = {5: two_steps_on.set}
    writing(lambda writer: waited.append(two_steps_on.wait(10)))
    runner("beside", async_checkpoints=True, **options)
    assert waited == [True, True]
    assert runner.metrics("beside") == runner.metrics("before")
    for name in ("checkpoint-3", "checkpoint-6"):
        one, other = (stored(runner.folder / run / name) for run in ("before", "beside"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    runner.at_step = {}
    first = str(runner.folder / "beside/checkpoint-3")
    resumed = runner("beside", resume_from_checkpoint=first, **options)
    assert same(runner("before", resume_from_checkpoint="latest", **options), resumed)


def test_a_save_waits_for_the_one_before_and_the_end_for_the_last(runner, writing):
    at_work, most = [], []

    def slowly(writer):
        at_work.append(writer)
        time.sleep(0.1)
        most.append(len(at_work))
        at_work.remove(writer)

    writing(slowly)
    runner("run", async_checkpoints=True, checkpoint_every_steps=1, keep_checkpoints=0)
    assert most == [1] * 6
    assert runner.checkpoints("run") == [f"checkpoint-{step}" for step in range(1, 7)]
    assert not list((runner.folder / "run").glob(".partial*"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_signal_waits_for_the_checkpoint(runner, writing):
    states = []

    def slowly(writer):
        time.sleep(0.3)
        states.append(read_run(runner.folder / "run")["state"])

    whole = runner("whole")
    writing(slowly)
    runner.at_step = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    assert runner("run", async_checkpoints=True, checkpoint_every_steps=3) is None
    assert states == ["running"] * 2
    assert read_run(runner.folder / "run")["state"] == "interrupted"
    assert runner.checkpoints("run") == ["checkpoint-3", "checkpoint-4"]
    runner.at_step = {}
    assert same(whole, runner("run", async_checkpoints=True, resume_from_checkpoint="latest"))


def test_a_disk_that_fills_up_ends_the_run_at_its_next_step_and_is_told(runner, writing, monkeypatch):
    writes = []
    monkeypatch.setattr(loop._Run, "checkpoint_due", lambda run, step: step in (2, 4))

    def fail(writer):
        writes.append(writer)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    writing(fail)
    with pytest.raises(OSError, match="has no room for checkpoint-4") as caught:
        runner("run", async_checkpoints=True, keep_checkpoints=1, max_steps=5000, log_every_steps=100)
    assert caught.value.errno == errno.ENOSPC
    run = read_run(runner.folder / "run")
    assert len(writes) == 2 and run["state"] == "failed" and run["step"] < 5000
    assert runner.checkpoints("run") == ["checkpoint-2"] and not list((runner.folder / "run").glob(".partial*"))
    resumed = runner("run", async_checkpoints=True, resume_from_checkpoint="latest")
    assert same(resumed, runner("whole"))


def test_a_run_that_ends_by_another_error_still_gets_its_checkpoint(runner, writing):
    writing(lambda writer: time.sleep(0.3))
    runner.fail_at(3)
    with pytest.raises(KeyboardInterrupt):
        runner("run", async_checkpoints=True, checkpoint_every_steps=3)
    assert runner.checkpoints("run") == ["checkpoint-3"]


def test_a_save_that_fails_as_the_run_ends_by_another_error_is_logged(runner, writing, caplog):
    def fail(writer):
        time.sleep(0.3)
        raise ValueError("what went wrong")

    writing(fail)
    runner.fail_at(3)
    with pytest.raises(KeyboardInterrupt):
        runner("run", async_checkpoints=True, checkpoint_every_steps=3)
    assert "The checkpoint that was under way is not saved: what went wrong" in caplog.text
    assert runner.checkpoints("run") == []


def test_without_the_option_no_thread_is_made(runner, monkeypatch):
    monkeypatch.setattr(BackgroundSaves, "__init__", lambda *rest: pytest.fail("a thread"))
    runner("run", checkpoint_every_steps=3)
