"""Previews take a share of the time: with a clock that only steps and previews move."""

import pytest
import torch

from cogview_pipelines import CogView2PipelineOutput, CogView2UpscalePipeline
from cogview_pipelines.pipelines.common import preview_budget
from cogview_pipelines.pipelines.common.previews import PreviewMixin

from ...utils import make_image_tokens

STEP, PASS = 1.0, 4.0  # seconds of a token and of a pass of super-resolution
ALL = [*(("transformer", 4 * row) for row in (1, 2, 3, 4)), ("direct_sr_transformer", 1)]
ALL += [("iterative_sr_transformer", 1), ("iterative_sr_transformer", 2)]


class Time:
    """Seconds that go by in steps and previews; the latter cost so much a token."""

    def __init__(self):
        self.now, self.previews, self.costs = 0.0, 0.0, iter(())

    def __call__(self):
        return self.now

    def step(self, pipe, step, timestep, kwargs):
        self.now += STEP if kwargs["stage"] == "transformer" else PASS

    def preview(self, pipe, tokens):
        seconds = next(self.costs) * tokens.numel()
        self.now += seconds
        self.previews += seconds
        return []


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(preview_budget, "perf_counter", time)
    monkeypatch.setattr(preview_budget, "_warm_devices", {torch.device("cpu")})
    for name in ("preview", "sketch"):
        monkeypatch.setattr(PreviewMixin, name, lambda pipe, tokens: time.preview(pipe, tokens))
    return time


def forever(*costs):
    """Of the first previews, and of all after them."""
    yield from costs[:-1]
    while True:
        yield costs[-1]


def watch(pipe, time, **call):
    """What previews were made, and the tokens of the pictures."""
    start = time.now
    *previews, output = pipe.stream(
        **{"prompt": "a cat", **call},
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=time.step,
        output_type="latent",
    )
    assert isinstance(output, CogView2PipelineOutput)
    time.others = time.now - start - time.previews
    return [(preview.stage, preview.timestep) for preview in previews], output.tokens


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("cost", [0.001, 0.01, 0.02])
def test_previews_take_no_more_than_their_share(pipe, time, share, cost):
    time.costs = forever(cost)
    made, _ = watch(pipe, time, max_preview_share=share)
    assert made == [about for about in ALL if about in made]
    first = cost * 16  # it is made before anybody knows what it costs
    assert time.previews <= max(share * time.others, first)
    dearest = cost * 144
    # and there is no time left for many
    assert len(made) == len(ALL) or time.previews > share * time.others - 2 * dearest


def test_cheap_previews_are_all_made(pipe, time):
    time.costs = forever(1e-4)
    assert watch(pipe, time)[0] == ALL


def test_no_limit_makes_every_preview_and_no_share_none(pipe, time):
    time.costs = forever(10.0)
    assert watch(pipe, time, max_preview_share=None)[0] == ALL
    assert watch(pipe, time, max_preview_share=0)[0] == []


def test_pictures_are_the_same_with_any_share(pipe, time):
    time.costs = forever(0.02)
    made, tokens = zip(*(watch(pipe, time, max_preview_share=share) for share in (0, 0.05, 0.2, None)))
    assert len(set(map(len, made))) == 4
    assert all(torch.equal(own, tokens[0]) for own in tokens)


def test_after_a_slow_preview_others_come_again(pipe, time):
    time.costs = forever(0.04, 0.0005)  # a share of 0.08 of 8 steps, then next to nothing
    made, _ = watch(pipe, time, max_preview_share=0.1)
    assert made[:2] == [("transformer", 4), ("transformer", 16)]
    assert made[2:] == ALL[4:]


def test_the_first_preview_of_a_larger_grid_is_judged_by_those_before(pipe, time):
    time.costs = forever(0.01)
    made, _ = watch(pipe, time, max_preview_share=0.05)
    assert made == ALL[:4]  # 144 tokens would take 1.44 s, more than the share of the 28 s of the call


def test_the_first_preview_on_a_device_does_not_count(pipe, time, monkeypatch):
    monkeypatch.setattr(preview_budget, "_warm_devices", set())
    time.costs = forever(100.0, 1e-4)
    assert watch(pipe, time)[0] == ALL
    time.costs = forever(100.0, 1e-4)
    assert watch(pipe, time)[0] == ALL[:1]


def test_upscaling_keeps_the_budget(pipe, time):
    pipe = CogView2UpscalePipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    tokens = make_image_tokens(1, 36).unflatten(1, (6, 6))
    time.costs = forever(1e-3)
    everything, expected = watch(pipe, time, prompt="", tokens=tokens, max_preview_share=None)
    time.previews = 0.0
    made, enlarged = watch(pipe, time, prompt="", tokens=tokens, max_preview_share=0.02)
    assert 1 < len(made) < len(everything)
    assert time.previews <= 0.02 * time.others
    assert torch.equal(enlarged[0], expected[0])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf"), "0.05", True])
def test_a_share_that_is_none_is_refused_at_once(pipe, share):
    with pytest.raises(ValueError, match="`max_preview_share` must be a number from 0 to 1, but is"):
        pipe.stream("a cat", max_preview_share=share)
