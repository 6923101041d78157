"""A replica: an actor of Ray Serve's that starts an api_server of its own and keeps saying how it is.

Its requests do not come through Ray: the front sends them to the api_server, over HTTP, with a key that only those who
may read the directory know. So a token costs what it costs without a cluster, and the bytes of an answer are unchanged.
What Ray does is place it, look after it, and put another in its place. Knows no route but those that say how it is.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import ray
from ray import serve

from lmtool.child import module_environment
from lmtool.cluster.api_server import ANSWER_S, ApiServer
from lmtool.cluster.directory import Record, directory
from lmtool.cluster.orders import FailedStart, ReplicaOrders
from lmtool.cluster.rank_actor import rank_actors
from lmtool.cluster.scaling import NUM_REQUESTS
from lmtool.engine.rank_key import KEY
from lmtool.errors import EngineError, LmtoolError

_log = logging.getLogger(__name__)
BEAT_S = 0.5
_AWAY_S = 120.0  # that its engine may be away before Ray is told: starting it again is the api_server's own affair
END_S = 15.0  # that it may take to end, beside what answers may take


class Replica:
    """orders: `ReplicaOrders` as JSON, without a key. loopback: the front is on this machine, nobody else may come."""

    async def __init__(self, model: str, orders: bytes, *, loopback: bool) -> None:  # type: ignore[misc]
        # Ray Serve awaits it
        self._model = model
        self._name = serve.get_replica_context().replica_id.unique_id
        self._directory = directory()
        self._record: Record | None = None
        self._ready_s = time.monotonic()  # when it last was, or began
        self._rank_actors: list[Any] = []
        host, key = "127.0.0.1" if loopback else ray.util.get_node_ip_address(), secrets.token_urlsafe(32)
        self._server = ApiServer(model, key)
        given = msgspec.json.decode(orders, type=ReplicaOrders)
        config = replace(given.config, host=host, port=0, api_keys=(key,), replica=self._name, disable_docs=True)
        self._end_s = given.config.drain_timeout_s + END_S
        try:
            engine, environment = await self._rank_hosts()
            own = msgspec.structs.replace(given, config=config, engine={**given.engine, **engine})
            await self._server.start(own, {**module_environment(), **environment})
            self._record = Record(self._name, model, self._server.url, key)
            await self._get_ready()
        except LmtoolError as error:
            await self._directory.fail.remote(FailedStart.of(model, error))
            await self._server.end(self._end_s)
            raise RuntimeError(str(error)) from None  # Ray tries again: what it was may have passed
        self._beating = asyncio.create_task(self._keep_beating())

    async def _rank_hosts(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Who starts ranks on its other machines, where it has some: a setting of its engine's, and the key to it in
        the environment."""
        group = ray.util.get_current_placement_group()
        if group is None or group.bundle_count < 2:
            return {}, {}
        key = secrets.token_hex(32)
        self._rank_actors = rank_actors(group, key)
        try:
            addresses = await asyncio.gather(*(actor.start.remote() for actor in self._rank_actors))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)  # of an error of the actor's: without Ray's pages around it
            raise EngineError(f"no rank host could be started on another machine: {cause}") from error
        return {"rank_hosts": addresses}, {KEY: key}

    async def _get_ready(self) -> None:
        """Saying how it is, until its engine is. Raises what keeps it from that."""
        broken = asyncio.create_task(self._server.broken())
        try:
            while self._record is None or not self._record.is_ready:
                await self._beat()
                done, _ = await asyncio.wait((broken,), timeout=BEAT_S)
                if done:
                    await broken
        finally:
            broken.cancel()

    # ------------------------------------------------------------------ how it is
    async def _keep_beating(self) -> None:
        while self._server.ended_with is None:
            try:
                async with asyncio.timeout(ANSWER_S * 2):
                    await self._beat()
            except TimeoutError:  # as long as the directory's machine cannot be reached
                _log.warning("the directory does not answer")
            except ray.exceptions.RayError as error:  # it is made again where it is gone
                _log.warning("the directory does not answer: %s", error)
                with contextlib.suppress(ray.exceptions.RayError, ValueError):
                    self._directory = directory()
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        assert self._record is not None
        record = replace(self._record, beat=self._record.beat + 1)
        is_ready = await self._server.is_ready()
        if is_ready and not record.is_ready:
            record = await self._introduced(record)
        elif not is_ready:
            record = replace(record, is_ready=False)
        if record.is_ready:
            self._ready_s = time.monotonic()
        self._record = record
        await self._directory.put.remote(record)

    async def _introduced(self, record: Record) -> Record:
        """With what its engine says of itself; not ready where that fails."""
        try:
            stats, models = await self._server.read("/stats"), await self._server.read("/v1/models")
        except (aiohttp.ClientError, TimeoutError):
            return record
        cache_tokens = (stats["num_blocks"] - 1) * stats["block_size"]  # block 0 belongs to nobody
        card = models["data"][0]
        return replace(record, is_ready=True, num_starts=record.num_starts + 1, cache_tokens=cache_tokens, card=card)

    # ------------------------------------------------------------------ what Ray Serve asks
    async def check_health(self) -> None:
        """Raises where Ray is to put another in its place."""
        if self._server.ended_with is not None:
            raise RuntimeError(f"the api_server ended with code {self._server.ended_with}")
        with contextlib.suppress(TimeoutError):  # a machine that is cut off may come back: the engine tries again
            async with asyncio.timeout(ANSWER_S):
                await asyncio.gather(*(actor.check.remote() for actor in self._rank_actors))
        found = await self._server.health()
        if found["status"] == "silent":
            raise RuntimeError(found["message"])
        if found["status"] == "down" and time.monotonic() - self._ready_s > _AWAY_S:
            raise RuntimeError(f"the engine is away for more than {_AWAY_S:.0f} s: {found.get('message')}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.by_requests`. An engine that is away has nothing to do."""
        try:
            stats = await self._server.read("/stats")
        except (aiohttp.ClientError, TimeoutError):
            return {NUM_REQUESTS: 0.0}
        return {NUM_REQUESTS: float(stats["num_running"] + stats["num_waiting"])}

    async def __del__(self) -> None:
        """Ray Serve awaits this, and kills the actor where it takes longer than `END_S` and the answers' time."""
        if self._record is None:
            return
        await self._server.end(self._end_s)
        self._beating.cancel()  # till now: answers that are under way are its own, and not lost
        with contextlib.suppress(ray.exceptions.RayError):
            await self._directory.drop.remote(self._record.name)
