"""Around every request: an id, a line in the log, and an answer even where something of ours broke."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmtool.errors import LmtoolError
from lmtool.server.refusals import refusal_response

_log = logging.getLogger(__name__)
_SOUND_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Envelope:
    """The client's X-Request-Id, where it is sound, else one of ours, comes back with the answer and is logged."""

    def __init__(self, app: ASGIApp, *, log_requests: bool) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("%s %s broke (%s)", scope["method"], escaped(scope["path"]), request_id)
            if not status:
                error = LmtoolError("the server failed", f"its log says more about {request_id}")
                await refusal_response(error)(scope, receive, send_with_id)
        finally:
            if self._log_requests:
                duration_s = time.perf_counter() - started
                line = "%s %s %d %.3f s (%s)"
                _log.info(line, scope["method"], escaped(scope["path"]), status, duration_s, request_id)


def escaped(text: str) -> str:
    """For a log: one line, printable, and no letters that look like others."""
    return text[:500].encode("unicode_escape").decode("ascii")
