"""Weights of 8 and 4 bits: which they are, what they take, and how far the results move."""

import copy

import pytest
import torch

from cogview_pipelines import CogLMCanvasModel, CogLMModel, CogView2Pipeline, CogViewPipeline

from ...utils import make_coglm, make_image_tokens

STAGES = ("transformer", "direct_sr_transformer", "iterative_sr_transformer")
MATRICES = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")


def eight_bits():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def four_bits():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coglm")
    make_coglm(hidden_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(shared_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    CogView2Pipeline(**copy.deepcopy(shared_pipe.components)).save_pretrained(folder)
    return folder


def load(folder, configuration):
    pipe = CogView2Pipeline.from_pretrained(folder, quantization_config=configuration)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def logits(model):
    ids = make_image_tokens(2)
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits


def stored_bytes(weight):
    """What a weight takes, its scales included."""
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return sum(part.nbytes for part in parts)


def test_eight_bits_are_for_the_matrices_of_the_layers_only(model_folder):
    model = CogLMModel.from_pretrained(model_folder, quantization_config=eight_bits())
    quantised = {name for name, weight in model.named_parameters() if hasattr(weight, "qdata")}
    assert quantised == {name for name, _ in model.named_parameters() if name.endswith(MATRICES)}
    assert len(quantised) == 4 * model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if name in quantised:
            rows, columns = weight.shape
            assert stored_bytes(weight) <= rows * columns + 8 * rows


def test_logits_of_eight_bits_are_near_those_of_float32(model_folder):
    exact = logits(CogLMModel.from_pretrained(model_folder))
    near = logits(CogLMModel.from_pretrained(model_folder, quantization_config=eight_bits()))
    assert not torch.equal(near, exact)
    assert (near - exact).std() < 0.05 * exact.std()


def test_a_configuration_counts_for_every_stage_and_keeps_a_shared_backbone_shared(pipeline_folder):
    pipe = load(pipeline_folder, eight_bits())
    lent = dict(pipe.direct_sr_transformer.named_parameters())
    assert all(lent[name] is parameter for name, parameter in pipe.transformer.named_parameters())
    for stage in STAGES:
        model = getattr(pipe, stage)
        assert hasattr(model.config, "quantization_config")
        assert model.word_embeddings.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in pipe.vqvae.parameters()} == {torch.float32}
    tokens = pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="latent").tokens
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < pipe.transformer.config.num_image_tokens


def test_eight_bits_can_be_saved_and_loaded(pipeline_folder, tmp_path):
    pipe = load(pipeline_folder, eight_bits())
    pipe.save_pretrained(tmp_path)
    sizes = {stage: (tmp_path / stage / "model.safetensors").stat().st_size for stage in STAGES}
    whole = {stage: (pipeline_folder / stage / "model.safetensors").stat().st_size for stage in STAGES}
    assert all(sizes[stage] < whole[stage] for stage in STAGES)
    assert sizes["direct_sr_transformer"] < sizes["iterative_sr_transformer"]  # without the backbone
    again = CogView2Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "output_type": "latent"}
    assert torch.equal(
        again(**call, generator=torch.Generator().manual_seed(1)).tokens,
        pipe(**call, generator=torch.Generator().manual_seed(1)).tokens,
    )


def test_four_bits_leave_the_place_of_a_shared_backbone_empty_until_it_is_lent(tmp_path):
    configuration = four_bits()
    transformer = make_coglm(hidden_size=128)
    direct = CogLMCanvasModel.from_transformer(transformer, "direct", (12, 12), shares_backbone=True)
    exact = logits(transformer)
    for name, model in (("transformer", transformer), ("direct", direct)):
        model.save_pretrained(tmp_path / name)
    transformer, direct = (
        model_class.from_pretrained(tmp_path / name, quantization_config=configuration)
        for name, model_class in (("transformer", CogLMModel), ("direct", CogLMCanvasModel))
    )
    assert all("canvas_" in name for name, _ in direct.named_parameters())
    assert direct.layers[0].canvas_attention.dense.weight.dtype == torch.uint8
    direct.share_backbone(transformer)
    lent = dict(direct.named_parameters())
    assert all(lent[name] is parameter for name, parameter in transformer.named_parameters())
    assert transformer.layers[0].mlp.dense_h_to_4h.weight.nbytes == 4 * 128 * 128 // 2
    assert (logits(transformer) - exact).std() < 0.5 * exact.std()


@pytest.mark.parametrize("kind", ["eight", "four"])
def test_cogviews_matrices_are_quantised_in_all_of_its_models(cogview_pipe, tmp_path, kind):
    configuration = eight_bits() if kind == "eight" else four_bits()
    cogview_pipe.save_pretrained(tmp_path)
    pipe = CogViewPipeline.from_pretrained(tmp_path, quantization_config=configuration)
    pipe.set_progress_bar_config(disable=True)
    assert {parameter.dtype for parameter in pipe.vqvae.parameters()} == {torch.float32}
    for name in ("transformer", "caption_transformer", "super_resolution_transformer"):
        exact, model = getattr(cogview_pipe, name), getattr(pipe, name)
        weights = dict(model.named_parameters())
        quantised = {
            name for name, weight in weights.items() if hasattr(weight, "qdata") or weight.dtype == torch.uint8
        }
        assert quantised == {name for name in weights if name.endswith(MATRICES)}
        assert len(quantised) == 4 * model.config.num_hidden_layers
        near, wanted = logits(model), logits(exact)
        assert 0 < (near - wanted).std() < (0.05 if kind == "eight" else 0.5) * wanted.std()
    call = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", "num_candidates": 2}
    tokens = pipe("a cat", **call).tokens
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < pipe.transformer.config.num_image_tokens


def test_cogview_of_eight_bits_can_be_saved_and_loaded(cogview_pipe, tmp_path):
    cogview_pipe.save_pretrained(tmp_path / "whole")
    pipe = CogViewPipeline.from_pretrained(tmp_path / "whole", quantization_config=eight_bits())
    pipe.save_pretrained(tmp_path / "small")
    again = CogViewPipeline.from_pretrained(tmp_path / "small")
    sizes = [(tmp_path / name / "transformer/model.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < sizes[1]
    assert torch.equal(logits(again.transformer), logits(pipe.transformer))


@pytest.mark.gpu
def test_four_bits_of_torchao_run_on_a_gpu(model_folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    configuration = TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    model = CogLMModel.from_pretrained(model_folder, quantization_config=configuration, **options)
    ids = make_image_tokens(2).cuda()
    positions = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
    with torch.no_grad():
        near = model(ids, positions).logits
        exact = CogLMModel.from_pretrained(model_folder, **options)(ids, positions).logits
    assert (near - exact).std() < 0.5 * exact.std()
