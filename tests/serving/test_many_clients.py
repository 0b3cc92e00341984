"""The queue, clients that leave, and clients that come all at once."""

import concurrent.futures
import contextlib
import gc
import logging
import os
import random
import socket
import time
import types
import weakref

import httpx

from cogview_pipelines.serving import jobs
from cogview_pipelines.serving.jobs import Job, Work

from .conftest import LOW, PROMPT, assert_error, half_mask, picture, png, wait_for

GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": PROMPT, "size": f"{LOW}x{LOW}"}


def post(running, seed):
    """One request with a connection of its own, as different clients have."""
    with running.client() as client:
        return client.post(GENERATIONS, json={**SMALL, "seed": seed})


def send(running, seed=0):
    """A request whose answer nobody reads; closing the socket is leaving."""
    body = b'{"prompt": "a tiger on a blue background.", "seed": %d}' % seed
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def outcomes(running):
    """How many jobs ended how."""
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    counts = {}
    for line in lines:
        if line.startswith("cogview2_jobs_total"):
            counts[line.split('outcome="')[1].split('"')[0]] = float(line.split()[-1])
    return counts


def test_twenty_clients_at_once_all_get_their_own_picture(serve):
    running = serve(queue_limit=20)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda seed: post(running, seed), range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert [answer.json()["data"][0]["seed"] for answer in answers] == list(range(20))
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 20
    assert outcomes(running) == {"done": 20}
    assert running.worker.places_taken == 0


def test_with_a_small_queue_the_surplus_is_told_to_come_back(serve, hold):
    running = serve(queue_limit=3)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(post, running, seed) for seed in range(20)]
        wait_for(lambda: sum(future.done() for future in futures) == 17)
        hold.open()
        answers = [future.result() for future in futures]
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(accepted) == 3
    for answer in refused:
        error = assert_error(answer, 429, "queue_full")
        assert error["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert outcomes(running) == {"done": 3}
    assert post(running, 0).status_code == 200


def test_who_leaves_in_mid_generation_stops_it_and_the_next_one_runs(serve, hold):
    running = serve()
    hold.close()
    leaving = send(running)
    assert hold.reached.wait(30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        next_one = pool.submit(post, running, 5)
        wait_for(lambda: running.worker.places_taken == 2)
        before = hold.steps
        leaving.close()
        wait_for(lambda: running.worker.places_taken == 1)
        hold.open()
        assert next_one.result().status_code == 200
    assert outcomes(running) == {"cancelled": 1, "done": 1}
    full, small = 16 + 2, 16  # forward passes of the low resolution, and what is left of it for the next one
    assert hold.steps - before < full + small


def test_who_leaves_in_mid_edit_stops_it(serve, hold):
    running = serve()
    form = httpx.Request(
        "POST",
        f"{running.url}/v1/images/edits",
        data={"prompt": PROMPT, "n": "2"},
        files={"image": png(picture()), "mask": png(half_mask())},
    )
    hold.close()
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as leaving:
        head = "".join(f"{name}: {value}\r\n" for name, value in form.headers.items())
        leaving.sendall(f"POST /v1/images/edits HTTP/1.1\r\n{head}\r\n".encode() + form.read())
        assert hold.reached.wait(30)
    wait_for(lambda: running.worker.places_taken == 0)
    before = hold.steps
    hold.open()
    wait_for(lambda: outcomes(running) == {"cancelled": 1})
    assert hold.steps - before <= 1
    assert post(running, 0).status_code == 200


def test_who_leaves_the_queue_is_never_computed_and_forgotten(serve, hold):
    running = serve()
    hold.close()
    first = send(running)
    assert hold.reached.wait(30)
    second = send(running)
    wait_for(lambda: running.worker.places_taken == 2)
    second.close()
    wait_for(lambda: running.worker.places_taken == 1)
    assert outcomes(running) == {"cancelled": 1}  # while the first one still runs
    first.close()
    hold.open()
    wait_for(lambda: outcomes(running) == {"cancelled": 2})


def test_work_that_takes_too_long_is_stopped_and_answered(serve, hold):
    running = serve(job_timeout=0.2)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, running, 0)
        assert hold.reached.wait(30)
        time.sleep(0.3)
        hold.open()
        assert_error(waiting.result(), 504, "timeout")


def test_pictures_are_not_kept_after_their_request(server):
    jobs, left = [], weakref.WeakSet()
    submitted = server.worker.enqueue

    def remember(job):
        jobs.append(job)
        left.add(job)
        submitted(job)

    server.worker.enqueue = remember
    try:
        with server.client() as client:
            for seed in range(3):
                files = {"image": png(picture(32, 32))}
                answer = client.post("/v1/images/upscales", data={"seed": str(seed)}, files=files)
                assert answer.status_code == 200
        assert len(jobs) == 3 and all(job.state is None and job.stages == () for job in jobs)
        jobs.clear()
        gc.collect()
        assert len(left) <= 1  # the last one may still be on its way out
    finally:
        del server.worker.enqueue


def test_an_end_of_the_server_refuses_at_once_what_waits_and_lets_end_what_runs(serve, hold):
    running = serve(shutdown_timeout=30)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, running, 0)
        assert hold.reached.wait(30)
        others = [pool.submit(post, running, seed) for seed in (1, 2)]
        wait_for(lambda: running.worker.places_taken == 3)
        running.server.should_exit = True
        for answer in others:
            assert_error(answer.result(), 503, "stopping")
        assert not first.done()
        hold.open()
        assert first.result().status_code == 200
    running.thread.join(30)
    assert not running.thread.is_alive() and not running.worker._thread.is_alive()


