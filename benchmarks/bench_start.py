#!/usr/bin/env python
"""
How long the command line takes before it does anything: processor seconds of a process that prints help, which other
programs on the machine hardly affect. One JSON line. `python -X importtime` tells what they go into.

    python benchmarks/bench_start.py
"""

import json
import resource
import statistics
import subprocess
import sys

import typer

from cogview_pipelines.environment import stamp

COMMAND_LINE = "from cogview_pipelines.cli import app; app()"
STARTS = {
    "python": ("pass",),
    "import cogview_pipelines": ("import cogview_pipelines",),
    "cogview2 --help": (COMMAND_LINE, "--help"),
    "cogview2 generate --help": (COMMAND_LINE, "generate", "--help"),
}


def processor_seconds(code: str, *arguments: str) -> float:
    """User and system time of a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(
    repeats: int = typer.Option(9, min=1, help="Times that each is started, after one that is not counted."),
) -> None:
    """Measure how long the command line takes to start."""
    medians = {}
    for name, start in STARTS.items():
        processor_seconds(*start)
        medians[name] = round(statistics.median(processor_seconds(*start) for _ in range(repeats)), 3)
    print(json.dumps({"processor_seconds": medians, "repeats": repeats, **stamp("cpu")}))


if __name__ == "__main__":
    typer.run(main)
