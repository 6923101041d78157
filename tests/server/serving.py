"""A real uvicorn with the whole application, on a thread and a free port, for tests that use real clients."""

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
import openai
import uvicorn

from lmtool.server.app import create_app
from lmtool.server.context import ServerContext
from tests.server.support import EngineInThread, tiny_context, tiny_engine

TIMEOUT_S = 120.0  # generous: the machine is shared


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


class Serving:
    """``with Serving(max_queue=3) as server``. engine: the caller closes it; config: of `ServerConfig`."""

    def __init__(self, engine: EngineInThread | None = None, **config: Any) -> None:
        self._own = engine is None
        self.engine = engine or tiny_engine()
        self._config = config
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.context: ServerContext
        self.url = ""

    async def _run(self) -> None:
        async with tiny_context(self.engine, **self._config) as context:
            self.context = context
            server = uvicorn.Server(uvicorn.Config(create_app(context), port=0, log_level="warning", lifespan="off"))
            server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
            self._server = server
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._up.set()
            await serving

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        if self._own:
            self.engine.close()

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=TIMEOUT_S, max_retries=0)

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, **settings)
