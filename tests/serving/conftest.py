"""A real server on a free port of this machine, with a tiny random model, for real clients."""

import contextlib
import io
import threading
import time

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `serve`")

from cogview_pipelines.serving.app import create_app  # noqa: E402
from cogview_pipelines.serving.server import bind, make_server  # noqa: E402
from cogview_pipelines.serving.settings import ServerSettings  # noqa: E402

from ..pipelines.conftest import FINE, LOW, build  # noqa: E402

PROMPT = "a tiger on a blue background."
__all__ = ["FINE", "LOW", "PROMPT"]


class Serving:
    """A server in a thread: its address, its application, and clients for it."""

    def __init__(self, app, settings):
        self.app, self.settings = app, settings
        self.server = make_server(self.app, settings)
        self.socket = bind(settings)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def start(self):
        self.thread.start()
        wait_for(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.socket.close()
        assert not self.thread.is_alive()

    def client(self, **arguments):
        return httpx.Client(base_url=self.url, timeout=300, **arguments)


class Running(Serving):
    """A server of a model."""

    def __init__(self, pipe, settings):
        super().__init__(create_app(pipe, settings, "tiny"), settings)
        self.worker = self.app.state.worker


class Hold:
    """Makes the model wait at every step while it is closed, and tells what it has done."""

    def __init__(self, pipe):
        self.reached, self.steps = threading.Event(), 0
        self._open = threading.Event()
        self._open.set()
        self._hook = pipe.transformer.register_forward_pre_hook(self._wait)

    def _wait(self, *arguments):
        self.steps += 1
        self.reached.set()
        assert self._open.wait(30)

    def close(self):
        self.reached.clear()
        self._open.clear()

    def open(self):
        self._open.set()

    def remove(self):
        self.open()
        self._hook.remove()


def wait_for(condition, seconds=30):
    """Poll until something is so; fail after a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.01)


def png(image):
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(width=64, height=64, seed=0):
    """A picture of smooth colours."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(4, 4, 3, generator=generator) * 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width=64, height=64, box=(16, 16, 40, 40)):
    """Black, with a white box."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.fixture(scope="session")
def pipe(tokenizer):
    """All three stages; for one server at a time."""
    torch.set_num_threads(1)
    return build(tokenizer)


@pytest.fixture
def hold(pipe):
    """Closed by the test, open again after it."""
    hold = Hold(pipe)
    yield hold
    hold.remove()


@pytest.fixture
def serve(pipe):
    """Start servers with settings of their own."""
    with contextlib.ExitStack() as stack:

        def start(**settings):
            running = Running(pipe, ServerSettings(**{"port": 0, "page": False, "shutdown_timeout": 2, **settings}))
            running.start()
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture(scope="module")
def server(pipe):
    """The API with default bounds."""
    running = Running(pipe, ServerSettings(port=0, page=False, shutdown_timeout=2))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(server):
    """For the server with default bounds."""
    with server.client() as client:
        yield client


def assert_error(answer, status, code=None, param=None):
    """An error as documented, which gives nothing away."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text and "site-packages" not in answer.text and ".py" not in answer.text
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error
