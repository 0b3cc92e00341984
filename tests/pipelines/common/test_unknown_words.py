"""What a model does not know of a prompt is named by a warning, once, wherever the prompt comes from."""

import logging

import pytest
import torch

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
    IcetkTokenizer,
)

from ...utils import make_tokenizer
from ...utils_cogview import make_cogview_tokenizer
from ..conftest import LOW, build, build_cogview

LOGGER = "cogview_pipelines.unknown_words"
PICTURE = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(60, 60)
MASK[20:40, 20:40] = 1
GUIDED = {"guidance_scale": 2.0, "height": LOW}


@pytest.fixture(autouse=True)
def told_as_by_default(caplog):
    """Whatever a command has switched off before, in this process."""
    caplog.set_level("WARNING", LOGGER)


@pytest.fixture
def own(tmp_path):
    """A pipeline whose tokenizer knows some words only."""
    make_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    return build(IcetkTokenizer.from_pretrained(tmp_path / "saved", known_words=["a", "cat", "老虎"]))


@pytest.fixture
def own_cogview(tmp_path):
    """The same of the first CogView."""
    make_cogview_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    return build_cogview(CogViewTokenizer.from_pretrained(tmp_path / "saved", known_words=["a", "cat", "老虎"]))


def told(caplog):
    found = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    caplog.clear()
    return found


@pytest.mark.parametrize("made_for", ["text", "inpaint", "upscale"])
def test_a_word_that_the_model_does_not_know_is_named_once(own, caplog, made_for):
    call = {
        "text": lambda prompt: CogView2Pipeline.__call__(pipe, prompt, height=LOW),
        "inpaint": lambda prompt: CogView2InpaintPipeline.__call__(pipe, prompt, PICTURE, MASK),
        "upscale": lambda prompt: CogView2UpscalePipeline.__call__(pipe, PICTURE, prompt),
    }[made_for]
    kinds = {"text": CogView2Pipeline, "inpaint": CogView2InpaintPipeline, "upscale": CogView2UpscalePipeline}
    pipe = kinds[made_for].from_pipe(own)
    pipe.set_progress_bar_config(disable=True)
    call("a cat")
    assert told(caplog) == []
    call("a zebra")
    (message,) = told(caplog)
    assert "does not know this part of `prompt`" in message and "['zebra']" in message
    call("a zebra")
    assert told(caplog) == []
    call("a zebra, 马")
    (message,) = told(caplog)
    assert "马" in message and "zebra" not in message


def test_what_the_model_does_not_know_changes_no_picture(own):
    def drawn(*prompts, **call):
        generator = torch.Generator().manual_seed(5)
        return own(list(prompts), generator=generator, output_type="latent", height=LOW, **call)

    known = drawn("a cat", "a, cat").tokens
    assert torch.equal(drawn("wow a cat", "a zebra, cat ☃").tokens, known)
    with_it, without = (drawn(prompt, num_candidates=3) for prompt in ("wow a cat", "a cat"))
    assert torch.equal(with_it.tokens, without.tokens) and with_it.scores == without.scores


@pytest.mark.parametrize("made_for", ["text", "inpaint"])
def test_what_guidance_leads_away_from_is_treated_as_the_prompt_is(own, caplog, made_for):
    def drawn(negative):
        call = {"generator": torch.Generator().manual_seed(5), "negative_prompt": negative, "guidance_scale": 2.0}
        if made_for == "text":
            return own("a cat", output_type="latent", height=LOW, **call).tokens
        return pipe("a cat", PICTURE, MASK, output_type="pt", super_resolve=False, **call).images

    pipe = CogView2InpaintPipeline.from_pipe(own)
    pipe.set_progress_bar_config(disable=True)
    without, other = drawn("a 老虎"), drawn("cat")
    assert told(caplog) == []
    assert torch.equal(drawn("wow, a 老虎"), without) and not torch.equal(without, other)
    (message,) = told(caplog)
    assert message == "The model does not know this part of `negative_prompt`, and goes by the rest: ['wow']."
    drawn("wow, a 老虎")
    assert told(caplog) == []
    own.check_inputs("wow, a cat", negative_prompt="zebra, a cat", **GUIDED)  # of each argument by itself
    assert [("`prompt`" in message, "zebra" in message) for message in told(caplog)] == [(False, True), (True, False)]


