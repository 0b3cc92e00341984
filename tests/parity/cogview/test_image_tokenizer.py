"""Image tokenizer against the original: codes, pictures, and how the codes are learnt."""

import numpy as np
import PIL.Image
import pytest
import torch

from cogview_pipelines.models.image_tokenizers.modeling_cogview_vq import (
    Codebook,
    CogViewVQConfig,
    divergence_from_uniform,
    squared_distances,
)
from cogview_pipelines.pictures.sizes import center_crop, resize_shorter_side

from ..comparing import assert_close, assert_same, assert_same_decisions, assert_thinned, longs, run


@pytest.fixture(scope="module")
def images(arrays):
    return torch.from_numpy(arrays("vqvae")["images"]).permute(0, 3, 1, 2).float() / 255


def normalised(pixels, vqvae):
    mean, std = (torch.tensor(value)[:, None, None] for value in (vqvae.config.image_mean, vqvae.config.image_std))
    return (pixels - mean) / std


def read_picture(array, size):
    """A picture as the release reads it: shorter side resized on bytes, with antialiasing, then the middle."""
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    return center_crop(resize_shorter_side(pixels, size, as_pillow=True), size).float() / 255


@torch.no_grad()
def test_codes_are_the_originals(vqvae, arrays, images):
    data = arrays("vqvae")
    ours = run(vqvae.encode, images).tokens.flatten(1)
    assert_same_decisions(ours, data["ids"], data["dist_margin"])
    assert_close(run(vqvae.encode_features, images)[0, ::8, ::8], data["features"])
    assert_close(normalised(images[0], vqvae)[:, 7], data["normalised_row"], 1e-5)


@torch.no_grad()
def test_decoded_pictures_of_every_size_are_the_originals(vqvae, arrays):
    data = arrays("vqvae")
    decoded = run(vqvae.decode, longs(data["ids"])).sample
    assert_thinned(decoded[0, :, ::2, ::2], data, "decoded")
    assert_close(torch.stack([decoded.min(), decoded.max()]), data["decoded_range"])
    assert_thinned(run(vqvae.decode, longs(data["grid16"])).sample[0], data, "decoded16")
    assert_close(run(vqvae.decode, longs(data["grid64"])[None]).sample[0, :, ::8, ::8], data["decoded64_sub"])


@torch.no_grad()
def test_a_batch_of_flat_codes_decodes_like_its_grids(vqvae, arrays):
    codes = longs(arrays("vqvae")["ids"])
    side = int(codes.shape[1] ** 0.5)
    flat, grids = run(vqvae.decode, codes).sample, run(vqvae.decode, codes.view(-1, side, side)).sample
    assert torch.equal(flat, grids)


def pillow_picture(array, size):
    """A picture as Pillow resizes it, and its middle."""
    height, width = array.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    target = (longer, size) if width > height else (size, longer)
    resized = PIL.Image.fromarray(array).resize(target, PIL.Image.Resampling.BILINEAR)
    return center_crop(torch.from_numpy(np.array(resized)).permute(2, 0, 1), size).float() / 255


@pytest.mark.parametrize("size, step", [(256, 4), (128, 2)])
def test_pictures_are_read_as_by_the_original(vqvae, arrays, size, step):
    data = arrays("vqvae")
    theirs = pillow_picture(data["wide"], size)
    assert_close(normalised(theirs, vqvae)[:, ::step, ::step], data[f"wide_{size}"], 1e-5)
    difference = (read_picture(data["wide"], size) - theirs).abs() * 255
    assert difference.max() < 1.01  # rounding of the same arithmetic
    assert (difference > 0.01).float().mean() < 0.003


@torch.no_grad()
@pytest.mark.parametrize("picture, size, codes", [("wide", 256, "wide_ids256"), ("images", 128, "a_ids128")])
def test_codes_of_a_resized_picture_are_the_originals(vqvae, arrays, picture, size, codes):
    """There are no margins here; float32 noise, and one level of a byte, may change a code that is close to a tie."""
    data = arrays("vqvae")
    array = data[picture] if data[picture].ndim == 3 else data[picture][0]
    theirs = run(vqvae.encode, pillow_picture(array, size)[None]).tokens.flatten()
    assert (theirs != longs(data[codes])).float().mean() <= 0.001
    ours = run(vqvae.encode, read_picture(array, size)[None]).tokens.flatten()
    assert (ours != longs(data[codes])).float().mean() <= 0.01


def test_one_step_of_the_moving_averages_is_the_originals(arrays):
    data = {key: torch.from_numpy(value) for key, value in arrays("vq_train").items()}
    dim, num_codes = data["embed0"].shape
    codebook = Codebook(CogViewVQConfig(num_embeddings=num_codes, embedding_dim=dim, commitment_cost=0.25)).train()
    with torch.no_grad():
        codebook.embed.weight.copy_(data["embed0"].T)
        codebook.embed_avg.copy_(data["embed_avg0"].T)
        codebook.cluster_size.copy_(data["cluster_size0"])
    vectors = data["x"].clone().requires_grad_()
    codes, tokens, loss = codebook(vectors.flatten(0, -2))
    assert_same(tokens, data["ids"].flatten())
    assert_close(codes.view_as(vectors).detach(), data["q"], 1e-5)
    assert_close(loss.detach() / 0.25, data["diff"], 1e-5)
    ((codes.view_as(vectors) * data["w"]).sum() + loss).backward()
    assert_close(vectors.grad, data["grad_x"], 1e-5)
    for ours, theirs in (
        (codebook.embed.weight.detach().T, "embed1"),
        (codebook.embed_avg.T, "embed_avg1"),
        (codebook.cluster_size, "cluster_size1"),
    ):
        assert_close(ours, data[theirs], 1e-4)


def test_divergence_of_gumbel_softmax_is_the_originals(arrays):
    data = {key: torch.from_numpy(value) for key, value in arrays("vq_train").items()}
    scores = -squared_distances(data["x"].flatten(0, -2), data["embed0"].T)
    assert_close(divergence_from_uniform(scores), data["kl"], 1e-4)
