"""Requests that wait together are computed together, and nobody notices but by the clock."""

import concurrent.futures
import threading

import pytest

from cogview_pipelines.serving.errors import ApiError
from cogview_pipelines.serving.jobs import Job, JobCancelled, Stage, Work, checkpoint
from cogview_pipelines.serving.metrics import Metrics
from cogview_pipelines.serving.worker import Worker

from .conftest import LOW, PROMPT, assert_error, picture, png, wait_for

GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": PROMPT, "size": f"{LOW}x{LOW}"}


class Line:
    """A worker whose stages wait for the test, and write down who was computed with whom."""

    def __init__(self, **settings):
        self.worker = Worker(100, 600, Metrics(), **settings)
        self.seen, self.entered = [], threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def stage(self, key, fails=()):
        def run(jobs):
            self.seen.append((key, [job.request_id for job in jobs]))
            self.entered.release()
            assert self.go.acquire(timeout=30)
            checkpoint(jobs)
            for job in jobs:
                if job.request_id in fails:
                    raise ApiError(400, "no", "invalid_value") if len(jobs) == 1 else RuntimeError("somebody's fault")
            for job in jobs:
                job.state = (*(job.state or ()), key)

        return Stage(key, run)

    def add(self, name, keys, size=1, fails=()):
        job = Job("generation", Work([self.stage(key, fails) for key in keys], None, size), request_id=name)
        self.worker.enqueue(job)
        return job

    def step(self, count=1):
        """Let stages end, and wait until the next one is at work, if there is one."""
        for _ in range(count):
            self.go.release()

    def wait(self):
        assert self.entered.acquire(timeout=30)


@pytest.fixture
def line():
    lines = []

    def make(**settings):
        line = Line(**settings)
        lines.append(line)
        line.worker.start()
        return line

    yield make
    for line in lines:
        line.step(100)
        line.worker.stop()


def test_jobs_of_one_key_that_wait_are_computed_together(line):
    line = line(batch_size=8)
    first = line.add("first", ["a"])
    line.wait()
    others = [line.add("b1", ["b"]), line.add("c1", ["c"]), line.add("b2", ["b"]), line.add("c2", ["c"])]
    line.step(3)
    assert [job.future.result(30) for job in (first, *others)] == [("a",), ("b",), ("c",), ("b",), ("c",)]
    assert line.seen == [("a", ["first"]), ("b", ["b1", "b2"]), ("c", ["c1", "c2"])]


def test_the_oldest_is_always_next_and_batches_have_a_size(line):
    line = line(batch_size=4)
    line.add("first", ["a"])
    line.wait()
    for name, key, size in (("b1", "b", 3), ("c1", "c", 9), ("b2", "b", 2), ("b3", "b", 1), ("c2", "c", 1)):
        last = line.add(name, [key], size)
    line.step(6)
    last.future.result(30)
    together = [names for _, names in line.seen]
    assert together == [["first"], ["b1", "b3"], ["c1"], ["b2"], ["c2"]]  # what is larger than a batch runs alone


def test_an_arrival_joins_at_the_next_stage(line):
    line = line(batch_size=8)
    early = line.add("early", ["draft", "refine", "decode"])
    line.wait()
    late = line.add("late", ["refine", "decode"])
    line.step(3)
    assert early.future.result(30) == ("draft", "refine", "decode") and late.future.result(30) == ("refine", "decode")
    assert line.seen == [("draft", ["early"]), ("refine", ["early", "late"]), ("decode", ["early", "late"])]


def test_with_a_batch_of_one_each_is_computed_alone(line):
    line = line(batch_size=1)
    jobs = [line.add(str(number), ["a", "b"]) for number in range(3)]
    line.step(6)
    assert [job.future.result(30) for job in jobs] == [("a", "b")] * 3
    assert all(len(names) == 1 for _, names in line.seen)
    assert [names[0] for _, names in line.seen] == ["0", "0", "1", "1", "2", "2"]


