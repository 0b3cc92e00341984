"""Every way that a step can run writes the same tokens."""

import functools
import itertools

import pytest
import torch

from cogview_pipelines.generation import decoders
from cogview_pipelines.generation.decoders import Decoder, Decoding, StaticDecoder, encode_context
from cogview_pipelines.generation.sampling import sample_cluster_tokens
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
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
        def addresses():
            fixed = [tensor for inputs in self.inputs.values() for tensor in vars(inputs).values()]
            return [tensor.data_ptr() for tensor in (*self.cache.layers, self.bias, *fixed)]

        captured = addresses()
        step()
        logits = step().clone()

        def replay():
            assert addresses() == captured
            return logits.copy_(step())

        return replay

    find = Decoding.decoder

    def find_elsewhere(decoding, *arguments):
        decoding.compile, decoding.cuda_graph = True, False
        decoder = find(decoding, *arguments)
        decoding.cuda_graph = decoder.cuda_graph = True
        return decoder

    without_compiler(monkeypatch)
    monkeypatch.setattr(StaticDecoder, "_capture", capture)
    monkeypatch.setattr(Decoding, "decoder", find_elsewhere)
    return {"cuda_graph": True}


def made_decoders(monkeypatch):
    """All decoders of fixed shapes that are made from now on."""
    made, make = [], StaticDecoder.__init__

    def record(self, *arguments, **options):
        made.append(self)
        make(self, *arguments, **options)

    monkeypatch.setattr(StaticDecoder, "__init__", record)
    return made


WAYS = {"without_compiler": without_compiler, "compiled": compiled, "captured": captured}


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_fixed_shapes_write_the_same_tokens(way, monkeypatch):
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    expected = write_images(model, texts, generator=generators(1, 2, 3, 4))
    guided = write_guided(model, texts[:2], 2.0, generator=generators(1, 2))
    monkeypatch.setattr(decoders, "BLOCK", 8)  # attention reads more blocks step by step
    decoding = Decoding(**WAYS[way](monkeypatch), parallel=1)
    assert torch.equal(write_images(model, texts, generator=generators(1, 2, 3, 4), decoding=decoding), expected)
    assert torch.equal(write_guided(model, texts[:2], 2.0, generator=generators(1, 2), decoding=decoding), guided)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [3, LENGTH])
def test_windows_of_fixed_shapes_write_the_same_tokens_at_any_pace(way, size, monkeypatch):
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    expected = write_images(model, texts, generator=generators(1, 2, 3, 4))
    guided = write_guided(model, texts[:2], 2.0, generator=generators(1, 2))
    monkeypatch.setattr(decoders, "BLOCK", 8)
    decoding, made = Decoding(**WAYS[way](monkeypatch), parallel=size), made_decoders(monkeypatch)
    assert torch.equal(write_images(model, texts, generator=generators(1, 2, 3, 4), decoding=decoding), expected)
    # whole windows whatever is left at the end, if it is more than one position
    assert size in {width for _, width in made[0].steps} <= {1, size}
    assert torch.equal(write_guided(model, texts[:2], 2.0, generator=generators(1, 2), decoding=decoding), guided)


@pytest.mark.parametrize("way", ["without_compiler", "captured"])
@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("size", [1, 5])
def test_steps_of_fixed_shapes_complete_alike(size, name, way, monkeypatch):
    model, texts, image = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[tuple(zip(*HOLES[name]))] = True
    task = completion(texts, image, mask, model.config.layout)

    def complete(decoding=None):
        arguments = (model, task.context, cluster_sampler, task.entries, task.positions)
        return generate(*arguments, text_attention_bias=1.4, generator=generators(1, 2), decoding=decoding)

    expected = complete()
    decoding = Decoding(**WAYS[way](monkeypatch), parallel=size)
    assert torch.equal(complete(decoding), expected)


def test_steps_of_fixed_shapes_leave_the_tokens_that_only_some_rows_know(monkeypatch):
    model, texts, known = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    entries = torch.full((2, LENGTH), TO_GENERATE)
    entries[1, 3:7], entries[1, 9] = known[1, 3:7], known[1, 9]

    def complete(decoding=None):
        context, positions = text_to_image(texts, model.config.layout), model.config.layout.image_positions
        arguments = (model, context, cluster_sampler, entries, positions)
        return generate(*arguments, generator=generators(1, 2), decoding=decoding)

    completed = complete(Decoding(**without_compiler(monkeypatch)))
    assert torch.equal(completed[1, 3:7], known[1, 3:7]) and completed[1, 9] == known[1, 9]
    assert torch.equal(completed, complete())


def test_a_model_that_has_changed_is_looked_at_again(monkeypatch):
    class Fused(Decoder):
        pass

    monkeypatch.setattr(decoders, "FusedDecoder", Fused)
    monkeypatch.setattr(decoders, "call_refusals", lambda *arguments: [])
    model, decoding = make_coglm(), Decoding()

    def kind():
        return type(decoding.decoder(model, 1, LENGTH, False, torch.device("cpu")))

    assert kind() is Fused
    hook = model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)
    assert kind() is Decoder
    hook.remove()
    assert kind() is Fused


