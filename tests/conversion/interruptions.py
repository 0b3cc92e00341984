"""Converters that are killed at every change of a file."""

import re
import shutil
from pathlib import Path

from cogview_pipelines.conversion.output_folder import LOCK_FILE

from ..child_processes import count_changes, kill_before_change


def quiet(line):
    pass


def contents(folder: Path) -> dict[str, object]:
    """All files; of the record without what tells that a run was interrupted."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == LOCK_FILE:
            continue
        found[name] = path.read_bytes() if path.is_file() else None
        if name == "conversion.json":
            found[name] = re.sub(r'"shards_reused": \d+', "", path.read_text())
        if name.endswith(".pt"):
            found[name] = path.stat().st_size
    return found


def check_every_kill(convert, output: Path, prepare=lambda: None) -> None:
    """Kill `convert` before each change that it makes in `output`, call it again, and compare."""
    prepare()
    number = count_changes(convert, output)
    whole = contents(output)
    assert number > 10
    for at in range(number):
        shutil.rmtree(output)
        prepare()
        assert kill_before_change(convert, output, at)
        if contents(output) == whole:  # only the lock was still held
            continue
        convert()
        found = contents(output)
        assert found.keys() == whole.keys(), f"killed before change {at}"
        assert found == whole, f"killed before change {at}"
