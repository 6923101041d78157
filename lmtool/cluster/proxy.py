"""`lmtool serve proxy`: Ray, the models on it, and the front in this process, from the start to an orderly end."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lmtool.cluster.app import FrontContext, create_front
from lmtool.cluster.directory import Listing
from lmtool.cluster.fleet import Fleet
from lmtool.cluster.forward import replica_session
from lmtool.cluster.spec import ClusterSpec
from lmtool.errors import ConfigError, InputError
from lmtool.server.config import ServerConfig
from lmtool.server.http_process import uvicorn_server
from lmtool.server.supervisor import address_of, bind

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_LAST_WORDS_S = 1.0  # for errors of answers that are cut off to be written
_INTERRUPTED = 130
_LISTING_S = 5.0  # that the directory may take for an answer; it is asked again then
Say = Callable[[str], None]


def serve_proxy(
    spec: ClusterSpec, config: ServerConfig, ray_address: str | None, say: Say, reread: Callable[[], ClusterSpec]
) -> None:
    """Until SIGINT or SIGTERM. ray_address: of a cluster; None: one of its own on this machine, for as long as this.
    reread: what is to be served from SIGHUP on; the same models by name, with other settings.

    Raises what keeps it from serving: ConfigError, and of a model that cannot start what its engine says.
    """
    from lmtool.cluster.ray_cluster import joined

    [door] = bind(config)
    quietly = contextlib.redirect_stdout(sys.stderr)  # where Ray says what it notices
    owner = secrets.token_hex(8)
    loopback = ray_address is None
    with door, quietly, joined(ray_address, say), _deployed(spec, owner, loopback=loopback, say=say):
        import uvloop

        def update() -> list[str]:
            nonlocal spec
            wanted = reread()
            changed = _update(spec, wanted, loopback=loopback)
            spec = wanted
            return changed

        uvloop.run(_Proxy(spec, config, door, owner, say, update).main())


@contextlib.contextmanager
def _deployed(spec: ClusterSpec, owner: str, *, loopback: bool, say: Say) -> Iterator[None]:
    """The models, as long as the block lasts."""
    import ray

    from lmtool.cluster import deployment
    from lmtool.cluster.directory import directory

    deployment.check_fit(spec, deployment.nodes())
    taken = ray.get(directory().claim.remote(owner, spec.names))
    if taken:
        raise ConfigError(
            f"{taken[0]} is served by another proxy on this cluster", "end that one, or give another name"
        )
    num_replicas = sum(model.replicas for model in spec.models)
    say(f"starting {num_replicas} replicas of {', '.join(spec.names)}")
    try:
        deployment.deploy(spec, loopback=loopback)
        yield
    finally:
        deployment.withdraw(spec)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(directory().release.remote(owner), timeout=_LAST_WORDS_S)


def _update(spec: ClusterSpec, wanted: ClusterSpec, *, loopback: bool) -> list[str]:
    """Replicas of models whose settings differ are replaced, one after another: their names. Raises ConfigError."""
    from lmtool.cluster import deployment

    if wanted.names != spec.names:
        raise ConfigError(
            f"the models are now {', '.join(wanted.names)} and were {', '.join(spec.names)}",
            "keep the names, or start the proxy again",
        )
    changed = tuple(new for new, old in zip(wanted.models, spec.models, strict=True) if new != old)
    deployment.check_fit(wanted, deployment.nodes())
    if changed:
        deployment.deploy(ClusterSpec(changed), loopback=loopback)
    return [model.name for model in changed]


class _Proxy:
    """The front, from its start to its end. update: what SIGHUP is for; takes a while, gives the models it changed."""

    def __init__(
        self,
        spec: ClusterSpec,
        config: ServerConfig,
        door: socket.socket,
        owner: str,
        say: Say,
        update: Callable[[], list[str]],
    ) -> None:
        from lmtool.cluster.directory import directory

        self._config = config
        self._door = door
        self._owner = owner
        self._say = say
        self._directory = directory()
        self._fleet = Fleet(spec.names, self._look)
        self._update = update
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
            beside = [asyncio.create_task(work) for work in (self._tell_when_ready(), self._keep_updating())]
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

    async def _keep_updating(self) -> None:
        while True:
            await self._asked_to_update.wait()
            self._asked_to_update.clear()
            try:
                changed = await asyncio.to_thread(self._update)
            except Exception as error:  # what is served already goes on
                _log.warning("nothing was changed: %s", error)
            else:
                self._say(f"replicas are replaced one after another: {', '.join(changed) or 'none, nothing differs'}")

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
        for name in self._fleet.models:
            while not self._fleet.ready(name):
                await asyncio.sleep(_POLL_S)
        self._say(f"{', '.join(self._fleet.models)} · serving on {address_of(self._config, self._door)}")

    async def _fail_with_models(self) -> None:
        """Raises what is wrong with what was given for a model, as its first replica says. What else keeps a replica
        from starting may pass, and Ray tries again."""
        started: set[str] = set()
        while True:
            await asyncio.sleep(_POLL_S)
            started.update(name for name in self._fleet.models if self._fleet.ready(name))
            for failed in self._fleet.failed.values():
                error = failed.error()
                if failed.model not in started and isinstance(error, InputError):
                    raise type(error)(f"{failed.model}: {error.cause}", error.fix)
