"""`benchmarks/bench_token_shards.py`: one file under many names is as many shards."""

import importlib.util
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
