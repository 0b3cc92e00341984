"""What can be loaded without a network, and how shells complete it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cogview_pipelines.cli import app, models
from cogview_pipelines.environment import SHIPPED_MODELS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache, name, index, commit=COMMIT, refs=("main",)):
    """A repository in the cache of the Hub, as a download leaves it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs" / "index").write_text(index)
    (snapshot / "model_index.json").symlink_to(folder / "blobs" / "index")
    (folder / "refs").mkdir()
    for ref in refs:
        (folder / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    ours = {"_class_name": "CogView2Pipeline", "vqvae": ["cogview_pipelines", "IcetkVQModel"]}
    put(tmp_path, "someone/model", json.dumps(ours))
    put(tmp_path, "someone/pinned", json.dumps({**ours, "_class_name": "CogViewPipeline"}), refs=())
    put(tmp_path, "someone/other", json.dumps({"_class_name": "Other", "vae": ["diffusers", "AutoencoderKL"]}))
    put(tmp_path, "someone/broken", "[" * 3)
    return tmp_path


def test_models_of_the_package_and_of_the_cache_are_listed(cache):
    result = CliRunner().invoke(app, ["models", "--json"], catch_exceptions=False)
    rows = {row["model"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert set(rows) == {"shipped", "cogview-emoji", "someone/model", "someone/pinned"}
    assert rows["someone/model"]["class"] == "CogView2Pipeline"
    assert rows["someone/model"]["revisions"] == ["main"]
    assert rows["someone/pinned"]["revisions"] == [COMMIT[:12]]
    assert rows["shipped"]["bytes"] > 10**7 > rows["cogview-emoji"]["bytes"] > 10**6
    assert (rows["shipped"]["class"], rows["cogview-emoji"]["class"]) == ("CogView2Pipeline", "CogViewPipeline")
    lines = CliRunner().invoke(app, ["models"], catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["shipped", "cogview-emoji", "someone/model", "someone/pinned"]


def test_without_a_cache_there_are_the_shipped_ones(cache, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "nowhere"))
    assert [row["model"] for row in (*models.shipped_models(), *models.cached_models())] == list(SHIPPED_MODELS)


def test_a_file_in_place_of_the_cache_is_no_cache(cache, monkeypatch):
    import huggingface_hub.constants

    (cache / "file").write_text("dear to me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "file"))
    assert list(models.cached_models()) == []


def complete(words):
    """What bash would be offered for the last of these words."""
    environment = {**os.environ, "_COGVIEW2_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    environment["COMP_CWORD"] = str(len(words) - 1)
    command = [sys.executable, "-c", "from cogview_pipelines.cli import app; app(prog_name='cogview2')"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return result.stdout.split()


def test_shells_complete_commands_options_and_models():
    assert complete(["cogview2", "gen"]) == ["generate"]
    assert "--num-images" in complete(["cogview2", "generate", "--num"])
    assert complete(["cogview2", "generate", "--model", "ship"]) == ["shipped"]


def test_completion_knows_the_models(cache):
    assert models.complete_model("someone/") == ["someone/model", "someone/pinned"]
    assert models.complete_model("s") == ["shipped", "someone/model", "someone/pinned"]
