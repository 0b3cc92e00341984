"""Every way that a step can run writes the same tokens."""

import functools

import pytest
import torch

from cogview_pipelines.generation import decoders
from cogview_pipelines.generation import tokens as token_loop
from cogview_pipelines.generation.decoders import StaticDecoder
from cogview_pipelines.generation.sampling import sample_cluster_tokens
from cogview_pipelines.generation.tokens import generate
from cogview_pipelines.models.cogview2.sequences import completion, text_to_image

from ..utils import (
    IMAGE_GRID,
    MAX_TEXT_TOKENS,
    NUM_CLUSTERS,
    cluster_labels,
    make_coglm,
    make_image_tokens,
    make_texts,
)
from .utils import HOLES, LENGTH, MIXED_LENGTHS, cluster_sampler, generators, write_guided, write_images


def without_compiler(monkeypatch):
    """The step of fixed shapes, as it is written."""
    monkeypatch.setattr(decoders, "_compiled_prediction", lambda device_type: decoders._predict)
    return {"compile": True}


def compiled(monkeypatch):
    """The step as one graph of PyTorch operations, without the minutes that a C++ compiler may take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return {"compile": True}


def captured(monkeypatch):
    """Whatever a CUDA graph does but the graph: warm-up runs, then runs without arguments, results in one place."""

    def capture(self, step):
        addresses = [tensor.data_ptr() for tensor in (*self.cache.layers, self.bias, self.input_ids, self.slot)]
        captures.append((len(self.bias), self.key))
        step()
        logits = step().clone()

        def replay():
            assert addresses == [t.data_ptr() for t in (*self.cache.layers, self.bias, self.input_ids, self.slot)]
            return logits.copy_(step())

        return replay

    def find(model, *arguments):
        on_cuda = model.decoding.cuda_graph
        model.decoding.compile, model.decoding.cuda_graph = True, False
        decoder = decoders.find_decoder(model, *arguments)
        model.decoding.cuda_graph = decoder.cuda_graph = on_cuda
        return decoder

    captures = []
    without_compiler(monkeypatch)
    monkeypatch.setattr(StaticDecoder, "_capture", capture)
    monkeypatch.setattr(token_loop, "find_decoder", find)
    return {"cuda_graph": True}


WAYS = {"without_compiler": without_compiler, "compiled": compiled, "captured": captured}


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_fixed_shapes_write_the_same_tokens(way, monkeypatch):
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    expected = write_images(model, texts, generator=generators(1, 2, 3, 4))
    guided = write_guided(model, texts[:2], 2.0, generator=generators(1, 2))
    monkeypatch.setattr(decoders, "BLOCK", 8)  # attention reads more blocks step by step
    model.set_decoding(**WAYS[way](monkeypatch))
    assert torch.equal(write_images(model, texts, generator=generators(1, 2, 3, 4)), expected)
    assert torch.equal(write_guided(model, texts[:2], 2.0, generator=generators(1, 2)), guided)


@pytest.mark.parametrize("way", ["without_compiler", "captured"])
@pytest.mark.parametrize("name", HOLES)
def test_steps_of_fixed_shapes_complete_alike(name, way, monkeypatch):
    model, texts, image = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[tuple(zip(*HOLES[name]))] = True
    task = completion(texts, image, mask, model.config.layout)

    def complete():
        arguments = (model, task.context, cluster_sampler, task.entries, task.positions)
        return generate(*arguments, text_attention_bias=1.4, generator=generators(1, 2))

    expected = complete()
    model.set_decoding(**WAYS[way](monkeypatch))
    assert torch.equal(complete(), expected)


def test_fixed_shapes_serve_prompts_of_all_lengths_and_are_made_anew_for_another_batch_size(monkeypatch):
    model = make_coglm()
    prompts = [make_texts([length]) for length in (0, 3, MAX_TEXT_TOKENS)]
    expected = [write_images(model, texts, generator=generators(1)) for texts in prompts]
    model.set_decoding(**without_compiler(monkeypatch))
    kept = set()
    for texts, image in zip(prompts, expected):
        assert torch.equal(write_images(model, texts, generator=generators(1)), image)
        kept.add(model.decoding.decoder)
    assert len(kept) == 1 and len(kept.pop().steps) == 1
    one = model.decoding.decoder
    write_images(model, make_texts([2, 2]), generator=generators(1, 2))
    assert model.decoding.decoder is not one
    model.set_decoding()
    assert model.decoding.decoder is None


def test_what_a_sequence_before_left_in_the_fixed_memory_does_not_matter(monkeypatch):
    model = make_coglm()
    expected = write_images(model, make_texts([1]), generator=generators(1))
    model.set_decoding(**without_compiler(monkeypatch))
    write_images(model, make_texts([9]), generator=generators(2))
    decoder = model.decoding.decoder
    for layer in decoder.cache.layers:
        layer.fill_(float("nan"))  # as an overflow in half precision would leave it
    assert torch.equal(write_images(model, make_texts([1]), generator=generators(1)), expected)
    assert model.decoding.decoder is decoder


def test_a_cuda_graph_on_a_cpu_is_refused():
    model = make_coglm()
    model.set_decoding(cuda_graph=True)
    with pytest.raises(ValueError, match="`cuda_graph=True` needs a CUDA device, but the model computes on cpu"):
        write_images(model, make_texts([1]))


@pytest.mark.slow
def test_the_compiled_step_writes_the_same_tokens():
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    expected = write_images(model, texts, generator=generators(1, 2, 3, 4))
    model.set_decoding(compile=True)
    assert torch.equal(write_images(model, texts, generator=generators(1, 2, 3, 4)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{"cuda_graph": True}, {"compile": True}, {"compile": True, "cuda_graph": True}])
def test_captured_and_compiled_steps_write_the_same_tokens_on_a_gpu(way):
    model = make_coglm(hidden_size=128).to("cuda")
    sampler = functools.partial(cluster_sampler, cluster_labels=cluster_labels().cuda(), num_clusters=NUM_CLUSTERS)
    prompts = [make_texts(lengths) for lengths in ([3, 0, 7, 1], [9, 2, 5, 4], [1, 1, 1, 1])]
    expected = [write_images(model, texts, sampler, generator=generators(1, 2, 3, 4)) for texts in prompts]
    model.set_decoding(**way)
    for texts, images in zip(prompts, expected):
        assert torch.equal(write_images(model, texts, sampler, generator=generators(1, 2, 3, 4)), images)
    model.to("cpu").to("cuda")  # as offloading does: a graph that was kept would read freed memory
    assert torch.equal(write_images(model, prompts[0], sampler, generator=generators(1, 2, 3, 4)), expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{}, {"cuda_graph": True}])
def test_writing_tokens_never_waits_for_the_gpu(way):
    model, texts = make_coglm(hidden_size=128).to("cuda", torch.bfloat16), make_texts(MIXED_LENGTHS)
    labels = cluster_labels().cuda()
    steps = []

    def sampler(logits, noise):
        # from the second step on: making a context or a graph may wait
        torch.cuda.set_sync_debug_mode("error" if steps else "default")
        steps.append(None)
        return sample_cluster_tokens(logits, noise, labels, 1.15, 4, 0.9, NUM_CLUSTERS)

    model.set_decoding(**way)
    try:
        for _ in range(2):  # a graph is captured in the first round
            steps.clear()
            write_images(model, texts, sampler)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_16_bit_model_on_a_cpu_keeps_keys_and_values_in_float32_and_predicts_as_one_whole_forward():
    model, texts = make_coglm().to(torch.bfloat16), make_texts([3, 5])
    seen = []

    def sampler(logits, noise):
        seen.append(logits)
        return cluster_sampler(logits, noise)

    tokens = write_images(model, texts, sampler, generator=generators(1, 2))
    whole = text_to_image(texts, model.config.layout, tokens)
    arguments = (whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4)
    expected = model(*arguments).logits[:, -LENGTH - 1 : -1]
    exact = model.float()(*arguments).logits[:, -LENGTH - 1 : -1]
    rounding = (expected - exact).abs().mean()
    assert (torch.stack(seen, 1) - exact).abs().mean() <= 1.2 * rounding
