"""One answer of a server as it comes: server-sent events in, `Delta`s out, ended from outside at any moment."""

import contextlib
import json
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, Protocol

import httpx

from lmtool.chat.backend import Delta
from lmtool.chat.http_errors import broken, refused, said_error, unreachable
from lmtool.config import LOOPBACK

_CONNECT_S = 10.0
_SILENCE_S = 600.0  # a long prompt may take that long on a small machine
_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")


def make_client(root: str, api_key: str | None) -> httpx.Client:
    """A connection for each request, so that `HttpStream` knows its own. Proxies of the environment are for servers
    elsewhere."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(
        base_url=root,
        headers=headers,
        timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=httpx.URL(root).host not in LOOPBACK,
    )


class Reader(Protocol):
    """What the events of one answer mean. Its deltas need no times."""

    def take(self, said: dict[str, Any]) -> Delta | None:
        """None: nothing new for the user."""
        ...

    def finish(self, aborted: bool) -> Delta | None:
        """The last delta, with the reason and the counts; None: the answer is not whole."""
        ...


class HttpStream(Iterator[Delta]):
    """Raises LmtoolError for whatever keeps the answer from coming whole."""

    def __init__(self, client: httpx.Client, root: str, path: str, body: dict[str, Any], reader: Reader) -> None:
        self._client = client
        self._root = root
        self._path = path
        self._body = body
        self._reader = reader
        self._socket: socket.socket | None = None
        self._aborted = False
        self._begun_s = time.monotonic()
        self._first_s: float | None = None
        self._deltas = self._run()

    def __next__(self) -> Delta:
        return next(self._deltas)

    def abort(self) -> None:
        """From any thread or signal handler: who reads gets a last delta."""
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # closing would not wake who waits in it

    def close(self) -> None:
        self._deltas.close()

    def _run(self) -> Generator[Delta, None, None]:
        begun = False
        trace = {"trace": self._trace}
        try:
            with self._client.stream("POST", self._path, json=self._body, extensions=trace) as response:
                begun = True
                if response.status_code != 200:
                    response.read()
                    raise refused(self._root, response)
                yield from self._read(_events(response.iter_bytes()))
        except httpx.HTTPError as error:
            if not self._aborted:
                raise (broken(self._root) if begun else unreachable(self._root, error)) from error
        last = self._reader.finish(self._aborted)
        if last is None:
            raise broken(self._root)
        yield self._timed(last)

    def _read(self, events: Iterator[bytes]) -> Iterator[Delta]:
        for data in events:
            if data == b"[DONE]":
                return
            try:
                said = json.loads(data)
            except ValueError:
                raise said_error(self._root, f"an event is no JSON: {data[:80]!r}") from None
            if "error" in said:
                raise said_error(self._root, said["error"])
            delta = self._reader.take(said)
            if delta is not None:
                yield self._timed(delta)

    def _timed(self, delta: Delta) -> Delta:
        now_s = time.monotonic() - self._begun_s
        if self._first_s is None and delta.text:
            self._first_s = now_s
        return replace(delta, time_to_first_token_s=self._first_s, duration_s=now_s)

    def _trace(self, name: str, info: dict[str, Any]) -> None:
        if name in _CONNECTED:
            self._socket = info["return_value"].get_extra_info("socket")
        if self._aborted and name == "http11.send_request_headers.started":  # there was no socket to shut down yet
            raise httpx.ReadError("the user stopped it")


def _events(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each event. Lines end with a newline only: U+2028 is text."""
    held = b""
    for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()