def test_who_leaves_a_batch_leaves_it_at_once_and_holds_nobody(line):
    line = line(batch_size=8)
    line.add("first", ["x"])
    line.wait()
    gone, late, stays = (line.add(name, ["a", "b"]) for name in ("gone", "late", "stays"))
    line.step()
    line.wait()  # all three are in their first stage
    line.worker.drop(gone)
    late.deadline = 0.0
    line.step(2)
    assert stays.future.result(30) == ("a", "b")
    with pytest.raises(JobCancelled):
        gone.future.result(0)
    with pytest.raises(ApiError, match="not done"):
        late.future.result(0)
    assert line.seen[1:] == [("a", ["gone", "late", "stays"]), ("b", ["stays"])]


def test_who_fails_spoils_nobody_else(line, caplog):
    line = line(batch_size=8)
    line.add("first", ["x"])
    line.wait()
    good, bad, fine = (line.add(name, ["a"], fails=["bad"]) for name in ("good", "bad", "fine"))
    line.step(5)
    assert good.future.result(30) == fine.future.result(30) == ("a",)
    with pytest.raises(ApiError, match="no"):
        bad.future.result(0)
    assert line.seen[1:] == [("a", ["good", "bad", "fine"]), ("a", ["good"]), ("a", ["bad"]), ("a", ["fine"])]


def post(running, **fields):
    with running.client() as client:
        return client.post(GENERATIONS, json={**SMALL, **fields})


def test_clients_that_wait_together_get_the_pictures_that_each_gets_alone(serve, hold):
    requests = [{"seed": seed} for seed in range(5)] + [{"seed": 9, "n": 2, "num_candidates": 3}]
    requests += [{"seed": 5, "prompt": "一只猫,红色背景。"}, {"seed": 6, "temperature": 0.5}]
    alone = serve(batch_size=1)
    expected = [post(alone, **fields).json()["data"] for fields in requests]
    running = serve(batch_size=8)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(post, running, seed=100)
        assert hold.reached.wait(30)
        together = [pool.submit(post, running, **fields) for fields in requests]
        wait_for(lambda: running.worker.places_taken == len(requests) + 1)
        wait_for(lambda: len(running.worker._queue) == len(requests))
        hold.open()
        answers = [answer.result().json()["data"] for answer in together]
        assert first.result().status_code == 200
    for answer, data in zip(answers, expected):
        for one, other in zip(answer, data, strict=True):
            assert one.get("score") == pytest.approx(other.get("score"))
            assert (one["seed"], one["b64_json"]) == (other["seed"], other["b64_json"])
    with running.client() as client:
        numbers = client.get("/metrics").text
    [line] = [line for line in numbers.splitlines() if 'batch_pictures_bucket{kind="generation",le="4.0"}' in line]
    [total] = [line for line in numbers.splitlines() if 'batch_pictures_count{kind="generation"}' in line]
    assert float(line.split()[-1]) < float(total.split()[-1])  # some had more than four pictures


def test_pictures_of_one_size_are_enlarged_together(serve, hold):
    def enlarge(running, seed):
        with running.client() as client:
            files = {"image": png(picture(30, 20, seed=seed))}
            return client.post("/v1/images/upscales", data={"seed": str(seed), "prompt": PROMPT}, files=files)

    alone = serve(batch_size=1)
    expected = [enlarge(alone, seed).json()["data"] for seed in range(3)]
    running = serve(batch_size=8)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, running, seed=100)
        assert hold.reached.wait(30)
        together = [pool.submit(enlarge, running, seed) for seed in range(3)]
        wait_for(lambda: len(running.worker._queue) == 3)
        hold.open()
        assert [answer.result().json()["data"] for answer in together] == expected
        assert first.result().status_code == 200
    with running.client() as client:
        assert 'batch_pictures_bucket{kind="upscale",le="2.0"} 0.0' in client.get("/metrics").text


def test_a_request_of_several_that_cannot_be_made_is_refused_alone(serve, hold):
    running = serve(batch_size=8)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, running, seed=1)
        assert hold.reached.wait(30)
        bad, good = pool.submit(post, running, style="oil"), pool.submit(post, running, seed=2)
        assert_error(bad.result(), 400, "invalid_value", "style")  # while the others wait
        hold.open()
        assert first.result().status_code == good.result().status_code == 200
