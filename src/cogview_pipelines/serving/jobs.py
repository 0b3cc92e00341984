"""A piece of work for the model: what is to be done, for how long somebody wants it, and how it ended."""

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .errors import ApiError


class JobCancelled(Exception):
    """The client left, or the server stops."""


@dataclass(frozen=True)
class Stage:
    """
    A part of a job's work, after which it may be put aside for others, and which it may share with others.

    Args:
        key (hashable): Jobs whose next stages have equal keys may be computed together.
        run: Called with such jobs in the worker's thread, oldest first. It calls [`checkpoint`] at every step, and
            leaves what the next stage needs in each job's `state`; the last stage leaves the result there. It is
            called again, for each job alone, when it has raised something for several.
    """

    key: Hashable
    run: Callable[[list["Job"]], None]


@dataclass(frozen=True)
class Work:
    """
    What there is to do for a request.

    Args:
        stages (sequence of [`Stage`]): In order.
        state: What the first one begins with.
        size (`int`): Pictures, of which a batch has so many at the most.
    """

    stages: Sequence[Stage]
    state: Any = None
    size: int = 1


def alone(work: Callable[["Job"], Any]) -> Work:
    """Work that shares nothing, in one stage; what the function returns is the result."""

    def run(jobs: list["Job"]) -> None:
        [job] = jobs
        job.state = work(job)

    return Work([Stage(object(), run)])


class Job:
    """
    A piece of work for the model.

    Args:
        kind (`str`): For the metrics.
        work ([`Work`]): What is to be done.
        request_id (`str`): For the log.
        wants_previews (`bool`): Whether somebody looks at `preview`.
        lease (`float`, *optional*): Cancel the job when `renew` was not called for so many seconds.
    """

    def __init__(
        self,
        kind: str,
        work: Work,
        request_id: str = "-",
        wants_previews: bool = False,
        lease: float | None = None,
    ):
        self.kind, self.request_id, self.wants_previews = kind, request_id, wants_previews
        self.stages, self.state, self.size = tuple(work.stages), work.state, work.size
        self.future: Future = Future()
        self.preview: Any = None  # the latest one only: nobody needs those before
        self.budget: Any = None  # of its previews
        self.deadline, self.timeout = math.inf, math.inf
        self.has_ended = False
        self.created, self.started = time.monotonic(), math.inf
        self.on_end: Callable[[Job, str], None] | None = None
        self._lease, self._renewed = lease, self.created
        self._is_cancelled = threading.Event()
        self._ending = threading.Lock()

    @property
    def stage(self) -> Stage | None:
        """What is to be done next; nothing after its end, which may come from another thread at any time."""
        stages = self.stages
        return stages[0] if stages else None

    @property
    def has_started(self) -> bool:
        """Whether the model has begun with it."""
        return self.started < math.inf

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        if self._lease is not None and time.monotonic() > self._renewed + self._lease:
            self._is_cancelled.set()
        return self._is_cancelled.is_set()

    def cancel(self) -> None:
        """Stop at the next step, or never start."""
        self._is_cancelled.set()

    def renew(self) -> None:
        """Somebody still waits for the result."""
        self._renewed = time.monotonic()

    def end_if_due(self) -> None:
        """End it now if it was cancelled, or took too long."""
        if self.is_cancelled:
            self.end("cancelled", error=JobCancelled())
        elif time.monotonic() > self.deadline:
            message = f"The work was not done {self.timeout:g} s after the request came. Ask for less."
            self.end("expired", error=ApiError(504, message, "timeout"))

    def end(self, outcome: str, result: Any = None, error: BaseException | None = None) -> None:
        """
        Hand over the result or the error, and forget all else; only the first end counts.

        Args:
            outcome (`str`): For the metrics: done, refused, cancelled, expired or failed.
            result, error: What `future` gets.
        """
        with self._ending:
            if self.has_ended:
                return
            self.has_ended = True
        self.stages, self.state = (), None  # and with them the pictures that came with the request
        if self.on_end is not None:
            self.on_end(self, outcome)
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


def checkpoint(jobs: Sequence[Job]) -> None:
    """
    To be called at every step of the work for some jobs: ends those that are to stop, at once.

    Raises:
        JobCancelled: If none of them is left.
    """
    for job in jobs:
        job.end_if_due()
    if all(job.has_ended for job in jobs):
        raise JobCancelled