def test_fixed_shapes_serve_prompts_of_all_lengths_and_are_made_anew_for_another_batch_size(monkeypatch):
    model = make_coglm()
    prompts = [make_texts([length]) for length in (0, 3, MAX_TEXT_TOKENS)]
    expected = [write_images(model, texts, generator=generators(1)) for texts in prompts]
    decoding = Decoding(**without_compiler(monkeypatch), parallel=1)
    made = made_decoders(monkeypatch)
    for texts, image in zip(prompts, expected):
        assert torch.equal(write_images(model, texts, generator=generators(1), decoding=decoding), image)
    assert len(made) == 1 and len(made[0].steps) == 1
    write_images(model, make_texts([2, 2]), generator=generators(1, 2), decoding=decoding)
    assert len(made) == 2


def test_what_a_sequence_before_left_in_the_fixed_memory_does_not_matter(monkeypatch):
    model = make_coglm()
    expected = write_images(model, make_texts([1]), generator=generators(1))
    decoding, made = Decoding(**without_compiler(monkeypatch)), made_decoders(monkeypatch)
    write_images(model, make_texts([9]), generator=generators(2), decoding=decoding)
    for layer in made[0].cache.layers:
        layer.fill_(float("nan"))  # as an overflow in half precision would leave it
    assert torch.equal(write_images(model, make_texts([1]), generator=generators(1), decoding=decoding), expected)
    assert len(made) == 1


def test_a_cuda_graph_on_a_cpu_is_refused():
    model = make_coglm()
    with pytest.raises(ValueError, match="`cuda_graph=True` needs a CUDA device, but the model computes on cpu"):
        write_images(model, make_texts([1]), decoding=Decoding(cuda_graph=True))


@pytest.mark.slow
def test_the_compiled_step_writes_the_same_tokens():
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    expected = write_images(model, texts, generator=generators(1, 2, 3, 4))
    decoding = Decoding(compile=True)
    assert torch.equal(write_images(model, texts, generator=generators(1, 2, 3, 4), decoding=decoding), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{"cuda_graph": True}, {"compile": True}, {"compile": True, "cuda_graph": True}])
def test_captured_and_compiled_steps_write_the_same_tokens_on_a_gpu(way):
    model = make_coglm(hidden_size=128).to("cuda")
    sampler = functools.partial(cluster_sampler, cluster_labels=cluster_labels().cuda(), num_clusters=NUM_CLUSTERS)
    prompts = [make_texts(lengths) for lengths in ([3, 0, 7, 1], [9, 2, 5, 4], [1, 1, 1, 1])]
    expected = [write_images(model, texts, sampler, generator=generators(1, 2, 3, 4)) for texts in prompts]
    decoding = Decoding(**way)
    for texts, images in zip(prompts, expected):
        assert torch.equal(
            write_images(model, texts, sampler, generator=generators(1, 2, 3, 4), decoding=decoding), images
        )
    model.to("cpu").to("cuda")  # as offloading does: a graph that was kept would read freed memory
    again = write_images(model, prompts[0], sampler, generator=generators(1, 2, 3, 4), decoding=decoding)
    assert torch.equal(again, expected[0])


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

    decoding = Decoding(**way, parallel=1)  # how far a window is settled has to be looked at
    try:
        for _ in range(2):  # a graph is captured in the first round
            steps.clear()
            write_images(model, texts, sampler, decoding=decoding)
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

    tokens = write_images(model, texts, sampler, generator=generators(1, 2), decoding=Decoding(parallel=1))
    whole = text_to_image(texts, model.config.layout, tokens)
    arguments = (whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4)
    expected = model(*arguments).logits[:, -LENGTH - 1 : -1]
    exact = model.float()(*arguments).logits[:, -LENGTH - 1 : -1]
    rounding = (expected - exact).abs().mean()
    assert (torch.stack(seen, 1) - exact).abs().mean() <= 1.2 * rounding


# What decoders can do besides


def begun(model, num_sequences=3, max_new=6, width=1, **decoding):
    """A decoder that continues texts of different lengths, and their context."""
    context = text_to_image(make_texts([4, 1, 6][:num_sequences]), model.config.layout)
    cache, bias, _ = encode_context(model, context, 1.4, False, "cpu")
    decoder = Decoding(**decoding).decoder(model, num_sequences, cache.length + max_new, False, "cpu", width)
    decoder.begin(cache, bias, torch.ones(num_sequences, dtype=torch.long))
    return decoder


