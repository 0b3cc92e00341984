"""`CogViewVQModel`: sizes, batches, the four ways to learn codes, save and load, errors."""

import pytest
import torch

from cogview_pipelines import CogViewVQConfig, CogViewVQModel

from ...utils import randomize


def make_model(**config) -> CogViewVQModel:
    fields = {"num_embeddings": 32, "embedding_dim": 4, "hidden_channels": 8}
    return randomize(CogViewVQModel(CogViewVQConfig(**{**fields, **config})))


@pytest.fixture(scope="module")
def model():
    return make_model()


def pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (16, 40), (64, 24)])
def test_any_size_that_is_a_multiple_of_eight_goes_in_and_comes_out(model, size):
    images = pixels(2, 3, *size)
    tokens = model.encode(images).tokens
    assert tokens.shape == (2, size[0] // 8, size[1] // 8) and tokens.max() < 32
    assert model.decode(tokens).sample.shape == images.shape
    # one picture alone has the codes it has in a batch
    assert torch.equal(model.encode(images[1:]).tokens, tokens[1:])


@torch.no_grad()
def test_flat_codes_of_a_batch_are_squares(model):
    tokens = model.encode(pixels(3, 3, 32, 32)).tokens
    assert torch.equal(model.decode(tokens.flatten(1)).sample, model.decode(tokens).sample)


@torch.no_grad()
def test_the_code_is_the_nearest(model):
    features = model.encode_features(pixels(2, 3, 16, 16))
    distances = torch.cdist(features.flatten(0, 2).double(), model.quantize.embed.weight.double())
    assert torch.equal(model.encode(pixels(2, 3, 16, 16)).tokens.flatten(), distances.argmin(1))


def learn(codebook_training, **config):
    """A model after one training step, and what it was before."""
    model = make_model(codebook_training=codebook_training, **config).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(pixels(2, 3, 16, 16))
    (output.sample.square().mean() + output.commitment_loss).backward()
    optimizer.step()
    return model, before, output


@pytest.mark.parametrize("training", ["moving_average", "nearest", "gumbel", "fixed"])
def test_encoder_and_decoder_learn_in_all_four_ways_and_codes_in_three(training):
    model, before, output = learn(training)
    after = model.state_dict()
    for key in ("encoder.0.weight", "encoder.6.bias", "decoder.0.weight", "decoder.6.weight"):
        assert not torch.equal(before[key], after[key]), key
    moved = not torch.equal(before["quantize.embed.weight"], after["quantize.embed.weight"])
    assert moved == (training != "fixed")
    counted = not torch.equal(before["quantize.cluster_size"], after["quantize.cluster_size"])
    assert counted == (training == "moving_average")
    assert output.tokens.shape == (2, 2, 2) and output.commitment_loss.ndim == 0


def test_the_codebook_loss_is_of_the_codes_and_the_commitment_of_the_vectors():
    _, _, nearest = learn("nearest", commitment_cost=0.25)
    _, _, fixed = learn("fixed", commitment_cost=0.25)
    assert torch.allclose(nearest.commitment_loss, 5 * fixed.commitment_loss)


def test_dead_codes_move_to_vectors_that_are_served_badly():
    codebook = make_model(dead_code_threshold=0.03).quantize.train()
    torch.nn.init.zeros_(codebook.embed.weight)
    codebook.embed_avg.zero_()
    codebook.cluster_size.fill_(1.0)
    codebook.cluster_size[7] = 0.0
    vectors = torch.zeros(20, 4)
    vectors[3] = 50.0  # far from all codes
    codebook.revive(vectors, codebook.nearest(vectors)[1])
    assert torch.equal(codebook.embed.weight[7], vectors[3]) and codebook.cluster_size[7] == 1
    before = codebook.embed.weight.clone()
    codebook.revive(vectors, codebook.nearest(vectors)[1])  # none is dead now
    assert torch.equal(codebook.embed.weight, before)


def test_gumbel_softmax_grows_hard_as_the_temperature_falls():
    vectors = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    spread = []
    for temperature in (4.0, 1e-3):
        codebook = make_model(codebook_training="gumbel", gumbel_temperature=temperature).quantize.train()
        with torch.no_grad():
            codes, _, _ = codebook(vectors)
            spread.append(torch.cdist(codes, codebook.embed.weight).amin(1).max())
    assert spread[1] < 1e-3 < spread[0]


@torch.no_grad()
def test_in_eval_mode_nothing_changes_and_forward_is_encode_and_decode():
    for training in ("moving_average", "nearest", "gumbel", "fixed"):
        model = make_model(codebook_training=training).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        images = pixels(1, 3, 16, 16)
        output = model(images)
        assert torch.equal(output.tokens, model.encode(images).tokens)
        assert torch.allclose(output.sample, model.decode(output.tokens).sample, atol=1e-6)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_save_and_load_gives_the_same_pictures(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = CogViewVQModel.from_pretrained(tmp_path)
    tokens = model.encode(pixels(1, 3, 16, 24)).tokens
    assert torch.equal(loaded.encode(pixels(1, 3, 16, 24)).tokens, tokens)
    assert torch.equal(loaded.decode(tokens).sample, model.decode(tokens).sample)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_the_released_architecture_is_the_default():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in CogViewVQModel(CogViewVQConfig()).state_dict().items()}
    assert shapes["encoder.0.weight"] == (512, 3, 4, 4) and shapes["encoder.6.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.0.weight"] == (256, 512, 4, 4) and shapes["decoder.6.weight"] == (3, 512, 1, 1)
    assert shapes["quantize.embed.weight"] == (8192, 256)


def test_errors_name_the_argument(model):
    with pytest.raises(ValueError, match="multiples of `compression_rate` 8, but are 12 and 16"):
        model.encode(pixels(1, 3, 12, 16))
    with pytest.raises(ValueError, match=r"`pixel_values` must have the shape \(batch_size, 3, height, width\)"):
        model.encode(pixels(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"`tokens` must be codes in 0\.\.31, but span 0\.\.32"):
        model.decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(ValueError, match="square number of codes, but are 5"):
        model.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="`codebook_training` must be one of"):
        CogViewVQConfig(codebook_training="none")
