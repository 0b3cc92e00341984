"""`cogview2 plan`: tables and JSON of what a training needs, for models that are named and that lie in folders."""

import json

import pytest
from typer.testing import CliRunner

from cogview_pipelines import CogLMCanvasConfig, CogLMConfig
from cogview_pipelines.cli import app

SMALL = {"vocab_size": 20100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"boi_token_id": 20010, "start_of_english_token_id": 20011, "start_of_chinese_token_id": 20012}


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_folder_is_planned_in_every_layout(tmp_path):
    CogLMConfig(**SMALL).save_pretrained(tmp_path)
    common = (tmp_path, "--devices", 4, "--shard-size", 2, "-b", 1, "--memory", 0.1, "--tflops", 2)
    result = invoke(*common, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["sharding"] for row in rows] == ["none"] * 2 + ["full"] * 4 + ["hybrid"] * 4
    for row in rows:
        parts = ("weights", "gradients", "moments", "average", "activations", "buffers")
        assert row["total"] == sum(row[part] for part in parts)
        assert row["fits"] == (row["total"] <= 0.1e9)
        assert row["seconds_per_step"] == pytest.approx(row["operations"] / 2e12)
    table = invoke(*common, "--utilisation", 0.5)
    assert table.exit_code == 0 and "hybrid by 2, kept, checkpointing" in table.stdout
    assert "samples/s at 50% of 2 TFLOP/s" in table.stdout


def test_the_released_model_is_planned_without_its_weights():
    result = invoke("cogview2-6b", "--devices", 8, "--ema", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert 5.8e9 < rows[0]["weights"] / 4 < 6.0e9
    for row in rows[2:]:  # sharded: an eighth of each
        assert row["weights"] == pytest.approx(rows[0]["weights"] / 8, rel=1e-3)
        assert row["average"] == row["gradients"] == row["weights"]


def test_what_cannot_be_planned_is_said_in_a_line(tmp_path):
    CogLMCanvasConfig(**SMALL).save_pretrained(tmp_path)
    for arguments, message in (
        (("cogview2-6b", "--optimizer", "muon", "--moments", "int8"), "`moments` 'int8' is for `optimizer` adamw"),
        ((tmp_path,), "`MODEL` must be a CogLM or a CogView"),
        ((tmp_path / "none",), "`MODEL` must be one of cogview2-6b, cogview-4b or a folder"),
        (("cogview2-6b", "--devices", 4, "--shard-size", 3), "`shard_size` must divide the 4 devices"),
        (("cogview2-6b", "--tflops", 1, "--measure"), "Pass either `--tflops` or `--measure`"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
