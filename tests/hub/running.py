"""Starts the stand-in for the Hub, and Python processes that know no other one."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_someone"  # may write below `someone/`
ANOTHER_TOKEN = "hf_another"


class RunningHub:
    """
    A stand-in for the Hub that runs, in a process of its own.

    Args:
        address (`str`): Its `HF_ENDPOINT`.
        process: The server.
        folder (`Path`): For caches of the processes that use it.
    """

    def __init__(self, address: str, process: subprocess.Popen, folder: Path):
        self.address, self.process, self.folder = address, process, folder

    def control(self, **order) -> Any:
        """Have downloads `cut` off, all of them `mend`ed, the server `down`, or the `requests` since the last time."""
        request = urllib.request.Request(f"{self.address}/control", json.dumps(order).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def new_cache(self) -> Path:
        """A home for one user, who has never downloaded anything."""
        number = len(list(self.folder.iterdir()))
        path = self.folder / f"cache-{number}"
        path.mkdir()
        return path

    def environment(self, cache: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Variables of a process that uses this server."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        mine = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        }
        return {**inherited, **mine, **({} if token is None else {"HF_TOKEN": token}), **more}

    def run(
        self, code: str, *arguments: str, cache: Path | None = None, token: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess:
        """Run Python code in a process that has never seen any folder of this one; by default with an empty cache."""
        cache = self.new_cache() if cache is None else cache
        work = self.folder / "empty"  # relative names mean nothing there
        work.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=work,
            env=self.environment(cache, token, **variables),
        )

    def json(self, code: str, *arguments: str, **options) -> Any:
        """Run Python code that prints JSON in its last line; what it printed."""
        result = self.run(code, *arguments, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def run_hub(folder: Path) -> Iterator[RunningHub]:
    """Run the stand-in as long as the context lasts."""
    command = [sys.executable, "-m", "tests.hub.server"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        yield RunningHub(address, process, folder)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
