"""How many pixels a token stands for: what the image tokenizer says, and an error where it has no such rate."""

import json

import pytest
import torch

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewUpscalePipeline,
)
from cogview_pipelines.models.image_tokenizers.auto import choose_rate

from ...utils import make_vq_model
from ...utils_cogview import make_cogview_vq

REFUSED = r"`compression_rate` must be one of \[4\], which `vqvae` has, but is 8"


def vq_of_four():
    return make_vq_model(compression_rates=(4,), decoder_channel_multipliers={4: (1, 1, 1)})


@pytest.fixture(params=["CogView2", "CogView"])
def family(request, pipe, cogview_pipe):
    """A pipeline, the classes of its family, and an image tokenizer of four pixels a token."""
    if request.param == "CogView":
        classes = (CogViewPipeline, CogViewUpscalePipeline, CogViewCaptionPipeline)
        return cogview_pipe, classes, make_cogview_vq(num_halvings=2)
    return pipe, (CogView2Pipeline, CogView2UpscalePipeline, CogView2CaptionPipeline), vq_of_four()


def test_the_only_rate_is_taken_and_pictures_have_its_size(family):
    pipe, (text_to_image, *others), vqvae = family
    new = text_to_image(**{**pipe.components, "vqvae": vqvae})
    assert new.config.compression_rate == 4 and pipe.config.compression_rate == 8
    new.set_progress_bar_config(disable=True)
    (image,) = new("a cat", generator=torch.Generator().manual_seed(0)).images
    assert image.size == new.sizes[-1] == tuple(side // 2 for side in pipe.sizes[-1])
    assert all(other.from_pipe(new).config.compression_rate == 4 for other in others)


def test_a_rate_that_the_image_tokenizer_lacks_is_refused_wherever_pipelines_are_built(family, tmp_path):
    pipe, classes, vqvae = family
    for each in classes:
        with pytest.raises(ValueError, match=REFUSED):
            each.from_pipe(pipe, vqvae=vqvae)
        assert each.from_pipe(pipe, vqvae=vqvae, compression_rate=4).config.compression_rate == 4
    classes[0](**{**pipe.components, "vqvae": vqvae}).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "compression_rate": 8}))
    with pytest.raises(ValueError, match=REFUSED):
        classes[0].from_pretrained(tmp_path)


def test_of_several_rates_the_released_one_is_taken():
    decoders = {4: (1, 1, 1), 8: (1, 1, 1, 1)}
    vqvae = make_vq_model(compression_rates=(4, 8), decoder_channel_multipliers=decoders)
    assert choose_rate(vqvae) == 8 and choose_rate(vqvae, 4) == 4 and choose_rate(vqvae, default=4) == 4
    with pytest.raises(ValueError, match=r"must be one of \[4, 8\], which `vqvae` has, but is 16"):
        choose_rate(vqvae, default=16)
