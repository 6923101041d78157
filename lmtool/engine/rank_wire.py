"""What the ranks of an engine say to each other: msgpack frames over a socket pair, no pickle.

A frame is its length, four bytes, little-endian, and a message.
"""

import socket
from typing import Any

import msgspec

from lmtool.engine.batch import Batch

_LENGTH_BYTES = 4
_PIECE = 1 << 20


class RankOrders(msgspec.Struct, frozen=True):
    """The first line of a rank's stdin. store: a file through which the ranks find each other; engine: what was given
    of `EngineConfig`; shape: random weights of this shape (`ModelConfig`'s fields) in place of ``path``'s."""

    rank: int
    size: int
    store: str
    socket_fd: int
    device: str
    engine: dict[str, Any]
    path: str | None = None
    shape: dict[str, Any] | None = None
    group_size: int | None = None
    verbose: bool = False


class Launch(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Step ``number``: the first rank launches it too."""

    number: int
    batch: Batch


class Ready(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The rank waits for steps."""


class Refused(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """It cannot start, and ends: kind is the name of an error's class."""

    kind: str
    cause: str
    fix: str | None = None


class Failed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Launching step ``number`` raised this."""

    number: int
    cause: str


FromRank = Ready | Refused | Failed


class Frames:
    """One end of a connection. told: the kinds of message that come in."""

    def __init__(self, connection: socket.socket, told: Any) -> None:
        self.connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(told)
        self._buffer = bytearray()

    def send(self, message: Any) -> None:
        """Raises OSError where nobody is there any more."""
        self.connection.sendall(self.frame(message))

    def frame(self, message: Any) -> bytes:
        body = self._encoder.encode(message)
        return len(body).to_bytes(_LENGTH_BYTES, "little") + body

    def receive(self) -> Any:
        """The next message; waits for it. Raises EOFError where the other end is gone."""
        while True:
            if len(self._buffer) >= _LENGTH_BYTES:
                end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES], "little")
                if len(self._buffer) >= end:
                    body = bytes(self._buffer[_LENGTH_BYTES:end])
                    del self._buffer[:end]
                    return self._decoder.decode(body)
            data = self.connection.recv(_PIECE)
            if not data:
                raise EOFError
            self._buffer += data
