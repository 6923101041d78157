"""Reading a body: as much as may be sent, JSON, not nested too deep. Before pydantic sees it."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from lmtool.server.disconnect import ClientGone
from lmtool.server.errors import Refusal

MAX_DEPTH = 64
MAX_MEMBERS = 50_000  # of all objects together: each that is wrong costs some microseconds to tell of
MAX_LISTS = 50_000  # and objects: millions of empty ones take seconds to make, and nobody else is served meanwhile
_THREAD_BYTES = 256 << 10  # what is larger is looked through on another thread
_PIECE_BYTES = 64 << 10  # looked through in one go: other threads wait for as long
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _number(text: str) -> int | float:
    """JSON has one kind of number: 5.0 is 5."""
    number = float(text)
    if not math.isfinite(number):
        raise msgspec.DecodeError(f"{text[:20]} is out of range")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


_decoder = msgspec.json.Decoder(float_hook=_number)


class _JsonRequest(Request):
    """A request whose body was read."""

    def __init__(self, request: Request, data: bytes, content: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._data = data
        self._content = content

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> Any:
        return self._content


@dataclass(slots=True)
class Bodies:
    """Those that one HTTP process holds at once, from their first byte until their request is over, or streams.
    max_bytes: of one; most_bytes: of all."""

    max_bytes: int
    most_bytes: int = 1 << 30
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        """Raises Refusal 429 where they have no room."""
        if self.num_bytes + num_bytes > self.most_bytes:
            raise Refusal(429, "large requests are being read already", "ask again in a moment", retry_after_s=1)
        self.num_bytes += num_bytes


def json_route(bodies: Bodies) -> type[APIRoute]:
    """The kind of route whose requests may have a body."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def read_and_handle(request: Request) -> Response:
                if request.method != "POST":
                    return await handle(request)
                pieces: list[bytes] = []
                try:
                    await _read(request, bodies, pieces)
                    data = b"".join(pieces)
                    small = len(data) < _THREAD_BYTES
                    content = parse(data) if small else await asyncio.to_thread(parse, data)
                    return await handle(_JsonRequest(request, data, content))
                finally:
                    bodies.num_bytes -= sum(map(len, pieces))

            return read_and_handle

    return JsonRoute


async def _read(request: Request, bodies: Bodies, pieces: list[bytes]) -> None:
    """Into ``pieces``, as far as it came; so many bytes are then counted among the bodies'."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise Refusal(400, f"the body's Content-Type is {kind[:100]!r}", "give application/json")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > bodies.max_bytes:
        raise _too_large(bodies.max_bytes)
    num_bytes = 0
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > bodies.max_bytes:
                raise _too_large(bodies.max_bytes)
            bodies.add(len(piece))
            pieces.append(piece)
    except ClientDisconnect:
        raise ClientGone from None


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"the body has more than {max_bytes:,} bytes", "send less", code="request_too_large")


def parse(data: bytes) -> Any:
    """Raises Refusal for what is not JSON (which is UTF-8 and knows no NaN) or is nested too deep."""
    if not data.strip():
        raise Refusal(400, "the body is empty", "give a JSON object")
    bare = without_texts(data)
    if bare.count(b"[") + bare.count(b"{") > MAX_LISTS:
        raise Refusal(400, f"the body has more than {MAX_LISTS} lists", "send less", code="request_too_large")
    if not _is_shallow(bare):
        raise Refusal(400, f"the body is nested deeper than {MAX_DEPTH}", "flatten it")
    if bare.count(b":") > MAX_MEMBERS:
        raise Refusal(400, f"the body has more than {MAX_MEMBERS} fields", "send less", code="request_too_large")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}", "give UTF-8 JSON", code="invalid_json") from None


def without_texts(data: bytes, piece_bytes: int = _PIECE_BYTES) -> bytes:
    """Of what is no JSON, anything: whoever parses it says so."""
    data = data.replace(rb"\\", b"").replace(rb"\"", b"")  # the quotes that are left are those around texts
    bare, inside = [], False
    for start in range(0, len(data), piece_bytes):
        parts = data[start : start + piece_bytes].split(b'"')
        bare += parts[inside::2]
        inside ^= len(parts) % 2 == 0
    return b"".join(bare)


def _is_shallow(bare: bytes) -> bool:
    """Innermost pairs of brackets are taken away, a level at a time. bare: JSON without its texts."""
    brackets = bare.translate(None, _NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets or not _is_balanced(brackets)


def _is_balanced(brackets: bytes) -> bool:
    """What is not is no JSON, and told so by who parses it."""
    return brackets.count(b"[") == brackets.count(b"]") and brackets.count(b"{") == brackets.count(b"}")
