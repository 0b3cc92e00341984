"""Tiny files in the format of the release, and ways to spoil them."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pipelines.conversion import convert_to_pipeline
from cogview_pipelines.conversion.cogview2.layout import (
    STAGES,
    Stage,
    expected_shapes,
    model_class_of,
    released_config,
    released_transformer_key,
)
from cogview_pipelines.models.cogview2.modeling_coglm import CogLMConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "cogview2" / "fixtures"
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1024}
NUM_IMAGE_TOKENS = 512  # of the narrow image tokenizer among the parity fixtures
STAGES_BY_NAME = {stage.released_name: stage for stage in STAGES}


def config_of(stage: Stage) -> CogLMConfig:
    """The configuration of a tiny model of a stage."""
    canvas = {} if stage.super_resolution is None else {"super_resolution": stage.super_resolution}
    return model_class_of(stage.component).config_class(**canvas, **SHAPE)


def make_state_dict(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float16 tensors under the released names; the backbone depends on the seed only, not on the model."""
    stage = STAGES_BY_NAME[name]
    config = config_of(stage)
    tensors = OrderedDict()
    for key, shape in sorted(expected_shapes(model_class_of(stage.component), config).items()):
        generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, key)))
        noise = 0.1 * torch.randn(shape, generator=generator)
        is_scale = "norm" in key and key.endswith("weight")
        tensors[released_transformer_key(key)] = (1 + noise if is_scale else noise).half()
    return tensors


def write_checkpoint(folder: Path, name: str, tensors: dict | None = None, content: dict | None = None) -> Path:
    """A folder in the layout of the release; `content` replaces what stands in the pickle."""
    stage = STAGES_BY_NAME[name]
    config = released_config(config_of(stage), stage)
    (folder / "7").mkdir(parents=True)
    (folder / "latest").write_text("7")
    (folder / "model_config.json").write_text(json.dumps(config))
    content = {"module": make_state_dict(name) if tensors is None else tensors} if content is None else content
    torch.save(content, folder / "7" / "mp_rank_00_model_states.pt")
    return folder


def weights_of(folder: Path) -> Path:
    return folder / "7" / "mp_rank_00_model_states.pt"


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> dict[str, Path]:
    """All files of a tiny release. Direct super-resolution shares CogLM's backbone."""
    root = tmp_path_factory.mktemp("release")
    make_state_dict("cogview2-itersr", 1)
    np.save(root / "cluster_label.npy", np.arange(NUM_IMAGE_TOKENS) % 20)
    return {
        "coglm": write_checkpoint(root / "coglm", "coglm"),
        "direct_sr": write_checkpoint(root / "cogview2-dsr", "cogview2-dsr"),
        "iterative_sr": write_checkpoint(
            root / "cogview2-itersr", "cogview2-itersr", make_state_dict("cogview2-itersr", 1)
        ),
        "image_tokenizer": FIXTURES / "icetk" / "ice_image.pt",
        "text_tokenizer": FIXTURES / "icetk" / "ice_text.model",
        "cluster_labels": root / "cluster_label.npy",
    }


@pytest.fixture(scope="session")
def pipeline_folder(release, tmp_path_factory) -> Path:
    """The tiny release as a pipeline folder; not to be changed."""
    output = tmp_path_factory.mktemp("pipeline") / "cogview2"
    convert_to_pipeline(output, **release, num_image_tokens=NUM_IMAGE_TOKENS, say=lambda line: None)
    return output


@pytest.fixture
def convert(release, tmp_path):
    """`convert(coglm=...)`: convert into `tmp_path / "out"`; returns the record and the lines of the report."""

    def run(**parts):
        lines: list[str] = []
        parts = {"text_tokenizer": release["text_tokenizer"], "num_image_tokens": NUM_IMAGE_TOKENS, **parts}
        return convert_to_pipeline(tmp_path / "out", **parts, say=lines.append), lines

    return run
