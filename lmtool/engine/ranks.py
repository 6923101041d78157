"""The other ranks of an engine: a process each, told every step that the first one launches, so that all launch the
same. Knows no scheduling.

They run on this machine, and on those of `EngineConfig.rank_hosts`. A rank that dies takes the engine along, and all
the others with it: whoever waits for one of them gets an error, and nobody waits for ever.
"""

import contextlib
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed
from torch.distributed import Store  # type: ignore[attr-defined]

from lmtool.config import EngineConfig
from lmtool.engine.batch import Batch, Load
from lmtool.engine.rank_group import address_towards, device_of, file_store, join_group, leave_group, open_store
from lmtool.engine.rank_key import SILENT_S, connect, key_here
from lmtool.engine.rank_start import RankHandle, model_digest
from lmtool.engine.rank_wire import Arrived, Copy, Failed, Landed, Launch, RankOrders, Ready, Refused, ToRank
from lmtool.errors import BY_NAME, ConfigError, EngineError, LmtoolError, RanksLost
from lmtool.layers.group import TorchGroup
from lmtool.models.config import ModelConfig

_log = logging.getLogger(__name__)
_END_S = 5.0
_TOGETHER_S = 5.0  # a step that breaks on all ranks does so within it: they wait for each other in every layer


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
        """Starts them, with the model that they are to hold a part of. Raises ConfigError, DeviceError, and what a rank
        or its host refuses to start for."""
        self.size = config.tp
        if torch.distributed.is_initialized():
            raise ConfigError("--tp: this process has an engine of several ranks already", "close that one first")
        num_cards = self.size // config.num_machines
        here = device_of(0, num_cards, device, self.size)
        self._changed = threading.Condition()
        self._arrived: set[int] = set()
        self._ready: set[int] = set()
        self._failed: dict[int, set[int]] = {}  # step -> ranks
        self._done = 0  # the last step that was launched here
        self._broken = -1  # the last one that broke here
        self._lost: LmtoolError | None = None
        self._closing = False
        self._leaving: threading.Thread | None = None
        self._number = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lmtool-ranks-")
        self._handles: list[RankHandle] = []
        self._listening: list[threading.Thread] = []
        orders = RankOrders(
            rank=0,
            size=self.size,
            card=0,
            num_cards=num_cards,
            device=str(device),
            engine={name: getattr(config, name) for name in config.given},
            store=str(Path(self._folder.name) / "store"),
            path=str(path) if path is not None else None,
            shape=asdict(shape) if shape is not None else None,
            group_size=group_size,
            verbose=_log.isEnabledFor(logging.DEBUG),
        )
        try:
            self.group = self._start(orders, config, here)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ the start
    def _start(self, orders: RankOrders, config: EngineConfig, device: torch.device) -> TorchGroup:
        with contextlib.ExitStack() as unused:
            connections = self._connect(config, orders.num_cards, unused)
            if connections:
                address = address_towards(connections, config.rank_hosts)
                store, port = open_store(address)
                digest = model_digest(Path(orders.path)) if orders.path is not None else None
                orders = msgspec.structs.replace(orders, store=(address, port), digest=digest)
            else:
                address, store = None, file_store(Path(str(orders.store)), self.size)
            for rank in range(1, self.size):
                card = rank % orders.num_cards
                own, name = msgspec.structs.replace(orders, rank=rank, card=card), f"rank {rank} of {self.size}"
                if rank < orders.num_cards:
                    self._hold(rank, RankHandle.here(name, own))
                else:
                    host = config.rank_hosts[rank // orders.num_cards - 1]
                    connection = connections[rank - orders.num_cards]
                    self._hold(rank, RankHandle.there(f"{name}, on {host},", own, connection))
            unused.pop_all()
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._arrived) == self.size - 1)
        self.check()
        return self._join(store, device, address)

    def _connect(self, config: EngineConfig, num_cards: int, stack: contextlib.ExitStack) -> list[socket.socket]:
        """One for each rank that another machine has."""
        if not config.rank_hosts:
            return []
        key = key_here()
        return [stack.enter_context(connect(host, key)) for host in config.rank_hosts for _ in range(num_cards)]

    def _hold(self, rank: int, handle: RankHandle) -> None:
        self._handles.append(handle)
        listening = threading.Thread(target=self._listen, args=(rank, handle), name=f"lmtool-rank-{rank}", daemon=True)
        self._listening.append(listening)
        listening.start()

    def _join(self, store: Store, device: torch.device, address: str | None) -> TorchGroup:
        """On a thread of its own: torch would wait for minutes for a rank that is gone."""
        joined: list[TorchGroup | Exception] = []

        def join() -> None:
            try:
                joined.append(join_group(store, 0, self.size, device, address))
            except Exception as error:
                joined.append(error)
            with self._changed:
                self._changed.notify_all()
                late = self._lost is not None or self._closing
            if late:
                leave_group()

        threading.Thread(target=join, name="lmtool-join", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or joined)
        self.check()
        if isinstance(joined[0], Exception):
            self.explain()
            raise EngineError(f"the ranks do not find each other: {_first_line(joined[0])}") from joined[0]
        return joined[0]

    # ------------------------------------------------------------------ what they say
    def _listen(self, rank: int, handle: RankHandle) -> None:
        try:
            while True:
                self._hear(rank, handle, handle.frames.receive())
        except (EOFError, ConnectionError):
            self._lose(_ended(handle))
        except TimeoutError:
            self._lose(
                RanksLost(f"{handle.name} was silent for {SILENT_S} s", "is its machine there, and the network?")
            )
        except OSError as error:
            self._lose(RanksLost(f"{handle.name} cannot be reached: {error.strerror or error}"))

    def _hear(self, rank: int, handle: RankHandle, message: Any) -> None:
        if isinstance(message, Refused):
            cause = message.cause if handle.pid is not None else f"{handle.name} cannot start: {message.cause}"
            self._lose(BY_NAME.get(message.kind, EngineError)(cause, message.fix))
            return
        with self._changed:
            if isinstance(message, Arrived):
                self._arrived.add(rank)
            elif isinstance(message, Ready):
                self._ready.add(rank)
            elif isinstance(message, Failed):
                self._failed.setdefault(message.number, set()).add(rank)
                _log.debug("rank %d: step %d: %s", rank, message.number, message.cause)
            self._changed.notify_all()
            if not isinstance(message, Failed):
                return
            # it may have broken here as well, or be about to; else this rank waits for one that has left the step
            number = message.number
            self._changed.wait_for(
                lambda: self._lost is not None or self._done >= number or self._broken == number, _TOGETHER_S
            )
            alone = self._broken != number
        if alone:
            self._lose(RanksLost(f"{handle.name} broke in a step: {message.cause}"))

    def _lose(self, reason: LmtoolError) -> None:
        with self._changed:
            if self._lost is not None or self._closing:
                return
            self._lost = reason
            self._changed.notify_all()
            self._leave()
        for handle in self._handles:  # who waits for one of them on a CPU hears of it when its connections end
            handle.kill()

    def _leave(self) -> threading.Thread:
        """A kernel that waits for a rank would wait for ever. It is told at once; this may end only when nothing holds
        the group any more."""
        if self._leaving is None:
            self._leaving = threading.Thread(target=leave_group, name="lmtool-leave", daemon=True)
            self._leaving.start()
        return self._leaving

    def check(self) -> None:
        """Raises what ended a rank: RanksLost, or what it refused to start for."""
        if self._lost is not None:
            raise type(self._lost)(self._lost.cause, self._lost.fix)

    def explain(self, within_s: float = 2.0) -> None:
        """For who has waited for the others and got an error: the reason may be on its way. Raises as `check` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, within_s)
        self.check()

    def wait_until_ready(self) -> None:
        """All wait for steps. Raises as `check` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._ready) == self.size - 1)
        self.check()

    # ------------------------------------------------------------------ what they are told
    def launch(self, batch: Batch) -> int:
        """Have them launch this step, too; its number. Raises as `check` does."""
        self._number += 1
        self._tell(Launch(self._number, batch))
        return self._number

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        """Have them copy their parts of these blocks. Raises as `check` does."""
        self._tell(Copy(list(saves), list(loads)))

    def landed(self, numbers: Sequence[int]) -> None:
        """These loads are over here: the others wait for theirs before they go on. Raises as `check` does."""
        self._tell(Landed(list(numbers)))

    def _tell(self, message: ToRank) -> None:
        self.check()
        frame = self._handles[0].frames.codec.encode(message)
        for handle in self._handles:
            try:
                handle.frames.connection.sendall(frame)
            except OSError:
                self._lose(_ended(handle))
                self.check()

    def launched(self, number: int) -> None:
        """The step is under way here: a rank where it is not would be waited for in vain."""
        with self._changed:
            self._done = number
            late = bool(self._failed)
            self._changed.notify_all()
        if late:
            self._lose(RanksLost(f"some of {self.size} ranks broke in a step, and others did not"))
            self.check()

    def failed_together(self, number: int, within_s: float = _TOGETHER_S) -> bool:
        """A step that broke here broke on every rank: they are still of one mind."""
        with self._changed:
            self._broken = number
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: self._lost is not None or len(self._failed.get(number, ())) == self.size - 1, within_s
            ) and (self._lost is None)

    def forget(self, number: int) -> None:
        with self._changed:
            self._failed.pop(number, None)

    def close(self) -> None:
        """May be called twice."""
        with self._changed:
            self._closing = True
        for handle in self._handles:
            handle.hang_up()
        until = time.monotonic() + _END_S
        for listening in self._listening:  # a connection ends when the rank at its other end has
            listening.join(max(0.0, until - time.monotonic()))
        for handle in self._handles:
            handle.close(max(0.0, until - time.monotonic()))
        with self._changed:
            leaving = self._leave()
        leaving.join(_END_S)
        self._folder.cleanup()


def _ended(handle: RankHandle) -> RanksLost:
    where = "see what it said before" if handle.pid is not None else "see what `lmtool serve ranks` said there"
    return RanksLost(f"{handle.name} has ended", where)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
