"""One of several servers, whoever holds the socket."""

import httpx
import pytest
import torch
from pydantic import ValidationError

from cogview_pipelines import CogView2Pipeline, LoPARScheduler
from cogview_pipelines.cli.loading import describe_model
from cogview_pipelines.environment import SHIPPED_MODEL, SHIPPED_MODELS
from cogview_pipelines.serving.app import create_app
from cogview_pipelines.serving.replica import ReplicaArguments, ReplicaGate
from cogview_pipelines.serving.settings import ServerSettings

from ..pipelines.conftest import build
from .conftest import assert_error

LOCAL, FOREIGN = ("127.0.0.1", 40000), ("192.0.2.7", 40000)


@pytest.fixture
def ask(pipe):
    """A request to a replica, from a machine."""

    async def get(settings, client, path, headers):
        app = create_app(pipe, settings, "tiny")
        app.add_middleware(ReplicaGate, replica="first", settings=settings)
        transport = httpx.ASGITransport(app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as session:
            return await session.get(path, headers=headers)

    def run(client=LOCAL, token=None, path="/v1/models", headers=None):
        import asyncio

        settings = ReplicaArguments(token=token).settings()
        return asyncio.run(get(settings, client, path, headers or {}))

    return run


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch):
    monkeypatch.delenv("COGVIEW2_TOKEN", raising=False)


@pytest.mark.parametrize("client", [LOCAL, ("::1", 40000)])
def test_without_a_token_the_own_machine_is_answered(ask, client):
    assert ask(client).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/health"])
def test_without_a_token_other_machines_are_refused(ask, path):
    # the names of this machine, which anybody can claim to call, do not help
    assert_error(ask(FOREIGN, path=path), 403, "token_not_set")
    assert_error(ask(None, path=path), 403, "token_not_set")


def test_with_a_token_others_are_let_in_under_any_name_of_the_machine(ask):
    bearer = {"Authorization": "Bearer secret", "Host": "pictures.example"}
    assert ask(FOREIGN, token="secret", headers=bearer).status_code == 200
    assert_error(ask(FOREIGN, token="secret"), 401, "invalid_token")


def test_answers_name_the_replica(ask):
    for answer in (ask(), ask(FOREIGN), ask(token="secret")):
        assert answer.headers["x-replica"] == "first"


def test_the_id_of_a_request_is_that_of_whoever_passed_it_on_who_writes_it_into_the_answer(ask, caplog):
    caplog.set_level("INFO", "cogview_pipelines")
    answer = ask(headers={"X-Request-Id": "0f3a-4711"})
    assert "x-request-id" not in answer.headers and "0f3a-4711 GET /v1/models 200" in caplog.text


@pytest.mark.parametrize("given", ["a line\tof text", "x" * 65, ""])
def test_an_id_that_does_not_belong_into_a_log_is_not_taken(ask, caplog, given):
    caplog.set_level("INFO", "cogview_pipelines")
    answer = ask(headers={"X-Request-Id": given})
    assert f"{answer.headers['x-request-id']} GET /v1/models 200" in caplog.text
    assert len(answer.headers["x-request-id"]) == 16 and (not given or given not in caplog.text)


def test_arguments_become_the_settings_of_the_application(monkeypatch):
    given = {"queue_limit": 3, "batch_size": 2, "max_images": 5, "metadata": False, "allowed_hosts": ["a.example"]}
    settings = ReplicaArguments(**given).settings()
    assert settings == ServerSettings(page=False, **{**given, "allowed_hosts": ("a.example",)})
    monkeypatch.setenv("COGVIEW2_TOKEN", "of the machine")
    assert ReplicaArguments().settings().token == "of the machine"
    assert ReplicaArguments(token="given").settings().token == "given"
    assert "given" not in repr(ReplicaArguments(token="given"))


@pytest.mark.parametrize(
    "wrong",
    [{"num_replica": 2}, {"num_replicas": 0}, {"dtype": "int8"}, {"queue_limit": 0}, {"num_cpus": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_arguments_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ReplicaArguments(**wrong)


def test_words_of_a_command_line_become_numbers():
    """`serve run ...:build num_replicas=2` passes texts."""
    arguments = ReplicaArguments.model_validate({"num_replicas": "2", "num_gpus": "0.5", "metadata": "false"})
    assert (arguments.num_replicas, arguments.num_gpus, arguments.metadata) == (2, 0.5, False)


def test_a_folder_is_found_from_elsewhere_and_named_without_its_place(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    located = ReplicaArguments(model="models/tiny").located()
    assert located.source == str(tmp_path / "models" / "tiny") and located.name == "tiny"
    assert located.identity["model"] == "tiny" and len(located.identity["model_fingerprint"]) == 16
    hub = ReplicaArguments(model="owner/name").located()
    assert hub.source == "owner/name" and hub.name == "name" and hub.identity == {"model": "owner/name"}
    shipped = ReplicaArguments().located()
    assert shipped.source == str(SHIPPED_MODEL) and shipped.name == "shipped"
    assert shipped.identity == describe_model("shipped")
    cogview = ReplicaArguments(model="cogview-emoji")
    assert cogview.located().source == str(SHIPPED_MODELS["cogview-emoji"]) and cogview.name == "cogview-emoji"
    (tmp_path / "cogview-emoji").mkdir()
    assert cogview.located().source == str(tmp_path / "cogview-emoji")  # a folder of that name comes first


def test_the_model_is_loaded_with_the_numbers_and_threads_asked_for(tokenizer, tmp_path):
    build(tokenizer).save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    try:
        pipe = ReplicaArguments(model=str(tmp_path), dtype="bfloat16", num_cpus=3.5).load()
        assert torch.get_num_threads() == 3
        assert ReplicaArguments(model=str(tmp_path), num_cpus=0.5).load().dtype == torch.float32
        assert torch.get_num_threads() == 3  # what a fraction means is left to others
    finally:
        torch.set_num_threads(threads)
    assert isinstance(pipe, CogView2Pipeline) and pipe.dtype == torch.bfloat16 and pipe.device.type == "cpu"


def test_what_is_no_model_for_a_server_is_told_before_anything_starts(tmp_path):
    LoPARScheduler([[1]], top_k=(4,)).save_pretrained(tmp_path / "other")
    with pytest.raises(OSError, match="other"):
        ReplicaArguments(model=str(tmp_path / "other")).pipeline_class()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "CogView2CaptionPipeline"}')
    with pytest.raises(ValueError, match="`model` must be saved as one of CogView2Pipeline, CogViewPipeline, but"):
        ReplicaArguments(model=str(tmp_path / "other")).pipeline_class()
