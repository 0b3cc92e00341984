"""What is exported computes what PyTorch computes, and draws the same tokens."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from cogview_pipelines.export import onnx_folder, onnx_pictures
from cogview_pipelines.export.graphs import CanvasStage, PixelStage, TextStage
from cogview_pipelines.export.onnx_folder import export_onnx
from cogview_pipelines.export.onnx_pictures import OnnxPictures
from cogview_pipelines.generation import sampling
from cogview_pipelines.models.cogview2 import sequences
from cogview_pipelines.ops.native import fused_refusals

from ..pipelines.conftest import build
from ..utils import make_image_tokens
from .conftest import one_thread

PROMPTS = ("a tiger on a blue background.", "一只猫,绿色背景。", "a cat ")
GREEDY = {"temperature": 1e-6, "direct_sr_temperature": 1e-6, "iterative_sr_temperature": 1e-6}
STAGES = ("transformer", "direct_sr_transformer", "iterative_sr_transformer")


def run(pictures, name, **feeds):
    session = pictures.sessions[name]
    taken = {each.name for each in session.get_inputs()}
    return session.run(None, {key: value.numpy() for key, value in feeds.items() if key in taken})


@pytest.mark.parametrize("batch_size, past, new", [(1, 0, 7), (2, 0, 1), (3, 9, 1), (2, 5, 4)])
@torch.no_grad()
def test_the_text_graph_computes_what_the_model_does_for_any_batch_past_and_number_of_tokens(
    pipe, pictures, batch_size, past, new
):
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    shape = (2, batch_size, config.num_attention_heads, past, config.hidden_size // config.num_attention_heads)
    ids = torch.randint(config.vocab_size, (batch_size, new), generator=generator)
    positions = torch.randint(config.max_position_embeddings, (batch_size, new), generator=generator)
    bias = torch.randn(batch_size, new, past + new, generator=generator)
    cache = [torch.randn(shape, generator=generator) for _ in range(config.num_hidden_layers)]
    expected = TextStage(pipe.transformer)(ids, positions, bias, *cache)
    named = {f"past.{layer}": values for layer, values in enumerate(cache)}
    found = run(pictures, "transformer", input_ids=ids, position_ids=positions, bias=bias, **named)
    assert len(found) == 1 + config.num_hidden_layers
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("cells", [slice(None), slice(0, 1), slice(3, None, 5)])
@pytest.mark.parametrize("stage", STAGES[1:])
@torch.no_grad()
def test_the_graphs_of_super_resolution_compute_what_the_models_do(pipe, pictures, stage, cells):
    model = getattr(pipe, stage)
    (text,) = pipe._encode_prompts([PROMPTS[0]], None, True)
    if stage.startswith("direct"):
        slots = model.config.num_text_slots
        context = sequences.direct_super_resolution([text], make_image_tokens(1), slots, model.config.layout)
    else:
        context = sequences.iterative_super_resolution([text], model.config.num_text_slots)
    canvas = make_image_tokens(1, model.config.canvas_length)
    canvas[:, ::3] = model.config.boi_token_id
    cells = torch.arange(model.config.canvas_length)[cells]
    inputs = (context.input_ids, context.position_ids, context.attention_mask, canvas, cells)
    names = ("context_ids", "context_positions", "context_mask", "canvas_ids", "cells")
    (found,) = run(pictures, stage, **dict(zip(names, inputs)))
    expected = model(canvas, context, logits_positions=cells).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(CanvasStage(model)(*inputs).numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (12, 12), (2, 5)])
@torch.no_grad()
def test_the_pixel_graph_decodes_grids_of_any_size(pipe, pictures, grid):
    tokens = make_image_tokens(1, grid[0] * grid[1]).unflatten(1, grid)
    (found,) = run(pictures, "vqvae", tokens=tokens)
    expected = PixelStage(pipe.vqvae, pipe.config.compression_rate)(tokens)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    assert found.shape == (1, 3, 8 * grid[0], 8 * grid[1])
    assert 0 <= found.min() < found.max() <= 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("style", ["none", "cool", "guided"])
@pytest.mark.parametrize("greedy", [True, False])
def test_the_tokens_of_all_stages_are_those_of_the_pipeline(pipe, pictures, prompt, style, greedy):
    stages = {}

    def keep(_, step, timestep, kwargs):
        stages[kwargs["stage"]] = kwargs["tokens"][0].clone()
        return {}

    settings = GREEDY if greedy else {}
    expected = pipe(
        prompt,
        style=style,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        callback_on_step_end=keep,
        **settings,
    )
    (ids,) = pipe._encode_prompts([prompt], style, True)
    found = pictures.draw(ids, style=style, seed=7, greedy=greedy)
    assert tuple(found.tokens) == STAGES
    for name in STAGES:
        np.testing.assert_array_equal(found.tokens[name], stages[name].numpy(), err_msg=name)
    assert np.abs(found.pixels / 255 - expected.images[0]).max() <= 0.5 / 255 + 1e-3


def test_a_style_of_which_no_name_is_given_is_the_default_one(pipe, pictures):
    (ids,) = pipe._encode_prompts(["a tiger"], None, True)
    default, named = pictures.draw(ids, seed=3), pictures.draw(ids, seed=3, style="none")
    np.testing.assert_array_equal(default.pixels, named.pixels)
    with pytest.raises(ValueError, match="`style` must be one of"):
        pictures.draw(ids, style="baroque")
    with pytest.raises(ValueError, match="`text` may have 30 tokens, but has 31"):
        pictures.draw([60] * 31)


def test_noise_is_that_of_a_generator_of_pytorch():
    for seed in (0, 7, 2**31 + 5, 2**40 + 1):
        generator = torch.Generator().manual_seed(seed)
        noise = onnx_pictures._Noise(seed)
        for count in (5, 700):
            expected = sampling.draw_noise((1, count, 2), generator)[0]
            np.testing.assert_array_equal(noise.draw(count), expected.numpy())


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_sampling_is_that_of_the_pipelines(top_k):
    generator = torch.Generator().manual_seed(0)
    logits, noise = 3 * torch.randn(500, 48, generator=generator), torch.rand(500, 2, generator=generator)
    labels = torch.arange(48) % 6
    plain = onnx_pictures.sample_tokens(logits.numpy(), noise.numpy(), 0.8, top_k)
    np.testing.assert_array_equal(plain, sampling.sample_tokens(logits, noise, 0.8, top_k))
    clustered = onnx_pictures.sample_cluster_tokens(logits.numpy(), noise.numpy(), labels.numpy(), 6, 0.8, top_k, 0.7)
    np.testing.assert_array_equal(clustered, sampling.sample_cluster_tokens(logits, noise, labels, 0.8, top_k, 0.7))


def test_low_resolution_alone_is_exported_too(tokenizer, tmp_path):
    pipe = build(tokenizer, stages=())
    export_onnx(pipe, tmp_path / "model", "float32")
    pictures = OnnxPictures(tmp_path / "model", one_thread())
    (ids,) = pipe._encode_prompts(["a tiger"], None, False)
    found = pictures.draw(ids, seed=1)
    expected = pipe("a tiger", generator=torch.Generator().manual_seed(1))
    assert list(found.tokens) == ["transformer"]
    np.testing.assert_array_equal(found.tokens["transformer"], expected.tokens[0].numpy())


# Files


def test_a_lent_backbone_is_stored_once_and_every_file_is_named(pipe, folder):
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    assert {path.name for path in folder.iterdir()} == {*description["files"], "model.json"}
    for name, file in description["files"].items():
        assert (folder / name).stat().st_size == file["bytes"]
    assert description["graphs"]["direct_sr_transformer"]["weights"] == [
        "transformer.weights",
        "direct_sr_transformer.weights",
    ]
    own = sum(p.numel() for n, p in pipe.direct_sr_transformer.named_parameters() if "canvas_" in n)
    assert description["files"]["direct_sr_transformer.weights"]["bytes"] < 4.5 * own


def test_weights_of_16_bits_take_half_and_compute_what_16_bit_weights_do(pipe, tokenizer, folder, tmp_path):
    halved = build(tokenizer, shares_backbone=True)
    for model in (halved.transformer, halved.direct_sr_transformer, halved.iterative_sr_transformer, halved.vqvae):
        for parameter in model.parameters():
            if parameter.numel() >= 256:  # what is smaller stays in the graph as it is
                parameter.data = parameter.data.half().float()
    halved.direct_sr_transformer.share_backbone(halved.transformer)
    export_onnx(halved, tmp_path / "model")
    size = {path.name: path.stat().st_size for path in (tmp_path / "model").glob("*.weights")}
    for name, whole in ((path.name, path.stat().st_size) for path in folder.glob("*.weights")):
        assert abs(2 * size[name] - whole) <= 0.02 * whole
    pictures = OnnxPictures(tmp_path / "model", one_thread())
    (ids,) = halved._encode_prompts([PROMPTS[0]], None, True)
    expected = halved(PROMPTS[0], generator=torch.Generator().manual_seed(2)).tokens[0].numpy()
    np.testing.assert_array_equal(pictures.draw(ids, seed=2).tokens[STAGES[-1]], expected)


def test_graphs_are_of_standard_operators_and_valid(folder):
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}


def test_drawing_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from cogview_pipelines.export.onnx_pictures import OnnxPictures; "
        f"OnnxPictures({str(folder)!r}).draw([60, 61]); "
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_export_that_fails_leaves_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "tokenizer_tables", lambda tokenizer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(pipe, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_never_looks_whole_and_the_next_one_clears_it(pipe, tmp_path):
    unfinished = tmp_path / ".model.unfinished"
    unfinished.mkdir()
    (unfinished / "transformer.onnx").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"holds no exported model"):
        OnnxPictures(unfinished)
    export_onnx(pipe, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_was_cut_short_is_noticed(pipe, folder, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        os.link(path, copy / path.name)
    (copy / "vqvae.weights").unlink()
    (copy / "vqvae.weights").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"vqvae.weights must have \d+ bytes, but has 5"):
        OnnxPictures(copy)


def test_errors_name_the_argument(pipe, folder, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        export_onnx(pipe, folder)
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        export_onnx(pipe, tmp_path / "model", "int8")
    with pytest.raises(TypeError, match="`pipe` must be a CogView2Pipeline"):
        export_onnx(object(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_that_16_bits_cannot_hold_are_refused(tokenizer, tmp_path):
    pipe = build(tokenizer, stages=())
    pipe.transformer.word_embeddings.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="cannot hold the weights"):
        export_onnx(pipe, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_traced_model_has_plain_operators_and_an_eager_one_its_kernels(pipe):
    query = torch.randn(1, 36, 2, 8)
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, query):
            seen.append(fused_refusals(query))
            return query

    torch.jit.trace(Probe(), query)
    assert any("traced" in reason for reason in seen[0])
    assert not any("traced" in reason for reason in fused_refusals(query))
