"""CogView's three pipelines: batches, candidates, windows, captions, save and load, interruption, errors."""

from itertools import pairwise

import PIL.Image
import pytest
import torch

from cogview_pipelines import (
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewPipelineOutput,
    CogViewUpscalePipeline,
    GenerationInterrupted,
)
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview import sequences

from ...utils import make_coglm
from ...utils_cogview import NUM_IMAGE_TOKENS, make_cogview, make_cogview_vq, make_image_tokens

PROMPTS = ["a cat", "a tree on a blue", "一只猫"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Text to image -------------------------------------------------------------------------------------------------------


def test_a_picture_is_the_same_alone_and_in_any_batch(pipe):
    together = pipe(PROMPTS, generator=generators(1, 2, 3), output_type="pt")
    assert together.tokens.shape == (3, 4, 4) and together.images.shape == (3, 3, 32, 32)
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, generator=generators(index + 1), output_type="pt")
        assert torch.equal(alone.tokens[0], together.tokens[index])
        assert torch.equal(alone.images[0], together.images[index])
    parts = pipe(PROMPTS, generator=generators(1, 2, 3), max_batch_size=2, output_type="latent")
    assert torch.equal(parts.images, together.tokens) and parts.seeds == [1, 2, 3]


def test_several_pictures_of_a_prompt_come_prompt_by_prompt(pipe):
    output = pipe(PROMPTS[:2], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="latent")
    assert output.prompts == ["a cat", "a cat", "a tree on a blue", "a tree on a blue"]
    assert torch.equal(output.tokens[3], pipe(PROMPTS[1], generator=generators(4)).tokens[0])


def test_settings_change_what_is_drawn_and_top_k_1_is_greedy(pipe):
    greedy = [pipe("a cat", generator=generators(seed), top_k=1).tokens for seed in (1, 2)]
    assert torch.equal(*greedy)
    assert torch.equal(pipe("a cat", generator=generators(1), top_p=0.0).tokens, greedy[0])
    warm = pipe("a cat", generator=generators(1), temperature=50.0).tokens
    assert not torch.equal(warm, pipe("a cat", generator=generators(1)).tokens)


def test_candidates_are_ranked_by_the_caption_model(pipe, captioner):
    output = pipe("a cat", num_candidates=5, num_images_per_prompt=2, generator=generators(*range(5)))
    everything = pipe("a cat", num_images_per_prompt=5, generator=generators(*range(5))).tokens
    scores = captioner.score(None, "a cat", tokens=everything)
    best = scores.argsort(descending=True)[:2]
    assert torch.equal(output.tokens, everything[best])
    torch.testing.assert_close(torch.tensor(output.scores), scores[best])
    assert output.seeds == best.tolist()
    chosen = pipe(
        "a cat", num_candidates=5, scorer=lambda images, prompts: [0, 0, 0, 1, 0], generator=generators(*range(5))
    )
    assert torch.equal(chosen.tokens, everything[3:4])


def test_names_of_commands_in_a_prompt_are_letters(pipe):
    text = pipe._encode_prompts(["a cat [BASE]"], pipe.layout.max_text_tokens)[0]
    assert max(text) < pipe.layout.command_token_id


def test_previews_callbacks_and_statistics(pipe):
    steps = []
    output = pipe(
        "a cat",
        return_statistics=True,
        callback_on_step_end=lambda own, step, timestep, about: steps.append((step, about["tokens"].shape)),
    )
    assert steps == [(step, (1, 4, 4)) for step in range(16)]
    assert output.statistics["transformer"].seconds > 0
    *previews, last = pipe.stream("a cat", generator=generators(1), max_preview_share=None)
    assert isinstance(last, CogViewPipelineOutput) and len(previews) == 4
    assert torch.equal(last.tokens, pipe("a cat", generator=generators(1)).tokens)


def test_interrupt_stops_a_call(pipe, upscale):
    for own, arguments in ((pipe, {"prompt": "a cat"}), (upscale, {"tokens": make_image_tokens(1).view(1, 4, 4)})):
        seen = []

        def stop(running, step, timestep, about, seen=seen):
            seen.append(step)
            running.interrupt = step == 2

        with pytest.raises(GenerationInterrupted):
            own(**arguments, callback_on_step_end=stop)
        assert seen == [0, 1, 2]


# Super-resolution ----------------------------------------------------------------------------------------------------


def test_coarse_tokens_become_a_whole_picture(upscale):
    coarse = make_image_tokens(2, 4).view(2, 2, 2)
    output = upscale(prompt=PROMPTS[:2], tokens=coarse, generator=generators(1, 2))
    assert output.tokens.shape == (2, 4, 4) and output.images[0].size == (32, 32)
    alone = upscale(prompt=PROMPTS[1], tokens=coarse[1:], generator=generators(2))
    assert torch.equal(alone.tokens[0], output.tokens[1])


