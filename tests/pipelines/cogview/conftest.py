"""A tiny CogView with all of its models."""

import pytest

from cogview_pipelines import CogViewCaptionPipeline, CogViewUpscalePipeline


@pytest.fixture(scope="session")
def pipe(cogview_pipe):
    return cogview_pipe


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
