"""The VQ model of diffusers under this package's interface: the same tokens and pixels, saved, and in a pipeline."""

import pytest
import torch
from diffusers import VQModel

from cogview_pipelines import CogView2Pipeline, DiffusersVQModel
from cogview_pipelines.models.image_tokenizers.auto import load_image_tokenizer

from ...pipelines.conftest import build
from ...utils import NUM_IMAGE_TOKENS

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


@pytest.fixture(scope="module")
def vq():
    torch.manual_seed(0)
    model = VQModel(
        **BLOCKS,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=NUM_IMAGE_TOKENS,
        sample_size=32,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


@pytest.fixture(scope="module")
def model(vq):
    return DiffusersVQModel.from_vq_model(vq, num_clusters=6)


@torch.no_grad()
def test_tokens_and_pixels_are_those_of_diffusers(vq, model):
    pixels = torch.rand(2, 3, 32, 48)
    latents = vq.encode(2 * pixels - 1).latents
    _, _, (_, _, indices) = vq.quantize(latents)
    tokens = model.encode(pixels, 8).tokens
    assert tokens.shape == (2, 4, 6)
    assert torch.equal(tokens.flatten(), indices.flatten())
    expected = (vq.decode(latents).sample + 1) / 2
    assert torch.allclose(model.decode(tokens, 8).sample, expected, atol=1e-5)
    flat = model.decode(tokens[:, :, :4].flatten(1)).sample
    assert torch.allclose(flat, model.decode(tokens[:, :, :4]).sample)


def test_it_says_its_codes_and_rate_and_groups_its_codes(model):
    assert model.config.num_embeddings == NUM_IMAGE_TOKENS and model.config.compression_rates == (8,)
    assert sorted(model.cluster_labels.unique().tolist()) == list(range(6))
    with pytest.raises(ValueError, match="`compression_rate` must be 8, which this model has, but is 4"):
        model.encode(torch.rand(1, 3, 32, 32), 4)
    with pytest.raises(ValueError, match="Text ids cannot be decoded"):
        model.decode(torch.full((1, 2, 2), NUM_IMAGE_TOKENS))
    with pytest.raises(ValueError, match=r"must be in 1\.\.48"):
        model.compute_cluster_labels(49)


@torch.no_grad()
def test_it_is_saved_and_loaded_by_itself_and_in_a_pipeline(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "vqvae")
    loaded = load_image_tokenizer(tmp_path / "vqvae")
    pixels = torch.rand(1, 3, 32, 32)
    assert isinstance(loaded, DiffusersVQModel)
    assert torch.equal(loaded.encode(pixels).tokens, model.encode(pixels).tokens)
    parts = build(tokenizer).components
    pipe = CogView2Pipeline(**{**parts, "vqvae": model})
    pipe.save_pretrained(tmp_path / "model")
    again = CogView2Pipeline.from_pretrained(tmp_path / "model")
    pictures = []
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
        pictures.append(each("a cat", generator=torch.Generator().manual_seed(1), output_type="pt").images)
    assert pictures[0].shape == (1, 3, 96, 96) and torch.equal(*pictures)


def test_pictures_are_prepared_with_it(model, tmp_path):
    from PIL import Image

    from ...training_scripts.conftest import as_arguments, load_script

    model.save_pretrained(tmp_path / "vqvae")
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "en": "green"}\n')
    options = {"vqvae": tmp_path / "vqvae", "image_folder": tmp_path, "captions": tmp_path / "captions.jsonl"}
    options |= {"low_size": 32, "fine_size": 0, "output_dir": tmp_path / "tokens"}
    load_script("prepare_tokens").main(as_arguments(options))
    assert (tmp_path / "tokens/tokens.safetensors").is_file()
