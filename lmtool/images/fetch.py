"""A picture's bytes from an http(s) URL that a stranger gave: one request, to an address that was checked.

The name is looked up once and the connection goes to what was found then, so nobody changes the answer between check
and use; redirects and proxies would lead elsewhere, so there are none.
"""

import errno
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from lmtool.errors import RequestError
from lmtool.images.addresses import is_named, is_public, resolve
from lmtool.images.load import MOST_BYTES

_PORTS = {"http": 80, "https": 443}
_CHUNK = 65_536  # bytes
_MOST_AROUND = 10**7  # bytes of headers and of what is around chunks
Resolver = Callable[[str, int, float], list[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was taken apart. path: with the query, as it goes into the request."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def is_default_port(self) -> bool:
        return self.port == _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.is_default_port else f"{host}:{self.port}"


def fetch_image(
    url: str,
    *,
    allowed_hosts: Sequence[str] | None = None,
    timeout_s: float = 10,
    resolver: Resolver = resolve,
) -> bytes:
    """What is at a URL, at most `MOST_BYTES`; whether it is a picture, `decode_image` finds out.

    allowed_hosts: the only ones, as 'example.org', 'example.org:8000' or '*.example.org', which may be private, too;
    None: any that all the internet can reach. timeout_s: for all of it. Raises RequestError, which says why.
    """
    target = _target(url)
    deadline = time.monotonic() + timeout_s
    if allowed_hosts is not None and not is_named(target.host, target.port, target.is_default_port, allowed_hosts):
        raise RequestError(
            f"pictures are not fetched from {target.authority}", "give the picture itself, as a data URL"
        )
    try:
        addresses = resolver(target.host, target.port, timeout_s)
        if allowed_hosts is None and not all(map(is_public, addresses)):
            raise RequestError(
                f"{target.authority} is not at a public address", "give the picture itself: a file or a data URL"
            )
        with _connected(addresses, target, deadline) as connection:
            return _body(connection, target, deadline)
    except TimeoutError:
        raise RequestError(
            f"{target.authority} took longer than {timeout_s:g} s", "try again, or give the file"
        ) from None
    except http.client.HTTPException:
        raise RequestError(f"{target.authority} gives no sound HTTP answer", "give the file") from None
    except ssl.SSLError as error:
        said = getattr(error, "verify_message", "") or error.reason or "the connection broke"
        raise RequestError(f"{target.authority} cannot be trusted: {said}", "give the file") from None
    except OSError as error:
        said = error.strerror or type(error).__name__
        raise RequestError(f"{target.authority} cannot be reached: {said}", "give the file") from None


def _target(url: str) -> Target:
    fix = "give http://HOST/PATH or https://HOST/PATH"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        raise RequestError("a picture's URL is broken", fix) from None
    if parts.scheme not in _PORTS or not host or any(char <= " " or char in "\\\x7f" for char in url):
        raise RequestError("a picture's URL is no http(s) URL", fix)
    if parts.username is not None or parts.password is not None:
        raise RequestError("a picture's URL holds a user's name", fix)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(
        parts.scheme, host, _PORTS[parts.scheme] if port is None else port, quote(path, "%/:=&?~#+!$,;'@()*[]")
    )


def _connected(addresses: Sequence[str], target: Target, deadline: float) -> socket.socket:
    """To the first of the addresses that answers."""
    refused = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for i, address in enumerate(addresses):
        share_s = _left(deadline) / (len(addresses) - i)  # one that swallows everything leaves time for the next
        try:
            plain = socket.create_connection((address, target.port), timeout=share_s)
        except OSError as error:
            refused = error
            continue
        if target.scheme == "http":
            return plain
        try:
            plain.settimeout(_left(deadline))  # Python counts a whole handshake, not each read of it
            return ssl.create_default_context().wrap_socket(plain, server_hostname=target.host)
        except BaseException:
            plain.close()
            raise
    raise refused


def _body(connection: socket.socket, target: Target, deadline: float) -> bytes:
    request = (
        f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: lmtool\r\nAccept: image/*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    connection.settimeout(_left(deadline))
    connection.sendall(request.encode("ascii"))
    answer = http.client.HTTPResponse(_Bounded(connection, deadline, _too_large(target)))  # type: ignore[arg-type]
    answer.begin()
    _check_head(answer, target)
    data = bytearray()
    while chunk := answer.read(_CHUNK):
        data += chunk
        if len(data) > MOST_BYTES:
            raise _too_large(target)
    if answer.length:
        raise RequestError(f"{target.authority} broke off in the middle of a picture", "try again")
    return bytes(data)


def _check_head(answer: http.client.HTTPResponse, target: Target) -> None:
    if 300 <= answer.status < 400:
        cause = f"{target.authority} leads elsewhere ({answer.status})"
        raise RequestError(cause, "give the URL of the picture itself: redirects are not followed")
    if answer.status != 200:
        raise RequestError(f"{target.authority} answers {answer.status}", "check the URL")
    encoding = answer.getheader("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RequestError(f"{target.authority} sends a picture packed as {encoding[:20]!r}", "give the file")
    if answer.length is not None and answer.length > MOST_BYTES:
        raise _too_large(target)


def _too_large(target: Target) -> RequestError:
    most = MOST_BYTES // 10**6
    return RequestError(f"the picture at {target.authority} has more than {most} MB", f"give one of at most {most} MB")


def _left(deadline: float) -> float:
    """Seconds. Raises TimeoutError where none are left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Bounded(io.RawIOBase):
    """A connection as `HTTPResponse` wants one, whose reads end at one moment together: a server that sends a byte now
    and then would else keep each of them in time. And together they have an end: a chunk may have a size of -1."""

    def __init__(self, connection: socket.socket, deadline: float, too_large: RequestError) -> None:
        self._connection = connection
        self._deadline = deadline
        self._too_large = too_large
        self._num_bytes = 0

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        num_bytes = self._connection.recv_into(buffer)
        self._num_bytes += num_bytes
        if self._num_bytes > MOST_BYTES + _MOST_AROUND:
            raise self._too_large
        return num_bytes
