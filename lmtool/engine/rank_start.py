"""A rank's process, on this machine or on another, as the first rank sees it."""

import contextlib
import hashlib
import json
import socket
import subprocess
from pathlib import Path

import msgspec

from lmtool.child import module_command, module_environment
from lmtool.engine.frames import Frames
from lmtool.engine.rank_wire import FromRank, RankOrders
from lmtool.errors import RanksLost

_WEIGHTS = (".safetensors", ".gguf")


def start_process(orders: RankOrders, connection: socket.socket) -> "subprocess.Popen[bytes]":
    """A rank on this machine, with its end of the connection to the first one. It ends when its stdin does."""
    orders = msgspec.structs.replace(orders, socket_fd=connection.fileno())
    process = subprocess.Popen(
        module_command("lmtool.engine.rank_process"),
        stdin=subprocess.PIPE,
        # torch would warn of every machine that has no name
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", **module_environment()},
        pass_fds=(connection.fileno(),),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already: its connection says so
        process.stdin.write(json.dumps(msgspec.to_builtins(orders)).encode() + b"\n")
        process.stdin.flush()
    return process


class RankHandle:
    """One of the other ranks. name: for people; process: None where another machine has it."""

    def __init__(self, name: str, connection: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.name = name
        self.frames = Frames(connection, FromRank)
        self._process = process

    @classmethod
    def here(cls, name: str, orders: RankOrders) -> "RankHandle":
        ours, theirs = socket.socketpair()
        with theirs:
            return cls(name, ours, start_process(orders, theirs))

    @classmethod
    def there(cls, name: str, orders: RankOrders, connection: socket.socket) -> "RankHandle":
        """connection: to a rank host, which gives it to the rank."""
        handle = cls(name, connection)
        with contextlib.suppress(OSError):  # whoever listens hears of it
            handle.frames.send(orders)
        return handle

    @property
    def pid(self) -> int | None:
        """None where it is another machine's."""
        return self._process.pid if self._process is not None else None

    def ended(self) -> RanksLost:
        where = "see what it said before" if self.pid is not None else "see what `lmtool serve ranks` said there"
        return RanksLost(f"{self.name} has ended", where)

    def hang_up(self) -> None:
        """It is to end; when it has, so has the connection."""
        with contextlib.suppress(OSError):
            self.frames.connection.shutdown(socket.SHUT_WR)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """At once, so that nobody who waits for it waits on. Whoever listens to it hears that it has ended."""
        with contextlib.suppress(OSError):
            self.frames.connection.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            self._process.kill()

    def close(self, within_s: float) -> None:
        """Behind `hang_up`, or `kill`: nothing of it is left here."""
        if self._process is not None:
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.frames.connection.close()


def model_digest(path: Path) -> str:
    """By which two copies of a model are told apart: its config.json, names and sizes of its weights. Reads no weights.

    Raises OSError.
    """
    digest = hashlib.sha256()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.name == "config.json":
            digest.update(file.read_bytes())
        elif file.suffix in _WEIGHTS:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()
