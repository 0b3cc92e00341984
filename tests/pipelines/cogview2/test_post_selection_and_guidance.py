"""Text to image: choosing among drafts, classifier-free guidance, translated prompts."""

import pytest
import torch

from cogview_pipelines import CogView2InpaintPipeline
from cogview_pipelines.evaluation.embedding_scores import EmbeddingScorer
from cogview_pipelines.evaluation.likelihood import caption_losses
from cogview_pipelines.generation.canvas import LOGITS_BYTES
from cogview_pipelines.pipelines.common.memory import LOGITS, USED_SHARE

from ..conftest import LOW, build

PROMPTS = ["a cat on a blue background.", "一只老虎,红色背景。"]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def low(pipe, prompts, numbers, **call):
    """Low-resolution tokens of each prompt, `len(numbers) / len(prompts)` of each."""
    count = len(numbers) // len(prompts)
    size = {"height": LOW, "width": LOW, "output_type": "latent"}
    return pipe(prompts, num_images_per_prompt=count, generator=seeds(*numbers), **size, **call).tokens


def test_the_drafts_with_the_lowest_caption_loss_are_kept_best_first(pipe):
    numbers = list(range(10, 18))
    drafts = low(pipe, PROMPTS, numbers)
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    losses = caption_losses(pipe.transformer, pipe.tokenizer, drafts, repeated).view(2, 4)
    expected = losses.argsort(1)[:, :2] + torch.tensor([[0], [4]])
    output = pipe(
        PROMPTS, num_images_per_prompt=2, num_candidates=4, generator=seeds(*numbers), height=LOW, output_type="latent"
    )
    assert torch.equal(output.tokens, drafts[expected.flatten()])
    assert output.seeds == [numbers[index] for index in expected.flatten()]
    torch.testing.assert_close(torch.tensor(output.scores), -losses.flatten()[expected.flatten()])
    assert output.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2


def test_a_chosen_picture_is_what_its_seed_gives_alone(pipe):
    output = pipe(PROMPTS[0], num_candidates=3, generator=seeds(1, 2, 3), output_type="pt")
    alone = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(output.seeds[0]), output_type="pt")
    assert torch.equal(output.images, alone.images)
    assert torch.equal(output.tokens, alone.tokens)


def test_only_what_is_kept_is_super_resolved(pipe):
    steps = []
    pipe(
        PROMPTS,
        num_candidates=3,
        max_batch_size=2,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: steps.append(
            (kwargs["stage"], len(kwargs["tokens"]))
        ),
    )
    assert {count for stage, count in steps if stage == "transformer"} == {2}
    assert sum(count for stage, count in steps if stage == "direct_sr_transformer") == 2
    assert sum(count for stage, count in steps if stage == "transformer") == 6 * 16


def test_a_scorer_gets_drafts_and_prompts_and_decides(pipe):
    calls = []

    def scorer(images, prompts):
        calls.append((images, prompts))
        return [0.0, 3.0, 1.0, 5.0, 2.0, 4.0]

    output = pipe(PROMPTS, num_images_per_prompt=2, num_candidates=3, generator=seeds(*range(6)), scorer=scorer)
    images, prompts = calls[0]
    assert [image.size for image in images] == [(LOW, LOW)] * 6
    assert prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert output.seeds == [1, 2, 3, 5]
    assert output.scores == [3.0, 1.0, 5.0, 4.0]


