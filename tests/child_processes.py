"""Forked children: what would end a process, or take all of its memory, happens in one of its own."""

import builtins
import io
import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

KILLED = 9
# What changes files, by Python's audit events; each comes before the change.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "open"}
# What runs commands, or looks up a name of a pickle.
_RUNS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}


def run(function: Callable[[], Any], memory: int | None = None, runs_code: bool = True) -> Any:
    """
    Call a function in a child; returns its result, by way of JSON.

    Args:
        function: What to call.
        memory (`int`, *optional*): Bytes that it may take beyond what this process has.
        runs_code (`bool`): Otherwise everything that runs code or commands ends the child.

    Raises:
        AssertionError: With the child's traceback, or exit status.
    """
    status, output = _fork(function, lambda: _prepare(memory, runs_code))
    assert status == 0, f"status {status}: {output}"
    return json.loads(output)


def count_changes(function: Callable[[], Any], root, writes: tuple[str, ...] = ()) -> int:
    """
    How many times a function changes files below a folder; it is called in a child.

    Args:
        function: What to call.
        root: The folder.
        writes (`tuple[str, ...]`): Endings of files of which every `write` is a change of its own.
    """
    counter = _Counter(root, None, writes)
    status, output = _fork(lambda: (function(), counter.count)[1], counter.start)
    assert status == 0, output
    return json.loads(output)


def kill_before_change(function: Callable[[], Any], root, number: int, writes: tuple[str, ...] = ()) -> bool:
    """
    Call a function in a child that is killed before its change of that number, from 0, or in the middle of it if it is
    a write; whether it came so far.
    """
    status, output = _fork(function, _Counter(root, number, writes).start)
    assert status in (0, KILLED), output
    return status == KILLED


class _Counter:
    def __init__(self, root, last: int | None, writes: tuple[str, ...]):
        self.root, self.last, self.count, self.writes = os.fspath(root), last, 0, writes

    def start(self) -> None:
        sys.addaudithook(self._note)
        if self.writes:
            self._open = builtins.open
            builtins.open = io.open = self._opened

    def _note(self, event: str, arguments: tuple) -> None:
        if event not in _CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if path.startswith(self.root) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            self._step()

    def _step(self) -> None:
        if self.count == self.last:
            os._exit(KILLED)
        self.count += 1

    def _opened(self, path, mode="r", *arguments, **options):
        file = self._open(path, mode, *arguments, **options)
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        counts = name.startswith(self.root) and name.endswith(self.writes) and set(mode) & set("wax+")
        return _Written(file, self) if counts else file


class _Written:
    """A file of which every write is a change."""

    def __init__(self, file, counter: _Counter):
        self._file, self._counter = file, counter

    def write(self, content):
        if self._counter.count == self._counter.last:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
        self._counter._step()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


def give_progress_bars_a_lock() -> None:
    """
    For a child that may be killed: the lock of tqdm is shared with its parent and with all later children, and whoever
    is killed with it keeps it, so that they would wait for it for ever.
    """
    lock, kinds = threading.RLock(), [tqdm]
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def _prepare(memory: int | None, runs_code: bool) -> None:
    if not runs_code:
        sys.addaudithook(_forbid)
    if memory is not None:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))


def _forbid(event: str, arguments: tuple) -> None:
    if event in _RUNS or (event == "exec" and arguments[0].co_filename == "<string>"):
        os.write(2, f"{event} {arguments!r}\n".encode()[:500])
        os._exit(3)


def _fork(function: Callable[[], Any], prepare: Callable[[], None]) -> tuple[int, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # pools of threads do not survive a fork
            give_progress_bars_a_lock()
            prepare()
            output, status = json.dumps(function()), 0
        except BaseException:
            output = traceback.format_exc()
        os.write(writing, output.encode("utf-8", "backslashreplace")[: 2**16 - 1])
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        output = file.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output
