"""A real uvicorn with the whole application, on a thread and a free port, for tests that use real clients."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import openai
import uvicorn

from lmtool.server.app import create_app
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.doors import bind
from lmtool.server.http_process import uvicorn_server
from tests.server.support import EngineInThread, tiny_context, tiny_engine

TIMEOUT_S = 120.0  # generous: the machine is shared
Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found]) -> Found:
    """What it was in the end: asked once more it might be something else."""
    end = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)
    return found


class OnThread:
    """A server on a thread of its own, as long as the block lasts. `_run` sets ``url`` and ``_server``, and serves."""

    def __init__(self) -> None:
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._server: uvicorn.Server
        self._clients: dict[str, openai.OpenAI] = {}
        self._asking = threading.Lock()
        self.url = ""

    async def _run(self) -> None:
        raise NotImplementedError

    async def _serve(self, server: uvicorn.Server, door: socket.socket) -> None:
        """Until the block's end."""
        self._server = server
        self.url = f"http://127.0.0.1:{door.getsockname()[1]}"
        serving = asyncio.create_task(server.serve([door]))
        while not server.started:
            await asyncio.sleep(0.01)
        self._up.set()
        await serving

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            client.close()
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def openai(self, key: str = "none") -> openai.OpenAI:
        """One for each key, closed with the server: a socket that nobody closes is an error, of whatever test is being
        run when it is found."""
        with self._asking:
            client = self._clients.get(key)
            if client is None or client.is_closed():
                client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=TIMEOUT_S, max_retries=0)
                self._clients[key] = client
            return client

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, **settings)


class Serving(OnThread):
    """``with Serving(max_queue=3) as server``. engine: the caller closes it; config: of `ServerConfig`."""

    def __init__(self, engine: EngineInThread | None = None, **config: Any) -> None:
        super().__init__()
        self._own = engine is None
        self.engine = engine or tiny_engine()
        self._config = config
        self.context: ServerContext

    async def _run(self) -> None:
        async with tiny_context(self.engine, **self._config) as context:
            self.context = context
            [door] = bind(ServerConfig(port=0))
            await self._serve(uvicorn_server(create_app(context), context.config), door)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._own:
            self.engine.close()
