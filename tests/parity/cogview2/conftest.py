"""
Parity with the original code: its numbers (`fixtures/`) against this package, from the same released-format files.

Another set of fixtures of the same form goes through unchanged: `pytest tests/parity/cogview2 --fixtures DIR`. Nothing
here knows how many cases a set has, how wide its models are or what they predict. `--device cuda` runs them there.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pipelines import CogLMCanvasModel, CogLMModel, IcetkTokenizer, IcetkVQModel, LoPARScheduler
from cogview_pipelines.conversion.reader import read_module

from ..checkpoints import direct_sr as direct_sr_checkpoint
from ..comparing import (  # noqa: F401 (the tests take them from here)
    CLEAR_MARGIN,
    LOGITS_TOLERANCE,
    assert_close,
    assert_logits,
    assert_same,
    assert_same_decisions,
    assert_thinned,
    bools,
    cases,
    longs,
    run,
    stored,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def fixture_folder(request) -> Path:
    """The set of fixtures under test."""
    folder = Path(request.config.getoption("parity_fixtures") or Path(__file__).parent / "fixtures")
    if not (folder / "MANIFEST.json").is_file():
        pytest.exit(f"{folder} holds no parity fixtures: it has no MANIFEST.json.", returncode=4)
    return folder


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the models run."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def arrays(fixture_folder):
    """`arrays("dsr")`: the arrays of one file, by name."""
    loaded = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            with np.load(fixture_folder / f"{name}.npz") as file:
                loaded[name] = {key: file[key] for key in file.files}
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def texts(fixture_folder) -> dict:
    """Encodings of the original text tokenizer, and the style recipes."""
    return json.loads((fixture_folder / "text_tokenizer.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def converted(fixture_folder, tmp_path_factory) -> Path:
    """The released-format files of the fixtures, converted by the script."""
    output = tmp_path_factory.mktemp("converted") / "cogview2"
    convert = runpy.run_path(str(ROOT / "conversion_scripts" / "convert_cogview2.py"))["main"]
    checkpoints, icetk = fixture_folder / "checkpoints", fixture_folder / "icetk"
    parts = {
        "--coglm": checkpoints / "coglm",
        "--direct_sr": direct_sr_checkpoint(fixture_folder, output.parent),
        "--iterative_sr": checkpoints / "cogview2-itersr",
        "--image_tokenizer": icetk / "ice_image.pt",
        "--text_tokenizer": icetk / "ice_text.model",
    }
    argv = [str(word) for pair in parts.items() for word in pair]
    # the labels among the fixtures are for the transformers' vocabulary, which is larger than this narrow codebook
    with (icetk / "ice_image.pt").open("rb") as file:
        num_codes = read_module(file, "ice_image.pt")[0]["quantize.embed.weight"].shape[0]
    labels = output.parent / "cluster_label.npy"
    np.save(labels, np.arange(num_codes) % 20)
    assert convert([*argv, "--cluster_labels", str(labels), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def coglm(converted, device) -> CogLMModel:
    return CogLMModel.from_pretrained(converted / "transformer", dtype=torch.float32).eval().to(device)


@pytest.fixture(scope="session")
def direct_sr(converted, coglm, device) -> CogLMCanvasModel:
    model = (
        CogLMCanvasModel.from_pretrained(converted / "direct_sr_transformer", dtype=torch.float32).eval().to(device)
    )
    if model.config.shares_backbone:
        model.share_backbone(coglm)
    return model


@pytest.fixture(scope="session")
def iterative_sr(converted, device) -> CogLMCanvasModel:
    return (
        CogLMCanvasModel.from_pretrained(converted / "iterative_sr_transformer", dtype=torch.float32).eval().to(device)
    )


@pytest.fixture(scope="session")
def direct_sr_scheduler(converted) -> LoPARScheduler:
    return LoPARScheduler.from_pretrained(converted / "direct_sr_scheduler")


@pytest.fixture(scope="session")
def iterative_sr_scheduler(converted) -> LoPARScheduler:
    return LoPARScheduler.from_pretrained(converted / "iterative_sr_scheduler")


@pytest.fixture(scope="session")
def vqvae(converted, device) -> IcetkVQModel:
    return IcetkVQModel.from_pretrained(converted / "vqvae", dtype=torch.float32).eval().to(device)


@pytest.fixture(scope="session")
def text_tokenizer(converted) -> IcetkTokenizer:
    return IcetkTokenizer.from_pretrained(converted / "tokenizer")
