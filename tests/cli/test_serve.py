"""`cogview2 serve` up to the point where it listens; tests/serving has the rest."""

import os
import socket
import subprocess
import sys
import time
import types

import pytest

from cogview_pipelines.cli import serve
from cogview_pipelines.cli.loading import describe_model
from cogview_pipelines.models.adapters import add_adapter
from cogview_pipelines.ops.int8_linear import is_built

from .conftest import assert_bad_input


@pytest.fixture
def served(monkeypatch):
    """What would be served, instead of serving it."""
    pytest.importorskip("gradio", reason="needs the extra `serve`")
    from cogview_pipelines.serving import app, server

    seen = {}

    def create_app(pipe, settings, name, identity):
        seen.update(pipe=pipe, settings=settings, name=name, identity=identity)

    def make_server(app, settings):
        return types.SimpleNamespace(run=lambda sockets: seen.update(port=sockets[0].getsockname()[1]))

    monkeypatch.setattr(app, "create_app", create_app)
    monkeypatch.setattr(server, "make_server", make_server)
    monkeypatch.setattr(server, "set_up_log", lambda: None)
    return seen


def test_options_become_settings_and_the_address_is_told(cogview2, served, model_folder):
    arguments = ("--port", 0, "--no-page", "--queue-limit", 3, "--max-images", 2, "--allow-host", "a.example")
    result = cogview2("serve", *arguments)
    assert result.exit_code == 0, result.output
    settings = served["settings"]
    assert (settings.host, settings.page, settings.queue_limit, settings.max_images) == ("127.0.0.1", False, 3, 2)
    assert settings.allowed_hosts == ("a.example",) and settings.token is None
    assert served["name"] == model_folder.name and str(model_folder) != served["name"]
    assert f"Serving on http://127.0.0.1:{served['port']}" in result.stderr


@pytest.mark.skipif(not is_built(), reason="the kernels are not built")
def test_picture_files_are_to_name_the_model_as_those_of_other_commands_do(cogview2, served, model_folder, tmp_path):
    assert cogview2("serve", "--port", 0, "--no-metadata").exit_code == 0
    assert served["identity"] == describe_model(str(model_folder)) and not served["settings"].metadata
    pipe = served["pipe"]
    add_adapter(pipe.transformer, "style", 2)
    pipe.save_adapter(tmp_path / "style")
    assert cogview2("serve", "--port", 0, "--int8", "--lora", f"{tmp_path / 'style'}=0.5").exit_code == 0
    [adapter] = served["identity"]["lora"]
    assert (adapter["name"], adapter["weight"], served["identity"]["int8"]) == ("style", 0.5, True)
    assert str(tmp_path) not in str(served["identity"]) and str(model_folder) not in str(served["identity"])


def test_clients_call_a_folder_by_its_name_whatever_the_path(cogview2, served, model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    for model in (".", f"../{model_folder.name}/", str(model_folder)):
        assert cogview2("serve", "--port", 0, "--no-page", "--model", model).exit_code == 0
        assert served["name"] == served["identity"]["model"] == model_folder.name


def test_the_token_comes_from_the_environment(cogview2, served, monkeypatch):
    monkeypatch.setenv("COGVIEW2_TOKEN", "secret")
    assert cogview2("serve", "--port", 0, "--host", "0.0.0.0").exit_code == 0
    assert served["settings"].token == "secret"


def test_other_machines_are_not_let_in_without_a_token(cogview2, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra `serve`")
    monkeypatch.delenv("COGVIEW2_TOKEN", raising=False)
    assert_bad_input(cogview2("serve", "--host", "0.0.0.0"), "`--host`", "COGVIEW2_TOKEN")


def test_a_port_in_use_is_told_before_the_model_is_loaded(cogview2, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra `serve`")
    monkeypatch.setattr(serve, "load_pipeline", lambda *arguments, **options: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cogview2("serve", "--port", port)
    assert result.exit_code == 1
    assert f"port {port}" in result.stderr and "Choose another" in result.stderr


def test_without_the_extra_it_is_named(cogview2, monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("no_such_package",))
    result = cogview2("serve")
    assert result.exit_code == 1
    assert "cogview_pipelines[serve]" in result.stderr


@pytest.mark.parametrize(
    "options, has_gradio, served", [((), True, True), ((), False, False), (("--no-page",), True, False)]
)
def test_the_page_is_served_where_gradio_is(cogview2, monkeypatch, options, has_gradio, served):
    find_spec, settings = serve.importlib.util.find_spec, []
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: has_gradio or None if name == "gradio" else find_spec(name)
    )

    def stop(given):
        settings.append(given)
        raise OSError("this is enough")

    monkeypatch.setattr("cogview_pipelines.serving.server.bind", stop)
    result = cogview2("serve", *options)
    assert result.exit_code == 1
    assert [given.page for given in settings] == [served]
    assert ("there is no page" in result.stderr) == (not has_gradio)


def test_a_page_that_is_asked_for_needs_gradio(cogview2, monkeypatch):
    find_spec = serve.importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    result = cogview2("serve", "--page")
    assert result.exit_code == 1
    assert "cogview_pipelines[page]" in result.stderr


def connect(port):
    """A connection to a server that has its port and begins to listen."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_proxies_and_certificates_of_the_environment_do_not_matter(model_folder):
    """Gradio makes HTTP clients when it is imported, and they know no SOCKS."""
    pytest.importorskip("gradio", reason="needs the extra `serve`")
    odd = {
        "ALL_PROXY": "socks5://127.0.0.1:1",
        "HTTPS_PROXY": "ftp://127.0.0.1:1",
        "http_proxy": "http://[::",
        "SSL_CERT_FILE": "/nowhere/certificates.pem",
    }
    command = [
        sys.executable,
        "-c",
        "from cogview_pipelines.cli import app; app()",
        "serve",
        "--port",
        "0",
        "--model",
        str(model_folder),
    ]
    with subprocess.Popen(command, env={**os.environ, **odd}, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("Serving on "):
                break
        try:
            assert said[-1].startswith("Serving on "), "".join(said)
            port = int(said[-1].rpartition(":")[2])
            with connect(port) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        finally:
            process.terminate()
            rest = process.stderr.read()
        assert "Traceback" not in rest, rest
