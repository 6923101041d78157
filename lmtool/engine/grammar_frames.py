"""What an engine and the processes that follow its grammars say to each other: msgpack in frames, over a Unix socket.

A frame is its length, four bytes, and so many bytes. Knows neither xgrammar nor torch.
"""

import socket
from typing import TypeVar

import msgspec

from lmtool.tokenizer import Tokenizer

_LENGTH = 4


class GrammarVocabulary(msgspec.Struct, frozen=True):
    """The text of every id, b'' where a model's matrix is padded, and the ids that end an answer.

    A special token has no text that a grammar could match: a byte that is not UTF-8 comes first. A grammar means it by
    its id.
    """

    tokens: list[bytes]
    stop_ids: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> "GrammarVocabulary":
        """vocab_size: of the model's logits."""
        known = min(tokenizer.vocab_size, vocab_size)
        tokens = [b"\xff" * tokenizer.is_special(i) + tokenizer.token_bytes(i) for i in range(known)]
        stop_ids = sorted(i for i in tokenizer.eos_ids if i < vocab_size)
        return cls(tokens + [b""] * (vocab_size - known), stop_ids)


class Source(msgspec.Struct, tag=True):
    """The first frame to a process: what it is to compile, and the memory that it may take besides what it has."""

    kind: str
    text: str
    closed: bool
    memory_bytes: int


class Open(msgspec.Struct, tag=True):
    """An answer begins."""

    number: int


class Step(msgspec.Struct, tag=True):
    """It got a token."""

    number: int
    token_id: int


class Close(msgspec.Struct, tag=True):
    """It is over. Has no reply; all else has one, in the same order."""

    number: int


class Begun(msgspec.Struct, tag=True):
    """The process is there."""


class Compiled(msgspec.Struct, tag=True):
    pass


class Allowed(msgspec.Struct, tag=True):
    """Which ids may come next: a bit for each, in 32-bit words. only_ends: none but those that end an answer."""

    number: int
    words: bytes
    only_ends: bool


class Refused(msgspec.Struct, tag=True):
    """number: of the answer that cannot go on; None: the grammar as a whole."""

    number: int | None
    cause: str
    fix: str | None


Order = Source | Open | Step | Close
Reply = Begun | Compiled | Allowed | Refused

_T = TypeVar("_T")


def frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(_LENGTH, "big") + payload


class Frames:
    """Bytes as they come → whole messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes, kind: type[_T]) -> list[_T]:
        self._bytes += data
        found = []
        while (message := self._next()) is not None:
            found.append(msgspec.msgpack.decode(message, type=kind))
        return found

    def _next(self) -> bytes | None:
        end = _LENGTH + int.from_bytes(self._bytes[:_LENGTH], "big")
        if len(self._bytes) < max(end, _LENGTH + 1):
            return None
        message = bytes(self._bytes[_LENGTH:end])
        del self._bytes[:end]
        return message


def receive(connection: socket.socket, kind: type[_T]) -> _T | None:
    """The next message, waited for; None where the other end is gone."""
    head = _exactly(connection, _LENGTH)
    payload = _exactly(connection, int.from_bytes(head, "big")) if head else b""
    return msgspec.msgpack.decode(payload, type=kind) if payload else None


def _exactly(connection: socket.socket, count: int) -> bytes:
    """b'' where the other end is gone before so many bytes came."""
    data = bytearray()
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            return b""
        data += more
    return bytes(data)
