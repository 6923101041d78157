"""Messages between processes of one engine, and between it and its server: msgpack in frames, no pickle.

A frame is its length, four bytes, little-endian, and a message. `Codec` is for whoever reads what has come and goes on,
`Frames` for whoever waits. Knows no message.
"""

import socket
from collections.abc import Iterator
from typing import Any

import msgspec

_LENGTH_BYTES = 4
_MOST_BYTES = (1 << 32) - 1


class Codec:
    """One end of a connection: messages ↔ frames. Not thread-safe. told: the kinds of message that come in;
    most_bytes: of one of them."""

    def __init__(self, told: Any, most_bytes: int = _MOST_BYTES) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(told)
        self._most_bytes = most_bytes
        self._buffer = bytearray()

    def encode(self, message: Any) -> bytes:
        body = self._encoder.encode(message)
        return len(body).to_bytes(_LENGTH_BYTES, "little") + body

    def decode(self, body: bytes | bytearray | memoryview) -> Any:
        """What follows a length. Raises msgspec.MsgspecError for what is no message."""
        return self._decoder.decode(body)

    def length(self, head: bytes | bytearray) -> int:
        """Bytes of the message that ``head`` announces. Raises msgspec.MsgspecError for too many."""
        num_bytes = int.from_bytes(head, "little")
        if num_bytes > self._most_bytes:
            raise msgspec.DecodeError(f"a message of {num_bytes} bytes")
        return num_bytes

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes. Raises msgspec.MsgspecError for what is none."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            end = start + _LENGTH_BYTES + self.length(buffer[start : start + _LENGTH_BYTES])
            if end > len(buffer):
                break
            yield self._decoder.decode(memoryview(buffer)[start + _LENGTH_BYTES : end])
            start = end
        del buffer[:start]


class Frames:
    """One end of a blocking connection. It reads no byte beyond a message, so that the socket may be handed on."""

    def __init__(self, connection: socket.socket, told: Any, most_bytes: int = _MOST_BYTES) -> None:
        self.connection = connection
        self.codec = Codec(told, most_bytes)

    def send(self, message: Any) -> None:
        """Raises OSError where nobody is there any more."""
        self.connection.sendall(self.codec.encode(message))

    def receive(self) -> Any:
        """The next message; waits for it. Raises EOFError where the other end is gone, OSError where the way to it is,
        msgspec.MsgspecError for what is no message."""
        head = self._exactly(_LENGTH_BYTES)
        return self.codec.decode(self._exactly(self.codec.length(head)))

    def _exactly(self, count: int) -> bytes | bytearray:
        data: bytes | bytearray = self.connection.recv(count)
        if data and len(data) == count:  # nearly always: nothing is copied
            return data
        data = bytearray(data)
        while len(data) < count:
            more = self.connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data
