"""
Requests made from the server's own description of itself, right ones and wrong ones: no answer is a failure, nothing
is logged as an error, and memory stays bounded.

`COGVIEW_FUZZ_SECONDS` says for how long to go on; by default 20.
"""

import io
import logging
import os
import random
import resource
import sys
import time

import pytest
from PIL import Image

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra `test`")
pytest.importorskip("gradio", reason="needs the extra `page`")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

from cogview_pipelines.serving.settings import ServerSettings  # noqa: E402

from ..pipelines.conftest import build  # noqa: E402
from ..serving.conftest import Running  # noqa: E402

SECONDS = float(os.environ.get("COGVIEW_FUZZ_SECONDS", "20"))
EXAMPLES = 4  # of a path at a time
MOST_MEMORY = 600 * 2**20  # by which the process may grow: some pictures' worth, and what the libraries keep
BOUNDS = {
    "max_images": 2,
    "max_candidates": 2,
    "max_texts": 4,
    "max_pixels": 60_000,
    "max_output_pixels": 60_000,
    "max_prompt_length": 200,
}


@st.composite
def files(draw):
    """Pictures of odd sizes, modes and kinds, whole and damaged; and what is none."""
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "1", "P", "LA", "I;16"]))
    size = draw(
        st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.sampled_from([(1, 4000), (4000, 1), (300, 300)])
    )
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    file = io.BytesIO()
    image = Image.new(mode, size)
    try:
        image.save(file, kind)
    except (OSError, ValueError, KeyError):  # not every kind has every mode
        image.convert("RGB").save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


schemathesis.openapi.format("binary", files())


@pytest.fixture(scope="module")
def server(tokenizer):
    """With a page, and bounds that keep every request short."""
    running = Running(build(tokenizer), ServerSettings(port=0, shutdown_timeout=2, **BOUNDS))
    running.start()
    yield running
    running.stop()


def peak_memory():
    """The most bytes that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def operations(server):
    """The paths and methods of the description."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def test_no_request_makes_the_server_fail(server, caplog):
    caplog.set_level(logging.WARNING)
    found, statuses = operations(server), []
    assert {operation.path for operation in found} >= {"/v1/images/generations", "/v1/images/edits", "/v1/models"}
    before, end, round_ = peak_memory(), time.monotonic() + SECONDS, 0
    while round_ == 0 or time.monotonic() < end:
        for operation in found:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                statuses += ask(operation, mode, round_)
        round_ += 1
    assert {200, 400} <= set(statuses)
    assert "Traceback" not in caplog.text and not [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert peak_memory() - before < MOST_MEMORY
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"} and server.worker.places_taken == 0


def ask(operation, mode, round_):
    """Some requests to an operation; returns the statuses of the answers."""
    statuses = []

    @seed(round_)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        answer = case.call(timeout=60)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (answer.status_code, answer.text[:500], case.as_curl_command()[:2000])
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in answer.text and "site-packages" not in answer.text

    try:
        run()
    except schemathesis.errors.InvalidSchema:
        raise
    except Exception as error:
        if type(error).__name__ in ("Unsatisfiable", "SerializationNotPossible"):
            return statuses  # there is nothing wrong that one could send here
        raise
    return statuses


def test_no_body_of_a_click_makes_the_page_fail(server, caplog):
    """The description does not hold the page's own routes."""
    caplog.set_level(logging.WARNING)
    generator, end, statuses = random.Random(0), time.monotonic() + SECONDS / 4, set()
    odd = [None, True, -1, 0, 1, 2, 999, 2**70, 0.5, "", "abc", "é", "x" * 100, [], [[]], {}, {"path": "/etc/passwd"}]
    with server.client() as client:
        while not statuses or time.monotonic() < end:
            names = ("data", "fn_index", "session_hash", "event_id", "trigger_id", "event_data", "batched")
            body = {name: generator.choice(odd) for name in names if generator.random() < 0.8}
            if generator.random() < 0.5:
                body["data"] = [generator.choice(odd[:12]) for _ in range(generator.randrange(12))]
            path = generator.choice(("queue/join", "cancel", "reset"))
            answer = client.post(f"/gradio_api/{path}", json=body)
            statuses.add(answer.status_code)
            assert answer.status_code < 500 or answer.json()["error"]["code"] == "queue_full", (
                path,
                body,
                answer.text,
            )
    assert any(400 <= status < 500 for status in statuses)
    assert "Traceback" not in caplog.text
