"""The other ranks of an engine: a process each, told every step that the first one launches, so that all launch the
same. Knows no scheduling.

They run on this machine, and on those of `EngineConfig.rank_hosts`. A rank that dies takes the engine along, and all
the others with it (`rank_watch.py`).
"""

import logging
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from msgspec.structs import replace

from lmtool.config import EngineConfig
from lmtool.engine.batch import Batch, Load
from lmtool.engine.rank_group import address_towards, device_of, file_store, join_group, open_store
from lmtool.engine.rank_key import connect, key_here
from lmtool.engine.rank_start import RankHandle, model_digest
from lmtool.engine.rank_watch import RankWatch
from lmtool.engine.rank_wire import Copy, Landed, Launch, RankOrders, ToRank
from lmtool.errors import ConfigError
from lmtool.layers.group import TorchGroup
from lmtool.models.config import ModelConfig

_log = logging.getLogger(__name__)


class Ranks:
    """All but the first, which is this process. watch: what they say. Close it with the engine."""

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
        if torch.distributed.is_initialized():
            raise ConfigError("--tp: this process has an engine of several ranks already", "close that one first")
        num_cards = config.tp // config.num_machines
        here = device_of(0, num_cards, device, config.tp)
        self._number = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lmtool-ranks-")
        self.watch = RankWatch(config.tp)
        orders = RankOrders(
            rank=0,
            size=config.tp,
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
            self.group = self._start(orders, config.rank_hosts, here)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ the start
    def _start(self, orders: RankOrders, hosts: Sequence[str], device: torch.device) -> TorchGroup:
        with ExitStack() as unused:
            connections = _connect(hosts, orders.num_cards, unused)
            if connections:
                address = address_towards(connections, hosts)
                store, port = open_store(address)
                digest = model_digest(Path(orders.path)) if orders.path is not None else None
                orders = replace(orders, store=(address, port), digest=digest)
            else:
                address, store = None, file_store(Path(str(orders.store)), orders.size)
            for rank in range(1, orders.size):
                name, own = f"rank {rank} of {orders.size}", replace(orders, rank=rank, card=rank % orders.num_cards)
                if rank < orders.num_cards:
                    handle = RankHandle.here(name, own)
                else:
                    host = hosts[rank // orders.num_cards - 1]
                    handle = RankHandle.there(f"{name}, on {host},", own, connections[rank - orders.num_cards])
                self.watch.hold(rank, handle)
            unused.pop_all()
        self.watch.wait_until_arrived()
        return self.watch.join(partial(join_group, store, 0, orders.size, device, address))

    # ------------------------------------------------------------------ what they are told
    def launch(self, batch: Batch) -> int:
        """Have them launch this step, too; its number. Raises what ended one of them, as `RankWatch.check` does."""
        self._number += 1
        self._tell(Launch(self._number, batch))
        return self._number

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        """Have them copy their parts of these blocks. Raises as `launch` does."""
        self._tell(Copy(list(saves), list(loads)))

    def landed(self, numbers: Sequence[int]) -> None:
        """These loads are over here: the others wait for theirs before they go on. Raises as `launch` does."""
        self._tell(Landed(list(numbers)))

    def _tell(self, message: ToRank) -> None:
        self.watch.check()
        frame = self.watch.handles[0].frames.codec.encode(message)
        for handle in self.watch.handles:
            try:
                handle.frames.connection.sendall(frame)
            except OSError:
                self.watch.lose(handle.ended())
                self.watch.check()

    def close(self) -> None:
        """May be called twice."""
        self.watch.close()
        self._folder.cleanup()


def _connect(hosts: Sequence[str], num_cards: int, stack: ExitStack) -> list[socket.socket]:
    """One for each rank that another machine has."""
    if not hosts:
        return []
    key = key_here()
    return [stack.enter_context(connect(host, key)) for host in hosts for _ in range(num_cards)]
