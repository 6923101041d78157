"""The other ranks of an engine: a process each, told every step that the first one launches, so that all launch the
same. Knows no scheduling.

Ranks find each other through a file in a folder that only this user may enter. A rank that dies takes the engine along:
whoever waits for it gets an error, and nobody waits for ever.
"""

import contextlib
import json
import logging
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed
from torch.distributed import FileStore  # type: ignore[attr-defined]

from lmtool.child import module_command, module_environment
from lmtool.config import EngineConfig
from lmtool.engine.batch import Batch
from lmtool.engine.rank_wire import Failed, Frames, FromRank, Launch, RankOrders, Ready, Refused
from lmtool.errors import BY_NAME, ConfigError, DeviceError, EngineError, LmtoolError, RanksLost
from lmtool.layers.group import TorchGroup
from lmtool.models.config import ModelConfig

_log = logging.getLogger(__name__)
_TIMEOUT = timedelta(minutes=10)  # of what ranks wait for each other in, loading included
_END_S = 5.0


def join_group(store: Path, rank: int, size: int, device: torch.device) -> TorchGroup:
    """Be one of the ranks that meet at ``store``."""
    on_gpu = device.type == "cuda"
    hook = sys.excepthook
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=device if on_gpu else None,
    )
    sys.excepthook = hook  # torch's own would write "[rank0]" before every traceback, from now on
    return TorchGroup(device)


def device_of(rank: int, size: int, first: torch.device) -> torch.device:
    """The first rank's card, and those after it. Raises DeviceError where there are not so many."""
    if first.type == "cpu":
        return first
    index, count = (first.index or 0) + rank, torch.cuda.device_count()
    if (first.index or 0) + size > count:
        there = "there is 1" if count == 1 else f"there are {count}"
        raise DeviceError(f"--tp {size} asks for {size} GPUs from {first} on, {there}", "give a smaller --tp")
    return torch.device("cuda", index)


class Ranks:
    """All but the first, which is this process. Close it with the engine."""

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        *,
        path: Path | None = None,
        shape: ModelConfig | None = None,
        group_size: int | None = None,
    ) -> None:
        """Starts them, with the model that they are to hold a part of. Raises ConfigError, DeviceError."""
        self.size = config.tp
        if torch.distributed.is_initialized():
            raise ConfigError("--tp: this process has an engine of several ranks already", "close that one first")
        if config.cache_host_gb:
            raise ConfigError("--tp and --cache-host-gb: the host tier is for one rank", "leave out one of them")
        device_of(0, self.size, device)
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._failed: dict[int, set[int]] = {}  # step -> ranks
        self._done = 0  # the last step that was launched here
        self._lost: LmtoolError | None = None
        self._closing = False
        self._number = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lmtool-ranks-")
        store = Path(self._folder.name) / "store"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._frames: list[Frames] = []
        try:
            for rank in range(1, self.size):
                self._start(rank, store, config, device, path, shape, group_size)
            self.group = join_group(store, 0, self.size, device)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        rank: int,
        store: Path,
        config: EngineConfig,
        device: torch.device,
        path: Path | None,
        shape: ModelConfig | None,
        group_size: int | None,
    ) -> None:
        here, there = socket.socketpair()
        orders = RankOrders(
            rank=rank,
            size=self.size,
            store=str(store),
            socket_fd=there.fileno(),
            device=str(device_of(rank, self.size, device)),
            engine={name: getattr(config, name) for name in config.given},
            path=str(path) if path is not None else None,
            shape=asdict(shape) if shape is not None else None,
            group_size=group_size,
            verbose=_log.isEnabledFor(logging.DEBUG),
        )
        process = subprocess.Popen(
            module_command("lmtool.engine.rank_process"),
            stdin=subprocess.PIPE,
            env=module_environment(),
            pass_fds=(there.fileno(),),
        )
        there.close()
        assert process.stdin is not None
        process.stdin.write(json.dumps(msgspec.to_builtins(orders)).encode() + b"\n")
        process.stdin.flush()
        self._processes.append(process)
        self._frames.append(Frames(here, FromRank))
        threading.Thread(target=self._listen, args=(rank,), name=f"lmtool-rank-{rank}", daemon=True).start()

    # ------------------------------------------------------------------ what they say
    def _listen(self, rank: int) -> None:
        frames = self._frames[rank - 1]
        try:
            while True:
                self._hear(rank, frames.receive())
        except (EOFError, OSError):
            if not self._closing:
                self._lose(RanksLost(f"rank {rank} of {self.size} has ended", "see what it said before"))

    def _hear(self, rank: int, message: Any) -> None:
        if isinstance(message, Refused):
            self._lose(BY_NAME.get(message.kind, EngineError)(message.cause, message.fix))
            return
        with self._changed:
            if isinstance(message, Ready):
                self._ready.add(rank)
            elif isinstance(message, Failed):
                self._failed.setdefault(message.number, set()).add(rank)
                _log.debug("rank %d: step %d: %s", rank, message.number, message.cause)
            self._changed.notify_all()
        if isinstance(message, Failed) and message.number <= self._done:
            self._lose(RanksLost(f"rank {rank} of {self.size} broke in a step: {message.cause}"))

    def _lose(self, reason: LmtoolError) -> None:
        with self._changed:
            if self._lost is not None:
                return
            self._lost = reason
            self._changed.notify_all()
        # a kernel that waits for the rank would wait for ever. It is told at once; this may return only when nothing
        # holds the group any more
        threading.Thread(target=_leave_group, name="lmtool-leave", daemon=True).start()

    def check(self) -> None:
        """Raises what ended a rank: RanksLost, or what it refused to start for."""
        if self._lost is not None:
            raise type(self._lost)(self._lost.cause, self._lost.fix)

    def wait_until_ready(self) -> None:
        """All wait for steps. Raises as `check` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._ready) == self.size - 1)
        self.check()

    # ------------------------------------------------------------------ what they are told
    def launch(self, batch: Batch) -> int:
        """Have them launch this step, too; its number. Raises as `check` does."""
        self.check()
        self._number += 1
        frame = self._frames[0].frame(Launch(self._number, batch))
        try:
            for frames in self._frames:
                frames.connection.sendall(frame)
        except OSError:
            self._lose(RanksLost(f"a rank of {self.size} has ended", "see what it said before"))
            self.check()
        return self._number

    def launched(self, number: int) -> None:
        """The step is under way here: a rank where it is not would be waited for in vain."""
        with self._changed:
            self._done = number
            late = bool(self._failed)
        if late:
            self._lose(RanksLost(f"some of {self.size} ranks broke in a step, and others did not"))
            self.check()

    def failed_together(self, number: int, within_s: float = 30.0) -> bool:
        """A step that broke here broke on every rank: they are still of one mind."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._lost is not None or len(self._failed.get(number, ())) == self.size - 1, within_s
            ) and (self._lost is None)

    def forget(self, number: int) -> None:
        with self._changed:
            self._failed.pop(number, None)

    def close(self) -> None:
        """May be called twice."""
        self._closing = True
        for frames in self._frames:
            with contextlib.suppress(OSError):
                frames.connection.shutdown(2)
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for frames in self._frames:
            frames.connection.close()
        if torch.distributed.is_initialized():
            leaving = threading.Thread(target=_leave_group, name="lmtool-leave", daemon=True)
            leaving.start()
            leaving.join(_END_S)
        self._folder.cleanup()


def _leave_group() -> None:
    """The others are gone: there is nobody to say goodbye to."""
    with contextlib.suppress(Exception):
        torch.distributed.distributed_c10d._abort_process_group()
