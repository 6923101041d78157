"""Who is let in: one of the server's keys, on every path but those that say how it is."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lmtool.server.errors import Refusal
from lmtool.server.refusals import refusal_response

_OPEN = ("/health", "/ready")


class Keys:
    """``Authorization: Bearer KEY``. Hashes are compared, in a time that tells nothing."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._hashes = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = Refusal(401, "no valid key was given", "send Authorization: Bearer KEY", code="invalid_api_key")
        response = refusal_response(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip().encode("latin-1"))  # as the header came
        found = [hmac.compare_digest(given, one) for one in self._hashes]
        return kind.lower() == "bearer" and any(found)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
