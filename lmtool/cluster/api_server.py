"""A replica's api_server: a process of its own, what it says on its stdout while it starts, and over HTTP from then on.
Knows no Ray.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from lmtool.child import module_command
from lmtool.cluster.orders import ReplicaOrders, ReplicaSays
from lmtool.errors import EngineError

ANSWER_S = 5.0  # for how it is; it answers between two tokens


class ApiServer:
    """model: for people. key: that it wants. To be made on the event loop that uses it."""

    def __init__(self, model: str, key: str) -> None:
        self._model = model
        self._process: asyncio.subprocess.Process | None = None
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(ANSWER_S)
        )
        self.url: str

    async def start(self, orders: ReplicaOrders, environment: Mapping[str, str]) -> None:
        """Until it listens, at ``url``; its engine is not ready yet. Raises what keeps it from that."""
        self._process = process = await asyncio.create_subprocess_exec(
            *module_command("lmtool.cluster.replica_process"),
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the front's
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(orders) + b"\n")
        url = (await self._said()).url
        assert url is not None
        self.url = url

    async def broken(self) -> None:
        """Raises why it ends, when it does: after its address it says nothing else."""
        await self._said()

    async def _said(self) -> ReplicaSays:
        """Its next line. Raises what it says is wrong, or that it ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise EngineError(f"a replica of {self._model} ended with code {code}", "see Ray's logs of it")
        said = msgspec.json.decode(line, type=ReplicaSays)
        if said.failure is not None:
            raise said.failure.error()
        return said

    @property
    def ended_with(self) -> int | None:
        assert self._process is not None
        return self._process.returncode

    # ------------------------------------------------------------------ over HTTP
    async def is_ready(self) -> bool:
        try:
            async with self._http.get(f"{self.url}/ready") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def read(self, path: str) -> dict[str, Any]:
        """What a path answers. Raises aiohttp.ClientError or TimeoutError where that is no 200."""
        async with self._http.get(self.url + path, raise_for_status=True) as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def health(self) -> dict[str, Any]:
        """Its own word, whatever the status: when the engine was last heard of. Raises as `read` does."""
        async with self._http.get(f"{self.url}/health") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def end(self, within_s: float) -> None:
        """Answers under way are finished, as far as they are within that time."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(within_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await self._http.close()
