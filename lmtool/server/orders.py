"""What `supervisor` tells the processes that it starts."""

from typing import Any

import msgspec


class Orders(msgspec.Struct, frozen=True):
    """To the engine's process. engine: settings of `EngineConfig` that were given; listener_fd: inherited."""

    name: str
    path: str
    listener_fd: int
    engine: dict[str, Any]
    verbose: bool = False
