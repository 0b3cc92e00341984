"""Lists that are killed at every change of a file, and run again: nothing is lost, nothing is left over."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app, generate, loading
from cogview_pipelines.cli import caption_and_score as texts
from cogview_pipelines.cli.results import MANIFEST
from cogview_pipelines.pictures.png import read_metadata, save_png

from .. import child_processes as children


class Pipe:
    """In place of a model: pictures and captions that cost nothing."""

    class transformer:
        dtype = "float32"

    vqvae = transformer

    def find_unknown(self, texts, name, scored=False):
        return {}

    def set_progress_bar_config(self, **options):
        pass

    def check_inputs(self, prompt, **arguments):
        return {"height": 8}

    def __call__(self, inputs, generator=None, **arguments):
        output = type("Output", (), {})
        output.images = [Image.fromarray(np.full((8, 8, 3), index, np.uint8)) for index in range(len(inputs))]
        output.seeds = [each.initial_seed() for each in generator or []]
        output.captions, output.scores = ["a cat"] * len(inputs), None if generator else [-1.0] * len(inputs)
        return output


@pytest.fixture(autouse=True)
def pipe(monkeypatch):
    monkeypatch.setattr(loading, "load_pipeline", lambda *arguments, **options: Pipe())
    monkeypatch.setattr(texts, "_load", lambda *arguments: Pipe())
    for module in (generate, loading):
        monkeypatch.setattr(module, "describe_model", lambda model, *described: {"model": model})


def check_every_kill(prepare, command, folder, check):
    """Kill a command at each change that it makes in a folder, which is prepared for it; run it again, and check."""

    def call():
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    prepare()
    call()  # what is imported here is not imported in every child
    at, was_killed = 0, True
    while was_killed:
        for path in folder.iterdir() if folder.exists() else ():
            path.unlink()
        prepare()
        was_killed = children.kill_before_change(call, folder, at, writes=("",))
        children.run(call)
        check(at)
        at += 1
    return at


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("metadata", ["--metadata", "--no-metadata"])
def test_a_killed_list_of_prompts_goes_on_without_a_loss(tmp_path, metadata):
    ids, out, requests = ["a", "बाघ", "c"], tmp_path / "out", tmp_path / "list.jsonl"
    requests.write_text("".join(json.dumps({"id": id, "prompt": f"{id}\u2028", "seed": 1}) + "\n" for id in ids))
    earlier = {"id": "earlier", "file": "earlier.png", "prompt": "one\x85two"}

    def prepare():
        out.mkdir(exist_ok=True)
        save_png(Image.new("RGB", (8, 8)), out / "earlier.png", {"prompt": "one\x85two"})
        (out / MANIFEST).write_text(json.dumps(earlier, ensure_ascii=False) + "\n", encoding="utf-8")

    def check(at):
        names = [MANIFEST, "earlier.png", *(f"{id}.png" for id in ids)]
        assert sorted(path.name for path in out.iterdir()) == sorted(names), at
        rows = rows_of(out / MANIFEST)
        assert sorted(row["id"] for row in rows) == sorted(["earlier", *ids]) and earlier in rows, at
        prompts = [read_metadata(out / f"{id}.png").get("prompt") for id in ids]
        assert prompts == [f"{id}\u2028" if metadata == "--metadata" else None for id in ids], at

    command = ("generate", "--requests", requests, metadata, "-o", out)
    assert check_every_kill(prepare, command, out, check) > 20  # or nothing was killed


def test_a_killed_list_of_captions_goes_on_without_a_loss(tmp_path):
    ids, out, requests = ["a", "b", "c"], tmp_path / "out", tmp_path / "list.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    lines = [{"id": id, "image": "image.png", "max_batch_size": 1} for id in ids]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def prepare():
        out.mkdir(exist_ok=True)
        (out / "captions.jsonl").write_text('{"id": "earlier", "text": "one\u2028two"}\n', encoding="utf-8")

    def check(at):
        assert [path.name for path in out.iterdir()] == ["captions.jsonl"], at
        rows = rows_of(out / "captions.jsonl")
        assert sorted(row["id"] for row in rows) == ["a", "b", "c", "earlier"], at
        assert {"id": "earlier", "text": "one\u2028two"} in rows, at

    command = ("caption", "--requests", requests, "-o", out / "captions.jsonl")
    assert check_every_kill(prepare, command, out, check) > 8
