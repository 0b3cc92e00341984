"""What a server may be asked for, and how much of it."""

import ipaddress
from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """
    Args:
        host (`str`), port (`int`): Where to listen; port 0 takes a free one.
        token (`str`, *optional*): Requests without it are refused, except for `/health`.
        allowed_hosts (`tuple[str, ...]`): Names by which the server may be called, besides that of `host`. On a
            loopback address, only these and the names of this machine's loopback are answered.
        page (`bool`): Serve the page, too.
        queue_limit (`int`): Requests that may wait or be computed at a time.
        batch_size (`int`): Pictures of several requests that are computed together at the most.
        job_timeout (`float`): Seconds from the arrival of a request until its work is stopped.
        head_timeout (`float`): Seconds for the head of a request to arrive on an open connection.
        body_timeout (`float`): Seconds for the body of a request to arrive.
        body_grace (`float`): Seconds after which a body that still arrives may lose its place to somebody else, when
            there is no other.
        silence_grace (`float`): Seconds after which a connection without a request may be closed for another one, when
            there are as many as may be.
        shutdown_timeout (`float`): Seconds that running requests get to end when the server stops.
        max_connections (`int`): Connections that are open at a time.
        max_body_bytes (`int`): Size of the body of a request.
        max_pixels (`int`): Pixels of the pictures that a request sends in, together.
        max_output_pixels (`int`): Pixels of an enlarged picture.
        max_images (`int`): Pictures that one request may ask for, or send in.
        max_candidates (`int`): Candidates of post-selection, and of captions.
        max_prompt_length (`int`): Characters of a text; the model's own limit in tokens holds, too.
        max_texts (`int`): Texts that one request may compare.
        metadata (`bool`): Write into PNG files how their pictures were made.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    page: bool = True
    queue_limit: int = 32
    batch_size: int = 8
    job_timeout: float = 600.0
    head_timeout: float = 30.0
    body_timeout: float = 60.0
    body_grace: float = 5.0
    silence_grace: float = 1.0
    shutdown_timeout: float = 10.0
    max_connections: int = 256
    max_body_bytes: int = 16 * MEBIBYTE
    max_pixels: int = 4_200_000
    max_output_pixels: int = 4_000_000
    max_images: int = 8
    max_candidates: int = 16
    max_prompt_length: int = 1000
    max_texts: int = 32
    metadata: bool = True

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
