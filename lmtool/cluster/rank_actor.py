"""A replica's ranks on another machine: an actor there, which starts a rank host and ends with the replica.

Ray gives it the machine's part of the GPUs. Engine and rank host speak with each other, not through Ray.
"""

import asyncio
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lmtool.child import module_command, module_environment
from lmtool.errors import EngineError

_START_S = 60.0  # for a process that imports torch, where others start as well


class RankActor:
    """key: that engines prove to know."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """HOST:PORT at which it listens. Raises EngineError where it does not."""
        self._process = process = await asyncio.create_subprocess_exec(
            *module_command("lmtool.engine.rank_host"),
            *("--host", ray.util.get_node_ip_address(), "--port", "0"),
            env=module_environment(),
            stdin=asyncio.subprocess.PIPE,  # ends with this actor, and the rank host with it
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._key.encode() + b"\n")
        async with asyncio.timeout(_START_S):
            line = await process.stdout.readline()
        if not line:
            raise EngineError(f"a rank host ended with code {await process.wait()}", "see Ray's logs of it")
        return line.decode().strip()

    async def check(self) -> None:
        """Raises EngineError where its process has ended."""
        if self._process is None or self._process.returncode is not None:
            raise EngineError("a rank host has ended")


def rank_actors(group: PlacementGroup, key: str) -> list[Any]:
    """One on each machine of the group but the first, with all that Ray keeps free for the replica there."""
    actors = []
    for index, bundle in enumerate(group.bundle_specs[1:], 1):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
        actors.append(ray.remote(RankActor).options(**options).remote(key))
    return actors
