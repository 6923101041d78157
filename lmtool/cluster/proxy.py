"""`lmtool serve proxy`: Ray, the models on it, and the front in this process, from the start to an orderly end."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lmtool.cluster.app import create_front
from lmtool.cluster.context import FrontContext
from lmtool.cluster.directory import Listing
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.forward import replica_session
from lmtool.cluster.routing import Policy, Router
from lmtool.cluster.spec import ClusterSpec
from lmtool.errors import InputError
from lmtool.server.config import ServerConfig
from lmtool.server.doors import address_of, bind
from lmtool.server.http_process import uvicorn_server

if TYPE_CHECKING:  # whose module imports Ray, which has to hear of its token before
    from lmtool.cluster.served import Served

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_LAST_WORDS_S = 1.0  # for errors of answers that are cut off to be written
_INTERRUPTED = 130
_LISTING_S = 5.0  # that the directory may take for an answer; it is asked again then
Say = Callable[[str], None]


def serve_proxy(
    spec: ClusterSpec,
    config: ServerConfig,
    ray_address: str | None,
    routing: Policy,
    say: Say,
    reread: Callable[[], ClusterSpec],
) -> None:
    """Until SIGINT or SIGTERM. ray_address: of a cluster; None: one of its own on this machine, for as long as this.
    reread: what is to be served from SIGHUP on.

    Raises what keeps it from serving: ConfigError, and of a model that cannot start what its engine says.
    """
    from lmtool.cluster.ray_cluster import joined

    [door] = bind(config)
    quietly = contextlib.redirect_stdout(sys.stderr)  # where Ray says what it notices
    owner = secrets.token_hex(8)
    with door, quietly, joined(ray_address, say):
        import uvloop

        from lmtool.cluster.served import Served

        num_replicas = sum(model.bounds[0] for model in spec.models)
        say(f"starting {num_replicas} replicas of {', '.join(spec.names)}")
        with Served(spec, owner, loopback=ray_address is None) as served:
            uvloop.run(_Proxy(served, owner, config, routing, door, say, reread).main())


class _Proxy:
    """The front, from its start to its end."""

    def __init__(
        self,
        served: "Served",
        owner: str,
        config: ServerConfig,
        routing: Policy,
        door: socket.socket,
        say: Say,
        reread: Callable[[], ClusterSpec],
    ) -> None:
        from lmtool.cluster.directory import directory

        self._served = served
        self._owner = owner
        self._config = config
        self._door = door
        self._say = say
        self._reread = reread
        self._directory = directory()
        self._fleet = Fleet(served.spec.names, self._look, partial(Router, routing))
        self._stop = asyncio.Event()
        self._asked_to_update = asyncio.Event()

    async def _look(self) -> Listing:
        async with asyncio.timeout(_LISTING_S):
            listing: Listing = await self._directory.listing.remote(self._owner)
        return listing

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_update.set)
        async with replica_session() as session:
            context = FrontContext(self._config, self._fleet, session)
            server = uvicorn_server(create_front(context), self._config)
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(server.serve([self._door])),
                asyncio.create_task(self._stop.wait()),
                asyncio.create_task(self._fail_with_models()),
            ]
            looking = asyncio.create_task(self._fleet.keep_looking())
            beside = [asyncio.create_task(work) for work in (self._tell_when_ready(), self._keep_updating(context))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                task.cancel()
            await self._drain(context)
            looking.cancel()
            server.should_exit = True
            await tasks[0]
            for task in tasks[1:]:
                task.cancel()
            for task in done:
                task.result()  # raises what a model says

    async def _keep_updating(self, context: FrontContext) -> None:
        while True:
            await self._asked_to_update.wait()
            self._asked_to_update.clear()
            try:
                wanted = await asyncio.to_thread(self._reread)
                change = await asyncio.to_thread(self._served.update, wanted)
            except Exception as error:  # what is served already goes on
                _log.warning("nothing was changed: %s", error)
                continue
            context.set_models(wanted.names)  # what is removed gets no new requests from now on
            self._say(f"{change}")
            await asyncio.to_thread(self._served.withdraw, change.removed)

    def _end(self) -> None:
        if self._stop.is_set():  # asked twice: at once; what is of its own ends with this process
            os._exit(_INTERRUPTED)
        self._stop.set()

    async def _drain(self, context: FrontContext) -> None:
        context.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout_s):
                while self._fleet.num_open:
                    await asyncio.sleep(_POLL_S)
        self._fleet.let_all_go()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._fleet.num_open:
                    await asyncio.sleep(_POLL_S)

    async def _tell_when_ready(self) -> None:
        while not all(map(self._fleet.ready, self._fleet.models)):
            await asyncio.sleep(_POLL_S)
        self._say(f"{', '.join(self._fleet.models)} · serving on {address_of(self._config, self._door)}")

    async def _fail_with_models(self) -> None:
        """Raises what is wrong with what was given for a model, as its first replica says. What else keeps a replica
        from starting may pass, and Ray tries again."""
        initial, started, told = set(self._fleet.models), set[str](), set[str]()
        while True:
            await asyncio.sleep(_POLL_S)
            started.update(name for name in self._fleet.models if self._fleet.ready(name))
            for failed in self._fleet.failed.values():
                error = failed.error()
                if failed.model in initial - started and isinstance(error, InputError):
                    raise type(error)(f"{failed.model}: {error.cause}", error.fix)
                if str(error) not in told:
                    told.add(str(error))
                    _log.warning("a replica of %s cannot start, and is tried again: %s", failed.model, error)
