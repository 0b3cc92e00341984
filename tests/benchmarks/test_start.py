"""The time to start, in processor seconds."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_start_is_measured_in_a_process_of_its_own():
    command = [sys.executable, ROOT / "benchmarks" / "bench_start.py", "--repeats", "1"]
    line = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    taken = line["processor_seconds"]
    assert list(taken) == ["python", "import cogview_pipelines", "cogview2 --help", "cogview2 generate --help"]
    assert min(taken.values()) > 0
    assert line["repeats"] == 1
    assert line["versions"]["cogview_pipelines"]