KINDS = {
    "plain": {"fused": False},
    "fused": {},
    "fixed": {"compile": True},
    "fixed_window": {"compile": True, "width": 4},
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if "compile" in KINDS[request.param]:
        without_compiler(monkeypatch)
    return KINDS[request.param]


@torch.no_grad()
def test_several_tokens_at_once_give_the_logits_of_one_by_one(kind):
    model = make_coglm()
    tokens, positions = make_image_tokens(3, 5), model.config.layout.image_positions[:5]
    one_by_one = begun(model, **kind)
    expected = [one_by_one.append(tokens[:, i : i + 1], positions[i : i + 1]).clone() for i in range(5)]
    at_once = begun(model, **kind)
    torch.testing.assert_close(at_once.append_all(tokens, positions), torch.stack(expected, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(begun(model, **kind).append(tokens, positions), expected[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_that_are_taken_back_leave_nothing(kind):
    model = make_coglm()
    tokens, positions = make_image_tokens(3, 5), model.config.layout.image_positions[:5]
    decoder, other = begun(model, **kind), begun(model, **kind)
    decoder.append(tokens[:, :2], positions[:2])
    decoder.append_all(make_image_tokens(3, 3, seed=9), positions[2:])
    decoder.truncate(decoder.cache.length - 3)
    other.append(tokens[:, :2], positions[:2])
    logits = [each.append_all(tokens[:, 2:], positions[2:]).clone() for each in (decoder, other)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sequences_that_were_cut_to_different_lengths_go_on_as_each_alone(kind):
    model = make_coglm()
    tokens, positions = make_image_tokens(3, 6), model.config.layout.image_positions[:6]
    decoder, kept = begun(model, **kind), torch.tensor([1, 3, 2])
    start = decoder.cache.length
    decoder.append_all(
        make_image_tokens(3, 3, seed=9).where(torch.arange(3) >= kept[:, None], tokens[:, :3]), positions[:3]
    )
    decoder.truncate(start + kept)
    own = kept[:, None] + torch.arange(2)
    logits = decoder.append_all(tokens.gather(1, own), positions[own])
    last = decoder.append(tokens.gather(1, kept[:, None] + 2), positions[kept[:, None] + 2])
    alone = begun(model, **kind)
    expected = alone.append_all(tokens, positions)
    for row, count in enumerate(kept.tolist()):
        torch.testing.assert_close(logits[row], expected[row, count : count + 2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[row], expected[row, count + 2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sequences_that_leave_do_not_disturb_those_that_stay(kind):
    model, rows = make_coglm(), torch.tensor([0, 2])
    tokens, positions = make_image_tokens(3, 5), model.config.layout.image_positions[:5]
    decoder, other = begun(model, **kind), begun(model, **kind)
    decoder.append_all(tokens[:, :2], positions[:2])
    decoder.truncate(decoder.cache.length - torch.tensor([0, 1, 1]))
    decoder.keep_rows(rows)
    expected = other.append_all(tokens, positions).clone()
    own = torch.tensor([[2, 3], [1, 2]])
    logits = decoder.append_all(tokens[rows].gather(1, own), positions[own]).clone()
    decoder.keep_rows(torch.tensor([1]))
    last = decoder.append(tokens[2:, 3:4], positions[3:4])
    torch.testing.assert_close(logits[0], expected[0, 2:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], expected[2, 1:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[0], expected[2, 3], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sequences_go_on_in_another_order(kind):
    model, rows = make_coglm(), torch.tensor([2, 0, 2])
    tokens, positions = make_image_tokens(3, 3), model.config.layout.image_positions[:3]
    decoder, other = begun(model, **kind), begun(model, **kind)
    decoder.append(tokens[:, :2], positions[:2])
    decoder.reorder(rows)
    logits = decoder.append(tokens[rows, 2:], positions[2:])
    other.append(tokens[:, :2], positions[:2])
    torch.testing.assert_close(logits, other.append(tokens[:, 2:], positions[2:])[rows], atol=1e-5, rtol=1e-5)


# What is noticed


def test_a_model_is_looked_at_again_only_when_it_has_changed(monkeypatch):
    looked, look = [], decoders.model_refusals
    monkeypatch.setattr(decoders, "model_refusals", lambda model: looked.append(model) or look(model))
    model, decoding = make_coglm(), Decoding()

    def write():
        write_images(model, make_texts([2]), generator=generators(1), decoding=decoding)
        return len(looked)

    assert [write(), write()] == [1, 1]
    model.word_embeddings.weight.data.mul_(1.5)  # numbers are read where they are
    assert write() == 1
    hook = model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output)
    assert [write(), write()] == [2, 2]
    hook.remove()
    assert write() == 3
    model.to(torch.bfloat16)
    assert write() == 4


@pytest.mark.parametrize("way", ["compiled", "captured"])
def test_changes_between_calls_reach_steps_that_are_kept(way, monkeypatch):
    model, texts = make_coglm(), make_texts([3])
    decoding = Decoding(**WAYS[way](monkeypatch))

    def both():
        pictures = [write_images(model, texts, generator=generators(1), decoding=each) for each in (None, decoding)]
        assert torch.equal(*pictures)
        return pictures[0]

    seen = [both()]
    with torch.no_grad():
        model.layers[1].mlp.dense_4h_to_h.weight.mul_(-1)
    seen.append(both())
    model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)
    seen.append(both())
    model.layers[1].attention.dense = torch.nn.Linear(32, 32)
    seen.append(both())
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(seen))
