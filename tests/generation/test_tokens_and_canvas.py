"""The two loops on tiny real models: what they compute, and that an image depends on its prompt and seed alone."""

import functools

import pytest
import torch

from cogview_pipelines.generation import decoders
from cogview_pipelines.generation import tokens as token_loop
from cogview_pipelines.generation.decoders import StaticDecoder
from cogview_pipelines.generation.sampling import draw_noise, sample_cluster_tokens, sample_tokens
from cogview_pipelines.generation.tokens import TO_GENERATE, generate, refine
from cogview_pipelines.models.cogview2.sequences import (
    caption,
    completion,
    direct_super_resolution,
    iterative_super_resolution,
    text_to_image,
)
from cogview_pipelines.schedulers.scheduling_lopar import LoPARScheduler

from ..utils import (
    BOI,
    FINE_GRID,
    IMAGE_GRID,
    MAX_TEXT_TOKENS,
    NUM_CLUSTERS,
    NUM_IMAGE_TOKENS,
    START_OF_ENGLISH,
    VOCAB_SIZE,
    cluster_labels,
    make_coglm,
    make_image_tokens,
    make_texts,
)

LENGTH = IMAGE_GRID[0] * IMAGE_GRID[1]
MIXED_LENGTHS = [3, 0, 7, 1]
cluster_sampler = functools.partial(
    sample_cluster_tokens, cluster_labels=cluster_labels(), temperature=1.15, top_k_clusters=4, cluster_temperature=0.9
)
# two passes on cells of 2 x 2, of which one cell in four keeps its token
SCHEDULER = LoPARScheduler([[0, 1], [2, 1]], top_k=(10, 5))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def write_images(model, texts, sampler=cluster_sampler, repeats=1, **arguments):
    """Text-to-image by `generate`, all entries unknown."""
    layout = model.config.layout
    count = len(texts) * repeats if isinstance(repeats, int) else sum(repeats)
    return generate(
        model,
        text_to_image(texts, layout),
        sampler,
        torch.full((count, LENGTH), TO_GENERATE),
        layout.image_positions,
        num_images_per_context=repeats,
        text_attention_bias=1.4,
        **arguments,
    )


def make_canvas(batch_size, seed=5):
    return make_image_tokens(batch_size, FINE_GRID[0] * FINE_GRID[1], seed).unflatten(1, FINE_GRID)


def make_context(model, texts):
    if model.config.super_resolution == "iterative":
        return iterative_super_resolution(texts, model.config.num_text_slots)
    image = make_image_tokens(len(texts))
    return direct_super_resolution(texts, image, model.config.num_text_slots, model.config.layout)


# generate


@torch.no_grad()
def test_generated_tokens_are_those_that_one_whole_forward_predicts():
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    tokens = write_images(model, texts, lambda logits, noise: logits.argmax(-1))
    whole = text_to_image(texts, model.config.layout, tokens)
    logits = model(whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4).logits
    assert torch.equal(tokens, logits[:, -LENGTH - 1 : -1].argmax(-1))


@torch.no_grad()
def test_the_sampler_gets_the_logits_and_the_noise_of_each_image():
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    seen = []

    def sampler(logits, noise):
        seen.append((logits, noise))
        return cluster_sampler(logits, noise)

    tokens = write_images(model, texts, sampler, generator=generators(1, 2, 3, 4))
    logits, noise = (torch.stack(part, 1) for part in zip(*seen))
    assert torch.equal(noise, draw_noise((4, LENGTH, 2), generators(1, 2, 3, 4)))
    assert torch.equal(tokens, cluster_sampler(logits, noise))
    whole = text_to_image(texts, model.config.layout, tokens)
    expected = model(whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4).logits
    torch.testing.assert_close(logits, expected[:, -LENGTH - 1 : -1], atol=1e-5, rtol=1e-5)


def test_one_image_alone_is_the_one_in_a_batch_of_mixed_prompts():
    model, texts = make_coglm(), make_texts(MIXED_LENGTHS)
    together = write_images(model, texts, generator=generators(11, 12, 13, 14))
    assert len(together.unique(dim=0)) == 4
    for row, seed in enumerate((11, 12, 13, 14)):
        alone = write_images(model, [texts[row]], generator=generators(seed)[0])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("repeats", [3, [1, 3, 2]])
