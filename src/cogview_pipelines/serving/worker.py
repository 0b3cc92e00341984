"""One thread owns the model; everything else hands it jobs through a queue with a limit."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator

from .errors import ApiError, internal_error
from .jobs import Job, JobCancelled, checkpoint
from .metrics import Metrics
from .uploads import Upload

logger = logging.getLogger(__name__)


class Place:
    """Room for one job, from before its request is read until its result is answered."""

    def __init__(self, worker: "Worker", upload: Upload | None):
        self.upload = upload
        self._worker, self._deadline = worker, time.monotonic() + worker.job_timeout
        self._job: Job | None = None

    @property
    def is_reading(self) -> bool:
        """Whether the request has not led to a job yet."""
        return self._job is None and self.upload is not None

    def submit(self, job: Job) -> Job:
        """
        Queue the job; leaving the place cancels it, if it has not ended.

        Raises:
            ApiError: If the place went to somebody else meanwhile.
        """
        assert self._job is None, "a place is for one job"
        if self.upload is not None:
            self.upload.check()
        job.deadline, job.timeout = self._deadline, self._worker.job_timeout
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

    The oldest job is always the next one. Others whose next stage is of the same kind are computed together with it,
    as many as fit into a batch; after each stage batches are formed anew.

    Args:
        limit (`int`): Places, and so the most jobs and requests that are held in memory.
        job_timeout (`float`): Seconds from taking a place until its job is stopped.
        metrics ([`Metrics`]): What to count.
        batch_size (`int`): Pictures of several jobs that are computed together at the most.
    """

    def __init__(self, limit: int, job_timeout: float, metrics: Metrics, batch_size: int = 1):
        self.limit, self.job_timeout, self.metrics, self.batch_size = limit, job_timeout, metrics, batch_size
        self._changed = threading.Condition()
        self._queue: list[Job] = []  # oldest first
        self._running: list[Job] = []
        self._places: list[Place] = []
        self._mean_seconds = 1.0
        self._is_closed = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="cogview2-worker", daemon=True)

    # For everybody ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more, and end what has not begun; what has begun goes on."""
        with self._changed:
            self._is_closed = True
            waiting = [job for job in self._queue if not job.has_started]
        for job in waiting:
            self.drop(job)

    def abandon(self) -> None:
        """End all jobs for those who wait for them, whatever the thread is at; it stops at its next step."""
        self.close()
        with self._changed:
            jobs = [*self._queue, *self._running]
        for job in jobs:
            self.drop(job)
            job.end_if_due()

    def stop(self) -> None:
        """Cancel everything and end the thread; it ends after the step that it is at."""
        self.abandon()
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs will be done."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def is_busy(self) -> bool:
        """Whether the thread computes."""
        return bool(self._running)

    @property
    def places_taken(self) -> int:
        """Requests that are being read, wait, or are computed."""
        return len(self._places)

    @contextlib.contextmanager
    def place(self, upload: Upload | None = None) -> Iterator[Place]:
        """
        Room for one job while in the context.

        Args:
            upload ([`Upload`], *optional*): The body that is still to be read. If it comes slowly, the place may go to
                somebody else when there is no other.

        Raises:
            ApiError: If the server is full (429) or stops (503).
        """
        place = Place(self, upload)
        with self._changed:
            if self._is_closed:
                raise ApiError(503, "The server is stopping.", "stopping", retry_after=10)
            if len(self._places) >= self.limit and not self._evict():
                seconds = min(max(math.ceil(self._mean_seconds), 1), 60)
                raise ApiError(
                    429,
                    f"The queue is full: {self.limit} requests wait or are computed. Try again in {seconds} s.",
                    "queue_full",
                    retry_after=seconds,
                )
            self._places.append(place)
            self.metrics.places.set(len(self._places))
        try:
            yield place
        finally:
            place.leave()
            with self._changed:
                if place in self._places:
                    self._places.remove(place)
                self.metrics.places.set(len(self._places))

    def _evict(self) -> bool:
        """Take the place of the slowest body, if there is one that has had its time."""
        reading = [(place, place.upload) for place in self._places if place.is_reading and place.upload is not None]
        slow = [(place, upload) for place, upload in reading if upload.may_be_evicted]
        if not slow:
            return False
        place, upload = min(slow, key=lambda one: one[1].rate)
        upload.evict()
        self._places.remove(place)
        return True

    # For places ------------------------------------------------------------------------------------------------------

    def enqueue(self, job: Job) -> None:
        """Add a job that has a place."""
        job.on_end = self._count
        with self._changed:
            is_closed = self._is_closed
            if not is_closed:
                self._queue.append(job)
                self._changed.notify()
        if is_closed:
            job.end("cancelled", error=JobCancelled())

    def drop(self, job: Job) -> None:
        """Cancel a job; one that is not being computed is forgotten at once, with all that it holds."""
        job.cancel()
        with self._changed:
            is_waiting = job in self._queue
            if is_waiting:
                self._queue.remove(job)
        if is_waiting:
            job.end_if_due()

    def _count(self, job: Job, outcome: str) -> None:
        self.metrics.jobs.labels(job.kind, outcome).inc()
        if not job.has_started:
            return
        seconds = time.monotonic() - job.started
        self.metrics.seconds.labels(job.kind).observe(seconds)
        logger.info("%s %s %s after %.2f s", job.request_id, job.kind, outcome, seconds)

    # The thread ------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                if not self._queue:
                    return
                jobs = self._running = self._next_batch()
            self._run(jobs)
            with self._changed:
                if not self._is_stopping:
                    left = [job for job in jobs if not job.has_ended]
                    self._queue = sorted((*left, *self._queue), key=lambda job: job.created)
            del jobs  # not to be held until the next ones come

    def _next_batch(self) -> list[Job]:
        """The oldest job, and those that can be computed together with it."""
        stages = {job: stage for job in self._queue if (stage := job.stage) is not None}
        size = 0
        batch: list[Job] = []
        for job, stage in stages.items():
            is_alike = not batch or stage.key == stages[batch[0]].key
            if is_alike and (not batch or size + job.size <= self.batch_size):
                batch.append(job)
                size += job.size
        self._queue = [job for job in stages if job not in batch]
        return batch

    def _run(self, jobs: list[Job]) -> None:
        """The next stage of some jobs."""
        began = time.monotonic()
        for job in jobs:
            if not job.has_started:
                job.started = began
                self.metrics.waited.observe(began - job.created)
        self.metrics.busy.set(1)
        try:
            checkpoint(jobs)
            alive = {job: stage for job in jobs if (stage := job.stage) is not None}
            if not alive:
                raise JobCancelled
            self.metrics.batches.labels(jobs[0].kind).observe(sum(job.size for job in alive))
            next(iter(alive.values())).run(list(alive))
        except JobCancelled:
            pass  # nobody waits for any of them
        except BaseException as raised:  # the thread must outlive whatever a model raises
            failed = [job for job in jobs if not job.has_ended]
            if len(failed) == 1:
                self._fail(failed[0], raised)
            del raised  # with its traceback, which holds the tensors of its step
            if len(failed) > 1:
                for job in failed:  # the others must not suffer from the one that is at fault
                    self._run([job])
        else:
            for job in jobs:
                self._advance(job)
            share = (time.monotonic() - began) / len(jobs)
            self._mean_seconds = 0.8 * self._mean_seconds + 0.2 * share
        self.metrics.busy.set(0)

    @staticmethod
    def _advance(job: Job) -> None:
        state, rest = job.state, job.stages[1:]
        if rest:
            job.stages = rest
        else:
            job.end("done", result=state)

    @staticmethod
    def _fail(job: Job, error: BaseException) -> None:
        if isinstance(error, ApiError):
            job.end("refused", error=error.with_traceback(None))
        else:
            logger.error("%s %s failed", job.request_id, job.kind, exc_info=error)
            job.end("failed", error=internal_error())
