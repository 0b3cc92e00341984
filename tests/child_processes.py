"""Forked children: what would end a process, or take all of its memory, happens in one of its own."""

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

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


def count_changes(function: Callable[[], Any], root) -> int:
    """How many times a function changes files below a folder; it is called in a child."""
    counter = _Counter(root, None)
    status, output = _fork(lambda: (function(), counter.count)[1], counter.start)
    assert status == 0, output
    return json.loads(output)


def kill_before_change(function: Callable[[], Any], root, number: int) -> bool:
    """Call a function in a child that is killed before its change of that number, from 0; whether it came so far."""
    status, output = _fork(function, _Counter(root, number).start)
    assert status in (0, KILLED), output
    return status == KILLED


class _Counter:
    def __init__(self, root, last: int | None):
        self.root, self.last, self.count = os.fspath(root), last, 0

    def start(self) -> None:
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if event not in _CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if path.startswith(self.root) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            if self.count == self.last:
                os._exit(KILLED)
            self.count += 1


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
