"""The folder of a run: locks, leftovers, modes, full disks."""

import errno
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch

from cogview_pipelines.training import run_folder
from cogview_pipelines.training.run_folder import (
    disk_errors,
    filling,
    locked,
    remove_leftovers,
    replacing,
    require_room,
    save_final,
    set_modes,
    write_json,
)

from .. import child_processes as children


def test_the_lock_holds_between_processes_and_ends_with_the_one_that_has_it(tmp_path):
    code = (
        "from cogview_pipelines.training.run_folder import locked\n"
        f"with locked({str(tmp_path)!r}):\n    print('held', flush=True)\n    input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"held"
        with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*choose another folder"):
            locked(tmp_path).__enter__()
        process.kill()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` .*file/run cannot be made"), locked(tmp_path / "file/run"):
        pass


def test_a_folder_that_is_filled_never_looks_whole_before_it_is_and_keeps_what_else_is_in_it(tmp_path):
    folder = tmp_path / "model"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "part").mkdir(parents=True)
        for name in ("notes.txt", "index.json", "part/weights"):
            (folder / name).write_text("old")

    def fill():
        with filling(folder, "index.json") as partial:
            (partial / "part").mkdir(parents=True)
            for name in ("index.json", "part/weights", "part/more"):
                (partial / name).write_text("new")
        return True

    def content():
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}

    whole = {"notes.txt": "old", "index.json": "new", "part/weights": "new", "part/more": "new"}
    at, was_killed, states = 0, True, []
    while was_killed:
        prepare()
        was_killed = children.kill_before_change(fill, tmp_path, at, writes=("",))
        states.append(content())
        children.run(fill)
        assert content() == whole and [path.name for path in tmp_path.iterdir()] == ["model"], at
        at += 1
    assert len(states) > 10
    for state in states:
        has_index = "index.json" in state
        assert not has_index or state == whole or set(state.values()) == {"old"}, state
        assert state["notes.txt"] == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("operation", range(8))
def test_whenever_a_replacement_is_killed_the_old_or_the_new_is_whole(tmp_path, monkeypatch, kind, operation):
    """Every file operation of the replacement is the last one, once."""
    target = tmp_path / "thing"

    def write(path, text):
        if kind == "folder":
            path.mkdir()
            path = path / "part"
        path.write_text(text)

    class Killed(BaseException):
        pass

    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == operation + 1:
                raise Killed
            return function(*args, **kwargs)

        return call

    write(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "remove", counted(run_folder.remove))
        patch.setattr(run_folder, "set_modes", counted(run_folder.set_modes))
        patch.setattr("os.replace", counted(os.replace))
        patch.setattr("pathlib.Path.rename", counted(run_folder.Path.rename))
        try:
            with replacing(target) as partial:
                write(partial, "new")
        except Killed:
            pass
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (target if kind == "file" else target / "part").read_text() in ("old", "new")


def test_leftovers_of_interrupted_saves_go_and_nothing_else(tmp_path):
    for name in (".partial-checkpoint-3", "checkpoint-2", ".old-checkpoint-2", ".old-final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".partial-metrics.jsonl").write_text("")
    remove_leftovers(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "checkpoint-2": "checkpoint-2",
        "final": ".old-final",  # it was moved away, and nothing took its place
    }


def test_a_final_model_is_replaced_only_by_one_of_the_same_steps(tmp_path):
    def save(text):
        def call(path):
            path.mkdir()
            (path / "weights").write_text(text)

        return call

    save_final(tmp_path, 4, save("four"))  # of which nothing is noted, as an earlier version left it
    save_final(tmp_path, 6, save("six"))
    write_json(tmp_path / "run.json", {"final_step": 6})
    save_final(tmp_path, 6, save("six again"))
    save_final(tmp_path, 9, save("nine"))
    found = {path.name: (path / "weights").read_text() for path in tmp_path.iterdir() if path.is_dir()}
    assert found == {"final": "nine", "final-6": "six again", "final-earlier": "four"}


def test_modes_follow_the_umask(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "folder/file").touch(mode=0o600)
    before = os.umask(0o022)
    try:
        set_modes(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "folder/file").stat().st_mode) == 0o644


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"has no room for checkpoint-7 \(2\.00 GB\): 0\.00 GB are free\. .*make room"):
        require_room(tmp_path, "checkpoint-7", 2 * 10**9)
    require_room(tmp_path, "checkpoint-7", 10**6)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors has it
    ],
)
def test_errors_of_a_full_disk_say_so(tmp_path, error):
    with (
        pytest.raises(OSError, match="has no room for the final model") as caught,
        disk_errors(tmp_path, "the final model"),
    ):
        raise error
    assert caught.value.errno == errno.ENOSPC


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), disk_errors(tmp_path, "anything"):
        raise RuntimeError("shape")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_torch_on_a_disk_that_fills_up_is_told_in_plain_words(small_disk):
    """It says `[enforce fail at inline_container.cc:672]`."""
    with pytest.raises(OSError, match=r"The disk of .* has no room for a file"), disk_errors(small_disk, "a file"):
        torch.save(torch.zeros(10**6), small_disk / "file")