def test_a_prompt_encoded_once_for_several_images_gives_what_separate_encoding_gives(repeats):
    model, texts = make_coglm(), make_texts([4, 2, 0])
    counts = [repeats] * 3 if isinstance(repeats, int) else repeats
    seeds = range(sum(counts))
    once = write_images(model, texts, repeats=repeats, generator=generators(*seeds))
    copies = [text for text, count in zip(texts, counts) for _ in range(count)]
    assert torch.equal(once, write_images(model, copies, generator=generators(*seeds)))


def test_the_same_generator_gives_the_same_images_and_goes_on_to_others():
    model, texts = make_coglm(), make_texts([3, 2])
    generator = torch.Generator().manual_seed(7)
    first, second = (write_images(model, texts, generator=generator) for _ in range(2))
    assert torch.equal(first, write_images(model, texts, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)


def test_text_attention_bias_changes_the_image_of_a_seed():
    model, texts = make_coglm(), make_texts([3])
    arguments = (
        model,
        text_to_image(texts, model.config.layout),
        cluster_sampler,
        torch.full((1, LENGTH), TO_GENERATE),
        model.config.layout.image_positions,
    )
    images = [generate(*arguments, text_attention_bias=bias, generator=generators(3)) for bias in (0.0, 6.0)]
    assert not torch.equal(*images)


def write_guided(model, texts, guidance_scale, sampler=cluster_sampler, repeats=1, **arguments):
    """Text-to-image away from the empty text."""
    layout = model.config.layout
    return generate(
        model,
        text_to_image([*texts, *([] for _ in texts)], layout),
        sampler,
        torch.full((len(texts) * repeats, LENGTH), TO_GENERATE),
        layout.image_positions,
        num_images_per_context=repeats,
        text_attention_bias=1.4,
        guidance_scale=guidance_scale,
        **arguments,
    )


@torch.no_grad()
def test_guidance_leads_from_the_logits_of_the_empty_text_past_those_of_the_text():
    model, texts = make_coglm(), make_texts([3, 5])
    seen = []

    def sampler(logits, noise):
        seen.append(logits)
        return cluster_sampler(logits, noise)

    tokens = write_guided(model, texts, 2.5, sampler, generator=generators(1, 2))

    def whole_logits(texts):
        whole = text_to_image(texts, model.config.layout, tokens)
        arguments = (whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4)
        return model(*arguments).logits[:, -LENGTH - 1 : -1]

    with_text, without = whole_logits(texts), whole_logits([[], []])
    expected = without + 2.5 * (with_text - without)
    torch.testing.assert_close(torch.stack(seen, 1), expected, atol=1e-4, rtol=1e-4)


def test_guidance_of_one_is_none_and_of_zero_ignores_the_text():
    model, texts = make_coglm(), make_texts([3, 5])
    plain = write_images(model, texts, generator=generators(1, 2))
    assert torch.equal(write_guided(model, texts, 1.0, generator=generators(1, 2)), plain)
    empty = write_images(model, [[], []], generator=generators(1, 2))
    assert torch.equal(write_guided(model, texts, 0.0, generator=generators(1, 2)), empty)
    assert not torch.equal(write_guided(model, texts, 3.0, generator=generators(1, 2)), plain)


def test_one_guided_image_alone_is_the_one_in_a_batch():
    model, texts = make_coglm(), make_texts([3, 0, 6])
    together = write_guided(model, texts, 2.0, repeats=2, generator=generators(*range(6)))
    for row in range(6):
        alone = write_guided(model, [texts[row // 2]], 2.0, generator=generators(row))
        assert torch.equal(alone[0], together[row])


def test_generate_leaves_its_arguments_alone():
    model, texts = make_coglm(), make_texts([2])
    context, entries = text_to_image(texts, model.config.layout), torch.full((1, LENGTH), TO_GENERATE)
    before = context.input_ids.clone()
    tokens = generate(model, context, cluster_sampler, entries, model.config.layout.image_positions)
    assert (entries == TO_GENERATE).all()
    assert torch.equal(context.input_ids, before)
    assert tokens.min() >= 0 and tokens.max() < NUM_IMAGE_TOKENS


def test_generate_reports_every_generated_token():
    model, texts, reports = make_coglm(), make_texts([2, 4]), []

    def callback(step, entries):
        assert (entries[:, :step] >= 0).all()
        assert (entries[:, step:] == TO_GENERATE).all()
        reports.append((step, entries.clone()))

    tokens = write_images(model, texts, callback=callback, generator=generators(1, 2))
    assert [step for step, _ in reports] == list(range(1, LENGTH + 1))
    assert torch.equal(reports[-1][1], tokens)


@torch.no_grad()
def test_captions_are_written_with_the_full_vocabulary():
    model, image = make_coglm(), make_image_tokens(2)
    context = caption(image, [START_OF_ENGLISH] * 2, model.config.layout)
    tokens = generate(
        model,
        context,
        lambda logits, noise: logits.argmax(-1),
        torch.full((2, 5), TO_GENERATE),
        torch.arange(1, 6),
        full_vocabulary=True,
    )
    whole = caption(image, [START_OF_ENGLISH] * 2, model.config.layout, tokens.tolist())
    logits = model(whole.input_ids, whole.position_ids, whole.attention_mask, full_vocabulary=True).logits
    assert logits.shape[-1] == VOCAB_SIZE
    assert torch.equal(tokens, logits[:, LENGTH:-1].argmax(-1))


HOLES = {
    "one": [(1, 2)],
    "first_column": [(0, 0), (2, 0)],
    "row": [(3, 0), (3, 1), (3, 2), (3, 3)],
    "scattered": [(0, 1), (0, 3), (2, 2), (3, 3)],
    "all_but_the_last": [(row, column) for row in range(4) for column in range(4) if row + column < 6],
}


@torch.no_grad()
@pytest.mark.parametrize("name", HOLES)
def test_completion_keeps_known_cells_and_predicts_the_others_as_one_whole_forward(name):
    model, texts, image = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[tuple(zip(*HOLES[name]))] = True
    task = completion(texts, image, mask, model.config.layout)
    entries = generate(
        model, task.context, lambda logits, noise: logits.argmax(-1), task.entries, task.positions,
        text_attention_bias=1.4,
    )  # fmt: skip
    completed = image.clone()
    completed[:, task.cells] = entries
    assert torch.equal(completed[:, ~mask.flatten()], image[:, ~mask.flatten()])
    task.entries = entries
    whole = task.whole_sequence()
    logits = model(whole.input_ids, whole.position_ids, whole.attention_mask, whole.text_mask, 1.4).logits
    predicted = logits[:, -entries.shape[1] - 1 : -1].argmax(-1)
    generated = mask.flatten()[task.cells]
    assert torch.equal(entries[:, generated], predicted[:, generated])


def test_completion_of_one_image_alone_is_the_one_in_a_batch():
    model, texts, image = make_coglm(), make_texts([3, 0, 5]), make_image_tokens(3)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[1:3, 1:] = True

    def complete(rows, *seeds):
        task = completion([texts[row] for row in rows], image[rows], mask, model.config.layout)
        arguments = (model, task.context, cluster_sampler, task.entries, task.positions)
        return generate(*arguments, text_attention_bias=1.4, generator=generators(*seeds))

    together = complete([0, 1, 2], 4, 5, 6)
    for row in range(3):
        assert torch.equal(complete([row], 4 + row)[0], together[row])


@pytest.mark.parametrize("name", ["first_column", "scattered"])
def test_known_entries_are_read_together_with_the_one_before_them(name, monkeypatch):
    model, texts, image = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[tuple(zip(*HOLES[name]))] = True
    task = completion(texts, image, mask, model.config.layout)
    passes = []
    model.register_forward_pre_hook(lambda module, arguments: passes.append(arguments[0].shape[1]))
    generate(model, task.context, cluster_sampler, task.entries, task.positions)
    num_entries = task.entries.shape[1]
    # the context, then one pass for each cell to be written except the first, unless a known one stands before it
    known_first = int(task.entries[0, 0] != TO_GENERATE)
    assert len(passes) == len(HOLES[name]) + known_first
    assert sum(passes[1:]) == num_entries - 1


# decoding with fixed shapes


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


# refine


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_refining_is_masking_predicting_and_drawing_pass_by_pass(kind):
    model, texts, canvas = make_coglm(kind), make_texts([2, 4]), make_canvas(2)
    context = make_context(model, texts)
    refined = refine(model, SCHEDULER, context, canvas, generator=generators(1, 2))
    noise = draw_noise((2, *FINE_GRID, 2), generators(1, 2))
    steps, expected = SCHEDULER.step_map(*FINE_GRID), canvas.clone()
    for timestep, top_k in ((1, 10), (2, 5)):
        visible = expected.masked_fill(steps >= timestep, BOI)
        logits = model(
            context.input_ids,
            context.position_ids,
            context.attention_mask,
            key_mask=context.key_mask,
            canvas_ids=visible.flatten(1),
        ).logits
        # every unknown cell is drawn here, as in the release; the later ones are masked again, whatever they got
        tokens = sample_tokens(logits.unflatten(1, FINE_GRID), noise, top_k=top_k)
        expected = torch.where(steps >= timestep, tokens, expected)
    assert torch.equal(refined, expected)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_one_refined_image_alone_is_the_one_in_a_batch_of_mixed_prompts(kind):
    model, texts, canvas = make_coglm(kind), make_texts(MIXED_LENGTHS), make_canvas(4)
    context = make_context(model, texts)
    together = refine(model, SCHEDULER, context, canvas, generator=generators(1, 2, 3, 4))
    for row in range(4):
        one = slice(row, row + 1)
        alone = refine(model, SCHEDULER, context[one], canvas[one], generator=generators(row + 1))
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("cells", [1, 7, 1000])
@pytest.mark.parametrize("cluster_temperature", [None, 0.8])
def test_drawing_in_parts_gives_the_same_canvas(cells, cluster_temperature, monkeypatch):
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 4]), make_canvas(2)
    scheduler = SCHEDULER.with_settings(cluster_temperature=cluster_temperature)

    def refined():
        arguments = (model, scheduler, make_context(model, texts), canvas)
        return refine(*arguments, cluster_labels=cluster_labels(), generator=generators(1, 2))

    expected, sizes = refined(), []
    monkeypatch.setattr(token_loop, "LOGITS_BYTES", 4 * 2 * NUM_IMAGE_TOKENS * cells)
    model.word_embeddings.register_forward_hook(lambda module, arguments, output: sizes.append(output.shape))
    assert torch.equal(refined(), expected)
    logits = [shape for shape in sizes if shape[-1] == NUM_IMAGE_TOKENS]
    assert max(shape[1] for shape in logits) <= cells
    assert sum(shape[1] for shape in logits) == int((SCHEDULER.step_map(*FINE_GRID) >= 1).sum())


def test_direct_super_resolution_fills_an_unknown_canvas_by_cluster_sampling():
    model, texts = make_coglm("direct"), make_texts([3, 2])
    scheduler = LoPARScheduler([[1]], top_k=3, cluster_temperature=0.8)
    context = make_context(model, texts)
    arguments = {"cluster_labels": cluster_labels(), "generator": generators(1, 2)}
    canvas = refine(model, scheduler, context, **arguments)
    assert canvas.shape == (2, *FINE_GRID)
    assert canvas.min() >= 0 and canvas.max() < NUM_IMAGE_TOKENS
    with torch.no_grad():
        logits = model(
            context.input_ids,
            context.position_ids,
            context.attention_mask,
            key_mask=context.key_mask,
            canvas_ids=torch.full((2, FINE_GRID[0] * FINE_GRID[1]), BOI),
        ).logits.unflatten(1, FINE_GRID)
    noise = draw_noise((2, *FINE_GRID, 2), generators(1, 2))
    expected = sample_cluster_tokens(logits, noise, cluster_labels(), 1.0, 3, 0.8, num_clusters=NUM_CLUSTERS)
    assert torch.equal(canvas, expected)


def test_what_stands_on_masked_cells_before_refining_does_not_matter():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    other = torch.where(SCHEDULER.step_map(*FINE_GRID) >= 1, make_canvas(1, seed=6), canvas)
    assert not torch.equal(other, canvas)
    images = [
        refine(model, SCHEDULER, make_context(model, texts), start, generator=generators(1))
        for start in (canvas, other)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_refining_changes_only_cells_of_the_schedule_inside_the_cell_mask(kind):
    model, texts, canvas = make_coglm(kind), make_texts([2, 4]), make_canvas(2)
    before = canvas.clone()
    cell_mask = torch.zeros(FINE_GRID, dtype=torch.bool)
    cell_mask[2:9, 3:] = True
    refined = refine(
        model, SCHEDULER, make_context(model, texts), canvas, cell_mask=cell_mask, generator=generators(1, 2)
    )
    free = cell_mask & (SCHEDULER.step_map(*FINE_GRID) >= 1)
    assert torch.equal(refined[:, ~free], before[:, ~free])
    assert (refined[:, free] != before[:, free]).float().mean() > 0.5
    assert torch.equal(canvas, before)  # the argument stays as it is


def test_cells_outside_the_cell_mask_are_seen_while_refining():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    cell_mask = torch.zeros(FINE_GRID, dtype=torch.bool)
    cell_mask[4:8, 4:8] = True
    other = canvas.clone()
    other[:, ~cell_mask] = make_canvas(1, seed=9)[:, ~cell_mask]
    inside = [
        refine(model, SCHEDULER, make_context(model, texts), start, cell_mask=cell_mask, generator=generators(1))[
            :, cell_mask & (SCHEDULER.step_map(*FINE_GRID) >= 1)
        ]
        for start in (canvas, other)
    ]
    assert not torch.equal(*inside)


def test_an_empty_cell_mask_keeps_the_canvas():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    nothing = torch.zeros(FINE_GRID, dtype=torch.bool)
    assert torch.equal(refine(model, SCHEDULER, make_context(model, texts), canvas, cell_mask=nothing), canvas)


def test_refine_reports_the_canvas_after_every_pass():
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 3]), make_canvas(2)
    scheduler = LoPARScheduler.diagonal(2)
    reports = []
    refined = refine(
        model,
        scheduler,
        make_context(model, texts),
        canvas,
        generator=generators(1, 2),
        callback=lambda step, tokens: reports.append((step, tokens.clone())),
    )
    assert [step for step, _ in reports] == [1, 2, 3]
    steps = scheduler.step_map(*FINE_GRID)
    for step, tokens in reports:
        assert torch.equal(tokens[:, steps <= step], refined[:, steps <= step])
        assert torch.equal(tokens[:, steps > step], canvas[:, steps > step])


def test_a_context_encoded_before_refines_alike():
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 3]), make_canvas(2)
    context = make_context(model, texts)
    with torch.no_grad():
        encoded = model(
            context.input_ids, context.position_ids, context.attention_mask, key_mask=context.key_mask
        ).context
    images = [refine(model, SCHEDULER, one, canvas, generator=generators(1, 2)) for one in (context, encoded)]
    assert torch.equal(*images)


