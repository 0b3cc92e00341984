"""One thread owns the model; everything else hands it jobs through a queue with a limit."""

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from .errors import ApiError, internal_error
from .metrics import Metrics

logger = logging.getLogger(__name__)


class JobCancelled(Exception):
    """The client left, or the server stops."""


class JobExpired(Exception):
    """The work took too long."""


class Job:
    """
    A piece of work for the model.

    Args:
        kind (`str`): For the metrics.
        work: Called with the job in the worker's thread; what it returns is the result of `future`.
        request_id (`str`): For the log.
        wants_previews (`bool`): Whether somebody looks at `preview`.
        lease (`float`, *optional*): Cancel the job when `renew` was not called for so many seconds.
    """

    def __init__(
        self,
        kind: str,
        work: Callable[["Job"], Any],
        request_id: str = "-",
        wants_previews: bool = False,
        lease: float | None = None,
    ):
        self.kind, self.work, self.request_id, self.wants_previews = kind, work, request_id, wants_previews
        self.future: Future = Future()
        self.preview: Any = None  # the latest one only: nobody needs those before
        self.deadline = math.inf
        self.has_started = self.has_ended = False
        self.created = time.monotonic()
        self._lease, self._renewed = lease, self.created
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop at the next step, or never start."""
        self._is_cancelled.set()

    def renew(self) -> None:
        """Somebody still waits for the result."""
        self._renewed = time.monotonic()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        if self._lease is not None and time.monotonic() > self._renewed + self._lease:
            self._is_cancelled.set()
        return self._is_cancelled.is_set()

    def checkpoint(self) -> None:
        """
        To be called at every step of the work.

        Raises:
            JobCancelled, JobExpired: If it is to stop.
        """
        if self.is_cancelled:
            raise JobCancelled
        if time.monotonic() > self.deadline:
            raise JobExpired


class Place:
    """Room for one job, from before its request is read until its result is answered."""

    def __init__(self, worker: "Worker", deadline: float):
        self._worker, self._deadline = worker, deadline
        self._job: Job | None = None

    def submit(self, job: Job) -> Job:
        """Queue the job; leaving the place cancels it, if it has not ended."""
        assert self._job is None, "a place is for one job"
        job.deadline = self._deadline
        self._job = job
        self._worker.enqueue(job)
        return job

    def leave(self) -> None:
        """Give up the job, if there is one."""
        if self._job is not None and not self._job.has_ended:
            self._worker.drop(self._job)


class Worker:
    """
    The thread, its queue, and the places that bound both.

    Args:
        limit (`int`): Places, and so the most jobs and requests that are held in memory.
        job_timeout (`float`): Seconds from taking a place until its job is stopped.
        metrics ([`Metrics`]): What to count.
    """

    def __init__(self, limit: int, job_timeout: float, metrics: Metrics):
        self.limit, self.job_timeout, self.metrics = limit, job_timeout, metrics
        self._changed = threading.Condition()
        self._queue: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._places = 0
        self._mean_seconds = 1.0
        self._is_closed = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="cogview2-worker", daemon=True)

    # For everybody ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more; what is queued goes on."""
        self._is_closed = True

    def stop(self) -> None:
        """Cancel everything and end the thread; it ends after the step that it is at."""
        self.close()
        with self._changed:
            self._is_stopping = True
            for job in (*self._queue, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs will be done."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def places_taken(self) -> int:
        """Requests that are being read, wait, or are computed."""
        return self._places

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """
        Room for one job while in the context.

        Raises:
            ApiError: If the server is full (429) or stops (503).
        """
        with self._changed:
            if self._is_closed:
                raise ApiError(503, "The server is stopping.", "stopping", retry_after=10)
            if self._places >= self.limit:
                seconds = min(max(math.ceil(self._mean_seconds), 1), 60)
                raise ApiError(
                    429,
                    f"The queue is full: {self.limit} requests wait or are computed. Try again in {seconds} s.",
                    "queue_full",
                    retry_after=seconds,
                )
            self._places += 1
            self.metrics.places.set(self._places)
        place = Place(self, time.monotonic() + self.job_timeout)
        try:
            yield place
        finally:
            place.leave()
            with self._changed:
                self._places -= 1
                self.metrics.places.set(self._places)

    # For places ------------------------------------------------------------------------------------------------------

    def enqueue(self, job: Job) -> None:
        """Add a job that has a place."""
        with self._changed:
            if self._is_stopping:
                job.cancel()
            self._queue.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Cancel a job; one that waits is forgotten at once, with all that it holds."""
        job.cancel()
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
                self._finish(job, "cancelled", error=JobCancelled())

    # The thread ------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                if not self._queue:
                    return
                job = self._running = self._queue.popleft()
            self._run(job)
            del job  # not to be held until the next one comes

    def _run(self, job: Job) -> None:
        started = time.monotonic()
        job.has_started = True
        self.metrics.waited.observe(started - job.created)
        self.metrics.busy.set(1)
        outcome, result, error = "done", None, None
        try:
            job.checkpoint()
            result = job.work(job)
        except JobCancelled:
            outcome, error = (
                "cancelled",
                JobCancelled(),
            )  # a new one: that one's traceback holds the tensors of its step
        except JobExpired:
            outcome = "expired"
            error = ApiError(
                504, f"The work was not done {self.job_timeout:g} s after the request came. Ask for less.", "timeout"
            )
        except ApiError as raised:
            outcome, error = "refused", raised.with_traceback(None)
        except BaseException:  # the thread must outlive whatever a model raises
            outcome, error = "failed", internal_error()
            logger.exception("%s %s failed", job.request_id, job.kind)
        seconds = time.monotonic() - started
        self.metrics.busy.set(0)
        self.metrics.seconds.labels(job.kind).observe(seconds)
        if outcome == "done":
            self._mean_seconds = 0.8 * self._mean_seconds + 0.2 * seconds
        logger.info("%s %s %s after %.2f s", job.request_id, job.kind, outcome, seconds)
        self._finish(job, outcome, result, error)

    def _finish(self, job: Job, outcome: str, result: Any = None, error: BaseException | None = None) -> None:
        self.metrics.jobs.labels(job.kind, outcome).inc()
        job.has_ended = True
        job.work = None  # and with it the pictures that came with the request
        if not job.future.set_running_or_notify_cancel():
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)
