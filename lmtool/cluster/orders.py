"""What a replica's actor tells its api_server's process, and what that says back: a line of JSON each, on its pipes."""

from typing import Any, Self

import msgspec

from lmtool.errors import BY_NAME, LmtoolError
from lmtool.server.config import ServerConfig


class FailedStart(msgspec.Struct, frozen=True):
    """Why a replica of a model cannot start, or serve any more: an error of ours by the name of its kind."""

    model: str
    kind: str
    cause: str
    fix: str | None

    @classmethod
    def of(cls, model: str, error: LmtoolError) -> Self:
        return cls(model, type(error).__name__, error.cause, error.fix)

    def error(self) -> LmtoolError:
        return BY_NAME.get(self.kind, LmtoolError)(self.cause, self.fix)


class ReplicaOrders(msgspec.Struct, frozen=True):
    """model, revision, download_dir: as the user named them; engine: settings of `EngineConfig` that were given."""

    model: str
    revision: str | None
    download_dir: str | None
    chat_template: str | None
    engine: dict[str, Any]
    config: ServerConfig


class ReplicaSays(msgspec.Struct, frozen=True):
    """url: where it listens. failure: why it does not, or not any more."""

    url: str | None = None
    failure: FailedStart | None = None
