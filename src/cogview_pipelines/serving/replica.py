"""One of several servers of a model: what all of them are told, and what each of them adds to the application."""

import os
import re

import torch
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..environment import SHIPPED, SHIPPED_MODELS, model_identity
from ..pipelines.cogview.pipeline_cogview import CogViewPipeline
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from ..pipelines.common.base import PipelineBase
from .errors import ApiError
from .settings import ServerSettings, is_loopback

_PIPELINES: dict[str, type[PipelineBase]] = {each.__name__: each for each in (CogView2Pipeline, CogViewPipeline)}


class ReplicaArguments(BaseModel):
    """
    What replicas are told: on a command line as `name=value`, in a configuration file under `args`.

    Args:
        model (`str`): Folder or Hub id of a saved [`CogView2Pipeline`] or [`CogViewPipeline`], which every machine
            must be able to read; or the name of a model that comes with the package (`shipped`, `cogview-emoji`).
        device (`str`, *optional*): Of a replica; by default `cuda` if replicas have GPUs, else `cpu`.
        dtype (`str`, *optional*): Number format; by default float32 on a CPU, bfloat16 elsewhere.
        num_replicas (`int`): How many there are.
        num_cpus, num_gpus (`float`): What each of them needs of a machine. PyTorch takes `num_cpus` threads.
        token (`str`, *optional*): What clients must send; by default what `COGVIEW2_TOKEN` holds. Without one, only
            clients on the machine that they ask are answered.
        allowed_hosts, queue_limit, batch_size, job_timeout, max_images, max_pixels, metadata:
            As in [`ServerSettings`]; queue and batches are those of one replica.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = SHIPPED
    device: str | None = None
    dtype: str | None = Field(None, pattern="^(float32|bfloat16|float16)$")
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    token: str | None = Field(None, repr=False)
    allowed_hosts: tuple[str, ...] = ServerSettings.allowed_hosts
    queue_limit: int = Field(ServerSettings.queue_limit, ge=1, le=1000)
    batch_size: int = Field(ServerSettings.batch_size, ge=1, le=64)
    job_timeout: float = Field(ServerSettings.job_timeout, ge=1)
    max_images: int = Field(ServerSettings.max_images, ge=1, le=64)
    max_pixels: int = Field(ServerSettings.max_pixels, ge=1, le=100_000_000)
    metadata: bool = ServerSettings.metadata

    def settings(self) -> ServerSettings:
        """What the application is bound by, without the page, which would keep things for visitors in one process."""
        names = ("allowed_hosts", "queue_limit", "batch_size", "job_timeout", "max_images", "max_pixels", "metadata")
        given = {name: getattr(self, name) for name in names}
        token = self.token or os.environ.get("COGVIEW2_TOKEN") or None
        host = ServerSettings.host if token is None else "0.0.0.0"  # where others let it be reached from
        return ServerSettings(host=host, token=token, page=False, **given)

    def located(self) -> "ReplicaArguments":
        """The same for processes that work in another folder."""
        return self.model_copy(update={"model": os.path.abspath(self.model)}) if os.path.isdir(self.model) else self

    @property
    def source(self) -> str:
        """The folder or Hub id; a model that comes with the package is that of the machine that asks."""
        shipped = None if os.path.exists(self.model) else SHIPPED_MODELS.get(self.model)
        return self.model if shipped is None else str(shipped)

    @property
    def name(self) -> str:
        """What clients call the model: no folder of a machine."""
        return self.model.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "cogview2"

    @property
    def identity(self) -> dict[str, str]:
        """What picture files say of the model."""
        return model_identity(self.model, self.source)

    def pipeline_class(self) -> type[PipelineBase]:
        """
        The pipeline that the model was saved as.

        Raises:
            ValueError: If it is none that a server can have.
            OSError: If there is no such model.
        """
        name = PipelineBase.load_config(self.source).get("_class_name")
        if name not in _PIPELINES:
            raise ValueError(
                f"`model` must be saved as one of {', '.join(_PIPELINES)}, but {self.model} holds a {name}."
            )
        return _PIPELINES[name]

    def load(self) -> PipelineBase:
        """The model on its device, and as many threads as it may take."""
        if self.num_cpus >= 1:
            torch.set_num_threads(int(self.num_cpus))
        device = self.device or ("cuda" if self.num_gpus else "cpu")
        dtype = self.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        return self.pipeline_class().from_pretrained(self.source, dtype=getattr(torch, dtype)).to(device)


class ReplicaGate:
    """
    What stands before everything else in a replica: somebody else holds the socket, on an address that is not known
    here.

    Without a token, clients on other machines are refused. The request's id is the one that came with it, which the
    holder of the socket has in its log and writes into the answer. `X-Replica` of an answer is who gave it.

    Args:
        app (`ASGIApp`): The application.
        replica (`str`): The name of this replica.
        settings ([`ServerSettings`]): Whether there is a token.
    """

    def __init__(self, app: ASGIApp, replica: str, settings: ServerSettings):
        self.app, self.replica, self.is_open = app, replica, settings.token is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        if re.fullmatch(r"[0-9A-Za-z-]{1,64}", given):  # it is written into the log
            scope.setdefault("state", {})["request_id"] = given

        async def send_with_replica(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Replica"] = self.replica
                if headers.get("x-request-id") == given:
                    del headers["x-request-id"]
            await send(message)

        if self.is_open or is_loopback((scope.get("client") or ("",))[0]):
            return await self.app(scope, receive, send_with_replica)
        message = "Without a token, only clients on the server's machine are answered. Set COGVIEW2_TOKEN there."
        await ApiError(403, message, "token_not_set").response()(scope, receive, send_with_replica)
