#!/usr/bin/env python
"""
How fast token shards are read, by the loader alone: samples a second, memory of a process, time to the first batch.

    python benchmarks/bench_token_shards.py                                  # ten million pairs of 400 + 3,600 tokens
    python benchmarks/bench_token_shards.py --num-pairs 100000 --num-batches 20

What is measured: a process opens a folder of shards, and for each sample draws the picture, reads its tokens and its
line of captions, and draws a caption; with --encode, its ids by the tokenizer of the shipped model, too. What is not:
making model inputs, copies to a device, and a disk. All shards are one file of random tokens under many names (hard
links), so that ten million pairs take no 80 GB: tokens come from the page cache, but every name is opened, and every
place in it read, as if the shards were different.
"""

import importlib
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import typer


def make_shards(folder: Path, num_pairs: int, shard_size: int, num_codes: int) -> None:
    """One shard of random tokens, and an index of as many names of it as make up the pairs."""
    import numpy as np

    from cogview_pipelines.training.data.shards import shard_name, write_index, write_shard

    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(0, num_codes, (shard_size, side, side), dtype=np.int32)
        for name, side in (("low", 20), ("fine", 60))
    }
    rows = [
        {"en": [f"a photograph of thing number {n} in front of a house"], "zh": [f"{n}号东西的照片"]}
        for n in range(shard_size)
    ]
    write_shard(folder, 0, tokens, rows, made_of={}, num_codes=num_codes)
    write_index(folder, 1)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    (entry,), index["shards"] = index["shards"], []
    for number in range(-(-num_pairs // shard_size)):
        name = f"{shard_name(number)}.safetensors"
        if number:
            os.link(folder / entry["file"], folder / name)
        index["shards"].append(entry | {"file": name})
    index["num_pictures"] = shard_size * len(index["shards"])
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


class Codes:
    """In place of a tokenizer, whose work is not measured, or around one."""

    def __init__(self, num_image_tokens: int, encode):
        self.num_image_tokens, self.encode = num_image_tokens, encode


def read(folder, worker, num_workers, order, batch_size, num_batches, num_codes, encode, ready, results) -> None:
    """What one process does, and what it took."""
    started = time.perf_counter()
    importlib.import_module("cogview_pipelines.training.data.tokens")
    from cogview_pipelines.training.data.draws import Draw
    from cogview_pipelines.training.data.tokens import TokenData

    imported, imports = time.perf_counter(), memory()
    data = TokenData.load(folder, Codes(num_codes, shipped_tokenizer().encode if encode else lambda text: [len(text)]))
    data.epoch_seed = 0 if order == "epochs" else None

    def batch(step: int) -> int:
        first = (step * num_workers + worker) * batch_size
        draw = Draw(step, range(first, first + batch_size))
        generators = list(draw.generators(0))
        indices = data.draw_all(draw.samples, generators)
        for index, generator in zip(indices, generators):
            data.draw_caption(index, generator)
        return data.low[indices].numel() + data.fine[indices].numel()

    batch(0)
    first_batch = time.perf_counter()
    ready.wait()
    begun, computed = time.perf_counter(), time.process_time()
    tokens = sum(batch(step) for step in range(1, num_batches + 1))
    seconds, computing = time.perf_counter() - begun, time.process_time() - computed
    results.put(
        {
            "samples_per_second": batch_size * num_batches / seconds,
            "cpu_microseconds_per_sample": 1e6 * computing / (batch_size * num_batches),
            "tokens_per_sample": tokens // (batch_size * num_batches),
            "import_seconds": imported - started,
            "start_seconds": first_batch - imported,
            "resident_mb": memory(),
            "resident_mb_after_imports": imports,
        }
    )


def shipped_tokenizer():
    """The text tokenizer of the shipped model."""
    from cogview_pipelines import IcetkTokenizer
    from cogview_pipelines.environment import SHIPPED_MODEL

    return IcetkTokenizer.from_pretrained(SHIPPED_MODEL, subfolder="tokenizer")


def memory() -> float:
    """Resident memory of this process in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1000


def main(
    num_pairs: int = typer.Option(10_000_000, min=1, help="Pairs."),
    shard_size: int = typer.Option(10_000, min=1, help="Pairs in a shard."),
    num_workers: int = typer.Option(2, min=1, help="Processes."),
    order: str = typer.Option("epochs", help="As --data_order: weighted or epochs."),
    batch_size: int = typer.Option(256, min=1, help="Samples of a batch."),
    num_batches: int = typer.Option(200, min=1, help="Batches that each process reads."),
    num_codes: int = typer.Option(20_000, min=2, help="Codes of the image tokenizer."),
    encode: bool = typer.Option(False, help="Encode captions with the shipped model's tokenizer."),
) -> None:
    """Measure how fast token shards are read; prints one JSON line."""
    from cogview_pipelines.environment import stamp

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), num_pairs, min(shard_size, num_pairs), num_codes)
        ready, results = context.Barrier(num_workers), context.Queue()
        options = (num_workers, order, batch_size, num_batches, num_codes, encode, ready, results)
        processes = [context.Process(target=read, args=(folder, worker, *options)) for worker in range(num_workers)]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
    report = {name: max(each[name] for each in found) for name in found[0]}
    report["samples_per_second"] = sum(each["samples_per_second"] for each in found)
    shown = {name: round(value, 2) for name, value in report.items()}
    sizes = {
        "num_pairs": num_pairs,
        "shard_size": shard_size,
        "num_workers": num_workers,
        "order": order,
        "encode": encode,
    }
    print(json.dumps({"benchmark": "token_shards", **sizes, **shown, **stamp("cpu")}))


if __name__ == "__main__":
    typer.run(main)
