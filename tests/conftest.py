"""Settings and fixtures of all tests."""

from pathlib import Path

import pytest
import torch

from .hub.running import run_hub
from .utils import make_tokenizer


def pytest_addoption(parser):
    parser.addoption(
        "--parity-fixtures",
        metavar="DIR",
        help="Numbers of the original code for tests/parity/cogview2 (default: tests/parity/cogview2/fixtures). "
        "`pytest tests/parity/cogview2 --fixtures DIR` does the same.",
    )
    parser.addoption(
        "--cogview_fixtures",
        metavar="DIR",
        help="Numbers of the original CogView for tests/parity/cogview (default: tests/parity/cogview/fixtures).",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="Where tests/parity runs the models, such as cuda (default: cpu). Float32 is never rounded to TF32.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`--fixtures DIR` of the parity tests: pytest's own flag of this name lists fixtures, and DIR is a path to it."""
    if config.option.showfixtures:
        folders = [arg for arg in config.args if (Path(arg) / "MANIFEST.json").is_file()]
        if folders:
            config.option.showfixtures = False
            config.option.parity_fixtures = str(Path(folders[0]).resolve())
            config.args[:] = [arg for arg in config.args if arg != folders[0]]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tiny bilingual tokenizer, trained once for all tests."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A stand-in for the Hub on loopback, and a way to run processes that know no other: `tests/hub/running.py`."""
    with run_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip():
    """A random CLIP of one layer, with a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({piece: index for index, piece in enumerate(pieces)}, [], model_max_length=12)
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(pieces), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**sides, **words, "pad_token_id": 1},
        vision_config={**sides, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    size = {"height": 16, "width": 16}
    torch.manual_seed(0)
    return CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer)
