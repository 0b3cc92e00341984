"""Clients that send slowly, say nothing, or leave in mid-upload keep nobody else out."""

import concurrent.futures
import contextlib
import logging
import socket
import time

from .conftest import LOW, PROMPT, assert_error, picture, png, wait_for

GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": PROMPT, "size": f"{LOW}x{LOW}"}


def begin(running, path=GENERATIONS, kind="application/json", length=1000):
    """A request whose body has only begun."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + (b"{" if kind == "application/json" else b"--x\r\n"))
    return connection


def test_bodies_that_come_slowly_give_their_places_to_others(serve):
    running = serve(queue_limit=3)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(begin(running)) for _ in range(3)]
        wait_for(lambda: running.worker.places_taken == 3)
        slow[0].sendall(b" " * 500)  # the fastest of them is the last to go
        with running.client() as client:
            assert_error(client.post(GENERATIONS, json=SMALL), 429, "queue_full")  # they have their time
            for place in running.worker._places:
                place.upload.grace = 0.0  # as if it were over
            for one in slow[1:]:
                one.sendall(b" ")
            assert client.post(GENERATIONS, json=SMALL).status_code == 200
            assert client.post(GENERATIONS, json=SMALL).status_code == 200
        assert running.worker.places_taken == 2
        slow[0].settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            raise AssertionError(slow[0].recv(1000))
        slow[1].settimeout(5)
        slow[2].settimeout(0.2)
        said = []
        for one in slow[1:]:
            with contextlib.suppress(TimeoutError):
                said.append(one.recv(4000))
        assert len(said) == 1 and said[0].startswith(b"HTTP/1.1 408") and b"body_timeout" in said[0]
    wait_for(lambda: running.worker.places_taken == 0)


def test_requests_that_wait_for_the_model_keep_their_places(serve, hold):
    running = serve(queue_limit=2, body_grace=0.0)
    hold.close()
    with running.client() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, GENERATIONS, json={**SMALL, "seed": seed}) for seed in range(2)]
        wait_for(lambda: running.worker.places_taken == 2)
        assert hold.reached.wait(30)
        with running.client() as other:
            assert_error(other.post(GENERATIONS, json=SMALL), 429, "queue_full")
        hold.open()
        assert [answer.result().status_code for answer in waiting] == [200, 200]


def test_connections_that_say_nothing_give_way_to_others(serve):
    running = serve(max_connections=8, silence_grace=0.2, head_timeout=60)
    address = ("127.0.0.1", running.port)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            silent = stack.enter_context(socket.create_connection(address, timeout=30))
            silent.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: loc")  # a head that never ends
        time.sleep(0.5)
        with running.client() as client:
            for _ in range(3):
                assert client.get("/health").status_code == 200


def test_a_connection_with_a_request_at_work_is_not_closed_for_others(serve, hold):
    running = serve(max_connections=4, silence_grace=0.1)
    hold.close()
    with running.client() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        working = pool.submit(client.post, GENERATIONS, json=SMALL)
        assert hold.reached.wait(30)
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30))
                time.sleep(0.15)
            hold.open()
            assert working.result().status_code == 200


def test_who_leaves_in_mid_upload_is_no_error(serve, caplog):
    running = serve(page=True)
    caplog.set_level(logging.INFO)
    form = "multipart/form-data; boundary=x"
    for path, kind in (
        (GENERATIONS, "application/json"),
        ("/v1/images/edits", form),
        ("/v1/images/scores", form),
        ("/gradio_api/queue/join", "application/json"),
    ):
        before = running.worker.places_taken
        leaving = begin(running, path, kind)
        wait_for(lambda before=before: running.worker.places_taken == before + 1)
        leaving.close()
        wait_for(lambda before=before: running.worker.places_taken == before)
    with running.client() as client:
        wait_for(lambda: client.get("/metrics").text.count('status="499"') >= 3)
        assert 'status="500"' not in client.get("/metrics").text
    assert "Traceback" not in caplog.text and "ERROR" not in caplog.text


def test_who_leaves_while_a_picture_is_encoded_stops_it(serve, pipe, monkeypatch):
    """The image tokenizer alone takes long for a large picture, before the first step of a model."""
    running = serve()
    begun, layers = [], []
    encode = pipe.vqvae.encode
    first = next(iter(pipe.vqvae.encoder.children()))
    last = pipe.vqvae.encoder.conv_out

    def slow(*arguments):
        begun.append(True)
        handle = first.register_forward_hook(lambda *_: time.sleep(1))
        seen = last.register_forward_hook(lambda *_: layers.append(True))
        try:
            return encode(*arguments)
        finally:
            handle.remove()
            seen.remove()

    monkeypatch.setattr(pipe.vqvae, "encode", slow)
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body += png(picture()) + b"\r\n--x--\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as leaving:
        head = "POST /v1/images/upscales HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x"
        leaving.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: begun)
    wait_for(lambda: not running.worker.is_busy and running.worker.places_taken == 0)
    assert layers == []