def window_by_window(upscale, prompt, tokens, seed):
    """The nine windows one after another, for one picture alone; known cells are never written again."""
    model, layout, generator = upscale.super_resolution_transformer, upscale.layout, generators(seed)
    text = upscale.tokenizer.encode(prompt)
    fine = sequences.unwritten(1, layout)
    sampler = upscale._sampler(upscale_settings())
    for window in sequences.sliding_windows(layout):
        rows, columns = window.fine(layout)
        context = sequences.super_resolution([text], tokens[(slice(None), *window.coarse(layout))].flatten(1), layout)
        entries = sequences.window_entries(fine, window, layout)
        positions = sequences.fine_positions(layout)[: entries.shape[1]]
        written = generate(model, context, sampler, entries, positions, generator=generator)
        known = entries != TO_GENERATE
        assert torch.equal(written[known], entries[known])
        fine[:, rows, columns] = written.unflatten(1, fine[0, rows, columns].shape)
    return fine


def upscale_settings():
    from cogview_pipelines.pipelines.cogview.settings import UpscaleSettings

    return UpscaleSettings()


def test_windows_side_by_side_write_what_they_write_one_after_another(upscale):
    tokens = make_image_tokens(2).view(2, 4, 4)
    output = upscale(prompt=PROMPTS[:2], tokens=tokens, generator=generators(5, 6))
    assert output.tokens.shape == (2, 8, 8) and output.images[0].size == (64, 64)
    assert (output.tokens >= 0).all() and (output.tokens < NUM_IMAGE_TOKENS).all()
    for index, seed in enumerate((5, 6)):
        assert torch.equal(
            window_by_window(upscale, PROMPTS[index], tokens[index : index + 1], seed)[0], output.tokens[index]
        )


def test_the_progress_bar_knows_all_steps_and_tokens_only_appear(upscale):
    shown = []
    upscale(
        tokens=make_image_tokens(1).view(1, 4, 4),
        callback_on_step_end=lambda own, step, timestep, about: shown.append(about["tokens"].clone()),
    )
    assert len(shown) == upscale._num_window_steps()
    for before, after in pairwise(shown):
        known = before >= 0
        assert torch.equal(before[known], after[known]) and (after >= 0).sum() > known.sum()


def test_pictures_of_any_kind_are_brought_to_a_size(upscale):
    grey = PIL.Image.new("L", (70, 50), 120)
    palette = PIL.Image.new("RGB", (40, 64), (200, 10, 30)).convert("P")
    output = upscale([grey, palette], size=16, generator=generators(1, 2))
    assert [image.size for image in output.images] == [(32, 32)] * 2
    assert upscale(grey).images[0].size == (64, 64)
    assert upscale.sizes == [(16, 16), (32, 32), (64, 64)]


# Captions ------------------------------------------------------------------------------------------------------------


def test_captions_are_texts_with_a_stop_rule(captioner):
    tokens = make_image_tokens(2).view(2, 4, 4)
    whole = captioner(tokens=tokens, end="length", max_length=6, generator=generators(1, 2))
    assert [len(ids) for ids in whole.token_ids] == [6, 6]
    layout = captioner.layout
    assert all(layout.num_image_tokens <= i < layout.command_token_id for ids in whole.token_ids for i in ids)
    short = captioner(tokens=tokens, max_length=6, generator=generators(1, 2))
    ends = set(captioner.tokenizer.sentence_end_ids)
    assert ends and not any(ends & set(ids) for ids in short.token_ids)
    alone = captioner(tokens=tokens[1:], end="length", max_length=6, generator=generators(2))
    assert alone.token_ids[0] == whole.token_ids[1]
    many = captioner(tokens=tokens, num_captions_per_image=3, max_length=4)
    assert len(many.captions) == len(many.seeds) == 6


def test_scores_are_per_token_or_in_sum_and_the_same_in_any_batch(captioner):
    tokens = make_image_tokens(3).view(3, 4, 4)
    mean = captioner.score(None, PROMPTS, tokens=tokens)
    total = captioner.score(None, PROMPTS, tokens=tokens, reduction="sum")
    lengths = torch.tensor([len(captioner.tokenizer.encode(prompt)) for prompt in PROMPTS])
    torch.testing.assert_close(mean * lengths, total)
    alone = captioner.score(None, PROMPTS[1], tokens=tokens[1:2])
    torch.testing.assert_close(alone, mean[1:2], atol=1e-4, rtol=1e-4)
    picture = PIL.Image.new("RGB", (50, 40), (10, 200, 90))
    assert captioner.score(picture, PROMPTS).shape == (3,)
    losses = captioner.caption_loss(None, PROMPTS, tokens=tokens, max_batch_size=2)  # lower is better
    torch.testing.assert_close(losses, -mean, atol=1e-4, rtol=1e-4)


# Components ----------------------------------------------------------------------------------------------------------


def test_every_pipeline_loads_from_one_folder_and_makes_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = CogViewPipeline.from_pretrained(tmp_path)
    wanted = pipe("a cat", generator=generators(1)).tokens
    assert torch.equal(loaded("a cat", generator=generators(1)).tokens, wanted)
    for kind in (CogViewUpscalePipeline, CogViewCaptionPipeline):
        assert type(kind.from_pretrained(tmp_path)) is kind


