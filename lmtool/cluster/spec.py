"""What a cluster is to serve: `ClusterSpec`. Frozen. Knows no Ray, nor how it is written (`spec_reader`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmtool.config import EngineConfig
from lmtool.errors import ConfigError
from lmtool.server.config import ServerConfig

_MOST_REPLICAS = 1024
_SERVER_DEFAULTS = ServerConfig()
SERVER_KEYS = {  # as the flag of api_server is called -> field of ServerConfig
    "http_processes": "num_http_processes",
    "max_queue": "max_queue",
    "request_timeout": "request_timeout_s",
    "drain_timeout": "drain_timeout_s",
    "max_images": "max_images",
    "allowed_image_hosts": "allowed_image_hosts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """
    model           a folder, a file or a name, as for api_server; the same on every machine
    name            what clients call it
    replicas        how many there are, where their number is fixed
    min_replicas, max_replicas   how many there are at least and at most, where it follows the load
    target_requests  that a replica is to have at a time; more of them ask for another replica
    scale_up_delay, scale_down_delay   seconds that the load has to ask for it first
    tp              GPUs that share one replica
    nnodes          machines that these are on, as many on each
    cpus, gpus      what Ray keeps free for one replica, cpus on each of its machines; gpus None: tp on a cluster with
                    GPUs, unless device is 'cpu'
    chat_template, revision, download_dir   as for api_server
    engine          settings of `EngineConfig`, as given
    server          fields of `ServerConfig`, as given
    """

    model: str
    name: str
    replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_requests: float = 16.0
    scale_up_delay: float = 10.0
    scale_down_delay: float = 300.0
    tp: int = 1
    nnodes: int = 1
    cpus: float = 1.0
    gpus: int | None = None
    chat_template: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(ok: bool, key: str, wanted: str) -> None:
            if not ok:
                raise ConfigError(f"{key.replace('_', '-')} is {getattr(self, key)!r}", f"give {wanted}")

        def is_number(key: str, kinds: tuple[type, ...]) -> bool:
            return isinstance(getattr(self, key), kinds) and not isinstance(getattr(self, key), bool)

        check(isinstance(self.model, str) and bool(self.model), "model", "a model's folder, file or name")
        check(_is_name(self.name), "name", "what clients call the model: a text without blanks")
        check(is_number("replicas", (int,)) and 1 <= self.replicas <= _MOST_REPLICAS, "replicas", "1 to 1024")
        check(is_number("tp", (int,)) and 1 <= self.tp <= 64, "tp", "a number of GPUs, from 1 to 64")
        shared_out = is_number("nnodes", (int,)) and 1 <= self.nnodes <= self.tp and self.tp % self.nnodes == 0
        check(shared_out, "nnodes", f"a number of machines that divides tp={self.tp}")
        self._check_bounds()
        for key in ("target_requests", "scale_up_delay", "scale_down_delay"):
            sound = is_number(key, (int, float)) and 0 <= getattr(self, key) <= 86_400
            check(
                sound and (key != "target_requests" or self.target_requests > 0), key, "a number that is not negative"
            )
        check(is_number("cpus", (int, float)) and 0 <= self.cpus <= 4096, "cpus", "a number from 0 to 4096")
        check(self.gpus is None or (is_number("gpus", (int,)) and self.gpus in (0, self.tp)), "gpus", "0 or tp")
        for key in ("chat_template", "revision", "download_dir"):
            check(getattr(self, key) is None or isinstance(getattr(self, key), str), key, "a text")
        for key, value in self.server.items():
            _check_kind(key, value)
        EngineConfig(**self.engine_settings())  # both say what is wrong with theirs
        self.server_config()

    def _check_bounds(self) -> None:
        bounds = (self.min_replicas, self.max_replicas)
        if bounds == (None, None):
            return
        for key, value in zip(("min-replicas", "max-replicas"), bounds, strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_REPLICAS:
                raise ConfigError(f"{key} is {value!r}", "give both bounds, each 1 to 1024")
        if self.min_replicas > self.max_replicas:  # type: ignore[operator]  # both are numbers
            raise ConfigError(
                f"min-replicas is {self.min_replicas} and max-replicas {self.max_replicas}",
                "give the larger one as max",
            )
        if self.replicas != 1:
            raise ConfigError(f"replicas is {self.replicas} beside its bounds", "give replicas, or min and max")

    @property
    def bounds(self) -> tuple[int, int]:
        """How many replicas there are at least and at most."""
        return self.min_replicas or self.replicas, self.max_replicas or self.replicas

    def engine_settings(self) -> dict[str, Any]:
        return {**self.engine, **({"tp": self.tp} if self.tp > 1 else {})}

    def server_config(self, **settings: Any) -> ServerConfig:
        """Of a replica. Raises ConfigError for a setting that cannot be."""
        return ServerConfig(model_names=(self.name,), **self.server, **settings)

    def num_gpus(self, *, cluster_has_gpus: bool) -> int:
        """What Ray is to keep free for one replica, on all of its machines."""
        if self.gpus is not None:
            return self.gpus
        return self.tp if cluster_has_gpus and self.engine.get("device") != "cpu" else 0


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """At least one model, each with a name of its own."""

    models: tuple[ModelSpec, ...]

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("there is no model to serve", "give --model, or --config with [[models]]")
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two models are called {name!r}", "give each a name of its own: name=…")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)


def _check_kind(key: str, value: object) -> None:
    """What ServerConfig compares is to be comparable."""
    kind = type(getattr(_SERVER_DEFAULTS, key))
    if kind is tuple:
        sound = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    else:
        sound = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not sound:
        flag = next(name for name, field in SERVER_KEYS.items() if field == key).replace("_", "-")
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a list of texts")
        raise ConfigError(f"{flag} is {value!r}", f"give {wanted}")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() and not any(map(str.isspace, name))
