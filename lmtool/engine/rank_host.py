"""A rank host: starts ranks on this machine for engines on others. `lmtool serve ranks`, or, for another program,

    python -m lmtool.engine.rank_host --host HOST --port PORT

which takes its key as the first line of stdin, says HOST:PORT on stdout when it listens, and ends when stdin does.

A connection is one rank: once its other end has proven to know the key and said what to start, it is handed on to the
rank's process, and this one only watches. It kills the process when the connection ends, or the machine at its other
end is silent. It holds nothing between connections; an engine that is started again connects again.
"""

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from lmtool import log
from lmtool.engine.frames import Frames
from lmtool.engine.rank_key import KEY, admit, checked_key
from lmtool.engine.rank_start import model_digest, start_process
from lmtool.engine.rank_wire import RankOrders, Refused
from lmtool.errors import CheckpointError, ConfigError, LmtoolError

_log = logging.getLogger("lmtool.engine.rank_host")  # run as a program, its __name__ is another
_ORDERS_BYTES = 1 << 20
_MOST_SESSIONS = 256  # a thread each
_SAME = "every machine reads its own copy of the model at the same path"


class RankHost:
    """Listens from the moment it is made."""

    def __init__(self, host: str, port: int, key: bytes) -> None:
        """port 0: a free one. Raises ConfigError where it cannot listen there."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            why = str(error.strerror or error).partition(" (while")[0]  # Python repeats the address
            raise ConfigError(f"cannot listen on {host} port {port}: {why}", "give another --host or --port") from error
        self._key = key
        self._over, self._end = socket.socketpair()  # the one becomes readable, for all who watch, when the other ends
        self._sessions: set[threading.Thread] = set()

    @property
    def address(self) -> str:
        """HOST:PORT, as --rank-hosts takes it."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def serve(self) -> None:
        """Until `close`; then no rank is left."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._over, select.POLLIN)
        while self._over.fileno() not in dict(poller.poll()):
            connection, peer = self._listener.accept()
            self._sessions = {session for session in self._sessions if session.is_alive()}
            if len(self._sessions) >= _MOST_SESSIONS:
                connection.close()
                continue
            session = threading.Thread(target=self._session, args=(connection, peer[0]), daemon=True)
            self._sessions.add(session)
            session.start()
        self._listener.close()
        for session in self._sessions:
            session.join()
        self._over.close()

    def close(self) -> None:
        """May be called from any thread, and from a signal's handler."""
        self._end.close()

    def _session(self, connection: socket.socket, peer: str) -> None:
        with connection:
            try:
                if not admit(connection, self._key):
                    _log.warning("%s has another %s", peer, KEY)
                    return
                frames = Frames(connection, RankOrders, _ORDERS_BYTES)
                orders = frames.receive()
                connection.settimeout(None)
                try:
                    _check(orders)
                except LmtoolError as error:
                    frames.send(Refused(type(error).__name__, error.cause, error.fix))
                    return
            except (OSError, EOFError, msgspec.MsgspecError) as error:
                _log.debug("%s: %s", peer, error)
                return
            self._run(orders, connection)

    def _run(self, orders: RankOrders, connection: socket.socket) -> None:
        """A rank, until it ends or nobody is there any more for whom it runs."""
        with start_process(orders, connection) as process:
            try:
                self._wait(process.pid, connection)
            finally:
                process.kill()

    def _wait(self, pid: int, connection: socket.socket) -> None:
        ended = os.pidfd_open(pid)
        try:
            poller = select.poll()
            poller.register(connection, select.POLLRDHUP)
            poller.register(self._over, select.POLLIN)
            poller.register(ended, select.POLLIN)
            poller.poll()
        finally:
            os.close(ended)


def _check(orders: RankOrders) -> None:
    """What is said before a process is started. Raises CheckpointError."""
    if orders.path is None:
        return
    path = Path(orders.path)
    if not path.exists():
        raise CheckpointError(f"there is no {path}", _SAME)
    if orders.digest is not None and model_digest(path) != orders.digest:
        raise CheckpointError(f"{path} is another model, or another copy of it", _SAME)


def serve(host: RankHost) -> None:
    """Until SIGINT or SIGTERM. For the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: host.close())
    host.serve()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lmtool.engine.rank_host")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    log.setup()
    try:
        key = checked_key(sys.stdin.readline().strip())
        host = RankHost(given.host, given.port, key)
    except LmtoolError as error:
        sys.stderr.write(f"lmtool: error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{host.address}\n")
    sys.stdout.flush()
    threading.Thread(target=_end_with_stdin, args=(host,), daemon=True).start()
    serve(host)
    return 0


def _end_with_stdin(host: RankHost) -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    host.close()


if __name__ == "__main__":
    sys.exit(main())
