"""What a model's replicas say is wrong with it: at its start that ends the proxy, later it does not. Without Ray: the
directory, which is an actor there, is in this process."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="pip install '.[cluster]'")

from lmtool.cluster import directory as directory_room
from lmtool.cluster.directory import Directory, Record
from lmtool.cluster.orders import FailedStart
from lmtool.cluster.proxy import _Proxy
from lmtool.cluster.routing import Policy
from lmtool.cluster.spec_reader import parse_models
from lmtool.errors import CheckpointError, ConfigError, EngineError, LmtoolError
from lmtool.server.config import ServerConfig
from lmtool.server.doors import bind
from tests.server.serving import wait_until

TOO_LONG = ConfigError("--session-len 999999 is longer than the model's 128 tokens", "give a smaller one")


class Here:
    """A handle as Ray's, whose calls are awaited."""

    def __init__(self, directory: Directory) -> None:
        async def listing(owner: str) -> Any:
            return directory.listing(owner)

        self.listing = SimpleNamespace(remote=listing)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Directory:
    made = Directory()
    monkeypatch.setattr(directory_room, "directory", lambda: Here(made))
    return made


def serve(said: list[str]) -> None:
    served: Any = SimpleNamespace(spec=parse_models(["x,name=long"]))
    config = ServerConfig(port=0)
    [door] = bind(config)
    with door:
        asyncio.run(_Proxy(served, "me", config, Policy.PREFIX, door, said.append, lambda: served.spec).main())


def fail(replicas: Directory, error: LmtoolError) -> None:
    replicas.fail(FailedStart.of("long", error))


@pytest.mark.parametrize("error", [TOO_LONG, CheckpointError("there is no x", "give another")])
def test_a_mistake_ends_a_proxy_that_starts(replicas: Directory, error: LmtoolError) -> None:
    fail(replicas, error)
    with pytest.raises(type(error)) as raised:
        serve([])
    assert str(raised.value) == f"long: {error}"


def test_what_may_pass_does_not_and_later_nothing_does(replicas: Directory, caplog: pytest.LogCaptureFixture) -> None:
    fail(replicas, EngineError("no rank host could be started"))
    said: list[str] = []

    def until_told(what: str) -> None:
        wait_until(lambda: any(what in record.getMessage() for record in caplog.records))

    def go_on() -> None:
        try:
            until_told("a replica of long cannot start, and is tried again: no rank host could be started")
            replicas.put(Record("a", "long", "http://127.0.0.1:1", "key", is_ready=True))
            wait_until(lambda: said)
            fail(replicas, TOO_LONG)
            until_told("a replica of long cannot start, and is tried again: --session-len 999999")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(go_on)
        serve(said)
        going.result()
    assert said[0].startswith("long · serving on http://127.0.0.1:")
