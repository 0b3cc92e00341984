"""Image tokenizer against the original: tokens and pictures at every compression rate."""

import pytest
import torch

from cogview_pipelines.pictures.sizes import center_crop, resize_shorter_side

from .conftest import assert_close, assert_same, assert_same_decisions, assert_thinned, longs, run

LEVELS = {"l0": 4, "l1": 8, "l2": 16}


def tokens_of(vqvae, pixels, rate):
    with torch.no_grad():
        return run(vqvae.encode, pixels, rate).tokens.flatten(1)


@pytest.mark.parametrize("level, rate", LEVELS.items())
def test_tokens_are_the_originals(vqvae, arrays, level, rate):
    data = arrays("vqvae")
    ours = tokens_of(vqvae, torch.from_numpy(data["image"]), rate)
    assert_same_decisions(ours[0], data[f"{level}_ids"][0], data[f"{level}_id_margin"], level)


@pytest.mark.parametrize("level, rate", LEVELS.items())
def test_vectors_before_the_codebook_are_the_originals(vqvae, arrays, level, rate):
    data = arrays("vqvae")
    with torch.no_grad():
        features = vqvae._encode_features(torch.from_numpy(data["image"]).to(vqvae.device), rate)
        projected = vqvae.quantize.proj(features)
    assert_thinned(features, data, f"{level}_encoder_out")
    assert_thinned(projected, data, f"{level}_pre_quant")


@pytest.mark.parametrize("level, rate", LEVELS.items())
def test_decoded_pictures_are_the_originals(vqvae, arrays, level, rate):
    data = arrays("vqvae")
    with torch.no_grad():
        ours = run(vqvae.decode, longs(data[f"{level}_ids"]), rate).sample
    mean, std = (torch.tensor(value)[:, None, None] for value in IMAGE_STATISTICS)
    assert_thinned((ours - mean) / std, data, f"{level}_decoded_raw")
    if f"{level}_decoded" in data:
        assert_thinned(ours, data, f"{level}_decoded")


# Written out, so that a change of the model's defaults is noticed.
IMAGE_STATISTICS = ((0.79093, 0.76271, 0.75340), (0.30379, 0.32279, 0.32800))


@pytest.mark.parametrize("kind", ["antialias", "plain"])
def test_pictures_are_resized_and_cropped_as_by_the_original(arrays, kind):
    data = arrays("vqvae")
    resized = data[f"pil_resized_{kind}"]
    size = resized.shape[-1]
    ours = resize_shorter_side(torch.from_numpy(data["pil_u8"]), size, antialias=kind == "antialias")
    difference = (center_crop(ours, size).int() - torch.from_numpy(resized).int()).abs()
    assert difference.max() <= 1  # rounding of the same arithmetic
    assert (difference > 0).float().mean() < 0.001


@pytest.mark.parametrize("kind", ["antialias", "plain"])
def test_tokens_of_a_resized_picture_are_the_originals(vqvae, arrays, kind):
    data = arrays("vqvae")
    pixels = torch.from_numpy(data[f"pil_resized_{kind}"])[None].float() / 255
    ours = tokens_of(vqvae, pixels, 8)
    differ = (ours != longs(data[f"pil_ids_{kind}"])).sum()
    assert differ <= 1  # there are no margins here, and one in a hundred codes may be close to a tie


def test_pixels_are_bytes_divided_by_255(vqvae, arrays):
    data = arrays("vqvae")
    pixels = torch.from_numpy(data["image_u8"]).to(vqvae.device).float() / 255
    assert_close(pixels, data["image"], 1e-6)
    mean, std = vqvae._image_statistics(pixels)
    assert_thinned((pixels - mean) / std, data, "normalised", 1e-4)


def test_flat_codes_of_a_batch_decode_like_grids(vqvae, arrays):
    codes = longs(arrays("vqvae")["l1_ids"]).repeat(2, 1).to(vqvae.device)
    side = int(codes.shape[1] ** 0.5)
    with torch.no_grad():
        flat, grids = vqvae.decode(codes, 8).sample, vqvae.decode(codes.view(2, side, side), 8).sample
    assert_same(flat.shape, grids.shape)
    assert torch.equal(flat, grids)
