"""A tiny CogView with all of its models."""

import pytest

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline, CogViewUpscalePipeline

from ...utils_cogview import make_cogview, make_cogview_tokenizer, make_cogview_vq


@pytest.fixture(scope="session")
def cogview_tokenizer(tmp_path_factory):
    return make_cogview_tokenizer(tmp_path_factory.mktemp("cogview_tokenizer"))


@pytest.fixture(scope="session")
def pipe(cogview_tokenizer):
    pipe = CogViewPipeline(cogview_tokenizer, make_cogview_vq(), make_cogview(), make_cogview(1), make_cogview(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def upscale(pipe):
    upscale = CogViewUpscalePipeline.from_pipe(pipe)
    upscale.set_progress_bar_config(disable=True)
    return upscale


@pytest.fixture(scope="session")
def captioner(pipe):
    captioner = CogViewCaptionPipeline.from_pipe(pipe)
    captioner.set_progress_bar_config(disable=True)
    return captioner
