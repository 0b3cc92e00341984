import pytest
import torch

from cogview_pipelines import IcetkVQConfig, IcetkVQModel
from cogview_pipelines.models.image_tokenizers.modeling_icetk_vq import VectorQuantizer, kmeans_labels


def tiny_config(**options) -> IcetkVQConfig:
    defaults = {
        "num_embeddings": 24,
        "embedding_dim": 8,
        "base_channels": 8,
        "norm_num_groups": 4,
        "num_clusters": 5,
        "encoder_channel_multipliers": (1, 1, 2),
        "decoder_channel_multipliers": {4: (1, 1, 2), 8: (1, 1, 1, 2), 16: (1, 1, 1, 1, 2)},
    }
    return IcetkVQConfig(**{**defaults, **options})


def local_config(**options) -> IcetkVQConfig:
    return tiny_config(
        compression_rates=(8,),
        mid_attention=False,
        norm_type="position",
        local_encoder=True,
        encoder_patch_size=8,
        encoder_channel_multipliers=(2,),
        decoder_patch_size=2,
        decoder_channel_multipliers={8: (1, 1, 2)},
        **options,
    )


def make_model(config=None) -> IcetkVQModel:
    torch.manual_seed(0)
    return IcetkVQModel(config or tiny_config()).eval()


def pictures(count=2, height=32, width=48) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_each_rate_maps_squares_of_pixels_to_tokens_and_back(rate):
    model = make_model()
    tokens = model.encode(pictures(), rate).tokens
    assert tokens.shape == (2, 32 // rate, 48 // rate) and tokens.dtype == torch.long
    assert tokens.min() >= 0 and tokens.max() < 24
    assert model.decode(tokens, rate).sample.shape == (2, 3, 32, 48)


def test_rates_share_encoder_and_codebook():
    model = make_model()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"encoder", "quantize", "down_samplers", "decoders"}
    assert [type(part).__name__ for part in model.decoders.values()] == ["Decoder"] * 3
    assert sum(part.numel() for part in model.quantize.embed.parameters()) == 24 * 8


def test_default_config_is_the_released_architecture():
    with torch.device("meta"):
        model = IcetkVQModel(IcetkVQConfig())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["quantize.embed.weight"] == (20000, 256)
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["encoder.down.1.block.1.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["down_samplers.1.conv.weight"] == (256, 256, 3, 3)
    assert shapes["decoders.16.up.4.attn.0.proj_out.weight"] == (512, 512, 1, 1)
    assert "decoders.8.up.3.attn.0.proj_out.weight" not in shapes
    assert (
        "encoder.down.2.downsample.conv.weight" not in shapes and "decoders.4.up.0.upsample.conv.weight" not in shapes
    )


def test_only_the_chosen_rates_are_built():
    model = make_model(tiny_config(compression_rates=(8,)))
    assert list(model.decoders) == ["8"] and len(model.down_samplers) == 1
    with pytest.raises(ValueError, match=r"`compression_rate` must be one of \(8,\).*16"):
        model.encode(pictures(), 16)
    with pytest.raises(ValueError, match="`compression_rate`"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.long), 4)


def test_the_token_is_the_nearest_code():
    model = make_model()
    features = model.quantize.proj(model._encode_features(pictures(), 8))
    distances = (features[:, None] - model.quantize.embed.weight[None, :, :, None, None]).square().sum(2)
    assert torch.equal(model.encode(pictures(), 8).tokens, distances.argmin(1))


def test_flat_codes_decode_like_square_ones_also_in_batches():
    model = make_model()
    tokens = torch.randint(24, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(tokens.flatten(1), 4).sample, model.decode(tokens, 4).sample)


def test_a_picture_alone_is_coded_as_in_a_batch():
    model, batch = make_model(), pictures(3)
    tokens = model.encode(batch).tokens
    assert torch.equal(model.encode(batch[1:2]).tokens[0], tokens[1])
    torch.testing.assert_close(model.decode(tokens[1:2]).sample[0], model.decode(tokens).sample[1], atol=1e-5, rtol=0)


def test_save_and_load_give_the_same_model(tmp_path):
    model = make_model()
    model.compute_cluster_labels(3)
    model.save_pretrained(tmp_path)
    loaded = IcetkVQModel.from_pretrained(tmp_path)
    assert loaded.config.decoder_channel_multipliers == model.config.decoder_channel_multipliers
    assert loaded.config.num_clusters == 3
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = model.encode(pictures()).tokens
    assert torch.equal(loaded.encode(pictures()).tokens, tokens)
    assert torch.equal(loaded.decode(tokens).sample, model.decode(tokens).sample)


