"""Random command lines and lists: an answer in a few words, and no file but a new one."""

import hashlib
import json
import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app, bench, evaluate_captions, evaluate_scenes, loading, serve
from cogview_pipelines.pictures.png import save_png

from .utils import cases

COMMANDS = ("generate", "inpaint", "upscale", "caption", "score", "evaluate", "bench", "serve")
VALUES = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "7",
    "1e400",
    "nan",
    "inf",
    "9" * 30,
    "true",
    "a cat",
    "一只猫",
    "é" * 3,
    "x" * 300,
    "虎" * 84,
    "../../x",
    "~",
    "~nouser-of-this-name/a.png",
    "a\nb",
    "\u202e",
    "\ud800",
    os.fsdecode(b"\xff.png"),
    "-",
    "--",
    "{}",
    "[1]",
    "a.png",
    "notes.txt",
    "list.jsonl",
    "utf16.jsonl",
    "deep.png",
    "text.png",
    "folder",
    "new/a.png",
    "new",
    "rows.jsonl",
    "model",
    "owner/name",
    "shipped",
    "cpu",
    "meta",
    "cuda:99",
    "float16",
    "best-of",
    "0.5",
    "60,40,20",
]
OPTIONS = [
    "--prompts",
    "--requests",
    "--remake",
    "--output",
    "-o",
    "--seed",
    "-s",
    "-n",
    "--num-candidates",
    "--style",
    "--grid",
    "--model",
    "-m",
    "--height",
    "--width",
    "--guidance-scale",
    "--negative-prompt",
    "--temperature",
    "--top-k-clusters",
    "--iterative-sr-top-k",
    "--num-lopar-steps",
    "--max-batch-size",
    "--device",
    "--dtype",
    "--overwrite",
    "--quiet",
    "--no-metadata",
    "--image",
    "--mask",
    "--top",
    "--left",
    "--levels",
    "--tile-overlap",
    "--faithful",
    "--prompt",
    "--language",
    "--strategy",
    "--candidates",
    "--beams",
    "--max-length",
    "--json",
    "--split",
    "--num",
    "--measure",
    "--batch-size",
    "--host",
    "--port",
    "--colour",
    "-h",
    "--version",
]
FIELDS = [
    "id",
    "prompt",
    "seed",
    "image",
    "mask",
    "prompts",
    "height",
    "style",
    "left",
    "num_images_per_prompt",
    "colour",
]
JSON_VALUES = [
    "a",
    "b",
    "虎" * 84,
    "बाघ",
    "A",
    "",
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    [],
    ["a cat"],
    {},
    "a.png",
    "text.png",
    "gone.png",
    "~nouser-of-this-name/a.png",
    "a\u2028b",
    "\ud800",
    "\0",
    "../a",
    "x" * 300,
]


class ModelWanted(Exception):
    """The command has found nothing wrong, and would go on to compute."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of every kind, in the folder where commands run; no command gets a model."""
    metadata = {"prompt": "a cat", "seed": 1, "settings": {"height": 40}, "model": "shipped"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", metadata)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "deep.png", metadata | {"settings": "[" * 3000, "dtype": [1]})
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("my notes\n")
    (tmp_path / "rows.jsonl").write_text('{"name": 1}\n')
    (tmp_path / "list.jsonl").write_text('{"id": "a", "prompt": "a cat"}\n')
    (tmp_path / "utf16.jsonl").write_text('{"id": "a"}\n', encoding="utf-16")
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("[" * 100_000)
    monkeypatch.chdir(tmp_path)

    def load_pipeline(*arguments, **options):
        raise ModelWanted

    for module in (loading, evaluate_captions, evaluate_scenes, bench, serve):
        monkeypatch.setattr(module, "load_pipeline", load_pipeline)
    return tmp_path


def state(folder):
    """The content of every file."""
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(folder, before, arguments, seed):
    """Run a command line: it wants the model, or says in a few words what is wrong, and changes no file."""
    result = CliRunner().invoke(app, arguments)
    error = result.exception
    if error is not None and not isinstance(error, (SystemExit, ModelWanted)):
        raise AssertionError(f"seed {seed}: {arguments}") from error
    if not isinstance(error, ModelWanted):
        assert result.exit_code in (0, 1, 2), (seed, arguments)
        assert result.exit_code == 0 or "Error: " in result.stderr, (seed, arguments)
        assert "Traceback" not in result.output, (seed, arguments)
        assert len(result.stderr) < 20_000, (seed, arguments)
    assert {path: digest for path, digest in state(folder).items() if path in before} == before, (seed, arguments)


def test_random_command_lines_are_answered_in_a_few_words(folder):
    before = state(folder)
    for seed, source in cases(250):
        arguments = [source.choice(COMMANDS)]
        arguments += source.choices(VALUES, k=source.choice([0, 1, 1, 2]))
        for _ in range(source.randint(0, 4)):
            arguments.append(source.choice(OPTIONS))
            arguments += source.choices(VALUES, k=source.choice([0, 1, 1, 1]))
        if arguments[0] == "serve":
            arguments += ["--model", "model"]  # never listen
        check(folder, before, arguments, seed)


def test_random_lists_are_answered_in_a_few_words(folder):
    for seed, source in cases(150):
        lines = []
        for _ in range(source.randint(0, 4)):
            row = {name: source.choice(JSON_VALUES) for name in source.sample(FIELDS, source.randint(0, 5))}
            row |= {"id": source.choice(JSON_VALUES)} if source.random() < 0.7 else {}
            line = json.dumps(row, ensure_ascii=source.random() < 0.5)
            lines.append(line[: source.randrange(len(line))] if source.random() < 0.1 else line)
        (folder / "random.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        before = state(folder)
        command = source.choice(["generate", "inpaint", "upscale", "caption", "score"])
        output = source.choice(["new", "notes.txt", "a.png", "rows.jsonl", "random.jsonl", "folder", "new/rows.jsonl"])
        check(folder, before, [command, "--requests", "random.jsonl", "-o", output], seed)
