"""Tiny inputs of the training scripts, and how they are run: as modules, through the arguments of the command line."""

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from cogview_pipelines.training.checkpoints import Clock
from cogview_pipelines.training.data.tokens import TokenData

from ..utils import COLOURS, FINE_GRID, IMAGE_GRID, NOUNS, NUM_IMAGE_TOKENS, make_coglm, make_vq_model, token_config
from ..utils_cogview import make_cogview_tokenizer, make_cogview_vq

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
COGLM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_text_tokens": 30,
    "image_position": 32,
    "max_position_embeddings": 56,
}
COGVIEW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOWS = {"kernel_size": [5, 3], "cross_kernel_size": [3, 3]}


@cache
def load_script(name: str) -> ModuleType:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_arguments(options: dict) -> list[str]:
    """`{"max_steps": 4}` as a command line; lists become several values, dicts JSON."""
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return arguments


def metrics(folder: Path) -> list[dict]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its settings for the life of the process; each test begins without any."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], None]:
    """`stop_after(2)`: the next run finds after two steps that its time is over; runs after it do not."""

    def arm(steps: int):
        answers = iter([False] * (steps - 1) + [True])
        monkeypatch.setattr(Clock, "time_is_over", lambda clock: next(answers, False))

    return arm


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory) -> Path:
    """The tiny tokenizer, saved."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vqvae_folder(tmp_path_factory) -> Path:
    """The tiny image tokenizer, saved."""
    folder = tmp_path_factory.mktemp("saved") / "vqvae"
    make_vq_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coglm_folder(tokenizer, tmp_path_factory) -> Path:
    """A tiny CogLM, saved as the shipped one is: in float16."""
    folder = tmp_path_factory.mktemp("saved") / "coglm"
    make_coglm(**token_config(tokenizer)).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> Path:
    """Twenty pictures as 4 x 4 and 12 x 12 random tokens, with captions in one or both languages."""
    folder = tmp_path_factory.mktemp("saved") / "tokens"
    write_token_folder(folder)
    return folder


@pytest.fixture(scope="session")
def cogview_tokenizer_folder(tmp_path_factory) -> Path:
    """CogView's tiny tokenizer, saved."""
    folder = tmp_path_factory.mktemp("saved_cogview") / "tokenizer"
    make_cogview_tokenizer(tmp_path_factory.mktemp("pieces")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cogview_vqvae_folder(tmp_path_factory) -> Path:
    """CogView's tiny image tokenizer, saved."""
    folder = tmp_path_factory.mktemp("saved_cogview") / "vqvae"
    make_cogview_vq().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cogview_token_folder(tmp_path_factory) -> Path:
    """Twenty pictures as 4 x 4 and 8 x 8 random tokens, with captions, and styles in one or both languages."""
    return write_cogview_token_folder(tmp_path_factory.mktemp("saved_cogview") / "tokens")


def write_cogview_token_folder(folder: Path, styles: bool = True, **options) -> Path:
    """A token folder for CogView, whose fine pictures have twice as many rows and columns."""
    fine = torch.randint(NUM_IMAGE_TOKENS, (20, 8, 8), generator=torch.Generator().manual_seed(1))
    return write_token_folder(folder, styles=styles, **{"fine": fine, **options})


def write_token_folder(folder: Path, styles: bool = False, **options) -> Path:
    """A token folder; `options` replace `low`, `fine` or `captions`, and `None` leaves a tensor out."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(NUM_IMAGE_TOKENS, (20, *grid), generator=generator)
        for name, grid in (("low", IMAGE_GRID), ("fine", FINE_GRID))
    }
    captions = [
        {"en": [f"a {noun} on a {colour} background.", f"a {colour} {noun}"], "zh": [f"{noun_zh},{colour_zh}背景。"]}
        for noun, noun_zh in NOUNS.items()
        for colour, colour_zh in COLOURS.items()
    ]
    del captions[0]["zh"], captions[1]["en"]
    captions[2]["weight"] = 3
    for index, line in enumerate(captions if styles else []):
        if index % 3 == 0:
            line["style"] = "oil painting" if index % 2 else {"en": "oil painting", "zh": "油画"}
    tensors = {name: options.get(name, value) for name, value in tensors.items()}
    TokenData.save(
        folder,
        {name: value for name, value in tensors.items() if value is not None},
        options.get("captions", captions),
    )
    return folder


def write_long_captions(folder: Path, write: Callable = write_token_folder) -> Path:
    """A token folder with one caption that is too long for every tiny model, and a letter that no tokenizer knows."""
    captions = [{"en": "a cat"} for _ in range(19)] + [{"en": "a cat on a red background " * 12 + "Ω"}]
    return write(folder, captions=captions)


def assert_losses_are_told(caplog: pytest.LogCaptureFixture, max_text_tokens: int) -> None:
    """What is lost of the captions of `write_long_captions` was said, once."""
    told = [record.message for record in caplog.records if record.name.endswith("data.captions")]
    assert len(told) == 3
    assert told[0].startswith(f"Captions with more than {max_text_tokens} tokens (the longest has ")
    assert told[0].endswith(": 1 of 20 (5.0%) in English.") and "Pieces that the tokenizer does not know: " in told[1]
    assert told[2] == "Characters that have no piece, which no model reads: Ω."
