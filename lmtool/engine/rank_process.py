"""A rank that is not the first: `python -m lmtool.engine.rank_process`, started by `Ranks` with its orders on stdin.

It loads its part, then launches whatever it is told, and reads nothing of what comes out: all ranks choose the same
tokens. It ends when the first one does.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from lmtool import log
from lmtool.config import EngineConfig
from lmtool.engine.executor import Runner
from lmtool.engine.frames import Frames
from lmtool.engine.rank_group import device_of, file_store, find_store, join_group
from lmtool.engine.rank_voice import Voice
from lmtool.engine.rank_wire import Arrived, Copy, Failed, Landed, Launch, RankOrders, Ready, Refused, ToRank
from lmtool.engine.setup import load_rank
from lmtool.errors import LmtoolError
from lmtool.models.config import ModelConfig

_log = logging.getLogger("lmtool.engine.rank_process")  # run as a program, its __name__ is another


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the first rank decides
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankOrders)
    log.setup()
    if orders.verbose:
        log.be_verbose()
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    frames = Frames(socket.socket(fileno=orders.socket_fd), ToRank)
    voice = Voice(frames)
    try:
        runner = _load(orders, frames.connection, voice)
    except LmtoolError as error:
        voice.say(Refused(type(error).__name__, error.cause, error.fix))
        return error.exit_code
    except Exception as error:
        _log.debug("rank %d cannot start", orders.rank, exc_info=error)
        voice.say(Refused("EngineError", f"rank {orders.rank} cannot start: {type(error).__name__}: {error}"))
        return 1
    with contextlib.suppress(EOFError, OSError):  # or the first rank's machine is gone
        voice.say(Ready())
        _serve(runner, frames, voice)
    os._exit(0)  # work that waits for the other ranks is on the device: nobody waits for it


def _load(orders: RankOrders, connection: socket.socket, voice: Voice) -> Runner:
    device = device_of(orders.card, orders.num_cards, torch.device(orders.device), orders.size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, address = _meeting(orders, connection)
    voice.say(Arrived())
    group = join_group(store, orders.rank, orders.size, device, address)
    config = EngineConfig(**orders.engine)
    model = msgspec.convert(orders.shape, ModelConfig) if orders.shape is not None else None
    return load_rank(
        config,
        device,
        group,
        path=Path(orders.path) if orders.path else None,
        shape=model,
        group_size=orders.group_size,
    )


def _meeting(orders: RankOrders, connection: socket.socket) -> tuple[Store, str | None]:
    """Where the ranks meet, and by which of its addresses this machine does, where there are several."""
    if isinstance(orders.store, str):
        return file_store(Path(orders.store), orders.size), None
    first, port = orders.store
    is_first_machine = connection.family == socket.AF_UNIX
    return find_store(first, port), first if is_first_machine else str(connection.getsockname()[0])


def _serve(runner: Runner, frames: Frames, voice: Voice) -> None:
    while True:
        told: ToRank = frames.receive()
        try:
            _do(runner, told)
        except Exception as error:  # the first rank had the same, or it will hear of this
            number = told.number if isinstance(told, Launch) else 0
            _log.debug("step %d failed", number, exc_info=error)
            voice.say(Failed(number, f"{type(error).__name__}: {error}"))
        if isinstance(told, Launch):
            voice.number = told.number


def _do(runner: Runner, told: ToRank) -> None:
    if isinstance(told, Launch):
        runner.launch(told.batch)
    elif isinstance(told, Copy):
        runner.copy(told.saves, told.loads)
    elif isinstance(told, Landed):
        runner.await_loads(told.numbers)


def _end_with_the_first() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
