"""One HTTP process: uvicorn around `create_app`, and how it comes to its end.

The first one is the server's own; others are `python -m lmtool.server.http_process`, with their orders on stdin.
Told to end, it lets answers finish for a while and refuses new requests; then whoever still waits gets an error.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from lmtool import log
from lmtool.images.form import read_image_form
from lmtool.server.app import create_app
from lmtool.server.config import ServerConfig
from lmtool.server.context import ServerContext
from lmtool.server.engine_client import EngineClient
from lmtool.server.orders import HttpOrders
from lmtool.tokenizer import load_tokenizer

_POLL_S = 0.05
_LAST_WORDS_S = 2  # for errors of answers that are cut off to reach their clients
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


class _Uvicorn(uvicorn.Server):
    """Signals are the server's own affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_context(orders: HttpOrders, on_change: Callable[[EngineClient], None] | None = None) -> ServerContext:
    """Raises CheckpointError and TokenizerError."""
    path = Path(orders.path)
    tokenizer = load_tokenizer(path, chat_template=orders.chat_template)
    return ServerContext(
        orders.config,
        EngineClient(Path(orders.engine_path), on_change),
        tokenizer,
        read_image_form(path),
        number=orders.number,
        sessions_path=Path(orders.sessions_path) if orders.sessions_path is not None else None,
    )


def uvicorn_server(app: ASGIApp, config: ServerConfig) -> uvicorn.Server:
    return _Uvicorn(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_WORDS_S,
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
        )
    )


async def serve_http(context: ServerContext, listener: socket.socket, stop: asyncio.Event) -> None:
    """Until ``stop`` is set and what was under way then is over."""
    server = uvicorn_server(create_app(context), context.config)
    context.engine.start()
    stopping = asyncio.create_task(stop.wait())
    if context.number:  # the first one answers meanwhile: this one would refuse what the server can do already
        await _wait_for_engine(context.engine, stopping)
    serving = asyncio.create_task(server.serve([listener]))
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await _drain(context)
    server.should_exit = True
    await serving


async def _wait_for_engine(engine: EngineClient, stopping: asyncio.Task[bool]) -> None:
    """Until it is ready or cannot start, or nobody is to be served any more."""
    ready = asyncio.create_task(engine.ready())
    await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    await asyncio.gather(ready, return_exceptions=True)  # why it cannot start is told to who asks


async def _drain(context: ServerContext) -> None:
    context.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(context.config.drain_timeout_s):
            while context.engine.num_open:
                await asyncio.sleep(_POLL_S)
    await context.engine.close()


def main() -> int:
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=HttpOrders)
    log.setup()
    if orders.verbose:
        log.be_verbose()
    uvloop.run(_main(orders))
    return 0


async def _main(orders: HttpOrders) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C goes to the whole group: the server decides

    def server_ended() -> None:  # nothing more is said on stdin: this is its end
        loop.remove_reader(sys.stdin.fileno())
        stop.set()

    loop.add_reader(sys.stdin.fileno(), server_ended)
    await serve_http(make_context(orders), socket.socket(fileno=orders.socket_fd), stop)


if __name__ == "__main__":
    sys.exit(main())
