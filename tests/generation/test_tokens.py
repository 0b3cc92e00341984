"""Tokens one by one on a tiny real model: what is computed, and that a picture depends on prompt and seed alone."""

import pytest
import torch

from cogview_pipelines.generation.decoders import Decoding
from cogview_pipelines.generation.sampling import draw_noise
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview2.sequences import caption, completion, text_to_image

from ..utils import (
    IMAGE_GRID,
    NUM_IMAGE_TOKENS,
    START_OF_ENGLISH,
    VOCAB_SIZE,
    make_coglm,
    make_image_tokens,
    make_texts,
)
from .utils import HOLES, LENGTH, MIXED_LENGTHS, cluster_sampler, generators, write_guided, write_images


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

    tokens = write_images(model, texts, sampler, generator=generators(1, 2, 3, 4), decoding=Decoding(parallel=1))
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


@torch.no_grad()
def test_guidance_leads_from_the_logits_of_the_empty_text_past_those_of_the_text():
    model, texts = make_coglm(), make_texts([3, 5])
    seen = []

    def sampler(logits, noise):
        seen.append(logits)
        return cluster_sampler(logits, noise)

    one_by_one = {"generator": generators(1, 2), "decoding": Decoding(parallel=1)}
    tokens = write_guided(model, texts, 2.5, sampler, **one_by_one)

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
    decoding = Decoding(parallel=1)
    generate(model, task.context, cluster_sampler, task.entries, task.positions, decoding=decoding)
    num_entries = task.entries.shape[1]
    # the context, then one pass for each cell to be written except the first, unless a known one stands before it
    known_first = int(task.entries[0, 0] != TO_GENERATE)
    assert len(passes) == len(HOLES[name]) + known_first
    assert sum(passes[1:]) == num_entries - 1


@pytest.mark.parametrize("count", [2, 5])
def test_a_wrong_number_of_rows_to_generate_is_an_error(count):
    model = make_coglm()
    context = text_to_image(make_texts([2, 3]), model.config.layout)
    entries = torch.full((count, LENGTH), TO_GENERATE)
    with pytest.raises(ValueError, match=f"`entries` must have a row for each of the 4 sequences .* but has {count}"):
        generate(
            model, context, cluster_sampler, entries, model.config.layout.image_positions, num_images_per_context=2
        )


@pytest.mark.parametrize("own_positions", [False, True])
def test_rows_with_known_tokens_in_other_places_are_what_each_is_alone(own_positions):
    model, texts = make_coglm(), make_texts([2, 3, 1])
    known = make_image_tokens(3)
    entries = torch.full((3, LENGTH), TO_GENERATE)
    entries[1, 3:7], entries[2, 0], entries[2, 6] = known[1, 3:7], known[2, 0], known[2, 6]
    positions = model.config.layout.image_positions
    if own_positions:  # each row has position ids of its own
        positions = torch.stack([positions, positions - 1, positions - 2])

    def fill_in(rows, *seeds):
        context = text_to_image([texts[row] for row in rows], model.config.layout)
        own = positions[rows] if own_positions else positions
        return generate(model, context, cluster_sampler, entries[rows], own, generator=generators(*seeds))

    together = fill_in([0, 1, 2], 4, 5, 6)
    assert torch.equal(together[1, 3:7], known[1, 3:7]) and torch.equal(together[2, [0, 6]], known[2, [0, 6]])
    for row in range(3):
        assert torch.equal(fill_in([row], 4 + row)[0], together[row])


def test_a_wrong_number_of_generators_is_an_error():
    with pytest.raises(ValueError, match=r"`generator` must be one generator or one per image \(2\), but 3 came"):
        write_images(make_coglm(), make_texts([2, 3]), generator=generators(1, 2, 3))
