"""Server-sent events, as OpenAI streams them: one ``send`` for each, ended by ``[DONE]`` or by an error event."""

import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmtool.errors import LmtoolError
from lmtool.server.disconnect import ClientGone, until_gone
from lmtool.server.errors import body_of

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass events on as they come
]


def event(content: Any) -> bytes:
    return b"data: " + _encode(content) + b"\n\n"


class EventStream(Response):
    """Sends what ``events`` gives. Its first event comes before the status: what fails until then is a plain error.

    After it, an error is an event and the last one. A client that goes away ends ``events``.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            async with until_gone(receive), contextlib.aclosing(self._events) as events:
                first = await anext(events)
                await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                await send(_part(first))
                try:
                    async for one in events:
                        await send(_part(one))
                except LmtoolError as error:
                    await send(_part(event(body_of(error))))
                except Exception:
                    _log.exception("a stream broke")
                    await send(_part(event(body_of(LmtoolError("the server failed", "see its log")))))
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


class Chunks:
    """Events of one stream in OpenAI's form of chunks, most of whose bytes are always the same.

    head: id, object, created, model, …. include_usage: then every chunk says ``"usage": null`` but the last.
    """

    def __init__(self, head: Mapping[str, Any], *, include_usage: bool) -> None:
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = (b'],"usage":null}' if include_usage else b"]}") + b"\n\n"
        self._include_usage = include_usage

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        return b"".join((self._head, _encode(choice), self._tail))

    def end(self, usage: Mapping[str, Any]) -> bytes:
        """Usage where it was asked for, and the end."""
        if not self._include_usage:
            return DONE
        return b"".join((self._head, b'],"usage":', _encode(usage), b"}\n\n", DONE))