def test_an_end_of_the_server_refuses_what_runs_when_its_time_is_over(serve, hold, caplog):
    running = serve(shutdown_timeout=0.5)
    hold.close()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, running, 0)
        assert hold.reached.wait(30)
        running.server.should_exit = True
        error = assert_error(answer.result(), 503, "stopping")  # while the model is still at its step
        assert error["type"] == "server_error"
    hold.open()
    running.thread.join(30)
    assert not running.thread.is_alive() and not running.worker._thread.is_alive()
    assert "Traceback" not in caplog.text


def test_a_server_that_stops_lets_nobody_in(serve):
    running = serve()
    running.worker.close()
    with running.client() as client:
        answer = client.post(GENERATIONS, json=SMALL)
        assert_error(answer, 503, "stopping")
        assert "retry-after" in answer.headers
        assert client.get("/health").status_code == 503


def test_a_job_that_nobody_asks_for_any_more_is_cancelled():
    job = Job("generation", Work([]), lease=0.0)
    wait_for(lambda: job.is_cancelled)
    job.renew()
    assert job.is_cancelled  # for good


def test_a_job_that_is_asked_for_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    job = Job("generation", Work([]), lease=2.0)
    for _ in range(3):
        now[0] += 1.5
        assert not job.is_cancelled
        job.renew()
    now[0] += 2.5
    assert job.is_cancelled


def test_clients_who_come_again_and_again_and_of_whom_some_leave_hold_nothing(serve, caplog):
    """Twenty at once, three requests each, every tenth of which is left before its answer."""
    running, seeds = serve(queue_limit=40), range(3)
    alone = [post(running, seed).json()["data"][0]["b64_json"] for seed in seeds]
    small = {"image": png(picture(32, 32))}
    paths = {"upscales": {"seed": "1"}, "captions": {}, "scores": {"prompt": PROMPT}}
    forms = {}
    with running.client() as client:
        for path, data in paths.items():
            forms[path] = client.post(f"/v1/images/{path}", data=data, files=small).json()

    def come(number):
        generator = random.Random(number)
        for _ in range(3):
            if generator.random() < 0.1:
                with contextlib.closing(send(running, seed=number)):
                    time.sleep(generator.choice([0, 0.01, 0.1, 0.3]))
            elif generator.random() < 0.5:
                seed = generator.choice(seeds)
                assert post(running, seed).json()["data"][0]["b64_json"] == alone[seed]
            else:
                path = generator.choice(list(paths))
                with running.client() as client:
                    answer = client.post(f"/v1/images/{path}", data=paths[path], files=small)
                assert answer.status_code == 200 and answer.json()["data"] == forms[path]["data"], answer.text

    def sockets():
        """Those that are open, of clients and server, after a while."""
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))

    before = sockets()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(come, range(20)))
    wait_for(lambda: running.worker.places_taken == 0)
    counts = outcomes(running)
    assert set(counts) <= {"done", "cancelled"} and counts["cancelled"] > 0
    wait_for(lambda: sockets() <= before)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_twenty_clients_of_forms(serve):
    running = serve(queue_limit=20)

    def rank(seed):
        with running.client() as client:
            return client.post(
                "/v1/images/scores", data={"prompt": PROMPT}, files={"image": png(picture(32, 32, seed=seed))}
            )

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(rank, range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
