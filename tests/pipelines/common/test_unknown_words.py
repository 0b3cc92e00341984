"""What a model does not know of a prompt is named by a warning, once, wherever the prompt comes from."""

import logging

import pytest
import torch

from cogview_pipelines import CogView2InpaintPipeline, CogView2Pipeline, CogView2UpscalePipeline, IcetkTokenizer

from ...utils import make_tokenizer
from ..conftest import LOW, build, build_cogview

LOGGER = "cogview_pipelines.unknown_words"
PICTURE = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(60, 60)
MASK[20:40, 20:40] = 1


@pytest.fixture(autouse=True)
def told_as_by_default(caplog):
    """Whatever a command has switched off before, in this process."""
    caplog.set_level("WARNING", LOGGER)


@pytest.fixture
def own(tmp_path):
    """A pipeline whose tokenizer knows some words only."""
    make_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    return build(IcetkTokenizer.from_pretrained(tmp_path / "saved", known_words=["a", "cat", "老虎"]))


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


def test_characters_without_a_piece_are_named_by_the_first_cogview(cogview_tokenizer, caplog):
    pipe = build_cogview(cogview_tokenizer)
    pipe.check_inputs("犛")
    (message,) = told(caplog)
    assert "犛" in message


def test_other_programs_can_switch_it_off(own, caplog):
    logging.getLogger(LOGGER).setLevel("ERROR")
    own.check_inputs("a zebra")
    assert told(caplog) == []
