"""The engine's end of its connections: requests in, tokens out, and a heartbeat. Knows neither HTTP nor text.

Each connection has a thread that reads and one that writes, so that a process that does not read holds up nobody else.
What has piled up for one connection leaves as one message: many tokens cost little more than one.
"""

import contextlib
import logging
import queue
import socket
import threading
from typing import Any

import msgspec

from lmtool.engine.async_engine import AsyncEngine
from lmtool.engine.core import EngineCore, TokenOutput
from lmtool.engine.frames import Codec
from lmtool.errors import LmtoolError
from lmtool.server.wire import Abort, EngineInfo, Loading, Output, Stats, ToEngine, Tokens

_log = logging.getLogger(__name__)
_HEARTBEAT_S = 0.5
_ACCEPT_S = 0.2  # how late it is noticed that no more are to be accepted


class EngineServer:
    """Accepts connections from the moment it is made; tells them how far loading is, then serves `AsyncEngine`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._engine: AsyncEngine | None = None
        self._said: Any = Loading("starting")  # what a new connection is told first
        self._closed = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="lmtool-accept", daemon=True)
        self._accepting.start()

    def say(self, message: Any) -> None:
        """Tell every connection, and those to come."""
        with self._lock:
            self._said = message
            for connection in self._connections:
                connection.put(message)

    def serve(self, engine: AsyncEngine, info: EngineInfo) -> None:
        """From now on requests are answered."""
        self._engine = engine
        self.say(info)
        threading.Thread(target=self._beat, args=(engine,), name="lmtool-heartbeat", daemon=True).start()

    def close(self, within_s: float = 1.0) -> None:
        """Say what is still to be said, then end every connection. The listener stays open: it is the caller's."""
        self._closed.set()
        self._accepting.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.finish(within_s)

    def _accept(self) -> None:
        self._listener.settimeout(_ACCEPT_S)
        while not self._closed.is_set():
            try:
                there, _ = self._listener.accept()
            except TimeoutError:
                continue
            there.settimeout(None)
            connection = _Connection(there, self)
            with self._lock:
                self._connections.add(connection)
                connection.put(self._said)
            connection.start()

    def _beat(self, engine: AsyncEngine) -> None:
        """The engine's thread speaks for itself: one that hangs is not heard."""
        while not self._closed.wait(_HEARTBEAT_S):
            engine.call(self._tell)

    def _tell(self, core: EngineCore) -> None:
        stats = stats_of(core)
        with self._lock:
            for connection in self._connections:
                connection.put(stats)

    # ------------------------------------------------------------------ for the connections
    @property
    def engine(self) -> AsyncEngine | None:
        return self._engine

    def forget(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    """Requests of one HTTP process, whose ids are no other's."""

    def __init__(self, there: socket.socket, server: EngineServer) -> None:
        self._socket = there
        self._server = server
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._deliver = self._outbox.put  # one object: a step's outputs come as one list
        self._open: set[int] = set()  # requests that are not over
        self._begun: set[int] = set()  # those whose first token was told with all it has
        self._codec = Codec(ToEngine)
        self._writer = threading.Thread(target=self._write, name="lmtool-to-http", daemon=True)
        self._reader = threading.Thread(target=self._read, name="lmtool-from-http", daemon=True)

    def start(self) -> None:
        self._writer.start()
        self._reader.start()

    def put(self, message: Any) -> None:
        self._outbox.put(message)

    def finish(self, within_s: float) -> None:
        self._outbox.put(None)
        self._writer.join(within_s)
        self._hang_up()
        self._reader.join(within_s)

    def _hang_up(self) -> None:
        """Both threads notice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------ in
    def _read(self) -> None:
        try:
            while data := self._socket.recv(1 << 18):
                for message in self._codec.feed(data):
                    self._take(message)
        except (OSError, msgspec.MsgspecError) as error:
            _log.debug("a connection ended: %s", error)
        finally:
            self._server.forget(self)
            engine = self._server.engine
            if engine is not None:
                for request_id in list(self._open):  # whoever asked is gone
                    engine.abort(request_id)
            self._outbox.put(None)
            self._hang_up()
            self._writer.join()
            self._socket.close()

    def _take(self, message: ToEngine) -> None:
        engine = self._server.engine
        assert engine is not None, "an HTTP process asks only where it was told that the engine is ready"
        if isinstance(message, Abort):
            engine.abort(message.request_id)
            return
        for request in message.requests():
            self._open.add(request.request_id)
            try:
                engine.submit(request, self._deliver)
            except LmtoolError as error:
                self._outbox.put([TokenOutput(request.request_id, None, "error", error=error)])

    # ------------------------------------------------------------------ out
    def _write(self) -> None:
        codec = Codec(ToEngine)
        try:
            while (message := self._outbox.get()) is not None:
                self._socket.sendall(self._gathered(codec, message))
        except OSError as error:
            _log.debug("a connection ended: %s", error)
        finally:
            self._hang_up()

    def _gathered(self, codec: Codec, message: Any) -> bytes:
        """Frames of everything that waits. Order is kept for each request, not between them."""
        first: list[bytes] = []
        tokens = Tokens([], [])
        last: list[bytes] = []
        while True:
            if isinstance(message, list):
                self._sort(message, first, tokens, last, codec)
            else:
                last.append(codec.encode(message))
            try:
                message = self._outbox.get_nowait()
            except queue.Empty:
                break
            if message is None:  # the end: to be seen again by `_write`
                self._outbox.put(None)
                break
        if tokens.request_ids:
            first.append(codec.encode(tokens))
        return b"".join(first + last)

    def _sort(
        self, outputs: list[TokenOutput], first: list[bytes], tokens: Tokens, last: list[bytes], codec: Codec
    ) -> None:
        """A request's first output goes to ``first``, plain tokens to ``tokens``, its last and all with logprobs, of
        which none is plain, to ``last``. Nearly all are plain, and Python is slow: see docs/log.md."""
        begun, request_ids, token_ids = self._begun, tokens.request_ids, tokens.token_ids
        for output in outputs:
            request_id = output.request_id
            if output.finish_reason is not None:
                begun.discard(request_id)
                self._open.discard(request_id)
                last.append(codec.encode(Output.of(output)))
            elif request_id not in begun:
                begun.add(request_id)
                first.append(codec.encode(Output.of(output)))
            elif output.logprob is None and output.token_id is not None:
                request_ids.append(request_id)
                token_ids.append(output.token_id)
            else:
                last.append(codec.encode(Output.of(output)))


def stats_of(core: EngineCore) -> Stats:
    """Called on the engine's thread."""
    scheduler, counters = core.scheduler, core.scheduler.counters
    blocks = scheduler.blocks
    return Stats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting) + scheduler.loads.num_sequences,
        num_free_blocks=blocks.num_free,
        num_host_blocks_used=len(blocks.host),
        counters={name: getattr(counters, name) for name in counters.__slots__},
    )
