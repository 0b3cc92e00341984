"""`benchmarks/bench_token_shards.py`: what it reports, at a tiny size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from cogview_pipelines.training.data.shards import TokenShards

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_token_shards.py"


def test_shards_under_many_names_are_as_many_pairs(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_token_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_shards(tmp_path, 95, 10, 500)
    shards = TokenShards(tmp_path)
    assert len(shards) == 100 and len(set(shards.files)) == 10
    assert (shards.tokens("fine", [99])[0] == shards.tokens("fine", [9])[0]).all()


def test_it_prints_one_line_of_what_it_measured():
    options = [
        "--num-pairs",
        "40",
        "--shard-size",
        "10",
        "--num-batches",
        "2",
        "--batch-size",
        "8",
        "--num-workers",
        "1",
    ]
    result = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True)
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert report["tokens_per_sample"] == 4000 and report["samples_per_second"] > 0
    assert report["resident_mb"] >= report["resident_mb_after_imports"] > 0
