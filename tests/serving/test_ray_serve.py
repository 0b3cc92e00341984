"""Two replicas under Ray Serve on this machine: the same pictures, checks and limits as those of one server."""

import base64
import concurrent.futures
import io
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image, ImageChops

ray = pytest.importorskip("ray", reason="needs the extra `ray`")
serve = pytest.importorskip("ray.serve", reason="needs the extra `ray`")
psutil = pytest.importorskip("psutil", reason="comes with accelerate")

from cogview_pipelines.serving.ray_serve import build  # noqa: E402
from cogview_pipelines.serving.replica import ReplicaArguments  # noqa: E402

from ..pipelines.conftest import FINE  # noqa: E402
from ..pipelines.conftest import build as build_pipeline  # noqa: E402
from .conftest import PROMPT, assert_error  # noqa: E402

TOKEN = "of-the-test"
GENERATIONS = "/v1/images/generations"
QUEUE_LIMIT, MOST = 4, 16
ATTEMPTS = 5
PATIENCE = 600  # seconds: Ray starts a dozen processes, and each replica imports PyTorch

pytestmark = pytest.mark.timeout(4 * PATIENCE)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A tiny pipeline, and the folder that it was saved to."""
    pipe = build_pipeline(tokenizer)
    folder = tmp_path_factory.mktemp("ray") / "tiny"
    pipe.save_pretrained(folder)
    return pipe, folder


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """
    Ray on this machine. On a busy one it may fail to start, since its processes get 15 seconds to tell their ports;
    most of them are told theirs.
    """

    def __init__(self, folder):
        names = ("port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "metrics-export-port")
        names += ("runtime-env-agent-port",)
        ports = free_ports(len(names))
        self.address = f"127.0.0.1:{ports[0]}"
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
        command += [
            "--num-cpus=2",
            "--include-dashboard=false",
            "--include-log-monitor=false",
            "--object-store-memory=100000000",
        ]
        command += ["--disable-usage-stats", f"--temp-dir={folder}"]
        command += [f"--{name}={port}" for name, port in zip(names, ports)]
        options = {
            "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
            "RAY_worker_register_timeout_seconds": str(PATIENCE),
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PATIENCE),
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(PATIENCE),
        }
        self.log = Path(folder, "start.log")
        with open(self.log, "w") as log:
            self.process = psutil.Popen(command, env={**os.environ, **options}, stdout=log, stderr=log)

    def connect(self):
        """Whether it has started, and this process is a client of it."""
        until(lambda: self.process.poll() is not None or "will now block forever" in self.log.read_text())
        if self.process.poll() is None:
            ray.init(address=self.address, logging_level="ERROR")
        return ray.is_initialized()

    def replicas(self):
        """The processes of the replicas."""
        own = self.process.children(recursive=True)
        return {process.pid for process in own if "ServeReplica" in " ".join(process.cmdline()[:1])}

    def stop(self):
        ray.shutdown()
        children = []
        if self.process.poll() is None:  # or it did not start, and the next attempt is due
            children = self.process.children(recursive=True)
            self.process.terminate()
            self.process.wait(60)
        for child in psutil.wait_procs(children, 10)[1]:
            child.kill()


@pytest.fixture(scope="module")
def cluster():
    for _ in range(ATTEMPTS):
        folder = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie in it
        running = Cluster(folder)
        try:
            if running.connect():
                yield running
                return
        finally:
            running.stop()
            shutil.rmtree(folder, ignore_errors=True)
    pytest.fail(f"Ray did not start in {ATTEMPTS} attempts.")


@pytest.fixture(scope="module")
def client(saved, cluster):
    """Of two replicas on a free port."""
    [port] = free_ports(1)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        limits = {"queue_limit": QUEUE_LIMIT, "max_images": MOST, "token": TOKEN}
        serve.run(build(ReplicaArguments(model=str(saved[1]), num_replicas=2, num_cpus=0.5, **limits)))
        head = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=head, timeout=PATIENCE) as client:
            yield client
    finally:
        serve.shutdown()


def ask(client, seed=0, n=1):
    return client.post(GENERATIONS, json={"prompt": PROMPT, "seed": seed, "n": n})


def ask_together(client, wanted):
    """Answers to requests that are sent at the same time, by the arguments of `ask`."""
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda arguments: ask(client, *arguments), wanted))


def until(condition, seconds=PATIENCE):
    """What a condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.2)
    return found


