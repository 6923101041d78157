"""What a server may be told: `ServerConfig`. Frozen; messages name the flag. Knows no engine."""

import re
from dataclasses import dataclass

from lmtool.config import LOOPBACK
from lmtool.errors import ConfigError

_HOSTS = "names of hosts, as in pictures.example.org or pictures.example.org:8080"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """
    host, port           where it listens; port 0: a free one
    model_names          what clients call the model: the first is what answers say, all are understood
    api_keys             one of them is asked for on every route but /health and /ready; none: nobody is asked
    allow_origins        of browsers' pages elsewhere (CORS); none: no page but its own
    ssl_keyfile, ssl_certfile   for https
    num_http_processes   that take requests, tokenize and write answers
    max_queue            requests that may wait for a place in the batch; more are refused with 429
    request_timeout_s    from a request's arrival to its end; 0: none
    drain_timeout_s      how long answers that are under way may go on after SIGTERM
    max_body_bytes       of a request; None: 8 MiB, and 64 for a model that takes pictures
    max_n, max_stop, max_stop_chars, max_prompts, max_images   bounds of what one request may ask for
    allowed_image_hosts  that pictures are fetched from, as 'host' or 'host:port'; none: they come in requests only
    max_sessions         conversations that are remembered for interactive chat and responses; the oldest go first
    replica              this server's name behind a proxy: ids of responses have it, and the proxy says whose they are
    disable_docs         no OpenAPI page
    log_requests         one line for each
    """

    host: str = "127.0.0.1"
    port: int = 23333
    model_names: tuple[str, ...] = ("model",)
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    num_http_processes: int = 1
    max_queue: int = 1024
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    max_body_bytes: int | None = None
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_prompts: int = 128
    max_images: int = 16
    allowed_image_hosts: tuple[str, ...] = ()
    max_sessions: int = 10_000
    replica: str = ""
    disable_docs: bool = False
    log_requests: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, flag: str, value: object, wanted: str) -> None:
            if not ok:
                raise ConfigError(f"{flag} is {value!r}", f"give {wanted}")

        check(0 <= self.port <= 65535, "--server-port", self.port, "0 (a free one) to 65535")
        check(bool(self.model_names) and all(self.model_names), "--model-name", self.model_names, "a name")
        check(all(self.api_keys), "--api-keys", "an empty key", "keys that are not empty")
        check(1 <= self.num_http_processes <= 64, "--http-processes", self.num_http_processes, "1 to 64")
        check(self.max_queue >= 0, "--max-queue", self.max_queue, "0 or more")
        check(self.request_timeout_s >= 0, "--request-timeout", self.request_timeout_s, "seconds, or 0: none")
        check(self.drain_timeout_s >= 0, "--drain-timeout", self.drain_timeout_s, "seconds, 0 or more")
        check(self.max_body_bytes is None or self.max_body_bytes >= 1024, "--max-body-mb", self.max_body_bytes, "more")
        check(self.max_images >= 0, "--max-images", self.max_images, "a number, or 0: none are taken")
        check(all(map(_is_host, self.allowed_image_hosts)), "--allowed-image-hosts", self.allowed_image_hosts, _HOSTS)
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile belong together", "give both or none")

    @property
    def is_public(self) -> bool:
        """Others than this machine's users may reach it."""
        return self.host not in LOOPBACK


def _is_host(text: str) -> bool:
    return re.fullmatch(r"(\*\.)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?", text) is not None