def test_half_precision_model_takes_float_pictures():
    model = make_model().to(torch.bfloat16)
    sample = model.decode(model.encode(pictures()).tokens).sample
    assert sample.dtype == torch.bfloat16 and sample.isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.encode(torch.rand(1, 3, 32, 36)), "multiples of `compression_rate` 8, but are 32 and 36"),
        (lambda model: model.encode(torch.rand(3, 32, 32)), r"`pixel_values`.*\(3, 32, 32\)"),
        (lambda model: model.encode(torch.rand(1, 1, 32, 32)), "`pixel_values`"),
        (lambda model: model.decode(torch.full((1, 2, 2), 24)), r"0\.\.23, but span 24\.\.24"),
        (lambda model: model.decode(torch.full((1, 2, 2), -1)), "`tokens`"),
        (lambda model: model.decode(torch.zeros(1, 6, dtype=torch.long)), "square number of codes, but are 6"),
        (lambda model: model.decode(torch.zeros(6, dtype=torch.long)), "`tokens` must have the shape"),
        (lambda model: model.compute_cluster_labels(25), r"`num_clusters` must be in 1\.\.24.*25"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compression_rates": (6,)}, "one is 6"),
        ({"compression_rates": (2,)}, "one is 2"),
        (
            {"decoder_channel_multipliers": {4: (1, 2)}, "compression_rates": (4,)},
            r"`decoder_channel_multipliers\[4\]`",
        ),
        ({"norm_type": "batch"}, "`norm_type`.*batch"),
    ],
)
def test_impossible_architectures_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_local_encoder_sees_only_the_pixels_of_the_token():
    model = make_model(local_config())
    batch = pictures(1, 32, 32)
    tokens = model.encode(batch).tokens
    changed = batch.clone()
    changed[:, :, 8:16, 16:24] = 1 - changed[:, :, 8:16, 16:24]
    features = model._encode_features(changed, 8) - model._encode_features(batch, 8)
    moved = features.abs().amax(1)[0] > 0
    assert moved.nonzero().tolist() == [[1, 2]]
    assert torch.equal(model.encode(batch[:, :, 8:24, 16:32]).tokens[0], tokens[0, 1:3, 2:4])


def test_gradient_passes_the_codebook_straight_through():
    model = make_model().train()
    output = model(pictures(), 8)
    (output.sample.square().mean() + output.commitment_loss).backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.proj.weight.grad.abs().sum() > 0
    assert model.decoders["8"].conv_in.weight.grad.abs().sum() > 0
    assert model.decoders["4"].conv_in.weight.grad is None
    assert model.quantize.embed.weight.grad is None


def test_training_forward_decodes_the_tokens_that_it_returns():
    model = make_model()
    output = model(pictures(), 8)
    assert torch.equal(output.tokens, model.encode(pictures(), 8).tokens)
    torch.testing.assert_close(output.sample, model.decode(output.tokens, 8).sample, atol=1e-5, rtol=0)


def make_quantizer(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(tiny_config(**options))
    torch.nn.init.dirac_(quantizer.proj.weight)
    torch.nn.init.zeros_(quantizer.proj.bias)
    return quantizer


def test_codes_start_at_different_vectors_of_the_first_batch():
    quantizer = make_quantizer().train()
    centres = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    vectors = centres[torch.arange(4 * 144) % 24]  # 24 different vectors, many times
    projected, embeddings, tokens = quantizer(vectors.view(4, 12, 12, 8).movedim(-1, 1))
    torch.testing.assert_close(embeddings, projected, atol=1e-4, rtol=0)
    assert len(tokens.unique()) == 24


def test_codes_follow_the_mean_of_their_vectors():
    quantizer = make_quantizer(num_embeddings=2, codebook_decay=0.5, dead_code_threshold=0.0).train()
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([-1.0, 1.0]).repeat(72).view(1, 1, 12, 12)
    for _ in range(20):
        quantizer(3 * signs + 0.1 * torch.randn(4, 8, 12, 12, generator=generator))
    means = quantizer.embed.weight.mean(1).sort().values
    torch.testing.assert_close(means, torch.tensor([-3.0, 3.0]), atol=0.05, rtol=0)


@pytest.mark.parametrize("threshold, revived", [(0.03, True), (0.0, False)])
def test_dead_codes_come_back_where_the_codebook_is_worst(threshold, revived):
    quantizer = make_quantizer(num_embeddings=4, codebook_decay=0.5, dead_code_threshold=threshold).train()
    quantizer.cluster_size.fill_(1.0)
    quantizer.embed_avg.copy_(quantizer.embed.weight)
    quantizer.embed.weight[0] = 0.0
    quantizer.embed_avg[0] = 0.0
    quantizer.embed.weight[1:] = 100.0
    quantizer.embed_avg[1:] = 100.0
    vectors = torch.zeros(1, 8, 6, 6)
    vectors[:, 0, 0, :3] = 10.0
    for _ in range(30):
        quantizer(vectors)
    served = (vectors.movedim(1, -1) - quantizer.eval()(vectors)[1].movedim(1, -1)).abs().amax() < 0.1
    assert bool(served) is revived


def test_eval_mode_leaves_the_codebook_alone():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(pictures(), 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cluster_labels_group_near_codes_and_leave_no_cluster_empty():
    model = make_model()
    centres = 10 * torch.eye(8)[:6]
    noise = 0.1 * torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.quantize.embed.weight.copy_(centres.repeat_interleave(4, 0) + noise)
    labels = model.compute_cluster_labels(6, seed=3)
    assert torch.equal(labels, model.cluster_labels)
    groups = labels.view(6, 4)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == 6


def test_kmeans_fills_all_clusters_even_of_equal_points_and_repeats_itself():
    equal = torch.zeros(10, 3)
    assert torch.bincount(kmeans_labels(equal, 4), minlength=4).min() >= 1
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kmeans_labels(points, 7, seed=1), kmeans_labels(points, 7, seed=1))
    assert len(kmeans_labels(points, 60).unique()) == 60
