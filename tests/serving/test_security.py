"""Who is let in."""

import base64

import pytest

from .conftest import PROMPT, assert_error

TOKEN = "correct horse 电池"


@pytest.fixture(scope="module")
def closed(pipe):
    from cogview_pipelines.serving.settings import ServerSettings

    from .conftest import Running

    running = Running(pipe, ServerSettings(port=0, page=True, token=TOKEN, shutdown_timeout=2))
    running.start()
    yield running
    running.stop()


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/metrics", "/openapi.json", "/config", "/assets/x.js", "/nothing"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Digest " + TOKEN.encode().hex()},
        basic("wrong"),
    ],
    ids=["nothing", "wrong", "empty", "no base64", "other kind", "wrong password"],
)
def test_nothing_is_given_without_the_token(closed, path, headers):
    with closed.client(headers=headers) as client:
        answer = client.get(path)
        error = assert_error(answer, 401, "invalid_token")
        assert error["type"] == "authentication_error" and "Basic" in answer.headers["www-authenticate"]


def test_the_token_opens_api_and_page_and_health_needs_none(closed):
    bearer = {"Authorization": b"Bearer " + TOKEN.encode()}
    with closed.client() as client:
        assert client.get("/health").status_code == 200
        assert_error(client.post("/v1/images/generations", json={"prompt": PROMPT}), 401)
        for headers in (bearer, basic(TOKEN)):
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert "<html" in client.get("/", headers=headers).text


def test_a_name_that_a_foreign_page_could_rebind_is_not_answered(serve):
    running = serve(allowed_hosts=("pictures.example",))
    with running.client() as client:
        for name in ("localhost", "127.0.0.1:80", "[::1]", "pictures.example", "PICTURES.example:443"):
            assert client.get("/v1/models", headers={"Host": name}).status_code == 200
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost@b", "["):
            assert_error(client.get("/v1/models", headers={"Host": name}), 421, "unknown_host")


def test_pages_of_other_sites_cannot_send_anything(serve):
    running = serve()
    with running.client() as client:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://["):
            answer = client.post("/v1/images/generations", json={"prompt": PROMPT}, headers={"Origin": origin})
            assert_error(answer, 403, "foreign_origin")
            assert "access-control-allow-origin" not in answer.headers
        assert client.post("/v1/images/generations", json={}, headers={"Origin": running.url}).status_code == 400