def test_more_and_fewer_passes_fill_the_same_cells():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    kept = SCHEDULER.step_map(*FINE_GRID) < 1
    images = []
    for num_steps in (1, 2, 3):
        refined = refine(
            model,
            SCHEDULER.with_num_steps(num_steps),
            make_context(model, texts),
            canvas,
            generator=generators(1),
        )
        assert torch.equal(refined[:, kept], canvas[:, kept])
        assert refined.max() < NUM_IMAGE_TOKENS
        images.append(refined)
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


@pytest.mark.parametrize("loop", ["generate", "refine"])
def test_a_wrong_number_of_generators_is_an_error(loop):
    texts = make_texts([2, 3])
    with pytest.raises(ValueError, match=r"`generator` must be one generator or one per image \(2\), but 3 came"):
        if loop == "generate":
            write_images(make_coglm(), texts, generator=generators(1, 2, 3))
        else:
            model = make_coglm("iterative")
            refine(model, SCHEDULER, make_context(model, texts), make_canvas(2), generator=generators(1, 2, 3))


def test_a_schedule_that_keeps_cells_needs_a_canvas():
    model = make_coglm("iterative")
    with pytest.raises(ValueError, match="`tokens` must be given, because 36 of 144 cells keep theirs"):
        refine(model, SCHEDULER, make_context(model, make_texts([2])))


@pytest.mark.parametrize("count", [2, 5])
def test_a_wrong_number_of_rows_to_generate_is_an_error(count):
    model = make_coglm()
    context = text_to_image(make_texts([2, 3]), model.config.layout)
    entries = torch.full((count, LENGTH), TO_GENERATE)
    with pytest.raises(ValueError, match=f"`entries` must have a row for each of the 4 sequences .* but has {count}"):
        generate(
            model, context, cluster_sampler, entries, model.config.layout.image_positions, num_images_per_context=2
        )


def test_rows_that_are_to_be_generated_in_other_places_are_an_error():
    model = make_coglm()
    entries = torch.full((2, LENGTH), TO_GENERATE)
    entries[1, 3] = 5
    context = text_to_image(make_texts([2, 3]), model.config.layout)
    with pytest.raises(ValueError, match="`entries` must have -1 in the same columns of every row"):
        generate(model, context, cluster_sampler, entries, model.config.layout.image_positions)
