"""What `supervisor` tells the processes that it starts, as one line of JSON on their stdin."""

from typing import Any

import msgspec

from lmtool.server.config import ServerConfig


class EngineOrders(msgspec.Struct, frozen=True):
    """engine: settings of `EngineConfig` that were given; listener_fd: a Unix socket that listens, inherited."""

    name: str
    path: str
    listener_fd: int
    engine: dict[str, Any]
    chat_template: str | None = None
    verbose: bool = False


class HttpOrders(msgspec.Struct, frozen=True):
    """number: of this HTTP process, from 0. engine_path: where the engine listens; sessions_path: None for memory.
    socket_fd: where clients come in, inherited."""

    config: ServerConfig
    number: int
    path: str
    chat_template: str | None
    engine_path: str
    sessions_path: str | None
    socket_fd: int
    verbose: bool = False
