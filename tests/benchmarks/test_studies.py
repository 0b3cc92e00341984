"""Benchmarks that compare how training goes: what they say of their runs, at tiny sizes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def call(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return call


def test_all_four_ways_to_learn_codes_are_compared_on_the_same_pictures(load, tmp_path, capsys):
    script = load("bench_codebooks")
    options = ["--output_dir", tmp_path, "--max_steps", 4, "--batch_size", 2, "--num_scenes", 4, "--crop_size", 16]
    options += ["--model", json.dumps({"num_embeddings": 16, "embedding_dim": 4, "hidden_channels": 8})]
    line = script.main([*map(str, options), "--resolutions", "40"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    losses = line["last_reconstruction_loss"]
    assert list(losses) == ["moving_average", "nearest", "gumbel", "fixed"] and len(set(losses.values())) > 1
    assert line["worst_over_best"] == pytest.approx(max(losses.values()) / min(losses.values()), abs=2e-3)
    first = [json.loads((tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()[0]) for name in losses]
    averaged, nearest, _, fixed = (one["reconstruction_loss"] for one in first)
    assert averaged == nearest == fixed  # the same weights and pictures to begin with
    assert (tmp_path / "codebooks.svg").is_file()
    assert script.main([*map(str, options), "--resolutions", "40"])["last_reconstruction_loss"] == losses


def test_an_overflow_is_found_where_it_is(load, tmp_path, monkeypatch, capsys):
    script = load("study_overflow")
    options = ["--output_dir", tmp_path, "--num_layers", 2, "--hidden_size", 16, "--num_heads", 2, "--steps", 3]
    options += ["--num_scenes", 4, "--batch_size", 2]
    results = script.main(list(map(str, options)))
    assert list(results) == list(script.COMBINATIONS)
    assert all(result["overflow"] is None and result["steps"] == 3 for result in results.values())
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["results"] == results and "sandwich, plain" in said.err

    from cogview_pipelines.models.cogview.modeling_cogview import CogViewLayer

    forward = CogViewLayer.forward

    def overflow(layer, hidden_states, *rest):
        output = forward(layer, hidden_states, *rest)
        return output * 1e30 if layer.index == 1 and layer.order == "pre" else output

    monkeypatch.setattr(CogViewLayer, "forward", overflow)
    results = script.main(list(map(str, options)))
    assert results["sandwich, plain"]["overflow"] is None
    assert results["pre, plain"]["overflow"] == {"step": 0, "where": "layers.1", "what": "forward pass"}
    assert results["pre, plain"]["steps"] == 0 and results["pre, plain"]["last_loss"] is None
    assert torch.isinf(torch.tensor(results["pre, plain"]["largest"]["layer"]))
