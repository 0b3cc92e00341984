"""Calls that run at the same time have a state each: one is not stopped, measured or reset by another."""

import copy
import threading

import pytest
import torch

from cogview_pipelines import GenerationInterrupted

from ..conftest import LOW

PROMPT = "a cat on a blue background."
STAGES = {"transformer", "direct_sr_transformer", "iterative_sr_transformer", "vqvae"}


class Other:
    """A call in a thread of its own, which goes on from its first step only when it is told to."""

    def __init__(self, pipe, **call):
        self.started, self.may_go_on = threading.Event(), threading.Event()
        self.output = self.error = None
        self._pipe, self._call = pipe, call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.started.wait(60)

    def _run(self):
        def wait(pipe, step, timestep, kwargs):
            self.started.set()
            assert self.may_go_on.wait(60)

        try:
            generator = torch.Generator().manual_seed(1)
            self.output = self._pipe(PROMPT, generator=generator, callback_on_step_end=wait, **self._call)
        except Exception as error:
            self.error = error

    def finish(self):
        self.may_go_on.set()
        self._thread.join(60)
        return self


def test_a_second_call_does_not_forget_that_the_first_is_to_stop(pipe):
    other = Other(pipe)
    pipe.interrupt = True
    pipe(PROMPT, height=LOW)  # begins anew, and is not stopped
    assert isinstance(other.finish().error, GenerationInterrupted)


def test_a_callback_stops_its_own_call_only(pipe):
    def stop(pipe, step, timestep, kwargs):
        pipe.interrupt = True
        assert pipe.interrupt

    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(1), output_type="latent").tokens
    other = Other(pipe, output_type="latent")
    with pytest.raises(GenerationInterrupted):
        pipe(PROMPT, callback_on_step_end=stop)
    assert torch.equal(other.finish().output.tokens, expected)


def test_another_thread_stops_all_calls(pipe):
    others = [Other(pipe), Other(pipe)]
    pipe.interrupt = True
    assert all(isinstance(other.finish().error, GenerationInterrupted) for other in others)
    assert pipe.interrupt
    pipe(PROMPT, height=LOW)
    assert not pipe.interrupt


def test_statistics_are_those_of_the_own_call(pipe):
    other = Other(pipe, return_statistics=True)
    assert pipe(PROMPT, height=LOW).statistics is None
    low = pipe(PROMPT, height=LOW, return_statistics=True).statistics
    assert set(low) == {"transformer", "vqvae"}
    assert set(other.finish().output.statistics) == STAGES


def test_offloaded_weights_stay_while_another_call_needs_them(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    other = Other(pipe)
    pipe(PROMPT, height=LOW)
    assert not freed
    other.finish()
    assert freed == [True]


def test_a_copy_of_a_pipeline_runs_nothing(low_pipe):
    seen = []

    def copy_it(pipe, step, timestep, kwargs):
        if not step:
            pipe.interrupt = True
            seen.append(copy.deepcopy(pipe._calls).interrupted)

    with pytest.raises(GenerationInterrupted):
        low_pipe(PROMPT, callback_on_step_end=copy_it)
    assert seen == [False]
