#!/usr/bin/env python
"""
A server with many clients, one picture each: requests computed together against one by one, in turns.

    python benchmarks/bench_serving.py --device cpu
    python benchmarks/bench_serving.py --model FOLDER --device cuda --dtype bfloat16 --clients 20 --json
    git worktree add /tmp/before COMMIT     # another state of this repository, with its kernels built, if it has any
    python benchmarks/bench_serving.py --against /tmp/before --json    # and --int8

With `--against`, the server of another state of the repository is measured in the same turns: it serves the model that
it ships, as it does by default.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from enum import Enum
from pathlib import Path

import httpx
import torch
import typer
from checkouts import revision

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.environment import SHIPPED_MODEL, stamp
from cogview_pipelines.serving.app import create_app
from cogview_pipelines.serving.server import bind, make_server
from cogview_pipelines.serving.settings import ServerSettings

PROMPTS = ("a tiger on a blue background", "a red car", "a sunflower and a cactus", "一只青蛙，黄色背景", "一个披萨")


class DType(str, Enum):
    """Number formats of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Client:
    """What asks a server at `url`."""

    url: str

    def ask(self, number: int) -> tuple[float, str]:
        """Seconds that a client waits, and its picture."""
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
        start = time.perf_counter()
        answer = httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=3600).raise_for_status()
        return time.perf_counter() - start, answer.json()["data"][0]["b64_json"]


class Running(Client):
    """A server on a free port of this machine."""

    def __init__(self, pipe: CogView2Pipeline, clients: int, batch_size: int):
        settings = ServerSettings(port=0, page=False, queue_limit=clients, batch_size=batch_size, job_timeout=3600)
        self.server, self.socket = make_server(create_app(pipe, settings), settings), bind(settings)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


class Checkout(Client):
    """The server of another state of the repository, with the model that it ships; a process of its own."""

    def __init__(self, checkout: Path, clients: int, device: str, dtype: str):
        self.command = [sys.executable, "-c", "from cogview_pipelines.cli import app; app()", "serve", "--port", "0"]
        self.command += ["--no-page", "--queue-limit", str(clients), "--job-timeout", "3600"]
        self.command += ["--device", device, "--dtype", dtype]
        self.environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}

    def __enter__(self) -> "Checkout":
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop it
                return self
        sys.exit(f"The other server ended:\n{''.join(lines[-20:])}")

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait()


def measure(server: contextlib.AbstractContextManager[Client], clients: int) -> tuple[float, list[float], list[str]]:
    """Seconds until all clients have their pictures, seconds that each waits, and the pictures."""
    with server as running, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        running.ask(0)  # the first one loads libraries
        start = time.perf_counter()
        answers = list(pool.map(running.ask, range(clients)))
        seconds = time.perf_counter() - start
    return seconds, [waited for waited, _ in answers], [picture for _, picture in answers]


def main(
    model: Path = typer.Option(SHIPPED_MODEL, help="A saved pipeline."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    dtype: DType = typer.Option(DType.float32, help="Number format of the weights."),
    clients: int = typer.Option(20, min=1, help="Clients that ask at once, for a picture each."),
    batch_size: int = typer.Option(8, min=2, help="Pictures that are computed together."),
    repeats: int = typer.Option(3, min=1, help="Times that each way is measured."),
    int8: bool = typer.Option(False, "--int8", help="Super-resolution in whole numbers of 8 bits, on a CPU."),
    against: Path = typer.Option(None, help="Checkout whose server is measured, too."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON line."),
) -> None:
    """Measure what batches save."""
    pipe = CogView2Pipeline.from_pretrained(model, dtype=getattr(torch, dtype.value)).to(device)
    pipe.set_super_resolution(int8=int8)
    servers = {
        "batched": lambda: Running(pipe, clients, batch_size),
        "one_by_one": lambda: Running(pipe, clients, 1),
    }
    if against:
        servers["before"] = lambda: Checkout(against, clients, device, dtype.value)
    turns = [{name: measure(make(), clients) for name, make in servers.items()} for _ in range(repeats)]
    pictures = [turn[name][2] for turn in turns for name in ("batched", "one_by_one")]

    result = {
        "benchmark": "serving",
        **stamp(device),
        "dtype": dtype.value,
        "int8": int8,
        "clients": clients,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    for name in servers:
        result[f"seconds_{name}"] = round(statistics.median(turn[name][0] for turn in turns), 2)
    for name in servers:
        result[f"mean_wait_{name}"] = round(statistics.median(statistics.fmean(turn[name][1]) for turn in turns), 2)
    faster = statistics.median(turn["one_by_one"][0] / turn["batched"][0] for turn in turns)
    result["times_faster"] = round(faster, 3)
    if against:
        result["compared_with"] = revision(against)
        faster = statistics.median(turn["before"][0] / turn["batched"][0] for turn in turns)
        result["times_faster_than_before"] = round(faster, 3)
    result["pictures_that_differ"] = sum(len(set(same)) > 1 for same in zip(*pictures))
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>22}  {value:.4g}" if isinstance(value, float) else f"{name:>22}  {value}")


if __name__ == "__main__":
    typer.run(main)
