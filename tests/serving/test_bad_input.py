"""What the API refuses, and how: with a JSON error that names the field, and nothing of the server's insides."""

import concurrent.futures
import contextlib
import io
import json
import socket
import struct
import time
import zlib

import pytest
from PIL import Image

from ..pictures.utils import exchanged_primaries
from .conftest import FINE, PROMPT, assert_error, half_mask, picture, png

GENERATIONS = "/v1/images/generations"
FORMS = ("/v1/images/edits", "/v1/images/upscales", "/v1/images/captions", "/v1/images/scores")


def huge_png(width, height):
    """A PNG file of a few bytes that claims to be huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animated(kind):
    file = io.BytesIO()
    frames = [picture(seed=seed) for seed in range(3)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{'prompt': 'a'}", "invalid_json"),
        (b'{"prompt": "a tiger"', "invalid_json"),
        (b'["a tiger"]', "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', "invalid_json"),
        (b'{"prompt": "a tiger", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a tiger", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    ],
)
def test_what_is_not_a_json_object_is_refused(client, body, code):
    answer = client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert_error(answer, 400, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", "missing_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "\u200b"}, "prompt", "invalid_value"),  # not blank, but nothing that the model can read
        ({"prompt": 7}, "prompt", "invalid_value"),
        ({"prompt": "a\0b"}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 1001}, "prompt", "prompt_too_long"),
        ({"prompt": "tiger " * 100}, "prompt", "invalid_value"),  # too many tokens for the model
        ({"prompt": PROMPT, "colour": "blue"}, "colour", "unknown_parameter"),
        ({"prompt": PROMPT, "n": 0}, "n", "invalid_value"),
        ({"prompt": PROMPT, "n": 9}, "n", "invalid_value"),
        ({"prompt": PROMPT, "n": "2"}, "n", "invalid_value"),
        ({"prompt": PROMPT, "n": 1.5}, "n", "invalid_value"),
        ({"prompt": PROMPT, "n": True}, "n", "invalid_value"),
        ({"prompt": PROMPT, "num_candidates": 17}, "num_candidates", "invalid_value"),
        ({"prompt": PROMPT, "n": 4, "num_candidates": 2}, "num_candidates", "invalid_value"),
        ({"prompt": PROMPT, "size": "1024x1024"}, "size", "invalid_value"),
        ({"prompt": PROMPT, "size": f"{FINE}x{FINE}x3"}, "size", "invalid_value"),
        ({"prompt": None}, "prompt", "missing_parameter"),
        ({"prompt": PROMPT, "colour": None}, "colour", "unknown_parameter"),
        ({"prompt": PROMPT, "seed": -2}, "seed", "invalid_value"),
        ({"prompt": PROMPT, "stream": True}, "stream", "invalid_value"),
        ({"prompt": PROMPT, "background": "transparent"}, "background", "invalid_value"),
        ({"prompt": PROMPT, "output_format": "tiff"}, "output_format", "invalid_value"),
        ({"prompt": PROMPT, "seed": 2**63}, "seed", "invalid_value"),
        ({"prompt": PROMPT, "temperature": 0}, "temperature", "invalid_value"),
        ({"prompt": PROMPT, "temperature": 1e300}, "temperature", "invalid_value"),
        ({"prompt": PROMPT, "num_lopar_steps": 1000}, "num_lopar_steps", "invalid_value"),
        ({"prompt": PROMPT, "style": "oil"}, "style", "invalid_value"),
        ({"prompt": PROMPT, "negative_prompt": "a car"}, "negative_prompt", "invalid_value"),
        ({"prompt": PROMPT, "response_format": "url"}, "response_format", "invalid_value"),
        ({"prompt": PROMPT, "model": "other"}, "model", "model_not_found"),
    ],
)
def test_a_bad_field_is_named(client, fields, param, code):
    answer = client.post(GENERATIONS, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    error = assert_error(answer, 404 if code == "model_not_found" else 400, code, param)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (png(Image.new("1", (10_000, 10_000))), "10000 x 10000"),  # 100 megapixels in 12 KB, all of them there
        (huge_png(10_000, 10_000), "10000 x 10000"),
        (huge_png(60_000, 60_000), "pixels"),
        (huge_png(64, 64), "damaged"),
        (png(picture())[:-60], "damaged"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "no picture"),
        (b"", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (animated("GIF"), "animation of 3 frames"),
        (animated("PNG"), "animation of 3 frames"),
        (animated("WEBP"), "animation of 3 frames"),
    ],
    ids=[
        "100 megapixels",
        "claims 100 megapixels",
        "bomb",
        "empty data",
        "cut off",
        "no JPEG",
        "nothing",
        "SVG",
        "GIF",
        "APNG",
        "WebP",
    ],
)
@pytest.mark.parametrize("path", FORMS)
def test_a_file_that_is_no_single_sound_picture_is_refused(client, path, content, part):
    data = {} if path.endswith("captions") else {"prompt": PROMPT}
    files = {"image": content, **({"mask": png(half_mask())} if path.endswith("edits") else {})}
    error = assert_error(client.post(path, data=data, files=files), 400, "invalid_image", "image")
    assert part in error["message"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (png(Image.new("1", (10_000, 10_000))), "10000 x 10000"),
        (png(half_mask())[:-60], "damaged"),
        (animated("GIF"), "animation of 3 frames"),
        (b"no picture", "no picture"),
    ],
    ids=["100 megapixels", "cut off", "GIF", "text"],
)
def test_a_mask_that_is_no_single_sound_picture_is_refused(client, content, part):
    files = {"image": png(picture()), "mask": content}
    error = assert_error(
        client.post("/v1/images/edits", data={"prompt": PROMPT}, files=files), 400, "invalid_image", "mask"
    )
    assert part in error["message"]


@pytest.mark.parametrize("path", FORMS)
def test_every_form_refuses_unknown_fields_and_long_texts(client, path):
    files = {"image": png(picture()), **({"mask": png(half_mask())} if path.endswith("edits") else {})}
    data = {} if path.endswith("captions") else {"prompt": PROMPT}
    answer = client.post(path, data={**data, "colour": "blue"}, files=files)
    assert_error(answer, 400, "unknown_parameter", "colour")
    if path.endswith("captions"):
        return
    answer = client.post(path, data={"prompt": "x" * 1001}, files=files)
    assert_error(answer, 400, "prompt_too_long", "prompt")
    answer = client.post(path, data={"prompt": "tiger " * 100}, files=files)
    error = assert_error(answer, 400, "invalid_value", "prompt")
    assert "Shorten it" in error["message"] and len(error["message"]) < 200
    answer = client.post(path, data={"prompt": "\u200b"}, files=files)
    assert_error(answer, 400, "invalid_value", "prompt")


def test_an_edit_has_the_size_of_its_picture(client):
    files = {"image": png(picture()), "mask": png(half_mask())}
    for size, status in (("auto", 200), ("64x64", 200), ("1024x1024", 400), ("64", 400)):
        answer = client.post("/v1/images/edits", data={"prompt": PROMPT, "size": size}, files=files)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.json()["size"] == "64x64"
        else:
            assert_error(answer, 400, "invalid_value", "size")


def test_a_picture_of_16_bits_or_of_other_colours_is_that_of_its_bytes_in_srgb(client):
    grey = picture().convert("L")
    deep = Image.frombytes("I;16", grey.size, b"".join(bytes([value // 3, value]) for value in grey.tobytes()))
    red, green, blue = picture().split()
    exchanged = io.BytesIO()
    Image.merge("RGB", (blue, green, red)).save(exchanged, "PNG", icc_profile=exchanged_primaries())
    for same, other in ((png(grey), png(deep)), (png(picture()), exchanged.getvalue())):
        answers = [client.post("/v1/images/captions", files={"image": content}).json() for content in (same, other)]
        scores = [answer["data"][0]["captions"][0]["score"] for answer in answers]
        assert scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.mark.parametrize(
    ("mask", "part"),
    [
        (half_mask(60, 64), "as large as its picture"),
        (Image.new("L", (64, 64), 0), "nothing to paint"),
        (Image.new("L", (64, 64), 255), "whole picture"),
        (half_mask(box=(0, 0, 64, 63)), "every token is masked"),
    ],
    ids=["other size", "empty", "full", "nearly full"],
)
def test_a_mask_that_cannot_be_used_is_refused(client, mask, part):
    files = {"image": png(picture()), "mask": png(mask)}
    error = assert_error(client.post("/v1/images/edits", data={"prompt": PROMPT}, files=files), 400, param="mask")
    assert part in error["message"]


def test_an_edit_without_a_mask_is_refused(client):
    answer = client.post("/v1/images/edits", data={"prompt": PROMPT}, files={"image": png(picture())})
    assert_error(answer, 400, "missing_parameter", "mask")


@pytest.mark.parametrize(
    ("data", "files", "param", "code"),
    [
        ({}, {"image": png(picture())}, "prompt", "missing_parameter"),
        ({"prompt": [PROMPT, PROMPT]}, {"image": png(picture())}, "prompt", "invalid_value"),
        ({"prompt": PROMPT, "colour": "x"}, {"image": png(picture())}, "colour", "unknown_parameter"),
        ({"prompt": PROMPT}, {"image": png(picture()), "other": b"x"}, "other", "unknown_parameter"),
        ({"prompt": PROMPT, "image": "text"}, {"mask": png(half_mask())}, "image", "invalid_value"),
        ({"prompt": PROMPT, "n": "many"}, {"image": png(picture())}, "n", "invalid_value"),
        ({"prompt": PROMPT}, {"mask": png(half_mask())}, "image", "missing_parameter"),
        ({"prompt": PROMPT}, [("image", png(picture()))] * 2, "image", "invalid_value"),
    ],
)
def test_a_bad_form_is_refused(client, data, files, param, code):
    assert_error(client.post("/v1/images/edits", data=data, files=files), 400, code, param)


def test_more_captions_than_a_strategy_makes_are_refused(client):
    for strategy in ("greedy", "beam", "best_of"):
        answer = client.post(
            "/v1/images/captions", data={"n": "9", "strategy": strategy}, files={"image": png(picture(32, 32))}
        )
        assert_error(answer, 400, "invalid_value", "n")


def test_a_form_that_is_none_is_refused(client):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_error(client.post("/v1/images/edits", content=b"--y\r\nfoo", headers=headers), 400, "invalid_form")
    headers = {"Content-Type": "multipart/form-data"}
    assert_error(client.post("/v1/images/edits", content=b"--y\r\nfoo", headers=headers), 400, "invalid_form")
    assert_error(client.post("/v1/images/edits", json={"prompt": PROMPT}), 415, "unsupported_media_type")
    assert_error(client.post(GENERATIONS, data={"prompt": PROMPT}), 415, "unsupported_media_type")


def test_counts_and_sizes_of_forms_are_bounded(client):
    small = png(picture(16, 16))
    answer = client.post("/v1/images/captions", files=[("image", small)] * 9)
    assert_error(answer, 400, "invalid_value", "image")
    answer = client.post("/v1/images/captions", files=[("image", png(Image.new("L", (1500, 1500))))] * 2)
    assert_error(answer, 400, "invalid_image", "image")  # within the bound one by one, not together
    answer = client.post("/v1/images/scores", data={"prompt": ["a"] * 33}, files={"image": small})
    assert_error(answer, 400, "invalid_value", "prompt")
    answer = client.post("/v1/images/upscales", files={"image": png(picture(700, 700))})
    assert_error(answer, 400, "invalid_value", "image")
    answer = client.post("/v1/images/upscales", data={"num_levels": "4"}, files={"image": png(picture(200, 200))})
    assert_error(answer, 400, "invalid_value", "image")


@pytest.mark.parametrize("size", [(60_000, 1), (300_000, 1), (1, 300_000)])
def test_a_thin_picture_counts_with_what_fills_its_tiles(client, size):
    files = {"image": png(Image.new("L", size))}
    began = time.monotonic()
    error = assert_error(client.post("/v1/images/upscales", files=files, data={"num_levels": "2"}), 400, param="image")
    assert "fills its tiles" in error["message"]
    assert time.monotonic() < began + 30  # nothing was computed


def test_other_paths_and_methods_are_json_errors_too(client):
    assert_error(client.get("/v1/images"), 404, "not_found")
    assert_error(client.get("/../../etc/passwd"), 404, "not_found")
    answer = client.get(GENERATIONS)
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve):
    running = serve(max_body_bytes=10_000)
    with running.client() as client:
        answer = client.post(GENERATIONS, json={"prompt": "x" * 20_000})
        assert_error(answer, 413, "body_too_large")

        def chunks():  # without a length
            for _ in range(20):
                yield b" " * 1000

        answer = client.post(GENERATIONS, content=chunks(), headers={"Content-Type": "application/json"})
        assert_error(answer, 413, "body_too_large")
        assert client.post(GENERATIONS, json={"prompt": PROMPT}).status_code == 200
    assert running.worker.places_taken == 0


def test_a_body_that_does_not_come_gives_its_place_back(serve):
    running = serve(body_timeout=0.3, queue_limit=1)
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    with running.client() as client:
        assert client.post(GENERATIONS, json={"prompt": PROMPT}).status_code == 200


def test_a_connection_on_which_no_request_comes_is_closed_and_one_at_work_is_not(serve, hold):
    running = serve(head_timeout=0.3, max_connections=4)
    address = ("127.0.0.1", running.port)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)]
        silent[0].sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: loc".encode())
        silent[1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n")  # and no more
        said = [b"".join(iter(lambda one=one: one.recv(1000), b"")) for one in silent]
        assert [answers.count(b"HTTP/1.1 ") for answers in said] == [0, 1, 0]
        assert said[1].startswith(b"HTTP/1.1 200")
    with running.client() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        hold.close()
        slow = pool.submit(client.post, GENERATIONS, json={"prompt": PROMPT})
        assert hold.reached.wait(30)
        time.sleep(1)
        hold.open()
        assert slow.result().status_code == 200


def test_a_failure_of_ours_tells_nothing(serve, pipe, monkeypatch, caplog):
    running = serve()

    def fail(*arguments, **settings):
        raise RuntimeError("in /home/somebody/secret.py")

    with running.client() as client:
        monkeypatch.setattr(pipe.vqvae, "decode", fail)
        answer = client.post(GENERATIONS, json={"prompt": PROMPT})
        error = assert_error(answer, 500, "failed")
        assert "secret" not in answer.text and error["type"] == "server_error"
        assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text
        monkeypatch.undo()
        assert client.post(GENERATIONS, json={"prompt": PROMPT}).status_code == 200  # the thread lives on


def test_a_value_error_that_names_no_field_is_a_failure_of_ours(serve, pipe, monkeypatch):
    running = serve()

    def fail(*arguments, **settings):
        raise ValueError("`weights` must be finite.")

    with running.client() as client:
        monkeypatch.setattr(pipe.vqvae, "decode", fail)
        assert_error(client.post(GENERATIONS, json={"prompt": PROMPT}), 500, "failed")
