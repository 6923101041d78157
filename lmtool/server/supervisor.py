"""`lmtool serve api_server`: starts the engine's process and the HTTP processes, keeps them going, ends them in order.

This process is the first HTTP process, too. The engine listens on a Unix socket that this process holds, in a folder of
its own: an engine that died is replaced behind the same address, and nobody else on the machine can connect.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lmtool import log
from lmtool.child import module_command, module_environment
from lmtool.errors import EngineError
from lmtool.server.config import ServerConfig
from lmtool.server.doors import address_of, bind
from lmtool.server.engine_client import EngineClient
from lmtool.server.orders import EngineOrders, HttpOrders

_log = logging.getLogger(__name__)
_MOST_FAILED_STARTS = 3  # in a row; then it is not worth another
_AGAIN_S, _MOST_REST_S = 0.5, 30.0  # before another start; twice as long after each that failed
# An engine that was ready and has said nothing for so long will not: a kernel does not end, a disk does not answer. Far
# more than a step takes; `/health` says sooner that it is silent.
_STILL_S = 600.0
_LOOK_S = 5.0
_INTERRUPTED = 130
_END_S = 10.0  # what a process that is told to end may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """name: as the user gave it; path: the model's folder or file; engine: settings of `EngineConfig`, as given."""

    name: str
    path: Path
    chat_template: str | None
    engine: dict[str, Any]
    config: ServerConfig


def serve(launch: Launch, say: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. say: what people are to know about the start. Raises what keeps the engine from it."""
    serve_at(bind(launch.config), launch, say)


def serve_at(doors: list[socket.socket], launch: Launch, say: Callable[[str], None]) -> None:
    """The same at sockets of `bind`, which are closed at the end."""
    with contextlib.ExitStack() as stack:
        for door in doors:
            stack.enter_context(door)
        folder = stack.enter_context(_private_folder())
        if len(doors) > 1:  # before prometheus_client is imported
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "engine"))
        listener.listen()
        run = _Run(launch, folder, doors, listener, say)

        import uvloop

        uvloop.run(run.main())


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lmtool-"))  # mode 0700
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Run:
    """One server from its start to its end."""

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        doors: list[socket.socket],
        listener: socket.socket,
        say: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._folder = folder
        self._doors = doors
        self._listener = listener
        self._say = say
        self._stop = asyncio.Event()
        self._http_over = asyncio.Event()
        self._told = False
        self._client: EngineClient
        self._address: str

    async def main(self) -> None:
        from lmtool.server.http_process import make_context, serve_http

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        context = make_context(self._http_orders(0), self._on_change)
        self._client = context.engine
        self._address = address_of(self._launch.config, self._doors[0])
        engine = asyncio.create_task(self._keep_engine())
        others = [asyncio.create_task(self._keep_http(number)) for number in range(1, len(self._doors))]
        here = asyncio.create_task(serve_http(context, self._doors[0], self._stop))
        await asyncio.wait((engine, here), return_when=asyncio.FIRST_COMPLETED)  # the engine's only where it gives up
        self._stop.set()
        try:
            await asyncio.gather(here, *others)
        finally:
            self._http_over.set()
        await engine

    def _end(self) -> None:
        if self._stop.is_set():  # asked twice: at once; the others notice
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(_INTERRUPTED)
        self._stop.set()

    def _on_change(self, client: EngineClient) -> None:
        if client.info is not None and not self._told:
            self._told = True
            self._say(f"{client.info.description} · serving on {self._address}")
        elif client.info is None and client.loading is not None and not self._told:
            _log.debug("loading: %s %d of %d", client.loading.what, client.loading.done, client.loading.total)

    # ------------------------------------------------------------------ the engine's process
    async def _keep_engine(self) -> None:
        """Start it, and again whenever it ends, until the server ends. Raises what it says about itself.

        One that has been ready on several machines is started again for as long as that takes: what it waits for, such
        as another machine or the link to it, is not here, and comes back without anybody telling this server.
        """
        num_failed = 0
        while not self._stop.is_set():
            process = await self._start(
                "engine_process", self._listener.fileno(), msgspec.json.encode(self._engine_orders())
            )
            began = time.monotonic()
            looking = asyncio.create_task(self._kill_where_still(process))
            is_to_end = await self._is_to_end(process)
            looking.cancel()
            if is_to_end:
                await self._http_over.wait()  # until then somebody may wait for an answer
                await self._let_end(process)
                return
            await asyncio.sleep(_AGAIN_S)  # what it said last has arrived then
            client = self._client
            if client.failure is not None and not self._told:
                raise client.failure
            num_failed = 0 if client.ready_since_s >= began else num_failed + 1
            if num_failed >= _MOST_FAILED_STARTS and not (self._told and self._launch.engine.get("rank_hosts")):
                raise client.failure or EngineError(
                    f"the engine's process ended {num_failed} times while it was starting, "
                    f"last with {_how(process.returncode)}",
                    "see what it said above, or try --device cpu",
                )
            why = client.failure or f"its process ended, {_how(process.returncode)}"
            _log.warning("the engine is started again: %s", why)
            if num_failed:
                await self._rest(min(_AGAIN_S * 2**num_failed, _MOST_REST_S))

    async def _rest(self, seconds: float) -> None:
        """Not for longer than the server is to go on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _is_to_end(self, process: asyncio.subprocess.Process) -> bool:
        """Wait until the server is to end, or the process has ended by itself (False)."""
        ended = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        ended.cancel()
        return self._stop.is_set()

    async def _kill_where_still(self, process: asyncio.subprocess.Process) -> None:
        """Counted while this process runs: after a Ctrl-Z both have said nothing, and both go on."""
        still_s = 0.0
        while still_s < _STILL_S:
            await asyncio.sleep(_LOOK_S)
            is_silent = self._client.info is not None and self._client.silent_s >= _LOOK_S
            still_s = still_s + _LOOK_S if is_silent else 0.0
        _log.error("the engine's process stands still: it said nothing for %.0f s", still_s)
        process.kill()

    def _engine_orders(self) -> EngineOrders:
        launch = self._launch
        return EngineOrders(
            launch.name,
            str(launch.path),
            self._listener.fileno(),
            launch.engine,
            launch.chat_template,
            log.is_verbose(),
        )

    # ------------------------------------------------------------------ other HTTP processes
    async def _keep_http(self, number: int) -> None:
        door = self._doors[number]
        while not self._stop.is_set():
            process = await self._start("http_process", door.fileno(), msgspec.json.encode(self._http_orders(number)))
            if await self._is_to_end(process):
                await self._let_end(process, self._launch.config.drain_timeout_s + _END_S)
                return
            _log.warning("HTTP process %d ended (%s); it is started again", number, _how(process.returncode))
            await asyncio.sleep(_AGAIN_S)

    def _http_orders(self, number: int) -> HttpOrders:
        launch = self._launch
        return HttpOrders(
            launch.config,
            number,
            str(launch.path),
            launch.chat_template,
            str(self._folder / "engine"),
            str(self._folder / "sessions") if len(self._doors) > 1 else None,
            self._doors[number].fileno(),
            log.is_verbose(),
        )

    # ------------------------------------------------------------------ processes
    async def _start(self, module: str, fd: int, orders: bytes) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *module_command(f"lmtool.server.{module}"),
            env=module_environment(),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(fd,),
        )
        assert process.stdin is not None
        process.stdin.write(orders + b"\n")
        return process

    async def _let_end(self, process: asyncio.subprocess.Process, within_s: float = _END_S) -> None:
        """Its stdin's end tells it."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(within_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-returncode).name
    return f"exit code {returncode}"
