"""A front with replicas, without Ray: whoever the test lists is there."""

import asyncio
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from lmtool.cluster.app import create_front
from lmtool.cluster.context import FrontContext
from lmtool.cluster.directory import Listing, Record
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.forward import replica_session
from lmtool.cluster.routing import Router
from lmtool.server.config import ServerConfig
from lmtool.server.doors import bind
from lmtool.server.http_process import uvicorn_server
from tests.server.serving import TIMEOUT_S, OnThread

KEY = "between front and replica"


def record(name: str, url: str, model: str = "one", **settings: Any) -> Record:
    return Record(name, model, url, KEY, **{"is_ready": True, "num_starts": 1, "cache_tokens": 4096, **settings})


class Front(OnThread):
    """``with Front("one", "two") as front``; then `list` says who there is."""

    def __init__(self, *models: str, router: Callable[[], Router] = Router, **config: Any) -> None:
        super().__init__()
        self._models, self._router = models, router
        self._config = ServerConfig(port=0, **config)
        self.context: FrontContext

    async def _run(self) -> None:
        async def look() -> Listing:
            return Listing([], [])

        self._loop = asyncio.get_running_loop()
        async with replica_session() as session:
            self.context = FrontContext(self._config, Fleet(self._models, look, self._router), session)
            [door] = bind(self._config)
            await self._serve(uvicorn_server(create_front(self.context), self._config), door)

    def do(self, action: Callable[[], Any]) -> Any:
        """On the front's own thread."""

        async def run() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(TIMEOUT_S)

    def list(self, *records: Record) -> None:
        self.do(lambda: self.context.fleet.take_listing(Listing(list(records), [])))


class BadReplica:
    """Answers each request with these bytes and closes, or, with hold=True, says nothing more until the end."""

    def __init__(self, said: bytes, *, hold: bool = False) -> None:
        import socket

        self._said, self._hold = said, hold
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_asked = 0
        self.asked = threading.Event()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                door, _ = self._listener.accept()
            except OSError:
                return
            if self._over.is_set():
                door.close()
                return
            thread = threading.Thread(target=self._answer, args=(door,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _answer(self, door: Any) -> None:
        with door:
            head = b""
            while b"\r\n\r\n" not in head and (data := door.recv(65536)):
                head += data
            head, _, body = head.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
            left = int(length[1]) - len(body) if length else 0
            while left > 0 and (data := door.recv(left)):  # who hangs up on what is not read takes its answer back
                left -= len(data)
            self.num_asked += head.startswith(b"POST")  # its figures are asked for, too
            door.sendall(self._said)
            self.asked.set()
            if self._hold:
                self._over.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import socket

        self._over.set()
        with socket.create_connection(self._listener.getsockname()):  # wakes who accepts
            pass
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        self._listener.close()


def http_answer(status: str, kind: str, body: bytes, *, length: int | None = None, more: str = "") -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n".encode() + body
