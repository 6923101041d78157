"""Who is let in: who has one of the server's keys, or, where there are none, who means this machine. On every path but
those that say how the server is.
"""

import hashlib
import hmac
import ipaddress
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


class OwnNames:
    """For a server without keys that only this machine reaches: a page in its browser must not come in by a name of the
    page's own that leads here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN or is_own_name(Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        fix = "ask 127.0.0.1 or localhost, or start the server with --api-keys"
        await refusal_response(Refusal(403, "this server has another name", fix))(scope, receive, send)


def is_own_name(host: str) -> bool:
    """'localhost:23333', '127.0.0.1', '[::1]:80': an address, or a name that leads nowhere else."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.removeprefix("[").removesuffix("]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