def test_a_negative_prompt_for_several_prompts_is_told_of_once(own, caplog):
    own.check_inputs(["a cat", "a", "cat"], negative_prompt="wow, a 老虎", **GUIDED)
    assert told(caplog) == ["The model does not know this part of `negative_prompt`, and goes by the rest: ['wow']."]


def test_a_prompt_that_super_resolution_does_not_read_to_its_end_is_told_of_once(own, caplog):
    own.direct_sr_transformer.config.num_text_slots = 3
    own.check_inputs(["a cat, a cat", "a cat, a 老虎"])
    own("a cat, a cat, a cat", output_type="latent")
    found = [text for text in caplog.messages if text.startswith("Direct super-resolution reads")]
    assert found == ["Direct super-resolution reads the first 2 tokens of a prompt; the longest has more."]


def test_where_nothing_is_known_it_does_not_say_that_there_is_a_rest(own, caplog):
    own.check_inputs(["a wow", "a zebra, cat", "unicorn"], negative_prompt=["", "", "heraldry"], **GUIDED)
    assert told(caplog) == [
        "The model knows nothing of `negative_prompt`: ['heraldry'].",
        "The model does not know this part of `prompt`, and goes by the rest: ['wow', 'zebra'].",
        "The model knows nothing of `prompt`: ['unicorn'].",
    ]


@pytest.mark.parametrize("family", ["own", "own_cogview"])
def test_texts_are_scored_with_all_of_their_words_and_those_not_known_are_named(request, caplog, family):
    pipe = request.getfixturevalue(family)
    kind = CogView2CaptionPipeline if family == "own" else CogViewCaptionPipeline
    captioner = kind.from_pipe(pipe)
    captioner.set_progress_bar_config(disable=True)
    tokens = torch.arange(16).view(1, 4, 4)
    losses = captioner.caption_loss(None, ["a cat", "a tree cat", "tree"], tokens=tokens)
    assert len(losses.unique()) == 3
    assert told(caplog) == [
        "The model does not know this part of `prompt`, so its share in the score says little: ['tree']."
    ]
    captioner.check_texts("a car")
    (message,) = told(caplog)
    assert "['car']" in message


def test_the_first_cogview_ranks_candidates_by_what_it_draws(own_cogview, caplog):
    def drawn(prompt):
        generator = torch.Generator().manual_seed(5)
        return own_cogview(prompt, num_candidates=3, generator=generator, output_type="latent")

    with_it, without = drawn("a tree, cat"), drawn("a, cat")
    assert torch.equal(with_it.tokens, without.tokens) and with_it.scores == without.scores
    assert "goes by the rest: ['tree']" in told(caplog)[0]
    upscaler = CogViewUpscalePipeline.from_pipe(own_cogview)
    upscaler.check_inputs("a red cat")
    assert "goes by the rest: ['red']" in told(caplog)[0]


def test_characters_without_a_piece_are_named_by_the_first_cogview(cogview_tokenizer, caplog):
    pipe = build_cogview(cogview_tokenizer)
    pipe.check_inputs("a cat, 犛")
    assert told(caplog) == ["The model does not know this part of `prompt`, and goes by the rest: ['犛']."]
    pipe.check_inputs("狸")
    assert told(caplog) == ["The model knows nothing of `prompt`: ['狸']."]


def test_other_programs_can_switch_it_off(own, caplog):
    logging.getLogger(LOGGER).setLevel("ERROR")
    own.check_inputs("a zebra")
    assert told(caplog) == []