def test_drafts_may_be_ranked_by_clip(pipe, clip):
    model, processor = clip
    scorer = EmbeddingScorer(model, processor, max_batch_size=2)
    numbers = list(range(3))
    output = pipe("a red cat", num_images_per_prompt=3, num_candidates=3, generator=seeds(*numbers), scorer=scorer)
    assert output.scores == sorted(output.scores, reverse=True)
    drafts = pipe("a red cat", num_images_per_prompt=3, generator=seeds(*numbers), height=LOW).images
    with torch.no_grad():
        inputs = processor(images=drafts, text=["a red cat"], return_tensors="pt")
        logits = model(**inputs).logits_per_image[:, 0] / model.logit_scale.exp()
    assert output.seeds == [numbers[index] for index in logits.argsort(descending=True)]
    torch.testing.assert_close(torch.tensor(output.scores), logits.sort(descending=True).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scores", [[1.0], [[1.0, 2.0]], [1.0, float("nan")]])
def test_a_scorer_that_returns_something_else_is_an_error(pipe, scores):
    with pytest.raises(ValueError, match="`scorer` must return a number for each of the 2 drafts"):
        pipe(PROMPTS[0], num_candidates=2, scorer=lambda images, prompts: scores)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            {"num_candidates": 1, "num_images_per_prompt": 2},
            "`num_candidates` must be at least `num_images_per_prompt`",
        ),
        ({"num_candidates": 0}, "`num_candidates` must be a whole number from 1 to 10000"),
        ({"scorer": len}, "`scorer` has nothing to choose from without `num_candidates`"),
        ({"num_candidates": 3, "generator": [torch.Generator()]}, r"one per picture \(3\)"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a number from 0 to 100, but is -1.0"),
        ({"negative_prompt": "red"}, "`negative_prompt` has no effect without `guidance_scale`"),
        ({"negative_prompt": 3, "guidance_scale": 2.0}, "`negative_prompt` must be a string"),
        ({"negative_prompt": "a cat " * 40, "guidance_scale": 2.0}, "`negative_prompt` may have 30 tokens"),
        ({"prompt_translator": lambda text: None}, "`prompt_translator` must return a text"),
    ],
)
def test_what_does_not_fit_together_is_an_error(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **call)


def test_a_guidance_scale_of_one_is_no_guidance_and_zero_is_the_negative_prompt(pipe):
    plain = low(pipe, PROMPTS, [1, 2])
    assert torch.equal(plain, low(pipe, PROMPTS, [1, 2], guidance_scale=1.0))
    negative = low(pipe, PROMPTS, [1, 2], guidance_scale=0.0, negative_prompt="a red car")
    assert torch.equal(negative, low(pipe, ["a red car"], [1, 2]))


def test_guidance_changes_the_picture_and_is_the_same_alone_and_in_a_batch(pipe):
    together = low(pipe, PROMPTS, [1, 2], guidance_scale=3.0)
    assert not torch.equal(together, low(pipe, PROMPTS, [1, 2]))
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(together[row], low(pipe, [prompt], [row + 1], guidance_scale=3.0)[0])


def test_a_style_may_set_the_guidance_scale(tokenizer):
    pipe = build(tokenizer, stages=())
    pipe.register_to_config(styles={"strict": {"guidance_scale": 3.0}})
    assert torch.equal(
        low(pipe, PROMPTS, [1, 2], style="strict"), low(pipe, PROMPTS, [1, 2], guidance_scale=3.0, style="strict")
    )
    assert pipe.check_inputs("a cat", style="strict")["guidance_scale"] == 3.0


def test_a_translated_prompt_is_used_and_returned(pipe):
    words = {"Katze": "a cat on a red background."}
    output = pipe("Katze", prompt_translator=words.get, generator=seeds(4))
    assert output.prompts == [words["Katze"]]
    assert torch.equal(output.tokens, pipe(words["Katze"], generator=seeds(4)).tokens)


@pytest.mark.parametrize("paints", [False, True])
def test_guidance_halves_the_pictures_computed_at_a_time(pipe, monkeypatch, paints):
    each = pipe._memory_per_picture(pipe.transformer)[0]
    free = LOGITS * LOGITS_BYTES + 4 * int(each / USED_SHARE) + each
    monkeypatch.setattr("cogview_pipelines.pipelines.common.memory.free_memory", lambda device: free)
    inpaint, mask = CogView2InpaintPipeline.from_pipe(pipe), torch.zeros(LOW, LOW, dtype=torch.bool)
    inpaint.set_progress_bar_config(disable=True)
    mask[:10, :10] = True
    for guidance_scale, expected in ((1.0, {4}), (3.0, {2})):
        sizes = set()
        call = {
            "num_images_per_prompt": 4,
            "guidance_scale": guidance_scale,
            "callback_on_step_end": lambda *about, sizes=sizes: sizes.add(len(about[3]["image_indices"])),
        }
        if paints:
            inpaint("a cat", torch.zeros(3, LOW, LOW), mask, super_resolve=False, **call)
        else:
            pipe("a cat", height=LOW, **call)
        assert sizes == expected