def test_a_super_resolution_model_without_a_base_says_what_it_is_for(cogview_tokenizer, tmp_path):
    alone = CogViewUpscalePipeline(cogview_tokenizer, make_cogview_vq(), super_resolution_transformer=make_cogview())
    alone.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"`transformer` must be given for a CogViewPipeline, but is missing.*Upscale"
    ):
        CogViewPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`caption_transformer` must be given for a CogViewCaptionPipeline"):
        CogViewCaptionPipeline.from_pipe(alone)


def test_components_of_other_models_are_refused(cogview_tokenizer):
    vqvae = make_cogview_vq()
    with pytest.raises(ValueError, match="`transformer` must be a CogViewModel, but is a CogLMModel"):
        CogViewPipeline(cogview_tokenizer, vqvae, make_coglm())
    with pytest.raises(ValueError, match="`vqvae` has 50 codes, but `transformer` 48"):
        CogViewPipeline(cogview_tokenizer, make_cogview_vq(num_embeddings=50), make_cogview())
    with pytest.raises(ValueError, match="`tokenizer` has its first command token at 102, but `transformer` at 100"):
        CogViewPipeline(cogview_tokenizer, vqvae, make_cogview(command_token_id=100))


# Errors --------------------------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_say_how_many_tokens_fit(pipe, upscale, captioner):
    long = "a cat " * 40
    with pytest.raises(ValueError, match="`prompt` may have 21 tokens with this model, but 'a cat"):
        pipe(long)
    with pytest.raises(ValueError, match="`prompt` may have 18 tokens with this model"):
        upscale(prompt=long, tokens=make_image_tokens(1).view(1, 4, 4))
    with pytest.raises(ValueError, match="`prompt` may have 20 tokens with this model"):
        captioner.score(None, long, tokens=make_image_tokens(1).view(1, 4, 4))
    with pytest.raises(ValueError, match="`max_length` may be 20 with this model, but is 21"):
        captioner(tokens=make_image_tokens(1).view(1, 4, 4), max_length=21)


def test_bad_arguments_are_refused(pipe, upscale, captioner):
    tokens = make_image_tokens(1).view(1, 4, 4)
    for call, message in (
        (lambda: pipe(""), "`prompt` must not be empty"),
        (lambda: pipe("a cat", top_p=2), "`top_p` must be a number from 0 to 1"),
        (lambda: pipe("a cat", num_candidates=1, num_images_per_prompt=2), "`num_candidates` must be at least"),
        (lambda: pipe("a cat", scorer=len), "`scorer` has nothing to choose from"),
        (lambda: pipe("a cat", output_type="jpg"), "`output_type` must be one of"),
        (lambda: upscale(), "Give either `image` or `tokens`"),
        (lambda: upscale(tokens=tokens, size=32), "`size` has no effect on `tokens`"),
        (lambda: upscale(PIL.Image.new("L", (9, 9)), size=20), "`size` must be 16 or 32 with this model, but is 20"),
        (lambda: upscale(tokens=tokens + NUM_IMAGE_TOKENS), r"`tokens` must be image codes, whole numbers in 0\.\.47"),
        (lambda: upscale(tokens=tokens[:, :3]), r"with 2 x 2 or 4 x 4 tokens, but have \(1, 3, 4\)"),
        (lambda: captioner(tokens=tokens, end="never"), "`end` must be one of"),
        (lambda: captioner(tokens=tokens[:, :2]), "with 4 x 4 tokens per picture"),
        (lambda: captioner.score(None, ["a", "b"], tokens=tokens.expand(3, -1, -1)), "one per picture"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Adapters ------------------------------------------------------------------------------------------------------------


def test_adapters_work_in_all_stages_and_fuse(cogview_tokenizer, tmp_path):
    from ...loaders.conftest import random_adapter

    models = [make_cogview(), make_cogview(1), make_cogview(2)]
    pipe = CogViewPipeline(cogview_tokenizer, make_cogview_vq(), *models)
    names = ("transformer", "caption_transformer", "super_resolution_transformer")
    random_adapter({name: getattr(pipe, name) for name in names}, tmp_path)
    upscale, captioner = CogViewUpscalePipeline.from_pipe(pipe), CogViewCaptionPipeline.from_pipe(pipe)
    tokens = make_image_tokens(1).unflatten(1, (4, 4))

    def use():
        drawn = pipe("a cat", generator=generators(1)).tokens
        fine = upscale(tokens=tokens, prompt="a cat", generator=generators(1)).tokens
        return [drawn, fine[0] if isinstance(fine, list) else fine, captioner.score(None, "a cat", tokens=tokens)]

    before = use()
    pipe.load_lora_weights(tmp_path, "style")
    assert pipe.get_list_adapters() == {name: ["style"] for name in names}
    adapted = use()
    assert not any(torch.equal(one, other) for one, other in zip(before, adapted))
    pipe.fuse_lora()
    for one, other in zip(adapted, use()):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    for one, other in zip(before, use()):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)
