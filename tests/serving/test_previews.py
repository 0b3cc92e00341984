"""What the page learns of a job while it runs."""

from types import SimpleNamespace

import pytest
import torch

from cogview_pipelines.pipelines.common import preview_budget
from cogview_pipelines.serving import studio as studio_module
from cogview_pipelines.serving.jobs import Job, Work
from cogview_pipelines.serving.schemas import GenerationRequest
from cogview_pipelines.serving.settings import ServerSettings
from cogview_pipelines.serving.studio import Studio

from .conftest import PROMPT

ROWS = [("transformer", 4 * row) for row in (1, 2, 3, 4)]
PASSES = [("direct_sr_transformer", 1), ("iterative_sr_transformer", 1), ("iterative_sr_transformer", 2)]


class Listener(Job):
    """A job that keeps every preview it gets."""

    def __init__(self):
        self.previews = []
        super().__init__("generation", Work([]), wants_previews=True)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "preview" and value is not None:
            self.previews.append(value)


@pytest.fixture
def previews(pipe, monkeypatch):
    """The previews of a job whose steps take a second, and whose previews take what is asked for."""

    def run(seconds):
        clock = SimpleNamespace(now=0.0)
        job = Listener()
        monkeypatch.setattr(studio_module, "PREVIEW_SHARE", 0.1)
        monkeypatch.setattr(preview_budget, "perf_counter", lambda: clock.now)
        monkeypatch.setattr(preview_budget, "_warm_devices", {torch.device("cpu")})

        def step(jobs):
            clock.now += 1.0

        def preview(tokens):
            clock.now += seconds
            return [len(job.previews)]

        monkeypatch.setattr(studio_module, "checkpoint", step)
        monkeypatch.setattr(pipe, "sketch", preview, raising=False)
        work = Studio(pipe, "tiny", ServerSettings()).generation(GenerationRequest(prompt=PROMPT, n=1, seed=1))
        job.state = work.state
        for stage in work.stages:
            stage.run([job])
        return job.previews

    return run


def test_every_row_and_pass_is_told_and_shown_where_there_is_time(previews):
    told = previews(seconds=0.01)
    assert [(one.stage, one.step) for one in told] == ROWS + PASSES
    assert [one.images for one in told] == [[number] for number in range(len(told))]


def test_the_picture_before_stays_where_there_is_no_time_for_another(previews):
    told = previews(seconds=0.5)
    assert [(one.stage, one.step) for one in told] == ROWS + PASSES
    assert [one.images for one in told] == [[0], [0], [2], [3], [3], [3], [3]]