def metrics(client):
    """What each replica has counted, by its name."""
    found = {}

    def complete():
        answer = client.get("/metrics")
        if answer.status_code != 200:  # on its way to a replica that died
            return False
        numbers = re.findall(r"^(\w+)(?:{(.*)})? ([\d.e+]+)$", answer.text, re.MULTILINE)
        found[answer.headers["x-replica"]] = {(name, labels): float(value) for name, labels, value in numbers}
        return len(found) == 2

    until(complete)
    return found


def picture(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")


def test_both_replicas_make_the_picture_of_a_seed(client, saved, cluster):
    assert len(cluster.replicas()) == 2
    expected = saved[0](PROMPT, generator=torch.Generator().manual_seed(7)).images[0]
    seen = set()

    def both():
        for answer in ask_together(client, [(7,)] * 4):
            made = picture(answer)
            assert made.size == (FINE, FINE) and ImageChops.difference(made, expected).getbbox() is None
            seen.add(answer.headers["x-replica"])
        return len(seen) == 2

    until(both)


def test_requests_that_wait_in_a_replica_are_computed_together(client):
    kind = 'kind="generation"'

    def together():
        # each replica has one that takes a while, and those after it wait
        answers = ask_together(client, [(1, MOST), (2, MOST), (3,), (4,), (5,), (6,)])
        assert [answer.status_code for answer in answers] == [200] * 6
        counted = metrics(client).values()
        # more than one picture in a batch, but fewer than the requests for many have
        return any(
            numbers.get(("cogview2_batch_pictures_bucket", f'{kind},le="4.0"'), 0)
            > numbers.get(("cogview2_batch_pictures_bucket", f'{kind},le="1.0"'), 0)
            for numbers in counted
        )

    until(together)


def test_requests_are_checked_as_by_the_server(client):
    assert_error(ask(client, n=MOST + 1), 400, param="n")
    assert_error(client.post(GENERATIONS, json={"prompt": " "}), 400, param="prompt")
    assert_error(client.post(GENERATIONS, content=b"{", headers={"Content-Type": "application/json"}), 400)
    assert_error(client.post(GENERATIONS, content=b"prompt"), 415)
    assert_error(client.post(GENERATIONS, content=b" " * (16 * 2**20 + 1)), 413, "body_too_large")
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert_error(client.get("/v1/nothing"), 404)
    refused = httpx.post(client.base_url.join(GENERATIONS), json={"prompt": PROMPT}, timeout=PATIENCE)
    assert_error(refused, 401, "invalid_token")


def test_an_answer_has_one_id_and_the_name_of_its_replica(client):
    answer = client.get("/health")
    assert len(answer.headers.get_list("x-request-id")) == 1 and answer.headers["x-replica"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_more_requests_than_there_are_places_are_told_to_come_back(client):
    answers = ask_together(client, [(seed, MOST) for seed in range(6 * QUEUE_LIMIT)])
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert_error(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1


def test_a_client_that_leaves_frees_its_place(client):
    body = f'{{"prompt": "{PROMPT}", "n": {MOST}}}'.encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(3 * QUEUE_LIMIT):  # more than there are places
        with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
            leaving.sendall(head.encode() + body)
    until(lambda: all(numbers["cogview2_places_taken", ""] == 0 for numbers in metrics(client).values()))
    assert ask(client).status_code == 200


def test_a_replica_that_dies_is_replaced_and_the_other_goes_on(client, cluster):
    before, names = cluster.replicas(), set(metrics(client))
    expected = picture(ask(client, 3))
    os.kill(min(before), signal.SIGKILL)
    # a request on its way to the dead replica is lost; the next ones reach the other
    survived = until(lambda: (answer := ask(client, 3)).status_code == 200 and answer)
    assert survived.headers["x-replica"] in names
    until(lambda: len(cluster.replicas() - {min(before)}) == 2 and set(metrics(client)) - names)
    made = {}

    def both():
        for answer in ask_together(client, [(3,)] * 4):
            assert ImageChops.difference(picture(answer), expected).getbbox() is None
            made[answer.headers["x-replica"]] = True
        return len(made) == 2

    until(both)
