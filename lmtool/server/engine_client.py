"""An HTTP process's end of the connection to the engine's process: requests out, tokens in. One event loop.

The engine may be loading, ready or down. Whoever waits when it goes down gets an error at once; the connection is made
again by itself, to the same listening socket, as soon as a new engine accepts it. Knows neither HTTP nor text.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lmtool.engine.core import TokenOutput
from lmtool.engine.frames import Codec
from lmtool.engine.sequence import Request
from lmtool.errors import EngineError, LmtoolError
from lmtool.server.wire import (
    Abort,
    EngineInfo,
    FromEngine,
    Loading,
    Output,
    Refused,
    Stats,
    Submit,
    ToEngine,
    Tokens,
)

_log = logging.getLogger(__name__)
_AGAIN_S = 0.1  # between two attempts to connect


class Stream:
    """What comes out of requests that are read together. To be read to the end of each, or aborted."""

    def __init__(self, client: "EngineClient", request_ids: Sequence[int]) -> None:
        self._client = client
        self._open = set(request_ids)
        self._outputs: deque[TokenOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> list[TokenOutput]:
        """All outputs that have come since the last call, at least one. Not to be called after the last one."""
        while not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def abort(self, request_id: int | None = None) -> None:
        """End one request, or all, whatever they are doing; nothing of them is read any more. Harmless when over."""
        for one in list(self._open) if request_id is None else [request_id]:
            self._open.discard(one)
            self._client.abort(one)

    def push(self, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """info: None until the engine is ready, and while it is down. stats: its last heartbeat.

    failure: why the engine cannot be started, where that is so. on_change: called when it becomes ready, goes down,
    or says how far it is with loading.
    """

    def __init__(self, path: Path, on_change: Callable[["EngineClient"], None] | None = None) -> None:
        self.info: EngineInfo | None = None
        self.stats: Stats | None = None
        self.loading: Loading | None = Loading("starting")
        self.failure: LmtoolError | None = None
        self.ready_since_s = -math.inf  # by time.monotonic
        self._path = path
        self._on_change = on_change or (lambda _: None)
        self._writer: asyncio.StreamWriter | None = None
        self._codec = Codec(FromEngine)
        self._streams: dict[int, Stream] = {}
        self._heard_s = time.monotonic()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ requests
    def submit(self, requests: Sequence[Request]) -> Stream:
        """Raises EngineError while there is no engine."""
        if self._writer is None or self.info is None:
            raise EngineError("the engine is not ready", "ask again in a moment")
        stream = Stream(self, [request.request_id for request in requests])
        for choices in _by_prompt(requests):
            self._streams.update((request.request_id, stream) for request in choices)
            self._send(Submit.of(choices))
        return stream

    def abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._streams)

    # ------------------------------------------------------------------ the engine's state
    @property
    def silent_s(self) -> float:
        """Since the engine was last heard of."""
        return time.monotonic() - self._heard_s

    async def ready(self) -> EngineInfo:
        """Wait for the engine. Raises what keeps it from starting."""
        while self.info is None:
            if self.failure is not None:
                raise self.failure
            self._changed.clear()
            await self._changed.wait()
        return self.info

    def start(self) -> None:
        """Connect, now and whenever the connection is lost, until `close`."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    async def close(self) -> None:
        """Requests that are still open get an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._lost("the server is shutting down")

    # ------------------------------------------------------------------ the connection
    async def _stay_connected(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path))
                self._codec = Codec(FromEngine)
                while data := await reader.read(1 << 18):
                    for message in self._codec.feed(data):
                        self._take(message)
            except (OSError, msgspec.MsgspecError) as error:
                _log.debug("connection to the engine: %s", error)
            self._lost("the engine's process ended")
            await asyncio.sleep(_AGAIN_S)

    def _take(self, message: FromEngine) -> None:
        self._heard_s = time.monotonic()
        match message:
            case Tokens():
                for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
                    stream = self._streams.get(request_id)
                    if stream is not None:  # else it was aborted while its tokens were on the way
                        stream.push(TokenOutput(request_id, token_id))
            case Output():
                over = message.finish_reason is not None
                found = self._streams.pop(message.request_id, None) if over else self._streams.get(message.request_id)
                if found is not None:
                    found.push(message.output())
            case Stats():
                self.stats = message
            case EngineInfo():
                self.info, self.loading, self.failure = message, None, None
                self.ready_since_s = self._heard_s
                self._change()
            case Loading():
                self.loading = message
                self._change()
            case Refused():
                self.failure = message.failure.error()
                self._change()

    def _lost(self, why: str) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self.info, self.stats = None, None, None
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            error = EngineError(why, "ask again in a moment")
            stream.push(TokenOutput(request_id, None, "error", error=error))
        self._change()

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(self._codec.encode(message))

    def _change(self) -> None:
        self._changed.set()
        self._on_change(self)


def _by_prompt(requests: Sequence[Request]) -> list[list[Request]]:
    """The choices of each prompt: all but its first one wait for that one."""
    found: list[list[Request]] = []
    for request in requests:
        if request.after is None:
            found.append([])
        found[-1].append(request)
    return found
