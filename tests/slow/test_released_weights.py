"""
The released files themselves, where they are at hand.

    COGVIEW2_RELEASE=~/cogview2-release pytest tests/slow/test_released_weights.py -m slow

The folder holds `coglm.zip`, `cogview2-dsr.zip`, `cogview2-itersr.zip` (or the unpacked folders `coglm`, ...),
`ice_image.pt`, `ice_text.model` and `cluster_label.npy`, or some of them.
"""

import os
from pathlib import Path

import pytest
import torch

from cogview_pipelines import CogView2Pipeline, IcetkTokenizer
from cogview_pipelines.conversion import convert_to_pipeline, verify
from cogview_pipelines.conversion.cogview2.layout import STAGES, expected_shapes, model_class_of
from cogview_pipelines.conversion.released_models import open_released_model

pytestmark = pytest.mark.slow

RELEASE = Path(os.environ.get("COGVIEW2_RELEASE", "")).expanduser()
# What the authors of icetk show for their tokenizer.
SHOWN_IDS = {
    "Hello World! I am icetk.": [39316, 20932, 20035, 20115, 20344, 22881, 35955, 20007],
    "你好世界！这里是 icetk。": [20005, 94874, 84097, 20035, 94947, 22881, 35955, 83823],
}


def part(*names: str) -> Path:
    found = [RELEASE / name for name in names if os.environ.get("COGVIEW2_RELEASE") and (RELEASE / name).exists()]
    if not found:
        pytest.skip(f"COGVIEW2_RELEASE has no {names[0]}")
    return found[0]


def checkpoint(name: str) -> Path:
    return part(f"{name}.zip", name)


def test_text_tokenizer_gives_the_ids_that_its_authors_show():
    tokenizer = IcetkTokenizer(part("ice_text.model"))
    for text, ids in SHOWN_IDS.items():
        assert tokenizer.encode(text) == ids
    assert (tokenizer.boi_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (150000, 20000, 20003)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.released_name)
def test_checkpoints_have_the_shapes_of_the_presets(stage, tmp_path):
    with open_released_model(checkpoint(stage.released_name), scratch=tmp_path) as model:
        rows = model.tensors["transformer.word_embeddings.weight"].shape[0]
        model_class = model_class_of(stage.component)
        config = model_class.config_class.released(stage.released_name, vocab_size=rows)
        shapes = {tuple(shape) for shape in expected_shapes(model_class, config).values()}
        assert {tensor.shape for tensor in model.tensors.values()} == shapes
        assert model.config["num_attention_heads"] == config.num_attention_heads


def test_the_release_becomes_a_pipeline_that_makes_pictures(tmp_path):
    convert_to_pipeline(
        tmp_path / "cogview2",
        coglm=checkpoint("coglm"),
        direct_sr=checkpoint("cogview2-dsr"),
        iterative_sr=checkpoint("cogview2-itersr"),
        image_tokenizer=part("ice_image.pt"),
        text_tokenizer=part("ice_text.model"),
        cluster_labels=part("cluster_label.npy"),
    )
    assert verify(tmp_path / "cogview2") == []
    pipe = CogView2Pipeline.from_pretrained(tmp_path / "cogview2", dtype=torch.float16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    picture = pipe("一只老虎 戴着 VR 眼镜", style="photo", generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (480, 480)
    assert len(picture.resize((48, 48)).getcolors(48 * 48) or []) > 100
